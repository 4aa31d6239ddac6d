"""The kernels of products as other processors get them: compiled without AVX512-BF16, and without AVX512."""

import ctypes
import platform
import shutil
import subprocess

import pytest
import torch

from dsv4 import native
from dsv4.ops.experts import experts
from dsv4.ops.experts.store import Matrices
from dsv4.ops.linear import linear, linear_groups
from dsv4.testing.compare import relative_distance

pytestmark = pytest.mark.skipif(
    not native.available() or platform.machine() != "x86_64", reason="needs a C compiler for x86"
)
DTYPES = [torch.float32, torch.bfloat16]
TYPES = [(x, w) for x in DTYPES for w in DTYPES]


@pytest.fixture(scope="module", params=["-mno-avx512bf16", "-mno-avx512f", "-mno-avx"])
def other_library(request, tmp_path_factory):
    made = tmp_path_factory.mktemp("kernels") / "kernels.so"
    sources = [str(native.SOURCES / name) for name in ("product.c", "packed.c", "linear.c", "experts.c")]
    flags = [*filter(None, native.FLAGS), request.param, "-Wall", "-Wextra", "-Wno-psabi", "-Werror"]
    subprocess.run([shutil.which("cc"), *flags, "-o", str(made), *sources, "-lm"], check=True)
    return ctypes.CDLL(str(made))


@pytest.fixture
def other(monkeypatch, other_library):
    """Run something with the other library."""

    def run(operation):
        with monkeypatch.context() as patch:
            patch.setattr(native, "library", lambda: other_library)
            return operation()

    return run


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("K", [7, 40, 512])
@pytest.mark.parametrize("wide", [False, True])
def test_the_same_numbers_but_for_the_order_of_their_sums(other, types, K, wide):
    x, weight = torch.randn(9, K).to(types[0]), torch.randn(30, K).to(types[1])
    here, there = (
        linear(x, weight, wide=wide, backend="native"),
        other(lambda: linear(x, weight, wide=wide, backend="native")),
    )
    magnitudes = x.double().abs() @ weight.double().abs().T
    allowed = 2 * (K / 16 + 6) * 2**-24 * magnitudes
    if here.dtype == torch.bfloat16:  # a sum near the middle goes either way
        allowed = allowed + 2**-7 * here.double().abs()
    assert ((here.double() - there.double()).abs() <= allowed).all()


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("K", [7, 40])
def test_the_same_bits_among_any_others(other, types, K):
    x, weight = torch.randn(33, K).to(types[0]), torch.randn(30, K).to(types[1])
    together = other(lambda: linear(x, weight, backend="native"))
    for M in (1, 2, 3, 4, 5):
        for first in (0, 33 - M):
            some = slice(first, first + M)
            assert torch.equal(other(lambda some=some: linear(x[some], weight, backend="native")), together[some])
    groups = other(lambda: linear_groups(x.unsqueeze(1), weight.unsqueeze(0), backend="native"))
    assert torch.equal(groups, together)


def test_types_meet_as_if_converted_first(other):
    x, weight = torch.randn(9, 77), torch.randn(20, 77)
    weight[3, 5] = torch.nan
    narrow, wanted = (other(lambda w=w: linear(x.bfloat16(), w, backend="native")) for w in (weight, weight.bfloat16()))
    torch.testing.assert_close(narrow, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("types", TYPES)
def test_experts(other, types):
    x, chosen, weights = torch.randn(40, 24), torch.rand(40, 6).argsort(dim=1)[:, :3], torch.rand(40, 3)
    w1, w2, w3 = torch.randn(6, 17, 24), torch.randn(6, 24, 17), torch.randn(6, 17, 24)
    given = x.to(types[0]), chosen, weights, Matrices(tuple(w.to(types[1]) for w in (w1, w2, w3))), 1.5

    def run(rows=slice(0, 40)):
        return experts(*(value[rows] for value in given[:3]), *given[3:], fixed_order=True, backend="native")

    together = other(run)
    assert torch.equal(other(lambda: run(slice(3, 5))), together[3:5])
    assert relative_distance(together, run()) < (1e-6 if types[0] == torch.float32 else 2**-8)
