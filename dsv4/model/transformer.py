"""The whole model: embed, expand to streams, blocks, fold, normalise, head; and the MTP block beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from dsv4.config.model import RATIO, LayerKind, ModelConfig
from dsv4.model import rows
from dsv4.model.block import Block
from dsv4.model.cache import Cache
from dsv4.model.call import Call, make_cached_call, make_call
from dsv4.model.expert_pool import ExpertPool
from dsv4.model.linear import Linear, Norm
from dsv4.model.record import LayerRecord, check_records
from dsv4.model.state import State
from dsv4.native.large_pages import prefer_large_pages
from dsv4.ops import mhc
from dsv4.ops.backend import Backend, BackendChoice, check_backend, resolve
from dsv4.ops.linear import linear
from dsv4.ops.lookup import lookup
from dsv4.ops.places import Places
from dsv4.ops.rmsnorm import rmsnorm
from dsv4.ops.shapes import check_range


@dataclass(frozen=True)
class Output:
    """logits: [B, T, V] float32. mtp_logits: [B, T - 1, V] float32 when asked for: position i predicts token i + 2."""

    logits: torch.Tensor
    mtp_logits: torch.Tensor | None = None


class Embedding(nn.Module):
    """weight: [V, D]."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size, dtype=dtype))

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(token_ids, self.weight)


class MTP(Block):
    """The multi-token prediction block: a window layer over the streams joined with the next token.

    It reads the main model's streams before they are folded (all N of them) and shares embedding and head.
    """

    def __init__(self, config: ModelConfig, kind: LayerKind, dtype: torch.dtype) -> None:
        super().__init__(config, kind, is_hash=False, dtype=dtype)
        D, N = config.hidden_size, config.hyper_connections.streams
        self.e_proj, self.h_proj = Linear(D, D, dtype), Linear(D, D, dtype)
        self.enorm, self.hnorm, self.norm = Norm(D, dtype), Norm(D, dtype), Norm(D, dtype)
        _add_head_mix(self, N, D)

    def join(
        self, streams: torch.Tensor, embedded: torch.Tensor, backend: Backend, *, is_step: bool = False
    ) -> torch.Tensor:
        """streams: [B, T, N, D]; embedded: [B, T, D], the next tokens; returns streams [B, T, N, D].

        is_step: of an engine, whose products have an order that hangs on nothing else in the step.
        """
        e = rmsnorm(embedded, self.enorm.weight, self.eps, backend=backend)
        h = rmsnorm(streams, self.hnorm.weight, self.eps, backend=backend)
        if is_step:
            one = linear(e, self.e_proj.weight, backend=backend).unsqueeze(2)  # [1, T, 1, D]
            return one + linear(h, self.h_proj.weight, backend=backend)
        return self.e_proj(e, backend).unsqueeze(2) + self.h_proj(h, backend)


