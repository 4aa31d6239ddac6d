"""Checkpoints of random weights at a model's true sizes, as released: to measure with, and to test what reads them.

Each tensor is drawn by a generator of its own, seeded by the seed and the tensor's name in the whole model. So what a
layer holds does not hang on which other layers are written, and one of 43 layers serves where all do not fit. Matrices
are normal with the variance 1 / inputs, which keeps the size of what passes through them, and are rounded to the codes
of the config's storage as weights are; everything else is close to a fresh model's (``dsv4.model.init``).

A number is one of 65,536 quantiles of the normal distribution, the largest 4.32 standard deviations, picked by 16
random bits: faster than drawing from the distribution itself, and the same bytes on every processor.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache, partial

import numpy as np
import torch

from dsv4.accounting.tensors import FP8_BLOCK, TensorSpec
from dsv4.checkpoint.generation import GENERATION, generation_config
from dsv4.checkpoint.stream import Tell, write_stream
from dsv4.checkpoint.tensor_file import DTYPES
from dsv4.config.load import to_released
from dsv4.config.model import ModelConfig
from dsv4.model.init import GATE, OFF_DIAGONAL
from dsv4.ops.backend import resolve
from dsv4.ops.lowbit import quantise_blocks, quantise_fp4

VERSION = 1  # of what a seed gives; another one makes a checkpoint begun before start again

LEVELS = 1 << 16  # quantiles
SMALL = 0.02  # standard deviation of norm weights around 1, and of router biases and position tables around 0
EMBEDDING = 1.0  # standard deviation: a token's vector is about as large as what a layer adds to it
TABLE_ROWS = 4096  # rows of a table of token ids drawn at a time

Drawn = list[tuple[TensorSpec, torch.Tensor]]


def synth_config(config: ModelConfig, layers: Sequence[int] | None = None, *, mtp: bool = False) -> ModelConfig:
    """Return the config of some layers of a model, numbered anew in the order given; ``None`` chooses all.

    All sizes stay. The MTP block is left out unless ``mtp``. Layers routed by token id must come before the others,
    because a config counts them. Raises ``ValueError`` for a choice that is empty, repeats or is not there.
    """
    chosen = _chosen(config, layers)
    for place, layer in enumerate(chosen):
        if layer not in range(config.num_layers):
            raise ValueError(f"layers holds {layer}; expected 0 to {config.num_layers - 1}")
        if layer in chosen[:place]:
            raise ValueError(f"layers holds {layer} twice; expected each layer once")
    if not chosen:
        raise ValueError("layers is empty; expected at least one layer")
    if mtp and not config.mtp_kinds:
        raise ValueError("mtp is True, but the model has no MTP block; expected False")
    is_hash = [config.is_hash_layer(layer) for layer in chosen]
    num_hash_layers = sum(is_hash)
    if not all(is_hash[:num_hash_layers]):
        late = chosen[is_hash.index(True, is_hash.index(False))]
        before = chosen[is_hash.index(False)]
        raise ValueError(
            f"layers holds {before} before {late}; expected layers that are routed by token id, those below "
            f"{config.moe.num_hash_layers}, to come first"
        )
    return replace(
        config,
        layer_kinds=tuple(config.layer_kinds[layer] for layer in chosen),
        mtp_kinds=config.mtp_kinds if mtp else (),
        moe=replace(config.moe, num_hash_layers=num_hash_layers),
    )


def synthesise(
    config: ModelConfig,
    directory: str | os.PathLike[str],
    *,
    layers: Sequence[int] | None = None,
    mtp: bool = False,
    seed: int = 0,
    workers: int = 1,
    tell: Tell = lambda done, total: None,
) -> None:
    """Write random weights of some layers of a model, ``synth_config(config, layers, mtp=mtp)``, in its storage.

    A layer holds the same bytes whatever others are written, and another seed gives others. The directory must be new
    or empty; it appears when it is complete, and what was cut off goes on where it was (``dsv4.checkpoint.stream``).

    workers: how many tensors are drawn at once; one more waits to be written. Each rounds its matrix with torch's
    threads, so more than one of both get in each other's way. tell: is told the bytes written, and all there will be.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}; expected at least 1")
    part = synth_config(config, layers, mtp=mtp)
    chosen = _chosen(config, layers)
    key = json.dumps({"synth": VERSION, "seed": seed, "layers": chosen, "config": to_released(part)})
    files = {GENERATION: generation_config(part)}
    make = partial(_make, part, chosen, seed, workers)
    write_stream(directory, part, make, key=key, files=files, tell=tell)


def _chosen(config: ModelConfig, layers: Sequence[int] | None) -> tuple[int, ...]:
    return tuple(range(config.num_layers)) if layers is None else tuple(layers)


def _make(
    config: ModelConfig, layers: Sequence[int], seed: int, workers: int, specs: Sequence[TensorSpec]
) -> Iterator[tuple[TensorSpec, torch.Tensor]]:
    """Draw tensors in their order, each with its dtype and stored shape, a few ahead of whoever takes them."""
    with ThreadPoolExecutor(workers) as pool:
        drawing: deque[Future[Drawn]] = deque()
        for weight, scale in _with_scales(specs):
            drawing.append(
                pool.submit(_draw, config, _generator(seed, _name_in_whole(weight.name, layers)), weight, scale)
            )
            if len(drawing) > workers:
                yield from drawing.popleft().result()
        while drawing:
            yield from drawing.popleft().result()


