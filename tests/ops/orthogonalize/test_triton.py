"""The kernels of the iteration against float64: products by tiles and parts, tall and wide, and what they depend on."""

import pytest
import torch
import triton as language
import triton.language as tl

from dsv4.ops.orthogonalize import HYBRID, orthogonalize, portable, reference, triton
from tests.ops.triton_lane import DEVICE, DTYPES, assert_near, poisoned

# Less than a tile, one and a bit, several, wide and tall and square; in batches
SHAPES = [(3, 7), (2, 70, 90), (90, 70), (2, 1, 20, 19), (40, 40), (1, 9), (9, 1)]
STEPS = HYBRID[:1] + HYBRID[-1:]


def matrices(*shape, dtype=torch.float32):
    """Of sizes that differ from matrix to matrix."""
    sizes = 10.0 ** torch.randint(-3, 4, (*shape[:-2], 1, 1))
    return (sizes * torch.randn(shape)).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_two_steps(shape, dtype):
    x = matrices(*shape)
    wanted = reference.orthogonalize(x.double(), STEPS, torch.float64)
    with poisoned():
        found = triton.orthogonalize(x, STEPS, dtype)
    assert found.dtype == torch.float32
    assert_near(found, wanted, dtype, factor=4)  # six products and as many roundings


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("least", [1024, 16])
@pytest.mark.parametrize(("batch", "R"), [(2, 16), (2, 29), (1, 66)])
def test_symmetric_products(monkeypatch, batch, R, least, dtype):
    """Of 16 x 16 tiles, the last row of them full and not; long sums in one part and in several."""
    for name in ("float32", triton.NARROW):
        monkeypatch.setitem(triton.CONFIGS, name, triton.Config(16, 16, 4, 2))
    monkeypatch.setattr(triton, "LEAST_OF_A_PART", least)
    x = torch.randn(batch, R, 37).to(DEVICE, dtype)
    square = x @ x.mT
    wanted = x.double() @ x.double().mT
    whole = 0.5 * square.double() - 2 * square.double() @ square.double().mT
    with poisoned():
        gram, polynomial = (torch.empty(batch, R, R, dtype=dtype, device=DEVICE) for _ in range(2))
        triton._symmetric(x, gram, 0.0, 1.0)
        triton._symmetric(square, polynomial, 0.5, -2.0)
    assert_near(gram, wanted, dtype)
    assert_near(polynomial, whole, dtype)
    for made in (gram, polynomial):
        assert torch.equal(made[:, 16:, :16], made[:, :16, 16:].mT)


@language.jit
def _rows_kernel(tiles, rows, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(rows + at, triton._row_of(tl.load(tiles + at)))


def test_rows_begin_where_they_do_whatever_a_root_is_rounded_to():
    """Up to a thousand times the tiles of a matrix, where float32 can no longer count them."""
    row = torch.arange(1, 16385, dtype=torch.int32, device=DEVICE)
    begin, found = row * (row + 1) // 2, torch.empty_like(row)
    for tile, wanted in ((begin, row), (begin - 1, row - 1)):
        _rows_kernel[(1,)](tile, found, len(row))
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(24, 40), (48, 24)])
def test_singular_values(shape, dtype):
    k = min(shape)
    u, v = (torch.linalg.qr(torch.randn(size, k, dtype=torch.float64))[0] for size in shape)
    x = (u * 1000.0 ** -torch.linspace(0, 1, k, dtype=torch.float64) @ v.T).float().to(DEVICE)
    s = torch.linalg.svdvals(triton.orthogonalize(x, HYBRID, dtype).double())
    allowed = 3e-3 if dtype == torch.float32 else 1e-2
    assert s.min() >= 1 - allowed
    assert s.max() <= 1 + allowed


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs_give_the_same_bits(dtype):
    x = matrices(4, 20, 18)
    wanted = triton.orthogonalize(x, STEPS, dtype)
    for cut in (
        x.mT.contiguous().mT,
        torch.stack([x, x], 3).flatten(2)[:, :, ::2],
        x.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        assert not cut.is_contiguous()
        assert torch.equal(triton.orthogonalize(cut, STEPS, dtype), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(20, 34), (34, 20)])
def test_a_matrix_has_the_same_bits_whatever_is_beside_it(shape, dtype):
    """Of the symmetric products; the plain one is the library's."""
    x = torch.randn(5, *shape).to(DEVICE, dtype)
    x = x.mT if shape[0] > shape[1] else x
    whole, again = (torch.empty(5, 20, 20, dtype=dtype, device=DEVICE) for _ in range(2))
    one = torch.empty(1, 20, 20, dtype=dtype, device=DEVICE)
    for out, given in ((whole, x), (again, x), (one, x[3:4])):
        triton._symmetric(given, out, 0.0, 1.0)
    assert torch.equal(whole, again)
    assert torch.equal(one[0], whole[3])
    full = triton.orthogonalize(x, STEPS, dtype)
    assert torch.equal(full, triton.orthogonalize(x, STEPS, dtype))


def test_a_matrix_that_is_no_number_spoils_no_other_and_one_of_zeros_stays():
    x = matrices(3, 4, 6)
    x[1, 0, 0] = torch.nan
    x[2] = 0
    found = triton.orthogonalize(x, HYBRID, torch.float32)
    assert found.isnan().flatten(1).all(1).tolist() == [False, True, False]
    assert not found[2].any()
    assert found[0].isfinite().all()


@pytest.mark.parametrize("size", [1e-45, 1e-30, 1e-20])
def test_numbers_whose_squares_vanish_do_not_explode(size):
    found = triton.orthogonalize(size * torch.randn(20, 30, device=DEVICE), HYBRID, torch.float32)
    assert found.isfinite().all()
    assert torch.linalg.matrix_norm(found, ord=2) <= 1.003


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (2, 3, 0)])
def test_nothing_to_do(shape):
    assert triton.orthogonalize(torch.zeros(shape, device=DEVICE), STEPS, torch.float32).shape == shape


def test_the_dtype_stays_no_gradient_passes_and_no_steps_scale_alone():
    x = matrices(3, 5, 4, dtype=torch.float16)
    found = triton.orthogonalize(x.requires_grad_(), (), torch.float32)
    assert found.dtype == torch.float16
    assert not found.requires_grad
    exact = x.detach().double()
    assert_near(found, exact / torch.linalg.matrix_norm(exact, keepdim=True), torch.float16)


def test_the_operation_takes_the_kernels_and_float64_is_what_portable_makes_of_it():
    x = matrices(2, 4, 6)
    taken = orthogonalize(x, dtype=torch.float32, steps=STEPS, backend="unproved")
    assert torch.equal(taken, triton.orthogonalize(x, STEPS, torch.float32))
    for given, dtype in ((x.double(), torch.float32), (x, torch.float64)):
        assert torch.equal(triton.orthogonalize(given, STEPS, dtype), portable.orthogonalize(given, STEPS, dtype))
