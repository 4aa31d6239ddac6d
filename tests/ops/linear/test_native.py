"""The fixed-order kernel of linear maps: within the rounding of its sums, and the same bits however it is called."""

import subprocess
import sys

import pytest
import torch

from dsv4 import native
from dsv4.ops.linear import linear, linear_groups, linears, portable

pytestmark = pytest.mark.skipif(not native.available(), reason="no C compiler here")
FLOAT, HALF = torch.float32, torch.bfloat16
TYPES = [(FLOAT, FLOAT), (FLOAT, HALF), (HALF, FLOAT), (HALF, HALF)]
# K, N: single elements, part of a vector, whole vectors with and without a rest, several parts of a weight
SIZES = [(1, 1), (7, 5), (32, 16), (40, 67), (129, 3), (512, 300)]


@pytest.fixture(autouse=True)
def _no_other_path(monkeypatch):
    """These tests are of the kernel, so nothing may go another way."""
    for name in ("linear", "linears", "linear_groups"):
        monkeypatch.setattr(portable, name, lambda *_: pytest.fail("the portable path ran"))


def given(M, K, N, types):
    return torch.randn(M, K).to(types[0]), torch.randn(N, K).to(types[1])


def run(x, weight, wide=False):
    return linear(x, weight, wide=wide, backend="native")


