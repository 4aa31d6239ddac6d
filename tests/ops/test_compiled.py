"""What the compiler makes is the same operation, made once for any number of tokens; without a compiler it says so."""

import pytest
import torch
from torch._dynamo.utils import counters

from dsv4.ops.backend import pick, resolve
from dsv4.ops.compiled import check_compiler
from dsv4.ops.experts import swiglu

CPU = torch.device("cpu")


def learned(gate, up, backend):
    y = swiglu(gate, up, 1.0, backend=backend)
    return y, *torch.autograd.grad(y, (gate, up), torch.ones_like(y))


def test_values_and_gradients_are_those_of_plain_torch_and_a_length_costs_nothing():
    assert resolve("compiled", CPU) == "compiled"
    before, graphs = counters["stats"]["unique_graphs"], []
    for tokens in (5, 9, 14):
        given = [torch.randn(2, tokens, 3).requires_grad_() for _ in range(2)]
        for found, wanted in zip(learned(*given, "compiled"), learned(*given, "portable"), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > before
    assert graphs == graphs[:1] * 3


def test_an_operation_that_gains_nothing_is_the_portable_one():
    assert pick("compiled", reference=len, portable=sum, native=max) is sum
    assert pick("compiled", reference=len, portable=sum, compiled=min) is min
    assert pick("portable", reference=len, portable=sum, compiled=min) is sum
    assert pick("native", reference=len, portable=sum, compiled=min) is sum


def test_a_machine_without_a_compiler_says_so(monkeypatch):
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setattr(torch.compiler.config, "force_disable_caches", True)
    torch._dynamo.reset()
    check_compiler.cache_clear()
    with pytest.raises(ValueError, match=r"backend is 'compiled'; expected 'portable'.* does not work here for cpu"):
        resolve("compiled", CPU)
    check_compiler.cache_clear()
