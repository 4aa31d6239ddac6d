"""The feed-forward layer: a router, routed experts and one shared expert (report 2.1)."""

from __future__ import annotations

import torch
from torch import nn

from dsv4.config.model import ModelConfig
from dsv4.model.call import Call
from dsv4.model.expert_store import StoredExperts
from dsv4.model.linear import Linear, of_sequences, quantised, rounded
from dsv4.model.record import LayerRecord
from dsv4.model.rows import Rows
from dsv4.native import wants_gradient
from dsv4.ops import route
from dsv4.ops.backend import Backend
from dsv4.ops.balance import balance
from dsv4.ops.experts import experts, experts_with_shared, rounded_experts, swiglu
from dsv4.ops.experts.store import Matrices
from dsv4.ops.linear import linear
from dsv4.ops.lookup import lookup
from dsv4.ops.lowbit import Kind, Packed
from dsv4.ops.recompute import Recomputed


class Router(nn.Module):
    """The gate: affinities in float32; experts by affinity plus bias, or by a table of token ids.

    ``bias`` is set by the load-balancing rule, not by gradients; a hash layer has ``tid2eid`` [V, A]
    instead, fixed for the model's life.
    """

    def __init__(self, config: ModelConfig, is_hash: bool, dtype: torch.dtype) -> None:
        super().__init__()
        moe = config.moe
        self.experts_per_token, self.routed_scale = moe.experts_per_token, moe.routed_scale
        self.weight = nn.Parameter(torch.empty(moe.num_experts, config.hidden_size, dtype=dtype))
        self.is_narrow = False  # as of a ``Norm``
        self.tid2eid: torch.Tensor | None
        self.bias: nn.Parameter | None = None
        if is_hash:
            self.register_buffer("tid2eid", torch.empty(config.vocab_size, moe.experts_per_token, dtype=torch.int64))
        else:
            self.register_buffer("tid2eid", None)
            self.bias = nn.Parameter(torch.empty(moe.num_experts, dtype=torch.float32), requires_grad=False)

    def forward(self, x: torch.Tensor, call: Call, record: LayerRecord | None) -> tuple[torch.Tensor, torch.Tensor]:
        """x: [T, D], T counting all rows' tokens; returns experts [T, A] int64 and weights [T, A] float32."""
        if call.places is not None:
            table = self.tid2eid
            chosen = None if table is None else lookup(table, call.token_ids.flatten(), backend=call.backend)
            logits = linear(x, self.weight, wide=True, backend=call.backend)  # [T, E]
            return route.route(
                logits, self.bias, chosen, self.experts_per_token, self.routed_scale, backend=call.backend
            )
        weight = self.weight.to(torch.bfloat16) if self.is_narrow else self.weight
        logits = linear(x, weight, wide=True, backend=of_sequences(call.backend))
        affinities = route.affinity(logits, backend=call.backend)  # [T, E]
        chosen = self._choose(affinities, call) if record is None or record.forced is None else record.forced
        if record is not None:
            record.chosen = chosen
            if record.balance_weights is not None and self.tid2eid is None:  # a table has nothing to learn
                weights = record.balance_weights.flatten()
                record.balance = balance(affinities, chosen, _documents(call.rows), weights, backend=call.backend)
        return chosen, route.weigh(affinities, chosen, self.routed_scale)

    def _choose(self, affinities: torch.Tensor, call: Call) -> torch.Tensor:
        if self.tid2eid is not None:
            return self.tid2eid[call.token_ids.flatten()]
        assert self.bias is not None
        return route.choose(affinities, self.bias, self.experts_per_token)


def _documents(rows: Rows) -> torch.Tensor:
    """The number of each token's document among those of all rows, from 0 on: [B * T] int64."""
    token = torch.arange(rows.raw_begin.shape[1], device=rows.raw_begin.device)
    is_first = rows.raw_begin == token  # a row that goes on from a state begins at 0 too
    return is_first.flatten().cumsum(dim=0) - 1


