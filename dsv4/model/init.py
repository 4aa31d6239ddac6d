"""Fresh parameters: every initial distribution in one table.

The release states only the standard deviation of matrices (``initializer_range``); the rest is ours. The
mixes start so that a fresh model is a plain residual network: with equal streams, reading them with
weights 1 / N gives the stream itself, writing adds the output once to each, and the comb is nearly the
identity. The gates (``scale``) start small, so that the mixes depend on the input only as training asks.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from dsv4.config.model import ModelConfig
from dsv4.model.transformer import Transformer
from dsv4.ops.backend import BackendChoice

GATE = 0.01  # initial mHC gates
OFF_DIAGONAL = -8.0  # initial logit of mixing two different streams


def new_model(config: ModelConfig, seed: int = 0, *, backend: BackendChoice = "auto") -> Transformer:
    """Return a float32 model with fresh parameters, in train mode; the same seed gives the same model."""
    model = Transformer(config, backend=backend)
    initialize_(model, seed)
    return model


@torch.no_grad()
def initialize_(model: Transformer, seed: int) -> None:
    """Overwrite every parameter and table of ``model``; the same seed gives the same values."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        _fill(name, parameter, model.config, generator)
    for name, table in model.named_buffers():
        assert name.endswith("tid2eid")
        order = torch.rand(table.shape[0], model.config.moe.num_experts, generator=generator).argsort(dim=1)
        table.copy_(order[:, : table.shape[1]])  # distinct experts for each token id


def _fill(name: str, parameter: nn.Parameter, config: ModelConfig, generator: torch.Generator) -> None:
    leaf = name.rsplit(".", 1)[-1]
    N = config.hyper_connections.streams
    if leaf.endswith("_fn") or (parameter.dim() >= 2 and leaf != "ape"):
        fresh = torch.empty(parameter.shape, dtype=torch.float32)
        parameter.copy_(fresh.normal_(std=config.initializer_range, generator=generator))
    elif leaf.endswith("_scale"):
        parameter.fill_(GATE)
    elif leaf.endswith("_base"):
        parameter[:N] = -math.log(N - 1) if N > 1 else OFF_DIAGONAL * -1  # sigmoid = 1 / N
        if len(parameter) > N:
            parameter[N : 2 * N] = 0.0  # 2 sigmoid = 1
            parameter[2 * N :] = (torch.eye(N) - 1).flatten() * -OFF_DIAGONAL
    elif leaf in ("ape", "attn_sink", "bias"):
        parameter.zero_()
    else:
        assert "norm" in name, f"no initial value for {name}"
        parameter.fill_(1.0)
