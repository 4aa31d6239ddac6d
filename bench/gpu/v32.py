"""A layer shaped like one of DeepSeek-V3.2, to measure V4's beside: inference over a cache, random weights.

It is written here after the published config and descriptions, as a yardstick for time and bytes; it loads no
checkpoint and does not train. Multi-head latent attention keeps one latent vector (512 channels, normalised) and one
rotary key (64) of a token. The up-projection of keys is absorbed into the query and that of values into the output, so
that 128 heads attend to rows of 576 channels. A lightning indexer (64 heads of 128) scores every earlier token and
keeps the best; a token sees 2048 with itself. Then come 256 experts, 8 of them for a token, and a shared one; the first
three layers have one wide SwiGLU instead. Plain residuals, one normalisation before each half.

It takes the operations that V4's layers take, by the same backend: ``attend_paged`` and ``select_paged`` over pages,
``write_ring_`` and ``pack_index`` to store, ``experts_with_shared``, ``route``, ``linear``, ``linear_groups``,
``rmsnorm`` and ``rotate``. Plain torch is the rest: the layer norm of the indexer's keys, sums, and where a key lies in
its page. To those operations an entry of V4 stands for 4 tokens, and here for one, so tokens are told to them at four
times their position; and V4's window is here the token alone, which stands for its own row. So that V3.2 does not
suffer from an operation made for V4, attention can also be torch's: picked rows gathered, two products and a softmax.
Where both are measured, the faster is V3.2's time.

What differs from V3.2, and to whose advantage:

- Rows are stored as V4's are here: the latent in E4M3 with a scale for 64 channels, 648 bytes, and the indexer's keys
  in E2M1, 68; published are 656 and, in E4M3, 132. So 716 bytes are read where V3.2 reads 788: V3.2 looks faster.
- The values of a row are its first 512 channels; ``attend_paged`` adds up all 576: 6 % more of attention's operations;
  torch's way does not.
- A token's own row is read apart from the others', as a window of one: at most 1 more of 33 tiles of keys.
- The router's affinity is V4's root of a softplus, not a sigmoid, and there are no groups of experts: no difference.
- Matrices are in bfloat16, as V4's are here; V3.2's are published in FP8.
- Left out: the Hadamard transform and FP8 rounding of the indexer's queries and keys (V4's layers here leave theirs out
  too), the amplitude of YaRN in the softmax's scale, and the prediction block.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Literal, get_args

import torch
import torch.nn.functional as F

from bench.gpu.layers_v4 import PAGES_AT_ONCE, Chunk, Run, random_keys_, random_rows, replayed
from dsv4.accounting.v32 import V32Config
from dsv4.ops import rope
from dsv4.ops.attend.paged import attend_paged, write_ring_
from dsv4.ops.backend import Backend, triton_kernel
from dsv4.ops.experts import experts_with_shared, swiglu
from dsv4.ops.experts.store import Matrices
from dsv4.ops.index.paged import PAGE_ENTRIES, RATIO, select_paged
from dsv4.ops.linear import linear, linear_groups, linears
from dsv4.ops.places import Places
from dsv4.ops.rmsnorm import rmsnorm
from dsv4.ops.route import route
from dsv4.ops.rows import RowFormat, index_row_bytes, row_bytes, unpack
from dsv4.ops.rows.formats import index_places
from dsv4.ops.rows.portable import pack_index

ROUTED_SCALE = 2.5
THETA, FACTOR, ORIGINAL_CONTEXT = 10000.0, 40.0, 4096.0  # of rotations
EPS = 1e-6
NO_LIMIT = 1e30  # V3.2 does not clamp its SwiGLU
NO_SINK = -1e4  # of a softmax without one: exp of it is 0
KINDS = ("experts", "dense")
GATHERED_HELD = 1 << 26  # channels of picked rows that torch's attention gathers at a time, elements

Way = Literal["operation", "torch"]
"""How picked rows are attended to: by ``attend_paged``, or by torch's own products."""


def layers_of(config: V32Config) -> dict[str, int]:
    """How many layers of each kind the model has."""
    return {"experts": config.num_moe_layers, "dense": config.num_dense_layers}


