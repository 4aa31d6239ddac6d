"""The loss of a model on text it was not trained on, per token and per byte.

Bits per byte compare models of any tokenizer: sum of negative log-likelihoods / ln 2 / bytes of text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Protocol

import torch

from dsv4.model.transformer import Transformer
from dsv4.ops.backend import resolve
from dsv4.ops.cross_entropy import cross_entropy


class Batch(Protocol):
    """Rows of tokens on the model's device, as training has them.

    token_ids, segment_ids: [B, T] int64. targets: [B, T] int64, the next token, or -1 where none is predicted.
    num_bytes: bytes of the text that the targets stand for.
    """

    @property
    def token_ids(self) -> torch.Tensor: ...
    @property
    def segment_ids(self) -> torch.Tensor: ...
    @property
    def targets(self) -> torch.Tensor: ...
    @property
    def num_bytes(self) -> int: ...


@torch.no_grad()
def bits_per_byte(model: Transformer, batches: Iterable[Batch], *, dense: bool) -> tuple[float, float]:
    """Return the mean loss of a token, in nats, and the bits per byte.

    dense: CSA layers attend to every visible entry, as training starts out. Raises ValueError where no batch has
    a target, or no target a byte.
    """
    nats, num_targets, num_bytes = 0.0, 0, 0
    for batch in batches:
        streams, _ = model.run(batch.token_ids, segment_ids=batch.segment_ids, dense=dense)
        has_target = batch.targets >= 0  # [B, T]
        hidden, targets = model.hidden(streams)[has_target], batch.targets[has_target]
        ones = torch.ones(len(targets), device=targets.device)
        backend = resolve(model.backend, targets.device)
        _, nll = cross_entropy(hidden, model.head.matrix(hidden.dtype, backend), targets, ones, backend=backend)
        nats += nll.double().sum().item()
        num_targets += len(targets)
        num_bytes += batch.num_bytes
    if num_targets == 0 or num_bytes == 0:
        raise ValueError(f"batches hold {num_targets} targets of {num_bytes} bytes; expected at least one of each")
    return nats / num_targets, nats / math.log(2) / num_bytes
