"""Orthogonalisation: the report's equation in plain loops, singular values, and what the result may depend on."""

import pytest
import torch

from dsv4.ops.orthogonalize import HYBRID, orthogonalize
from dsv4.testing.compare import assert_backends_agree, assert_repeatable, relative_distance

BACKENDS = ["reference", "portable"]
SHAPES = [(3, 7), (6, 4), (5, 5), (1, 8), (9, 1), (1, 1)]


def float64(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def in_float64(matrices, backend="portable", steps=HYBRID):
    return orthogonalize(matrices, dtype=torch.float64, steps=steps, backend=backend)


def conditioned(rows, columns, condition):
    """A random float64 matrix whose singular values fall geometrically from 1 to 1 / condition."""
    k = min(rows, columns)
    u, v = (torch.linalg.qr(float64(size, k))[0] for size in (rows, columns))
    return u * (1 / condition) ** torch.linspace(0, 1, k, dtype=torch.float64) @ v.T


def moved(values, steps):
    """Where the steps take singular values."""
    for a, b, c in steps:
        values = a * values + b * values**3 + c * values**5
    return values


# The equation


def product(x, y):
    return [[sum(p * q for p, q in zip(row, column, strict=True)) for column in zip(*y, strict=True)] for row in x]


def test_the_steps_are_those_of_the_report():
    assert (*[(3.4445, -4.7750, 2.0315)] * 8, *[(2.0, -1.5, 0.5)] * 2) == HYBRID


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_steps", [0, 1, 8, 9, 10])
def test_equation_28_in_plain_loops(backend, num_steps):
    matrix = float64(3, 4)
    norm = sum(v * v for row in matrix.tolist() for v in row) ** 0.5
    x = [[v / norm for v in row] for row in matrix.tolist()]
    for a, b, c in HYBRID[:num_steps]:
        gram = product(x, list(zip(*x, strict=True)))
        first, second = product(gram, x), product(product(gram, gram), x)
        x = [[a * x[i][j] + b * first[i][j] + c * second[i][j] for j in range(4)] for i in range(3)]
    got = in_float64(matrix, backend, HYBRID[:num_steps])
    torch.testing.assert_close(got, torch.tensor(x, dtype=torch.float64), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_singular_vectors_stay_and_singular_values_move_by_the_polynomial(backend, shape):
    matrix = float64(*shape)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(in_float64(matrix, backend), u * moved(s / s.norm(), HYBRID) @ v, rtol=1e-9, atol=1e-9)


def test_how_far_the_hybrid_goes():
    s = torch.logspace(-9, 0, 100_001, dtype=torch.float64)
    lifted, settled = moved(s, HYBRID[:8]), moved(s, HYBRID)
    enough = s >= 4e-5
    assert lifted[enough].min() >= 0.68
    assert lifted[enough].max() <= 1.21
    assert settled[enough].min() >= 0.9999
    assert settled[enough].max() <= 1.003
    assert (settled[~enough] <= 79_300 * s[~enough]).all()


# Singular values of what is computed


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(24, 40), (96, 48), (64, 64)])
@pytest.mark.parametrize("condition", [1, 10, 1000, 3000])
def test_float32_singular_values(backend, shape, condition):
    # A condition of 3000 puts the smallest at 1e-4 of the norm, above the 4e-5 that ten steps can lift.
    got = orthogonalize(conditioned(*shape, condition).float(), dtype=torch.float32, backend=backend)
    s = torch.linalg.svdvals(got.double())
    assert got.dtype == torch.float32
    assert s.min() >= 0.9999
    assert s.max() <= 1.003


@pytest.mark.parametrize("shape", [(24, 40), (96, 48), (64, 64), (12, 512)])
@pytest.mark.parametrize("condition", [1, 10, 1000])
def test_bfloat16_singular_values(shape, condition):
    # The last two steps undo the rounding of all before; what is left is their own, of 2^-8 and less.
    got = orthogonalize(conditioned(*shape, condition).float(), dtype=torch.bfloat16)
    s = torch.linalg.svdvals(got.double())
    assert got.dtype == torch.float32
    assert s.min() >= 0.99
    assert s.max() <= 1.01


@pytest.mark.parametrize("backend", BACKENDS)
def test_products_run_in_the_dtype_asked_for(backend):
    matrix = torch.randn(24, 40)
    results = {dtype: orthogonalize(matrix, dtype=dtype, backend=backend) for dtype in (torch.bfloat16, torch.float32)}
    assert torch.equal(results[torch.bfloat16], results[torch.bfloat16].bfloat16().float())
    assert not torch.equal(results[torch.float32], results[torch.float32].bfloat16().float())
    # Each step rounds to 2^-9 and the next ones turn the singular vectors by what it left: a few times 2^-8 in all.
    assert relative_distance(results[torch.bfloat16], results[torch.float32]) < 0.05


