"""Writing and reading at once: ``pre`` of ``post``, whatever the backend, and nothing of it is kept."""

import gc
from importlib.util import find_spec

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from dsv4 import native
from dsv4.ops import mhc
from dsv4.testing.compare import evaluate
from tests.ops.triton_lane import DEVICE

BACKENDS = ["reference", "portable", *(["native"] if native.available() else [])]
TRITON = ["unproved"] if find_spec("triton") is not None else []
HOW = {"norm_eps": 1e-3, "eps": 1e-4, "iterations": 3}
B, T, N, D = 2, 5, 3, 7


def case():
    M = N * (2 + N)
    sizes = {
        "streams": (B, T, N, D), "y": (B, T, D), "fn": (M, N * D), "base": (M,), "scale": (3,), "norm_weight": (D,),
    }  # fmt: skip
    return {name: torch.randn(size) for name, size in sizes.items()}


def run(at_once, backend):
    def operation(streams, y, fn, base, scale, norm_weight):
        first = mhc.pre(streams, mhc.Mix(fn, base, scale), norm_weight, **HOW, backend=backend)
        mix = mhc.Mix(-fn, base.flip(0), scale)
        if at_once:
            second = mhc.write_read(first, y, mix, norm_weight, **HOW, backend=backend)
        else:
            second = mhc.pre(mhc.post(first, y, backend=backend), mix, norm_weight, **HOW, backend=backend)
        return *second[:4], mhc.post(second, 2 * y, backend=backend)

    return operation


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_one_after_the_other_to_the_bit(backend):
    given = case()
    found, wanted = evaluate(run(True, backend), **given), evaluate(run(False, backend), **given)
    assert found.keys() == wanted.keys()
    assert len(found) == 5 + len(given)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("backend", [*BACKENDS, *TRITON])
def test_the_streams_in_between_are_let_go_and_formed_again_once_a_backward_pass(backend, monkeypatch):
    calls, original = [], mhc.post

    def noted(*given, **how):
        calls.append(StorageWeakRef((made := original(*given, **how)).untyped_storage()))
        return made

    monkeypatch.setattr(mhc, "post", noted)
    leaves = {name: x.to(DEVICE).requires_grad_() for name, x in case().items()}
    x, post, comb, streams, written = run(True, backend)(**leaves)
    assert len(calls) == (1 if backend in TRITON else 2)  # a kernel writes by itself what it also reads
    between = StorageWeakRef(streams.untyped_storage())
    loss = x.sum() + (post.sum() + comb.square().sum() + written.square().sum())
    del streams
    gc.collect()  # the interpreter's own cycles, in which arguments of kernels are
    assert between.expired()
    calls.clear()
    first, second = (torch.autograd.grad(loss, leaves.values(), retain_graph=True) for _ in range(2))
    gc.collect()
    assert [formed.expired() for formed in calls] == [True] * 2
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


READING = mhc.Reading(torch.zeros(B, T, D), torch.zeros(B, T, N), torch.zeros(B, T, N, N), torch.zeros(B, T, N, D))
MIX = mhc.Mix(torch.zeros(N * (2 + N), N * D), torch.zeros(N * (2 + N)), torch.zeros(3))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"y": torch.zeros(B, T, D + 1)}, r"y has shape \[2, 5, 8\]; expected \[B, T, D\]"),
        ({"reading": READING._replace(comb=torch.zeros(B, T, N, 2))}, r"reading\.comb has shape"),
        ({"mix": MIX._replace(base=torch.zeros(4))}, r"mix\.base has shape \[4\]; expected \[15\]"),
        ({"norm_weight": torch.zeros(2)}, r"norm_weight has shape \[2\]; expected \[D\]"),
        ({"iterations": 0}, "iterations is 0; expected at least 1"),
        ({"backend": "numpy"}, "backend is 'numpy'; expected one of reference, portable"),
    ],
)
def test_what_does_not_fit_is_an_error(changed, message):
    fitting = {"reading": READING, "y": torch.zeros(B, T, D), "mix": MIX, "norm_weight": torch.zeros(D), **HOW}
    with pytest.raises(ValueError, match=message):
        mhc.write_read(**fitting | changed)
