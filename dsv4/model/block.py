"""One layer: hyper-connections around attention, then around the experts (report 2.2)."""

from __future__ import annotations

import torch
from torch import nn

from dsv4.config.model import LayerKind, ModelConfig
from dsv4.model.attention import Attention
from dsv4.model.cache import LayerCache
from dsv4.model.call import Call
from dsv4.model.linear import Norm
from dsv4.model.moe import MoE
from dsv4.model.record import LayerRecord
from dsv4.model.state import LayerState
from dsv4.ops import mhc


class Block(nn.Module):
    """Streams in, streams out. ``hc_*`` hold the mixes of the two sub-layers, always float32."""

    def __init__(self, config: ModelConfig, kind: LayerKind, is_hash: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.hyper = config.hyper_connections
        N = self.hyper.streams
        rows, columns = N * (2 + N), N * config.hidden_size
        self.hc_attn_fn, self.hc_ffn_fn = (_float32(rows, columns) for _ in range(2))
        self.hc_attn_base, self.hc_ffn_base = (_float32(rows) for _ in range(2))
        self.hc_attn_scale, self.hc_ffn_scale = (_float32(3) for _ in range(2))
        self.attn_norm = Norm(config.hidden_size, dtype)
        self.attn = Attention(config, kind, dtype)
        self.ffn_norm = Norm(config.hidden_size, dtype)
        self.ffn = MoE(config, is_hash, dtype)

    def forward(
        self, streams: torch.Tensor, call: Call, state: LayerState | LayerCache | None, record: LayerRecord | None
    ) -> torch.Tensor:
        """streams: [B, T, N, D]; returns the same shape."""
        hyper = self.hyper
        numbers = {"norm_eps": self.eps, "eps": hyper.eps, "iterations": hyper.sinkhorn_iterations}
        mix = mhc.Mix(self.hc_attn_fn, self.hc_attn_base, self.hc_attn_scale)
        first = mhc.pre(streams, mix, self.attn_norm.weight, **numbers, backend=call.backend)
        y = self.attn(first.x, call, state, record)
        mix = mhc.Mix(self.hc_ffn_fn, self.hc_ffn_base, self.hc_ffn_scale)
        second = mhc.write_read(first, y, mix, self.ffn_norm.weight, **numbers, backend=call.backend)
        return mhc.post(second, self.ffn(second.x, call, record), backend=call.backend)


def _float32(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, dtype=torch.float32))