# What the result depends on


@pytest.mark.parametrize("shape", [*SHAPES, (2, 5, 3), (2, 3, 4, 6), (0, 4, 3)])
def test_backends_agree(shape):
    assert_backends_agree(lambda backend, x: in_float64(x, backend).detach(), tolerance=1e-10, x=float64(*shape))


def test_backends_agree_on_non_contiguous_input():
    for x in (float64(6, 3, 5).transpose(0, 2), float64(4, 7, 6)[:, ::2, 1:], float64(8, 3).T):
        assert not x.is_contiguous()
        torch.testing.assert_close(in_float64(x), in_float64(x.clone(), "reference"), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_matrices_of_a_batch_do_not_meet(backend):
    batch = float64(2, 3, 4, 6) * torch.tensor([1e-3, 1.0, 1e5]).double()[:, None, None]
    got = in_float64(batch, backend)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(got[i, j], in_float64(batch[i, j], backend), rtol=1e-10, atol=1e-10)
    batch[1, 2, 0, 0] = torch.nan
    spoilt = in_float64(batch, backend)
    assert spoilt[1, 2].isnan().all()
    assert spoilt.flatten(0, 1)[:5].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(3, 7), (6, 4), (5, 5)])
def test_rotations_and_the_sign_pass_through(backend, shape):
    x = float64(*shape)
    left, right = (torch.linalg.qr(float64(size, size))[0] for size in shape)
    got = in_float64(x, backend)
    torch.testing.assert_close(in_float64(left @ x @ right, backend), left @ got @ right, rtol=1e-9, atol=1e-9)
    assert torch.equal(in_float64(-x, backend), -got)
    torch.testing.assert_close(in_float64(x.T, backend), got.T, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e12])
def test_the_scale_does_not_matter(backend, scale):
    x = torch.randn(5, 9)
    got, wanted = (orthogonalize(m, dtype=torch.float32, backend=backend) for m in (scale * x, x))
    # Epsilon shortens a norm of 1e-12 by a thousandth, which the settling steps undo.
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_zero_matrix_stays_zero(backend):
    assert not orthogonalize(torch.zeros(2, 3, 4), dtype=torch.bfloat16, backend=backend).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1e-45, 1e-30, 1e-23, 1e-20, 1e-18])
def test_numbers_whose_squares_vanish_do_not_explode(backend, size):
    got = orthogonalize(size * torch.randn(64, 96), dtype=torch.float32, backend=backend)
    assert got.isfinite().all()
    assert torch.linalg.matrix_norm(got, ord=2) <= 1.003


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 8), (9, 1)])
def test_a_row_or_a_column_becomes_a_unit_vector(backend, shape):
    x = float64(*shape)
    torch.testing.assert_close(in_float64(x, backend), x / x.norm(), rtol=3e-3, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_matrix_of_rank_one_keeps_its_rank(backend):
    x = float64(4, 1) @ float64(1, 6)
    s = torch.linalg.svdvals(in_float64(x, backend))
    assert s[0] == pytest.approx(1, abs=3e-3)
    assert s[1:].max() < 1e-9  # 2e-16 of rounding, times 79,000


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_dtype_and_the_input_stay(backend):
    x = torch.randn(3, 5, 4).bfloat16()
    before = x.clone()
    got = orthogonalize(x, dtype=torch.float32, backend=backend)
    assert got.dtype == torch.bfloat16
    assert got.shape == x.shape
    assert torch.equal(x, before)


def test_two_runs_give_the_same_bits():
    for dtype in (torch.float32, torch.bfloat16):
        assert_repeatable(lambda x, dtype=dtype: orthogonalize(x, dtype=dtype), x=torch.randn(5, 24, 40))


# Errors


@pytest.mark.parametrize(
    ("matrices", "message"),
    [
        (torch.zeros(3), r"matrices has shape \[3\]; expected \[\.\.\., rows, columns\]"),
        (torch.zeros(2, 3, dtype=torch.int64), r"matrices has dtype torch.int64; expected a floating-point dtype"),
    ],
)
def test_what_is_no_matrix_is_an_error(matrices, message):
    with pytest.raises(ValueError, match=message):
        orthogonalize(matrices, dtype=torch.float32)


def test_an_unknown_backend_is_an_error():
    with pytest.raises(ValueError, match="backend is 'numpy'; expected one of reference, portable"):
        orthogonalize(torch.zeros(2, 4), dtype=torch.float32, backend="numpy")