class Experts(nn.Module):
    """All routed experts of a layer, stacked: w1 and w3 [E, F, D], w2 [E, D, F]."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        E, F_, D = config.moe.num_experts, config.moe.expert_dim, config.hidden_size
        self.w1 = nn.Parameter(torch.empty(E, F_, D, dtype=dtype))
        self.w2 = nn.Parameter(torch.empty(E, D, F_, dtype=dtype))
        self.w3 = nn.Parameter(torch.empty(E, F_, D, dtype=dtype))
        self.rounds: Kind | None = None  # as of a ``Linear``

    def run(
        self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, limit: float, backend: Backend
    ) -> torch.Tensor:
        """See ``ops.experts.experts``, or with ``rounds`` ``ops.experts.rounded_experts``."""
        if self.rounds is None:
            return experts(x, chosen, weights, Matrices((self.w1, self.w2, self.w3)), limit, backend=backend)
        routed = Matrices(tuple(rounded(w, self.rounds, x.dtype, backend) for w in (self.w1, self.w2, self.w3)))
        return rounded_experts(x, chosen, weights, routed, limit, backend=backend)

    def run_with_shared(
        self,
        x: torch.Tensor,
        chosen: torch.Tensor,
        weights: torch.Tensor,
        shared: Matrices,
        limit: float,
        backend: Backend,
    ) -> torch.Tensor:
        """See ``ops.experts.experts_with_shared``. Where these round, ``shared`` is in codes."""
        if self.rounds is None:
            routed = Matrices((self.w1, self.w2, self.w3))
        else:
            w1, w2, w3 = (quantised(w, self.rounds, backend) for w in (self.w1, self.w2, self.w3))
            routed = Matrices.of_codes(w1, w2, w3)
        return experts_with_shared(x, chosen, weights, routed, shared, limit, backend=backend)


class PackedStack(nn.Module):
    """A stack of matrices in codes and scales."""

    def __init__(self, weight: Packed) -> None:
        super().__init__()
        self.kind: Kind = weight.kind
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scales", weight.scales)

    @property
    def weight(self) -> Packed:
        """All matrices, [E, O, I]."""
        return Packed(self.get_buffer("codes"), self.get_buffer("scales"), self.kind)


class PackedExperts(nn.Module):
    """All routed experts of a layer in codes."""

    def __init__(self, w1: Packed, w2: Packed, w3: Packed) -> None:
        super().__init__()
        self.kind: Kind | None = Matrices.of_codes(w1, w2, w3).kind
        self.w1, self.w2, self.w3 = PackedStack(w1), PackedStack(w2), PackedStack(w3)

    def run_with_shared(
        self,
        x: torch.Tensor,
        chosen: torch.Tensor,
        weights: torch.Tensor,
        shared: Matrices,
        limit: float,
        backend: Backend,
    ) -> torch.Tensor:
        """See ``Experts``."""
        routed = Matrices.of_codes(self.w1.weight, self.w2.weight, self.w3.weight)
        return experts_with_shared(x, chosen, weights, routed, shared, limit, backend=backend)


class SharedExpert(nn.Module):
    """The expert every token passes, clamped like the routed ones."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.limit = config.moe.swiglu_limit
        self.w1 = Linear(config.hidden_size, config.moe.expert_dim, dtype)
        self.w2 = Linear(config.moe.expert_dim, config.hidden_size, dtype)
        self.w3 = Linear(config.hidden_size, config.moe.expert_dim, dtype)

    def forward(self, x: torch.Tensor, call: Call) -> torch.Tensor:
        gate, up = self.w1(x, call.backend), self.w3(x, call.backend)
        activated = swiglu(gate, up, self.limit, backend=call.backend)
        if self.w2.rounds is not None:  # what is kept for the backward pass is the rounded copy
            return self.w2(activated, call.backend)
        again = Recomputed(lambda: swiglu(gate, up, self.limit, backend=call.backend))
        with again.instead_of(activated):
            return self.w2(activated, call.backend)

    def matrices(self, backend: Backend, *, in_codes: bool) -> Matrices:
        """Return the expert's maps."""
        if in_codes:
            return Matrices.of_codes(self.w1.packed(backend), self.w2.packed(backend), self.w3.packed(backend))
        return Matrices((self.w1.weight, self.w2.weight, self.w3.weight))


class MoE(nn.Module):
    """Routed plus shared experts, summed in float32 and rounded once."""

    def __init__(self, config: ModelConfig, is_hash: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.limit = config.moe.swiglu_limit
        self.gate = Router(config, is_hash, dtype)
        self.experts: Experts | PackedExperts | StoredExperts = Experts(config, dtype)
        self.shared_experts = SharedExpert(config, dtype)

    def forward(self, x: torch.Tensor, call: Call, record: LayerRecord | None) -> torch.Tensor:
        """x: [B, T, D], normalised; returns [B, T, D]."""
        flat = x.flatten(0, 1)  # [B * T, D]
        chosen, weights = self.gate(flat, call, record)
        in_codes, shared = self._is_in_codes(flat), self.shared_experts
        if in_codes or call.places is not None:
            own = shared.matrices(call.backend, in_codes=in_codes)
            return self.experts.run_with_shared(flat, chosen, weights, own, self.limit, call.backend).view(x.shape)
        assert not isinstance(self.experts, PackedExperts)
        routed = self.experts.run(flat, chosen, weights, self.limit, call.backend)
        return (routed + shared(flat, call)).to(x.dtype).view(x.shape)

    def _is_in_codes(self, x: torch.Tensor) -> bool:
        """Whether the experts are computed from their codes: where they have nothing else, or no gradient is asked for.

        The bits of a product of codes are those of the product of their values.
        """
        held = self.experts
        if isinstance(held, Experts):
            return held.rounds is not None and not wants_gradient(x, held.w1)
        return held.kind is not None