class Transformer(nn.Module):
    """A DeepSeek-V4 model of any size.

    Built with uninitialised parameters: ``dsv4.new_model`` fills them with fresh values, ``dsv4.load_model``
    with a checkpoint's. Matrices, norms and embedding are held in ``weight_dtype``; what the release stores
    in float32 (mixes, sinks, position and routing biases) stays float32. Activations run in
    ``activation_dtype``, the islands the released code computes in float32 excepted.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        weight_dtype: torch.dtype = torch.float32,
        activation_dtype: torch.dtype = torch.float32,
        backend: BackendChoice = "auto",
    ) -> None:
        super().__init__()
        check_backend(backend)
        self.config = config
        self.activation_dtype = activation_dtype
        self.backend: BackendChoice = backend
        self.rounds = False  # of cache rows and the indexer, see ``Call``; set with the maps' in ``precision``
        self.embed = Embedding(config, weight_dtype)
        self.layers = nn.ModuleList(
            Block(config, kind, config.is_hash_layer(layer), weight_dtype)
            for layer, kind in enumerate(config.layer_kinds)
        )
        self.norm = Norm(config.hidden_size, weight_dtype)
        self.head = Linear(config.hidden_size, config.vocab_size, weight_dtype)
        _add_head_mix(self, config.hyper_connections.streams, config.hidden_size)
        self.mtp = nn.ModuleList(MTP(config, kind, weight_dtype) for kind in config.mtp_kinds)
        self.expert_pool: ExpertPool | None = None  # of experts that are no parameters, see expert_store
        prefer_large_pages(self.parameters())

    @property
    def experts_move(self) -> bool:
        """Whether an expert may lie elsewhere in memory at the next step."""
        return self.expert_pool is not None

    def new_state(self, batch_size: int) -> State:
        """Return an empty state for ``batch_size`` sequences."""
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected at least 1")
        return State(self.config, batch_size, owner=self)

    def forward(
        self,
        token_ids: torch.Tensor,
        *,
        state: State | None = None,
        segment_ids: torch.Tensor | None = None,
        mtp: bool = False,
        dense: bool = False,
    ) -> Output:
        """Return next-token logits.

        token_ids: [B, T] int64. state: continue the sequences it holds, and advance it. segment_ids: [B, T]
        int64, runs of equal ids are documents that do not see each other. mtp: also the MTP block's logits.
        dense: CSA layers attend to every visible entry, as training starts out.
        """
        streams, call = self.run(token_ids, state=state, segment_ids=segment_ids, mtp=mtp, dense=dense)
        logits = self.logits(self.hidden(streams))
        if not mtp:
            return Output(logits)
        return Output(logits, self.logits(self.mtp_hidden(streams, call, segment_ids)))

    def run(
        self,
        token_ids: torch.Tensor,
        *,
        state: State | None = None,
        segment_ids: torch.Tensor | None = None,
        mtp: bool = False,
        dense: bool = False,
        records: Sequence[LayerRecord] | None = None,
    ) -> tuple[torch.Tensor, Call]:
        """Return the streams after the last layer, [B, T, N, D], and the call they belong to.

        records: one for each layer, without the MTP block; each steers its layer and is filled in by it.
        """
        self._check(token_ids, state, segment_ids, mtp)
        B, T = token_ids.shape
        if records is not None:
            self._check_records(records, len(self.layers), (B, T), state is not None)
        ratios = sorted({RATIO[kind] for kind in self.config.layer_kinds} - {0})
        if segment_ids is not None:
            places = rows.packed(segment_ids, ratios)
        else:
            places = rows.continued(B, T, state.length if state else 0, ratios, token_ids.device)
        backend = resolve(self.backend, token_ids.device)
        call = make_call(self.config, token_ids, places, backend=backend, dense=dense, rounds=self.rounds)
        embedded = self.embed(token_ids).to(self.activation_dtype)  # [B, T, D]
        streams = embedded.unsqueeze(2).repeat(1, 1, self.config.hyper_connections.streams, 1)  # [B, T, N, D]
        if state is not None:
            state.is_whole = False
        for i, layer in enumerate(self.layers):
            streams = layer(
                streams,
                call,
                None if state is None else state.layers[i],
                None if records is None else records[i],
            )
        if state is not None:
            state.length, state.is_whole = state.length + T, True
        return streams, call

    def step(self, token_ids: torch.Tensor, cache: Cache, places: Places) -> torch.Tensor:
        """Advance sequences of an engine's cache; return the streams after the last layer, [1, T, N, D].

        token_ids: [T] integers, the tokens that ``places`` places. Nothing is checked here: the engine has.
        """
        backend = resolve(self.backend, token_ids.device)
        call = make_cached_call(
            token_ids[None], places, cache.row_format, *cache.frequencies, backend=backend, rounds=self.rounds
        )
        copies = self.config.hyper_connections.streams
        streams = lookup(self.embed.weight, call.token_ids, copies, backend=call.backend)  # [1, T, N, D]
        streams = streams.to(self.activation_dtype)
        for layer, part in zip(self.layers, cache.layers, strict=False):
            streams = layer(streams, call, part, None)
        return streams

    def mtp_step(
        self, streams: torch.Tensor, next_ids: torch.Tensor, cache: Cache, places: Places
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Advance the MTP block: return its streams [1, T, N, D] and what the head reads, [1, T, D].

        streams: [1, T, N, D] of the placed tokens; next_ids: [T] int64, the token after each. Position i predicts
        token i + 2. The streams returned stand in for those of the next tokens when predictions are chained.
        """
        block = self.mtp[0]
        assert isinstance(block, MTP)
        backend = resolve(self.backend, next_ids.device)
        call = make_cached_call(
            next_ids[None], places, cache.row_format, *cache.frequencies, backend=backend, rounds=self.rounds
        )
        joined = block.join(streams, self.embed(call.token_ids).to(self.activation_dtype), backend, is_step=True)
        streams = block(joined, call, cache.layers[len(self.layers)], None)
        return streams, _fold(block, self.config, streams, backend)

    def hidden(self, streams: torch.Tensor) -> torch.Tensor:
        """Fold and normalise the streams: what the head reads, [B, T, D]."""
        return _fold(self, self.config, streams, resolve(self.backend, streams.device))

    def mtp_hidden(
        self,
        streams: torch.Tensor,
        call: Call,
        segment_ids: torch.Tensor | None = None,
        record: LayerRecord | None = None,
    ) -> torch.Tensor:
        """Return what the head reads to predict token i + 2 at position i, [B, T - 1, D].

        Position i joins the streams of token i with the embedding of token i + 1. record: of the MTP block, whose
        call has T - 1 tokens.
        """
        block = self.mtp[0]
        assert isinstance(block, MTP)
        next_ids = call.token_ids[:, 1:]
        B, T = next_ids.shape
        if record is not None:
            self._check_records([record], 1, (B, T), has_state=False)
        places = (
            rows.continued(B, T, 0, (), next_ids.device)
            if segment_ids is None
            else rows.packed(segment_ids[:, :-1], ())
        )
        next_call = make_call(self.config, next_ids, places, backend=call.backend, rounds=self.rounds)
        joined = block.join(streams[:, :-1], self.embed(next_ids).to(self.activation_dtype), call.backend)
        return _fold(block, self.config, block(joined, next_call, None, record), call.backend)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [..., D]; returns [..., V] float32, multiplied in float32."""
        return self.head.wide(hidden, resolve(self.backend, hidden.device))

    def step_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The same for an engine's step, in the fixed order of its kernels: hidden [n, D], returns [n, V] float32."""
        return linear(hidden, self.head.weight, wide=True, backend=resolve(self.backend, hidden.device))

    def _check_records(
        self, records: Sequence[LayerRecord], num_layers: int, tokens: tuple[int, int], has_state: bool
    ) -> None:
        moe = self.config.moe
        check_records(records, num_layers, tokens, (moe.num_experts, moe.experts_per_token), has_state)

    def _check(self, token_ids: torch.Tensor, state: State | None, segment_ids: torch.Tensor | None, mtp: bool) -> None:
        """Refuse anything that cannot be computed, before any of it is."""
        if token_ids.dtype != torch.int64:
            raise ValueError(f"token_ids has dtype {token_ids.dtype}; expected torch.int64")
        if token_ids.dim() != 2 or 0 in token_ids.shape:
            raise ValueError(f"token_ids has shape {list(token_ids.shape)}; expected [B, T] with B and T at least 1")
        V = self.config.vocab_size
        check_range("token_ids", token_ids, V, f"0 <= id < vocab_size = {V}")
        B, T = token_ids.shape
        length = 0
        if state is not None:
            if state.owner is not self:
                raise ValueError("state belongs to another model; expected one made by this model's new_state")
            if not state.is_whole:
                raise ValueError("state was left half advanced by a call that failed; expected a whole one: start anew")
            if state.batch_size != B:
                raise ValueError(f"state holds {state.batch_size} sequences; expected the {B} of token_ids")
            length = state.length
        if length + T > self.config.max_context:
            raise ValueError(
                f"token_ids would bring the sequence to {length + T} tokens; expected at most max_context = "
                f"{self.config.max_context}"
            )
        if segment_ids is not None:
            if state is not None:
                raise ValueError(
                    "segment_ids and state are both given; expected one of them: a state holds one document"
                )
            if segment_ids.dtype != torch.int64 or segment_ids.shape != token_ids.shape:
                raise ValueError(
                    f"segment_ids is {segment_ids.dtype} {list(segment_ids.shape)}; expected torch.int64 {[B, T]}"
                )
        if mtp:
            if len(self.mtp) == 0:
                raise ValueError("mtp is True; expected False: this model has no MTP block")
            if state is not None:
                raise ValueError("mtp and state are both given; expected one of them: MTP needs the whole sequence")
            if T < 2:
                raise ValueError(f"token_ids has {T} token; expected at least 2 with mtp")


def _add_head_mix(module: nn.Module, streams: int, width: int) -> None:
    """Give a module the parameters of a head's fold, under their released names."""
    for name, shape in (("fn", (streams, streams * width)), ("base", (streams,)), ("scale", (1,))):
        module.register_parameter(f"hc_head_{name}", nn.Parameter(torch.empty(shape, dtype=torch.float32)))


def _fold(module: nn.Module, config: ModelConfig, streams: torch.Tensor, backend: Backend) -> torch.Tensor:
    """Fold streams with a module's head mix and normalise with its final norm: [B, T, D]."""
    mix = mhc.Mix(
        module.get_parameter("hc_head_fn"), module.get_parameter("hc_head_base"), module.get_parameter("hc_head_scale")
    )
    norm = module.get_submodule("norm")
    assert isinstance(norm, Norm)
    return mhc.head(
        streams,
        mix,
        norm.weight,
        norm_eps=config.norm_eps,
        eps=config.hyper_connections.eps,
        backend=backend,
    )