class V32Cache:
    """One layer's rows and indexer keys of ``num_slots`` sequences of up to ``context`` tokens.

    latent: [num_slots * n, 32, bytes] uint8, the pages of a slot one after another; keys: the same of the indexer.
    table: [num_slots, n] int32. Raises ``ValueError`` for a context that is no multiple of 32, the tokens of a page.
    """

    def __init__(
        self, config: V32Config, *, num_slots: int, context: int, row_format: RowFormat, device: torch.device
    ) -> None:
        if context < 1 or context % PAGE_ENTRIES:
            raise ValueError(f"context is {context}; expected a multiple of {PAGE_ENTRIES}, at least one")
        self.row_format: RowFormat = row_format
        num_pages = num_slots * context // PAGE_ENTRIES
        row = row_bytes(row_format, config.kv_rank + config.rotary_dims, config.rotary_dims)
        key = index_row_bytes(row_format, config.index_head_dim)
        empty = partial(torch.zeros, dtype=torch.uint8, device=device)
        self.latent, self.keys = empty(num_pages, PAGE_ENTRIES, row), empty(num_pages, PAGE_ENTRIES, key)
        self.no_ring = empty(num_slots, 1, row)  # a window of one token reads none
        self.table = torch.arange(num_pages, dtype=torch.int32, device=device).view(num_slots, -1)
        self.where = index_places(row_format, config.index_head_dim, PAGE_ENTRIES).to(device)  # [32, bytes]

    def bytes_per_token(self) -> float:
        """Return what a token of context adds, in bytes."""
        return (self.latent.nbytes + self.keys.nbytes) / (len(self.latent) * PAGE_ENTRIES)

    def places(self, slot: torch.Tensor, position: torch.Tensor, first: torch.Tensor) -> Places:
        """Return the places of a step's tokens, all [T] int32: see ``dsv4.ops.places.Places``."""
        return Places(slot, position, first, self.table, {})