def assert_within_rounding(y, x, weight, wide):
    """Hold y to exact products of the numbers that meet.

    A lane adds K / 16 products at most, then five additions join lanes and pairs: each rounds by 2^-24 of the sum of
    magnitudes at most. A result in bfloat16 is rounded once more, by 2^-8 of itself.
    """
    used = weight if wide else weight.to(x.dtype)
    exact, magnitudes = x.double() @ used.double().T, x.double().abs() @ used.double().abs().T
    allowed = (x.shape[-1] / 16 + 6) * 2**-24 * magnitudes
    if y.dtype == HALF:
        allowed = allowed + 2**-8 * (exact.abs() + allowed)
    assert ((y.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("M", [1, 6, 29])
@pytest.mark.parametrize("wide", [False, True])
def test_within_the_rounding_of_its_sums(types, sizes, M, wide):
    x, weight = given(M, *sizes, types)
    y = run(x, weight, wide)
    assert y.dtype == (FLOAT if wide else x.dtype)
    assert_within_rounding(y, x, weight, wide)


def test_within_the_rounding_of_its_sums_for_many_rows():
    x, weight = given(300, 72, 150, (HALF, HALF))
    assert_within_rounding(run(x, weight), x, weight, wide=False)


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("wide", [False, True])
def test_a_row_has_the_same_bits_among_any_others(types, sizes, wide):
    x, weight = given(33, *sizes, types)
    together = run(x, weight, wide)
    for M in (1, 2, 3, 4, 5, 7, 25):
        for first in (0, 1, 33 - M):
            assert torch.equal(run(x[first : first + M], weight, wide), together[first : first + M])


@pytest.mark.parametrize("types", TYPES)
def test_the_same_bits_on_any_number_of_threads(types):
    x, weight = given(30, 48, 1100, types)
    one = [run(x[:M], weight) for M in (1, 30)]
    torch.set_num_threads(2)
    two = [run(x[:M], weight) for M in (1, 30)]
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("types", TYPES)
def test_a_column_has_the_same_bits_among_any_others(types):
    x, weight = given(5, 40, 90, types)
    together = run(x, weight)
    for first, last in ((0, 1), (3, 20), (89, 90)):
        assert torch.equal(run(x, weight[first:last]), together[:, first:last])


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("M", [1, 40, 300])
def test_several_maps_are_each_as_alone(num_threads, M):
    torch.set_num_threads(num_threads)
    x = torch.randn(M, 96).bfloat16()
    weights = [torch.randn(n, 96).to(dtype) for n, dtype in ((5, HALF), (300, FLOAT), (16, FLOAT), (129, HALF))]
    wide = [False, False, True, True]
    for y, weight, is_wide in zip(linears(x, weights, wide=wide, backend="native"), weights, wide, strict=True):
        assert torch.equal(y, run(x, weight, is_wide))


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("M", [1, 30])
def test_groups_are_each_as_alone(types, M):
    x, weight = torch.randn(M, 3, 40).to(types[0]), torch.randn(3, 21, 40).to(types[1])
    wanted = torch.cat([run(x[:, group].contiguous(), weight[group]) for group in range(3)], dim=1)
    assert torch.equal(linear_groups(x, weight, backend="native"), wanted)


def test_types_meet_as_if_converted_first():
    x, weight = given(9, 77, 20, (FLOAT, FLOAT))
    half_x, half_weight = x.bfloat16(), weight.bfloat16()
    assert torch.equal(run(half_x, weight), run(half_x, half_weight))
    assert torch.equal(run(x, half_weight), run(x, half_weight.float()))
    assert torch.equal(run(half_x, weight, wide=True), run(half_x.float(), weight))
    assert torch.equal(run(half_x, half_weight, wide=True).bfloat16(), run(half_x, half_weight))


def test_leading_dimensions_are_kept():
    x, weight = given(24, 16, 5, (HALF, HALF))
    y = run(x, weight)
    assert torch.equal(run(x.view(2, 3, 4, 16), weight), y.view(2, 3, 4, 5))
    assert torch.equal(run(x[3], weight), y[3])


def test_inputs_need_not_be_contiguous():
    x, weight = given(12, 40, 30, (HALF, HALF))
    y = run(x, weight)
    beside = torch.randn(12, 100).bfloat16()
    beside[:, 7:47] = x
    assert torch.equal(run(beside[:, 7:47], weight), y)
    assert torch.equal(run(x.T.contiguous().T, weight.T.contiguous().T), y)
    assert torch.equal(run(x[::2], weight[::3]), y[::2, ::3])
    assert torch.equal(run(x[:1].expand(4, 40), weight), y[:1].expand(4, 30))
    assert torch.equal(run(x, weight[:1].expand(30, 40)), y[:, :1].expand(12, 30))
    groups, weights = torch.randn(6, 2, 24).bfloat16(), torch.randn(2, 5, 24).bfloat16()
    wanted = linear_groups(groups, weights, backend="native")
    turned = groups.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(linear_groups(turned, weights.mT.contiguous().mT, backend="native"), wanted)


def test_copies_of_several_weights_are_kept_until_all_are_read():
    x, weight = given(2, 64, 48, (FLOAT, FLOAT))
    turned = [(weight + i).T.contiguous().T for i in range(8)]
    for i, y in enumerate(linears(x, turned, wide=[False] * 8, backend="native")):
        assert torch.equal(y, run(x, weight + i))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="protects a page as Linux does")
def test_nothing_past_the_end_of_a_tensor_is_read():
    """A checkpoint's last weight may end where its file's memory map does. Reading on would end the process."""
    subprocess.run([sys.executable, "-c", AT_THE_END_OF_MEMORY], check=True)


AT_THE_END_OF_MEMORY = """
import ctypes, mmap, torch
from dsv4.ops.linear import linear

libc = ctypes.CDLL(None)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
kept = []

def move(tensor):
    room, size = 16 * mmap.PAGESIZE, tensor.numel() * tensor.element_size()
    memory = mmap.mmap(-1, room + mmap.PAGESIZE)
    moved = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=room - size).view(tensor.shape)
    moved.copy_(tensor)
    assert libc.mprotect(moved.data_ptr() + size, mmap.PAGESIZE, 0) == 0
    kept.append(memory)
    return moved

for K, N in ((40, 67), (7, 5), (512, 9)):
    for dtypes in ((torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)):
        for M in (1, 5):
            x, weight = torch.randn(M, K).to(dtypes[0]), torch.randn(N, K).to(dtypes[1])
            y = linear(move(x), move(weight), backend="native")
            assert torch.equal(y, linear(x, weight, backend="native"))
"""


def test_rows_of_zeros_give_zeros():
    x, weight = given(3, 40, 30, (HALF, HALF))
    x[1] = 0
    assert not run(x, weight)[1].any()
    assert not run(x, torch.zeros_like(weight)).any()


@pytest.mark.parametrize("types", TYPES)
def test_what_is_not_a_number_stays_in_its_row_and_column(types):
    x, weight = given(3, 40, 6, types)
    x[1, 39], weight[4, 2] = torch.nan, torch.nan
    wrong = run(x, weight).isnan()
    assert wrong[1].all()
    assert wrong[:, 4].all()
    assert wrong.sum() == 6 + 2
    x[1, 39], weight[4, 2] = torch.inf, 1.0
    assert run(x, weight).isinf().nonzero()[:, 0].unique().tolist() == [1]


# Where the kernel does not serve


@pytest.mark.parametrize("needs_grad", ["x", "weight"])
def test_a_gradient_is_the_portable_paths(monkeypatch, needs_grad):
    monkeypatch.undo()
    tensors = dict(zip(("x", "weight"), given(3, 40, 6, (FLOAT, FLOAT)), strict=True))
    leaf = tensors[needs_grad].requires_grad_()
    linear(**tensors, backend="native").sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.any()
    with torch.no_grad():
        monkeypatch.setattr(portable, "linears", lambda *_: pytest.fail("the portable path ran"))
        linear(**tensors, backend="native")


def test_other_dtypes_and_no_rows_are_the_portable_paths(monkeypatch):
    monkeypatch.undo()
    x, weight = given(3, 40, 6, (FLOAT, FLOAT))
    assert run(x.double(), weight.double()).dtype == torch.float64
    assert run(x[:0], weight).shape == (0, 6)
    assert run(x, weight[:0]).shape == (3, 0)
    assert not run(x[:, :0], weight[:, :0]).any()
    assert linear_groups(x[:0].unsqueeze(1), weight.unsqueeze(0), backend="native").shape == (0, 6)
