"""One layer of Flash or Pro as a model of its own, with random weights made where they are used, and its measured work.

The model is a ``Transformer`` of one layer and a tiny vocabulary, in bfloat16, routed by affinity (the first layers of
both models look their experts up by token id, which is a little less work), without the head. What is measured runs as
it does in training and in the engine: a training step is forward and backward over one sequence, the indexer choosing
but not learning; a prompt goes through ``Transformer.step`` in chunks, over an empty cache; a decoding step takes one
token of each sequence, over a cache that was filled with random rows, and on an accelerator it is a replayed graph
where nothing in it waits for the device. Sequence i stands i tokens short of the context, as sequences of a batch close
their blocks at different times; the first one closes its block in this step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from dsv4 import device as devices
from dsv4.config.model import LayerKind, ModelConfig
from dsv4.engine.replay import Replayer
from dsv4.model.cache import Cache, CompressorCache
from dsv4.model.init import GATE, OFF_DIAGONAL
from dsv4.model.transformer import Transformer
from dsv4.ops.backend import Backend
from dsv4.ops.places import PAGE_TOKENS
from dsv4.ops.rows import RowFormat, pack, pack_index, write_index_pages_

VOCABULARY = 512
PAGES_AT_ONCE = 1024  # filled with random rows at a time
ROW_FORMAT: RowFormat = "packed"

Run = Callable[[], object]
Chunk = Callable[[int], object]  # takes the position of a chunk's first token


def one_layer(config: ModelConfig, kind: LayerKind) -> ModelConfig:
    """Return the config of a single layer of this kind."""
    return replace(
        config,
        vocab_size=VOCABULARY,
        layer_kinds=(kind,),
        mtp_kinds=(),
        moe=replace(config.moe, num_hash_layers=0),
        storage="bfloat16",
    )


class V4Layer:
    """A layer of V4 and what it can be asked to do. Weights are drawn on ``device``, matrix by matrix."""

    def __init__(
        self, config: ModelConfig, kind: LayerKind, *, dtype: torch.dtype, device: torch.device, backend: Backend
    ) -> None:
        self.config, self.device = one_layer(config, kind), device
        self.backend: Backend = backend
        with device:
            self.model = Transformer(self.config, weight_dtype=dtype, activation_dtype=dtype, backend=backend)
        draw_(self.model)

    def train(self, tokens: int) -> Run:
        """Return a training step over one sequence; the gradients are dropped after it."""
        ids = self._ids(1, tokens)
        D, N = self.config.hidden_size, self.config.hyper_connections.streams
        grad = torch.randn(1, tokens, N, D, dtype=self.model.activation_dtype, device=self.device)

        def run() -> None:
            streams, _ = self.model.run(ids)
            streams.backward(grad)
            self.model.zero_grad(set_to_none=True)

        return run

    def prefill(self, tokens: int, chunk: int) -> tuple[Chunk, dict[str, float]]:
        """Return what runs a prompt's chunk over a cache for all of it, and what the cache weighs."""
        ids, cache = self._ids(tokens), self._cache(1, tokens)

        @torch.inference_mode()
        def run(begin: int) -> torch.Tensor:
            count = min(chunk, tokens - begin)
            return self.model.step(ids[begin : begin + count], cache, cache.places([(0, begin, count, 0)]))

        return run, weight_of(cache)

    def decode(self, context: int, batch: int) -> tuple[Run, dict[str, float]]:
        """Return a step of a token of each of ``batch`` sequences of ``context`` tokens, and what the cache weighs."""
        cache = self._cache(batch, context)
        fill_(cache, context // PAGE_TOKENS, self.backend)
        shape, numbers = cache.arrange([(i, context - 1 - i, 1, 0) for i in range(batch)], fills=True)
        inputs = torch.cat([self._ids(batch).int(), torch.tensor(numbers, dtype=torch.int32, device=self.device)])

        @torch.inference_mode()
        def step(_: str, given: torch.Tensor) -> torch.Tensor:
            return self.model.step(given[:batch], cache, cache.places_of(shape, given[batch:]))

        return replayed(step, inputs, self.device), weight_of(cache)

    def _ids(self, *shape: int) -> torch.Tensor:
        return torch.randint(0, VOCABULARY, shape, device=self.device)

    def _cache(self, num_slots: int, context: int) -> Cache:
        """An empty cache, the pages of a sequence one after another."""
        if context < 1 or context % PAGE_TOKENS:
            raise ValueError(f"context is {context}; expected a multiple of {PAGE_TOKENS}, at least one")
        pages = context // PAGE_TOKENS
        cache = Cache(
            self.config, num_slots=num_slots, num_pages=num_slots * pages, row_format=ROW_FORMAT, max_context=context,
            device=self.device,
        )  # fmt: skip
        cache.table.copy_(torch.arange(num_slots * pages, device=self.device).view(num_slots, pages))
        return cache


def replayed(step: Callable[[str, torch.Tensor], object], inputs: torch.Tensor, device: torch.device) -> Run:
    """Return ``step`` of these inputs as a decoding engine runs it: as a graph, where it can be one."""
    if not devices.has_graphs(device):
        return lambda: step("step", inputs)
    replay = Replayer(step, 1, device)
    return torch.inference_mode()(lambda: replay("step", inputs))


def weight_of(cache: Cache) -> dict[str, float]:
    """Read off a cache's tensors what a token of context adds, and what a sequence of any length holds, in bytes."""
    pages = sum(c.pages.nbytes for layer in cache.layers for c in layer.compressors())
    return {
        "cache_bytes_per_token": pages / (cache.num_pages * PAGE_TOKENS),
        "cache_fixed_bytes": (cache.num_bytes() - pages) / cache.num_slots,
    }


@torch.no_grad()
def draw_(model: Transformer) -> None:
    """Overwrite all parameters: matrices so that they keep the size of what passes through, the rest as a new model's.

    Stacks are drawn one matrix at a time, so that nothing as large as a stack is held beside it.
    """
    N = model.config.hyper_connections.streams
    for name, parameter in model.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        if leaf == "ape" or "norm" in name or parameter.dim() == 1:
            parameter.fill_(GATE if leaf.endswith("_scale") else 1.0 if "norm" in name else 0.0)
        elif name == "embed.weight":
            parameter.normal_()
        else:
            for part in parameter.view(-1, *parameter.shape[-2:]):
                part.normal_(std=1 / math.sqrt(part.shape[-1]))
        if leaf.endswith("_base"):
            _base_(parameter, N)


def _base_(base: nn.Parameter, N: int) -> None:
    """Reading the mean of the streams, writing to each of them, mixing none: see ``dsv4.model.init``."""
    base[:N] = -math.log(N - 1) if N > 1 else -OFF_DIAGONAL
    if len(base) > N:
        base[2 * N :] = (torch.eye(N, device=base.device) - 1).flatten() * -OFF_DIAGONAL


@torch.no_grad()
def fill_(cache: Cache, pages_each: int, backend: Backend) -> None:
    """Fill a cache with random rows, as if prompts had been taken in: pages of the first slot, then copies of them."""
    a, J = cache.config.attention, cache.config.indexer.head_dim
    kind = a.head_dim, a.rotary_dims, cache.row_format, cache.table.device, backend
    for layer in cache.layers:
        layer.ring.copy_(random_rows(layer.ring.shape[:2], *kind))
        for part in layer.compressors():
            part.kv.normal_()
            part.gate.normal_()
            for first in range(0, pages_each, PAGES_AT_ONCE):
                pages = part.pages[first : min(first + PAGES_AT_ONCE, pages_each)]
                if part is layer.indexer:
                    random_keys_(pages, J, cache.row_format, backend)
                else:
                    pages.copy_(random_rows(pages.shape[:2], *kind))
            _repeat_(part, pages_each)


def _repeat_(part: CompressorCache, pages_each: int) -> None:
    own, *others = part.pages.split(pages_each)
    for other in others:
        other.copy_(own)


def random_rows(
    shape: tuple[int, ...],
    channels: int,
    rotary_dims: int,
    row_format: RowFormat,
    device: torch.device,
    backend: Backend,
) -> torch.Tensor:
    """Return normal numbers as rows, [*shape, bytes] uint8."""
    x = torch.randn(*shape, channels, device=device)
    return pack(x, row_format=row_format, rotary_dims=rotary_dims, backend=backend)


def random_keys_(pages: torch.Tensor, channels: int, row_format: RowFormat, backend: Backend) -> None:
    """Overwrite pages of indexer keys, [n, entries, bytes], with normal numbers."""
    n, entries = pages.shape[:2]
    x = torch.randn(n * entries, channels, device=pages.device)
    rows = pack_index(x, row_format=row_format, backend=backend)
    place = torch.arange(n * entries, device=pages.device)
    write_index_pages_(pages, place // entries, place % entries, rows, row_format=row_format, channels=channels)