class V32Layer:
    """One layer, tokens [T, D] in and out, its weights drawn on ``device``.

    kind: ``experts`` or ``dense``. attention: the way it is computed, which may be set anew. Raises ``ValueError`` for
    other kinds and ways.
    """

    def __init__(
        self,
        config: V32Config,
        kind: str,
        *,
        dtype: torch.dtype,
        device: torch.device,
        backend: Backend,
        attention: Way = "operation",
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r}; expected one of {', '.join(KINDS)}")
        if attention not in get_args(Way):
            raise ValueError(f"attention is {attention!r}; expected one of {', '.join(get_args(Way))}")
        self.config, self.kind, self.dtype = config, kind, dtype
        self.attention: Way = attention
        self.backend: Backend = backend
        c, matrix = config, partial(_matrix, dtype=dtype, device=device)
        D, H, latent = c.hidden_size, c.num_heads, c.kv_rank + c.rotary_dims
        self.wq_a, self.wkv = matrix(c.q_rank, D), matrix(latent, D)
        self.wq_b = matrix(H * (c.nope_dims + c.rotary_dims), c.q_rank)
        self.key_up = matrix(H, c.kv_rank, c.nope_dims)  # absorbed: each head's query to the latent's channels
        self.value_up = matrix(H, c.value_dims, c.kv_rank)
        self.wo = matrix(D, H * c.value_dims)
        self.index_q = matrix(c.index_heads * c.index_head_dim, c.q_rank)
        self.index_k, self.index_weights = matrix(c.index_head_dim, D), matrix(c.index_heads, D)
        ones = partial(torch.ones, dtype=dtype, device=device)
        self.attn_norm, self.ffn_norm, self.q_norm, self.kv_norm = ones(D), ones(D), ones(c.q_rank), ones(c.kv_rank)
        self.sink = torch.full((H,), NO_SINK, device=device)
        self.frequencies = rope.frequencies(
            c.rotary_dims, THETA, factor=FACTOR, original_context=ORIGINAL_CONTEXT
        ).to(device)  # fmt: skip
        width = c.dense_dim if kind == "dense" else c.expert_dim * c.num_shared_experts
        self.shared = Matrices((matrix(width, D), matrix(D, width), matrix(width, D)))
        if kind == "experts":
            E, wide = c.num_experts, c.expert_dim
            self.gate, self.bias = matrix(E, D), torch.zeros(E, device=device)
            self.routed = Matrices((matrix(E, wide, D), matrix(E, D, wide), matrix(E, wide, D)))

    def new_cache(self, num_slots: int, context: int, row_format: RowFormat = "packed") -> V32Cache:
        """Return an empty cache of this layer."""
        c = self.config
        return V32Cache(c, num_slots=num_slots, context=context, row_format=row_format, device=self.sink.device)

    @torch.inference_mode()
    def step(self, x: torch.Tensor, cache: V32Cache, places: Places) -> torch.Tensor:
        """Advance the sequences whose tokens ``places`` places: x [T, D] in, the same out. The cache takes them in."""
        x = x + self.attend(rmsnorm(x, self.attn_norm, EPS, backend=self.backend), cache, places)
        return x + self.feed_forward(rmsnorm(x, self.ffn_norm, EPS, backend=self.backend))

    def attend(self, x: torch.Tensor, cache: V32Cache, places: Places) -> torch.Tensor:
        """x: [T, D], normalised; returns [T, D]."""
        c, backend = self.config, self.backend
        rotation = rope.angles(places.position[None], self.frequencies, backend=backend)
        maps = [self.wq_a, self.wkv, self.index_k, self.index_weights]
        q_low, kv, key, weights = linears(x, maps, wide=[False] * 4, backend=backend)
        q_low = rmsnorm(q_low, self.q_norm, EPS, backend=backend)
        q, index_q = linears(q_low, [self.wq_b, self.index_q], wide=[False] * 2, backend=backend)

        latent = rmsnorm(kv[:, : c.kv_rank].contiguous(), self.kv_norm, EPS, backend=backend)
        kv = rope.rotate(torch.cat([latent, kv[:, c.kv_rank :]], dim=1)[None], *rotation, backend=backend)[0]  # [T, K]
        key = rope.rotate(F.layer_norm(key, key.shape[1:])[None], *rotation, backend=backend)[0]  # [T, J]
        self._store(kv, key, cache, places)

        index_q = index_q.view(1, -1, c.index_heads, c.index_head_dim)
        index_q = rope.rotate(index_q, *rotation, backend=backend)[0]  # [T, I, J]
        weights = weights * (c.index_head_dim * c.index_heads) ** -0.5
        # The first (position + 1) // RATIO entries are seen: the tokens before this one, and below with this one.
        before = places._replace(position=places.position * RATIO - 1)
        picked = select_paged(
            index_q, weights, cache.keys, before, c.index_top_k - 1, row_format=cache.row_format, backend=backend
        )
        q = q.view(1, -1, c.num_heads, c.nope_dims + c.rotary_dims)
        plain, rotary = rope.rotate(q, *rotation, backend=backend)[0].split([c.nope_dims, c.rotary_dims], dim=-1)
        absorbed = linear_groups(plain, self.key_up, backend=backend).view(*plain.shape[:2], -1)  # [T, H, latent]
        attend = self._attend_by_operation if self.attention == "operation" else self._attend_by_torch
        out = attend(torch.cat([absorbed, rotary], dim=-1), kv, picked, cache, places)
        return linear(linear_groups(out, self.value_up, backend=backend), self.wo, backend=backend)

    @property
    def scale(self) -> float:
        """Of scores."""
        return (self.config.nope_dims + self.config.rotary_dims) ** -0.5

    def _attend_by_operation(
        self, q: torch.Tensor, kv: torch.Tensor, picked: torch.Tensor, cache: V32Cache, places: Places
    ) -> torch.Tensor:
        """q: [T, H, K]; kv: [T, K], the tokens' own rows; picked: [T, P], of those before. Returns [T, H, kv_rank]."""
        c = self.config
        out = attend_paged(
            q, kv, self.sink, cache.no_ring, places._replace(position=places.position * RATIO + RATIO - 1),
            pages=cache.latent, picked=picked, window=1, ratio=RATIO, row_format=cache.row_format,
            rotary_dims=c.rotary_dims, scale=self.scale, backend=self.backend,
        )  # fmt: skip
        return out[..., : c.kv_rank]

    def _attend_by_torch(
        self, q: torch.Tensor, kv: torch.Tensor, picked: torch.Tensor, cache: V32Cache, places: Places
    ) -> torch.Tensor:
        """The same; the tokens' own rows are in the cache already."""
        c, (T, H, K) = self.config, q.shape
        picked = torch.cat([places.position[:, None], picked], dim=1)  # [T, P + 1]
        out = q.new_empty(T, H, c.kv_rank)
        step = max(1, GATHERED_HELD // (picked.shape[1] * K))
        for first in range(0, T, step):
            at = slice(first, first + step)
            entry = picked[at].clamp(min=0).long()
            page = places.table[places.slot[at, None].long(), entry // PAGE_ENTRIES].long()
            rows = cache.latent.flatten(0, 1)[page * PAGE_ENTRIES + entry % PAGE_ENTRIES]  # [t, P + 1, bytes]
            values = unpack(
                rows, row_format=cache.row_format, channels=K, rotary_dims=c.rotary_dims, dtype=q.dtype,
                backend=self.backend,
            )  # fmt: skip
            scores = torch.bmm(q[at] * self.scale, values.transpose(1, 2)).float()  # [t, H, P + 1]
            weights = scores.masked_fill_(picked[at, None] < 0, -torch.inf).softmax(dim=-1)
            out[at] = torch.bmm(weights.to(q.dtype), values[..., : c.kv_rank])
        return out

    def _store(self, kv: torch.Tensor, key: torch.Tensor, cache: V32Cache, places: Places) -> None:
        """Put the step's rows and keys where they are read: the pages of a slot lie together, as a ring of them all."""
        lying = cache.latent.view(len(cache.table), -1, cache.latent.shape[2])
        write_ring_(
            kv, lying, places, row_format=cache.row_format, rotary_dims=self.config.rotary_dims, backend=self.backend
        )
        pack = triton_kernel(self.backend, "rows.triton:pack_index") or pack_index
        position = places.position.long()
        page = places.table[places.slot.long(), position // PAGE_ENTRIES].long()
        cache.keys.flatten(1)[page[:, None], cache.where[position % PAGE_ENTRIES]] = pack(key, cache.row_format)

    def feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [T, D], normalised; returns [T, D]."""
        if self.kind == "dense":
            w1, w2, w3 = self.shared.parts
            gate, up = linears(x, [w1, w3], wide=[False] * 2, backend=self.backend)
            return linear(swiglu(gate, up, NO_LIMIT, backend=self.backend), w2, backend=self.backend)
        logits = linear(x, self.gate, wide=True, backend=self.backend)
        chosen, weights = route(
            logits, self.bias, None, self.config.experts_per_token, ROUTED_SCALE, backend=self.backend
        )
        return experts_with_shared(x, chosen, weights, self.routed, self.shared, NO_LIMIT, backend=self.backend)


def _matrix(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Draw a matrix, or a stack of them, that keeps the size of what passes through it; one matrix at a time."""
    weight = torch.empty(*shape, dtype=dtype, device=device)
    for part in weight.view(-1, *shape[-2:]):
        part.normal_(std=1 / math.sqrt(shape[-1]))
    return weight


class V32Work:
    """What a layer can be asked to do to be measured, as ``layers_v4.V4Layer`` is."""

    def __init__(self, layer: V32Layer) -> None:
        self.layer, self.device = layer, layer.sink.device

    def prefill(self, tokens: int, chunk: int) -> tuple[Chunk, dict[str, float]]:
        """Return what runs a prompt's chunk over a cache for all of it, and what the cache weighs."""
        cache, x = self.layer.new_cache(1, tokens), self._tokens(tokens)
        position = torch.arange(tokens, dtype=torch.int32, device=self.device)
        nothing = torch.zeros_like(position)

        def run(begin: int) -> torch.Tensor:
            now = slice(begin, begin + chunk)
            places = cache.places(nothing[now], position[now], nothing[now])
            return self.layer.step(x[now], cache, places)

        return run, weight_of(cache)

    def decode(self, context: int, batch: int) -> tuple[Run, dict[str, float]]:
        """Return a step of a token of each of ``batch`` sequences of ``context`` tokens, and what the cache weighs."""
        cache, x = self.layer.new_cache(batch, context), self._tokens(batch)
        fill_(cache, self.layer)
        slot = torch.arange(batch, dtype=torch.int32, device=self.device)
        places = cache.places(slot, context - 1 - slot, slot)
        return replayed(lambda _, given: self.layer.step(given, cache, places), x, self.device), weight_of(cache)

    def _tokens(self, count: int) -> torch.Tensor:
        return torch.randn(count, self.layer.config.hidden_size, dtype=self.layer.dtype, device=self.device)


def weight_of(cache: V32Cache) -> dict[str, float]:
    """Say in bytes what a token of context adds, and that a sequence holds nothing else."""
    return {"cache_bytes_per_token": cache.bytes_per_token(), "cache_fixed_bytes": 0.0}


@torch.no_grad()
def fill_(cache: V32Cache, layer: V32Layer) -> None:
    """Fill a cache with random rows and keys: pages of the first slot, then copies of them."""
    c, each = layer.config, cache.table.shape[1]
    kind = c.kv_rank + c.rotary_dims, c.rotary_dims, cache.row_format, cache.latent.device, layer.backend
    for first in range(0, each, PAGES_AT_ONCE):
        now = slice(first, min(first + PAGES_AT_ONCE, each))
        latent, keys = cache.latent[now], cache.keys[now]
        latent.copy_(random_rows(latent.shape[:2], *kind))
        random_keys_(keys, c.index_head_dim, cache.row_format, layer.backend)
    for pages in (cache.latent, cache.keys):
        own, *others = pages.split(each)
        for other in others:
            other.copy_(own)
