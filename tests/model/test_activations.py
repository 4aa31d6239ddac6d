"""The accounting of activations against what autograd keeps in a real step."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dsv4.accounting.activations import activation_bytes
from dsv4.config.presets import nano
from dsv4.model.init import initialize_
from dsv4.model.transformer import Transformer
from dsv4.ops import recompute
from dsv4.ops.cross_entropy import cross_entropy

SAVED_TENSORS_HOOKS = torch.autograd.graph.saved_tensors_hooks


class Kept:
    """Count the bytes of every storage that is kept, in and outside the contexts that recompute."""

    def __init__(self, model):
        self.parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.storages = {}

    def note(self, value):
        if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() not in self.parameters:
            self.storages[value.untyped_storage().data_ptr()] = value
        return value

    def hooks(self, pack=lambda value: value, unpack=lambda value: value):
        return SAVED_TENSORS_HOOKS(lambda value: self.note(pack(value)), unpack)

    def num_bytes(self):
        return sum(value.untyped_storage().nbytes() for value in self.storages.values())


def kept_bytes(model, token_ids, monkeypatch):
    kept = Kept(model)
    monkeypatch.setattr(recompute.torch.autograd.graph, "saved_tensors_hooks", kept.hooks)
    T = token_ids.shape[1]
    with kept.hooks():
        streams, call = model.run(token_ids, mtp=bool(model.mtp))
        readouts = [(model.hidden(streams)[0, :-1], token_ids[0, 1:])]
        if model.mtp:
            readouts.append((model.mtp_hidden(streams, call)[0, :-1], token_ids[0, 2:]))
        losses = [
            cross_entropy(hidden, model.head.weight, targets, torch.full((len(targets),), 1 / T))[0]
            for hidden, targets in readouts
        ]
    assert all(loss.requires_grad for loss in losses)
    head_gradients = len(readouts) * 4 * model.head.weight.numel()
    return kept.num_bytes() - head_gradients


@pytest.mark.parametrize("num_mtp", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_account_is_what_autograd_keeps(dtype, num_mtp, monkeypatch):
    config = replace(nano(), mtp_kinds=("window",) * num_mtp)
    model = Transformer(config, weight_dtype=dtype, activation_dtype=dtype)
    initialize_(model, 0)
    token_ids = torch.randint(config.vocab_size, (1, 2048))
    # From 1024 to 2048 tokens, so that widened weights, kept once, cancel. The filling of experts' groups, up to 64
    # rows an expert, does not quite; positions and masks are not counted.
    grown = kept_bytes(model, token_ids, monkeypatch) - kept_bytes(model, token_ids[:, :1024], monkeypatch)
    assert grown == pytest.approx(activation_bytes(config, 1024, width=dtype.itemsize), rel=0.02)


def test_recomputing_saves_what_it_says(monkeypatch):
    config = replace(nano(), layer_kinds=("window", "window"), mtp_kinds=())
    model = Transformer(config)
    initialize_(model, 0)
    token_ids = torch.randint(config.vocab_size, (1, 512))
    kept = kept_bytes(model, token_ids, monkeypatch)
    monkeypatch.setattr("dsv4.ops.mhc.Recomputed", lambda again: SimpleNamespace(instead_of=nullcontext))
    N, D = config.hyper_connections.streams, config.hidden_size
    assert kept_bytes(model, token_ids, monkeypatch) - kept == 2 * 512 * N * D * 4