def _with_scales(specs: Iterable[TensorSpec]) -> Iterator[tuple[TensorSpec, TensorSpec | None]]:
    """Each tensor with the scale that follows it, if one does."""
    waiting: TensorSpec | None = None
    for spec in specs:
        if spec.role == "scale":
            assert waiting is not None, f"{spec.name} follows no matrix"
            yield waiting, spec
            waiting = None
        else:
            if waiting is not None:
                yield waiting, None
            waiting = spec
    if waiting is not None:
        yield waiting, None


def _name_in_whole(name: str, layers: Sequence[int]) -> str:
    """The name that a tensor has when no layer is left out."""
    if not name.startswith("layers."):
        return name
    start, layer, rest = name.split(".", 2)
    return f"{start}.{layers[int(layer)]}.{rest}"


def _generator(seed: int, name: str) -> np.random.Generator:
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.SFC64(int.from_bytes(digest, "little")))


def _draw(config: ModelConfig, generator: np.random.Generator, spec: TensorSpec, scale: TensorSpec | None) -> Drawn:
    leaf = spec.name.rsplit(".", 1)[-1]
    if leaf.endswith("_fn"):
        return _normal(generator, spec, config.initializer_range)
    if spec.role == "matrix":
        return _normal(generator, spec, spec.logical_shape[-1] ** -0.5, scale)
    if spec.kind == "embedding":
        return _normal(generator, spec, EMBEDDING)
    if leaf in ("ape", "bias"):
        return _normal(generator, spec, SMALL)
    if leaf == "tid2eid":
        return [(spec, _experts(generator, spec.shape[0], config.moe.num_experts, spec.shape[1]))]
    if leaf.endswith("_scale"):
        return [(spec, torch.full(spec.shape, GATE))]
    if leaf.endswith("_base"):
        return [(spec, _stream_base(spec.shape[0], config.hyper_connections.streams))]
    if leaf == "attn_sink":
        return [(spec, torch.zeros(spec.shape))]
    assert "norm" in spec.name, f"no distribution for {spec.name}"
    return _normal(generator, spec, SMALL, mean=1.0)


def _normal(
    generator: np.random.Generator, spec: TensorSpec, spread: float, scale: TensorSpec | None = None, mean: float = 0.0
) -> Drawn:
    """A tensor of normal numbers, in codes if it has a scale, drawn and stored some rows at a time."""
    rows, columns = spec.logical_shape if len(spec.logical_shape) == 2 else (1, spec.logical_shape[0])
    levels = _quantiles() * np.float32(spread) + np.float32(mean)
    specs = [spec] if scale is None else [spec, scale]
    whole = [torch.empty(of.shape, dtype=DTYPES[of.dtype]) for of in specs]
    filled = [0 for _ in specs]
    for first in range(0, rows, FP8_BLOCK):  # whole blocks: no scale waits for rows to come
        shape = min(FP8_BLOCK, rows - first), columns
        bits = generator.integers(0, LEVELS, size=shape, dtype=np.uint16)
        # No bits are out of range; "clip" only keeps numpy from a copy of its own.
        numbers = torch.from_numpy(levels.take(bits, out=np.empty(shape, np.float32), mode="clip"))
        for i, part in enumerate(_stored(numbers, spec, scale)):
            flat = whole[i].view(-1)
            flat[filled[i] : filled[i] + part.numel()] = part.view(-1)
            filled[i] += part.numel()
    assert filled == [one.numel() for one in whole], f"{spec.name}: {filled} numbers of {specs}"
    return list(zip(specs, whole, strict=True))


def _stored(numbers: torch.Tensor, spec: TensorSpec, scale: TensorSpec | None) -> tuple[torch.Tensor, ...]:
    """Some rows of a matrix as they are stored, and their scales."""
    if scale is None:
        return (numbers,)
    backend = resolve("auto", numbers.device)
    if spec.dtype == "I8":
        packed = quantise_fp4(numbers, backend=backend)
    else:
        packed = quantise_blocks(numbers, torch.float32 if scale.dtype == "F32" else torch.uint8, backend=backend)
    scales = packed.scales if scale.dtype == "F32" else packed.scales.view(DTYPES[scale.dtype])
    return packed.codes.view(DTYPES[spec.dtype]), scales


@lru_cache(maxsize=1)
def _quantiles() -> np.ndarray:
    """[LEVELS] float32: the middles of as many equally likely parts of the normal distribution."""
    return torch.special.ndtri((torch.arange(LEVELS, dtype=torch.float64) + 0.5) / LEVELS).float().numpy()


def _experts(generator: np.random.Generator, rows: int, num_experts: int, experts_per_token: int) -> torch.Tensor:
    """[rows, A] int64: distinct experts for each token id, all equally likely."""
    table = torch.empty(rows, experts_per_token, dtype=torch.int64)
    for part in table.split(TABLE_ROWS):
        order = np.broadcast_to(np.arange(num_experts), (len(part), num_experts))
        part.copy_(torch.from_numpy(generator.permuted(order, axis=1)[:, :experts_per_token]))
    return table


def _stream_base(length: int, streams: int) -> torch.Tensor:
    """The base of a mix or, shorter, of the stream head, as in a fresh model: [N + N + N x N] or [N] float32."""
    base = torch.zeros(length)
    base[:streams] = -math.log(streams - 1) if streams > 1 else -OFF_DIAGONAL
    if length > streams:
        base[2 * streams :] = (1 - torch.eye(streams)).flatten() * OFF_DIAGONAL
    return base
