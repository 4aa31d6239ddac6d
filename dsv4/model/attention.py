"""Attention of one layer: low-rank queries, a shared key-value head, and what the layer's kind adds (report 2.3).

A window layer sees its last W tokens. A CSA layer adds the compressed entries its indexer picks, an HCA
layer all of its far fewer ones. The rotation is undone on the output, since keys double as values.
"""

from __future__ import annotations

import torch
from torch import nn

from dsv4.config.model import RATIO, LayerKind, ModelConfig
from dsv4.model import cached
from dsv4.model.cache import LayerCache
from dsv4.model.call import Call
from dsv4.model.linear import Linear, Norm, of_sequences
from dsv4.model.record import IndexerRequest, LayerRecord
from dsv4.model.state import CompressorState, LayerState
from dsv4.model.study import Attended, Projection, study
from dsv4.ops import compress, index
from dsv4.ops.attend import Entries, attend
from dsv4.ops.backend import Backend
from dsv4.ops.linear import linear_groups
from dsv4.ops.lowbit import round_entries
from dsv4.ops.rmsnorm import rmsnorm
from dsv4.ops.rope import rotate, rotate_normed, rotate_unit


class Compressor(nn.Module):
    """Projections, position bias and norm that turn tokens into entries of ``width`` channels.

    Pooling runs in float32; entries return in the dtype of the activations, normalised and rotated to the
    position of their block's first token.
    """

    def __init__(
        self, config: ModelConfig, kind: LayerKind, width: int, dtype: torch.dtype, *, is_index: bool = False
    ) -> None:
        super().__init__()
        self.kind: LayerKind = kind
        self.is_index, self.rotary_dims = is_index, config.attention.rotary_dims
        self.overlap = kind == "csa"
        self.eps = config.norm_eps
        projected = 2 * width if self.overlap else width
        self.wkv = Linear(config.hidden_size, projected, dtype)
        self.wgate = Linear(config.hidden_size, projected, dtype)
        self.ape = nn.Parameter(torch.empty(RATIO[kind], projected, dtype=torch.float32))
        self.norm = Norm(width, dtype)

    def forward(self, x: torch.Tensor, call: Call, state: CompressorState | None) -> torch.Tensor:
        """x: [B, T, D]; returns all entries so far, [B, C, width]."""
        kv, gate = self.wkv.wide(x, call.backend), self.wgate.wide(x, call.backend)  # [B, T, E] float32
        blocks = call.rows.blocks[RATIO[self.kind]]
        if blocks.tokens is not None:
            row = torch.arange(x.shape[0], device=x.device)[:, None, None]
            return compress.entries(
                kv[row, blocks.tokens],  # [B, C, m, E]
                gate[row, blocks.tokens],
                self.ape,
                self.norm.weight,
                *call.entry_rotation[self.kind],
                overlap=self.overlap,
                eps=self.eps,
                dtype=x.dtype,
                is_first=blocks.is_first,
                is_index=self.is_index,
                rounds=call.rounds,
                backend=call.backend,
            )
        tail = None if state is None else state.tail
        pooled, tail = compress.compress(kv, gate, self.ape, overlap=self.overlap, tail=tail, backend=call.backend)
        if state is not None:
            state.tail = compress.Tail(tail.kv.detach().clone(), tail.gate.detach().clone())
        rotation = call.entry_rotation[self.kind]
        entries = rotate_normed(pooled.to(x.dtype), self.norm.weight, *rotation, self.eps, backend=call.backend)
        if call.rounds:
            entries = round_entries(entries, self.rotary_dims, is_index=self.is_index, backend=call.backend)
        return entries if state is None else state.entries.extend(entries)


class Indexer(nn.Module):
    """The lightning indexer of a CSA layer: its own queries, keys and head weights (equations 13 to 17)."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        i = config.indexer
        self.num_heads, self.head_dim, self.top_k = i.num_heads, i.head_dim, i.top_k
        self.wq_b = Linear(config.attention.q_rank, i.num_heads * i.head_dim, dtype)
        self.weights_proj = Linear(config.hidden_size, i.num_heads, dtype)
        self.compressor = Compressor(config, "csa", i.head_dim, dtype, is_index=True)

    def forward(
        self, x: torch.Tensor, q_low: torch.Tensor, call: Call, state: CompressorState | None, queries: slice
    ) -> Projection:
        """Project ``queries`` of the tokens x [B, T, D] and q_low [B, T, Q], and all entries."""
        cos, sin = call.token_rotation["csa"]
        q = self.wq_b(q_low[:, queries], call.backend).unflatten(-1, (self.num_heads, self.head_dim))  # [B, T, I, J]
        q = rotate(q, cos[:, queries], sin[:, queries], backend=call.backend)
        if call.rounds:
            q = round_entries(q, 0, is_index=True, backend=call.backend)
        keys = self.compressor(x, call, state)
        scale = self.head_dim**-0.5 * self.num_heads**-0.5
        return Projection(q, keys, self.weights_proj(x[:, queries], call.backend) * scale)

    def select(self, projection: Projection, call: Call) -> torch.Tensor:
        """Return the entries that all queries pick, [B, T, P] int64."""
        blocks = call.rows.blocks[RATIO["csa"]]
        return index.select(*projection, blocks.begin, blocks.end, self.top_k, backend=call.backend)


class Attention(nn.Module):
    """One attention layer of any kind."""

    def __init__(self, config: ModelConfig, kind: LayerKind, dtype: torch.dtype) -> None:
        super().__init__()
        a = config.attention
        self.kind: LayerKind = kind
        self.eps = config.norm_eps
        self.num_heads, self.head_dim, self.window = a.num_heads, a.head_dim, a.window
        self.groups = a.o_groups
        self.wq_a = Linear(config.hidden_size, a.q_rank, dtype)
        self.q_norm = Norm(a.q_rank, dtype)
        self.wq_b = Linear(a.q_rank, a.num_heads * a.head_dim, dtype)
        self.wkv = Linear(config.hidden_size, a.head_dim, dtype)
        self.kv_norm = Norm(a.head_dim, dtype)
        self.attn_sink = nn.Parameter(torch.empty(a.num_heads, dtype=torch.float32))
        self.wo_a = Linear(a.group_dim, a.o_groups * a.o_rank, dtype)
        self.wo_b = Linear(a.o_groups * a.o_rank, config.hidden_size, dtype)
        if kind != "window":
            self.compressor = Compressor(config, kind, a.head_dim, dtype)
        if kind == "csa":
            self.indexer = Indexer(config, dtype)

    def forward(
        self, x: torch.Tensor, call: Call, state: LayerState | LayerCache | None, record: LayerRecord | None
    ) -> torch.Tensor:
        """x: [B, T, D], normalised; returns [B, T, D]."""
        if isinstance(state, LayerCache):
            return cached.attention(self, x, call, state)
        rotation = call.token_rotation[self.kind]
        q_low = rmsnorm(self.wq_a(x, call.backend), self.q_norm.weight, self.eps, backend=call.backend)  # [B, T, Q]
        q = self.wq_b(q_low, call.backend).unflatten(-1, (self.num_heads, self.head_dim))  # [B, T, H, K]
        q = rotate_unit(q, *rotation, self.eps, backend=call.backend)
        kv = rotate_normed(
            self.wkv(x, call.backend),
            self.kv_norm.weight,
            *rotation,
            self.eps,
            rounds=call.rounds,
            backend=call.backend,
        )  # [B, T, K]
        source = kv if state is None else state.extend_window(kv)
        request = record.indexer if record is not None and self.kind == "csa" else None
        entries, measured = self._entries(x, q_low, call, state, request)
        scale = self.head_dim**-0.5
        out, log_sum_exp = attend(
            q,
            source,
            self.attn_sink,
            call.rows.raw_begin,
            entries,
            window=self.window,
            scale=scale,
            backend=call.backend,
        )
        if record is not None and request is not None:
            assert entries is not None
            assert measured is not None
            attended = Attended(q, entries, log_sum_exp, scale)
            blocks, top_k = call.rows.blocks[RATIO["csa"]], self.indexer.top_k
            record.indexed = study(request, measured, attended, blocks, top_k, backend=call.backend)
        out = rotate(out, *rotation, inverse=True, backend=call.backend)
        return self.wo_b(self._project_groups(out, call.backend), call.backend)

    def _project_groups(self, out: torch.Tensor, backend: Backend) -> torch.Tensor:
        """Map each group of heads by its own part of wo_a: [B, T, H, K] -> [B, T, G * O]."""
        grouped = out.reshape(-1, self.groups, self.num_heads // self.groups * self.head_dim)  # [B * T, G, H K / G]
        wo_a = self.wo_a.matrix(out.dtype, backend).unflatten(0, (self.groups, -1))  # [G, O, H K / G]
        return linear_groups(grouped, wo_a, backend=of_sequences(backend)).view(*out.shape[:2], -1)

    def _entries(
        self,
        x: torch.Tensor,
        q_low: torch.Tensor,
        call: Call,
        state: LayerState | None,
        request: IndexerRequest | None,
    ) -> tuple[Entries | None, Projection | None]:
        """Return what the queries see and, for a request, the indexer's projection of its measured queries."""
        if self.kind == "window":
            return None, None
        picked, projection = None, self._index(x, q_low, call, state, request)
        if projection is not None and not call.dense:
            picked = self.indexer.select(projection, call)
            projection = None if request is None else projection.at(request.measured)
        values = self.compressor(x, call, None if state is None else state.compressor)
        if picked is not None:
            return Entries(values, picked=picked), projection
        blocks = call.rows.blocks[RATIO[self.kind]]
        return Entries(values, begin=blocks.begin, end=blocks.end), projection

    def _index(
        self,
        x: torch.Tensor,
        q_low: torch.Tensor,
        call: Call,
        state: LayerState | None,
        request: IndexerRequest | None,
    ) -> Projection | None:
        """Project the indexer where anything needs it: a choice, a state that keeps its keys, or a request.

        The language-model loss trains the main attention and never reaches the indexer. The indexer's own loss
        stops at the indexer's inputs.
        """
        if self.kind != "csa" or (call.dense and state is None and request is None):
            return None
        learns = torch.is_grad_enabled() and request is not None and request.learn
        queries = request.measured if request is not None and call.dense else slice(None)
        keys = None if state is None else state.indexer
        with torch.set_grad_enabled(learns):
            return self.indexer(x.detach(), q_low.detach(), call, keys, queries)
