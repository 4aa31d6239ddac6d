"""The rotation and its frequencies, against the formula and against the numbers of the released tables."""

import math

import numpy as np
import pytest
import torch

from dsv4.ops.lowbit import round_rows
from dsv4.ops.rope import angles, frequencies, rotate, rotate_normed, rotate_unit
from dsv4.testing.compare import assert_backends_agree, assert_close, assert_repeatable, evaluate

BACKENDS = ["reference", "portable"]
EPS = 1e-3
# x, and R; [B, T, K] and [B, T, H, K]
SHAPES = [((1, 1, 2), 2), ((2, 3, 7), 4), ((2, 3, 5, 8), 6), ((1, 4, 2, 6), 6), ((1, 0, 3, 4), 2)]


def main_table():
    return frequencies(64, 10000.0)


def compress_table():
    return frequencies(64, 160000.0, factor=16.0, original_context=65536.0, beta_fast=32.0, beta_slow=1.0)


def turn(x, cos, sin, backend="portable", inverse=False):
    return rotate(x, cos.detach(), sin.detach(), inverse=inverse, backend=backend)


def turn_unit(x, cos, sin, backend="portable"):
    return rotate_unit(x, cos.detach(), sin.detach(), EPS, backend=backend)


def random_angles(x, rotary_dims, dtype=torch.float64):
    angle = 9 * torch.randn(*x.shape[:2], rotary_dims // 2, dtype=dtype)
    return {"cos": angle.cos(), "sin": angle.sin()}


# Frequencies


@pytest.mark.parametrize(("table", "theta"), [(main_table, 10000.0), (compress_table, 160000.0)])
def test_a_pair_turns_by_theta_to_the_minus_two_k_over_r(table, theta):
    plain = [theta ** (-2 * k / 64) for k in range(32)]
    untouched = 32 if table is main_table else 16
    torch.testing.assert_close(table()[:untouched], torch.tensor(plain[:untouched]))


def test_yarn_leaves_fast_pairs_and_slows_slow_pairs_sixteen_times():
    plain, yarn = frequencies(64, 160000.0), compress_table()
    assert torch.equal(yarn[:16], plain[:16])
    assert torch.equal(yarn[25:], plain[25:] / 16)
    between = yarn[16:25] / plain[16:25]
    assert ((between < 1) & (between > 1 / 16)).all()


def test_yarn_joins_them_by_a_line_over_the_pairs_15_to_25():
    ramps = [(k - 15) / 10 for k in range(15, 26)]
    wanted = [160000 ** (-2 * k / 64) * (1 - r + r / 16) for k, r in zip(range(15, 26), ramps, strict=True)]
    torch.testing.assert_close(compress_table()[15:26], torch.tensor(wanted))


@pytest.mark.parametrize(("pair", "frequency"), [(0, 1.0), (20, 2.96978e-4), (31, 5.68053e-7)])
def test_yarn_values_of_the_released_model(pair, frequency):
    assert compress_table()[pair].item() == pytest.approx(frequency, rel=2e-6)


@pytest.mark.parametrize("position", [0, 1, 127, 65535, 1_000_003])
def test_angles_are_float32_products(position):
    cos, sin = angles(torch.tensor([[position]]), compress_table())
    angle = np.float32(position) * compress_table().numpy()
    np.testing.assert_allclose(cos[0, 0].numpy(), np.cos(angle), rtol=0, atol=3e-7)
    np.testing.assert_allclose(sin[0, 0].numpy(), np.sin(angle), rtol=0, atol=3e-7)


def test_the_amplitude_is_one():
    cos, sin = angles(torch.arange(0, 70000, 1000)[None], compress_table())
    torch.testing.assert_close(cos.square() + sin.square(), torch.ones(1, 70, 32))


# The rotation


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_quarter_turn_of_the_last_two_pairs_written_out(backend):
    x = torch.tensor([[[1.0, 2, 3, 4, 5, 6]]])
    cos, sin = torch.zeros(1, 1, 2), torch.ones(1, 1, 2)
    assert rotate(x, cos, sin, backend=backend).tolist() == [[[1, 2, -4, 3, -6, 5]]]
    assert rotate(x, cos, sin, inverse=True, backend=backend).tolist() == [[[1, 2, 4, -3, 6, -5]]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inverse", [False, True])
def test_formula_in_plain_loops(backend, inverse):
    x = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    angle = torch.randn(2, 3, 2, dtype=torch.float64)
    wanted = x.clone()
    for b, t, h, k in np.ndindex(2, 3, 5, 2):
        phi = angle[b, t, k].item() * (-1 if inverse else 1)
        first, second = x[b, t, h, 3 + 2 * k].item(), x[b, t, h, 4 + 2 * k].item()
        wanted[b, t, h, 3 + 2 * k] = first * math.cos(phi) - second * math.sin(phi)
        wanted[b, t, h, 4 + 2 * k] = first * math.sin(phi) + second * math.cos(phi)
    torch.testing.assert_close(turn(x, angle.cos(), angle.sin(), backend, inverse), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_inverse_undoes_the_rotation_and_norms_stay(backend):
    x = torch.randn(1, 6, 3, 8, dtype=torch.float64)
    turned = turn(x, **random_angles(x, 6), backend=backend)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    cos_sin = random_angles(x, 6)
    back = turn(turn(x, **cos_sin, backend=backend), **cos_sin, backend=backend, inverse=True)
    torch.testing.assert_close(back, x)


@pytest.mark.parametrize("distance", [0, 1, 5])
def test_products_depend_on_the_distance_alone(distance):
    q, k = torch.randn(1, 1, 64, dtype=torch.float64), torch.randn(1, 1, 64, dtype=torch.float64)
    q, k = q.expand(1, 40, 64), k.expand(1, 40, 64)
    angle = torch.arange(40)[:, None] * compress_table().double()  # [T, R / 2]
    keys, queries = (turn(x, angle.cos()[None], angle.sin()[None]) for x in (k, q))
    products = (queries[0, distance:] * keys[0, : 40 - distance]).sum(dim=-1)
    torch.testing.assert_close(products, products[:1].expand_as(products))


def test_channels_before_the_rotated_ones_keep_their_bits():
    x = torch.randn(2, 3, 9).bfloat16()
    assert torch.equal(turn(x, **random_angles(x, 4, torch.float32))[..., :5], x[..., :5])


def test_the_input_is_not_written_to():
    x = torch.randn(2, 3, 4, 6)
    before = x.clone()
    turn(x, **random_angles(x, 4, torch.float32))
    turn_unit(x, **random_angles(x, 4, torch.float32))
    assert torch.equal(x, before)


@pytest.mark.parametrize(("shape", "rotary_dims"), SHAPES)
@pytest.mark.parametrize("inverse", [False, True])
def test_backends_agree(shape, rotary_dims, inverse):
    x = torch.randn(shape, dtype=torch.float64)
    cos_sin = random_angles(x, rotary_dims)
    assert_backends_agree(lambda x, backend: turn(x, **cos_sin, backend=backend, inverse=inverse), x=x)


@pytest.mark.parametrize(("shape", "rotary_dims"), [case for case in SHAPES if len(case[0]) == 4])
def test_backends_agree_on_normalised_queries(shape, rotary_dims):
    x = torch.randn(shape, dtype=torch.float64)
    cos_sin = random_angles(x, rotary_dims)
    assert_backends_agree(lambda x, backend: turn_unit(x, **cos_sin, backend=backend), x=x)


@pytest.mark.parametrize("operation", [turn, turn_unit])
def test_backends_agree_on_non_contiguous_input(operation):
    x = torch.randn(8, 2, 5, 3, dtype=torch.float64).transpose(0, 3)  # [3, 2, 5, 8]
    cos_sin = random_angles(x, 6)
    assert_backends_agree(lambda x, backend: operation(x, **cos_sin, backend=backend), x=x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_are_normalised_over_all_channels_then_rotated(backend):
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    cos_sin = random_angles(x, 4)
    unit = x / (x.square().mean(dim=-1, keepdim=True) + EPS).sqrt()
    torch.testing.assert_close(turn_unit(x, **cos_sin, backend=backend), turn(unit, **cos_sin, backend=backend))


@pytest.mark.parametrize("operation", [turn, turn_unit])
def test_gradients_are_those_of_finite_differences(operation):
    x = torch.randn(1, 2, 2, 6, dtype=torch.float64, requires_grad=True)
    cos_sin = random_angles(x, 4)
    assert torch.autograd.gradcheck(lambda x: operation(x, **cos_sin), (x,))


@pytest.mark.parametrize(("operation", "roundings"), [(turn, 1), (turn_unit, 2)])
def test_bfloat16_rounds_each_stage_once(operation, roundings):
    x = torch.randn(2, 5, 3, 48).bfloat16()
    cos_sin = random_angles(x, 32, torch.float32)
    exact = evaluate(lambda x: operation(x, **cos_sin), x=x.float())
    rounded = evaluate(lambda x: operation(x, **cos_sin), x=x)
    assert rounded["output 0"].dtype == torch.bfloat16
    # A stage rounds to 8 bits, at most 2^-8 of a number; both of a pair add up to sqrt 2 after the rotation.
    # Gradients start from rounded cotangents and, normalised, from the rounded output: as many again.
    wide = {name: value.float() for name, value in rounded.items()}
    allowed = roundings * 2**0.5 * 2**-8
    assert_close({"y": wide["output 0"]}, {"y": exact["output 0"]}, allowed)
    assert_close(wide, exact, 2 * allowed)


@pytest.mark.parametrize("operation", [turn, turn_unit])
def test_two_runs_give_the_same_bits(operation):
    x = torch.randn(2, 50, 3, 48)
    cos_sin = random_angles(x, 32, torch.float32)
    assert_repeatable(lambda x: operation(x, **cos_sin), x=x)


# Keys


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_key_is_normalised_with_its_weight_and_then_rotated(backend):
    x, weight, turn = torch.randn(2, 3, 7).double(), torch.randn(7).double(), torch.randn(2, 3, 2).double()
    scaled = x / (x.square().mean(dim=-1, keepdim=True) + EPS).sqrt() * weight
    cos, sin = turn.cos(), turn.sin()
    a, b = scaled[..., 3::2], scaled[..., 4::2]
    turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(2)
    found = rotate_normed(x, weight, cos, sin, EPS, backend=backend)
    torch.testing.assert_close(found, torch.cat([scaled[..., :3], turned], dim=-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rounded_key_is_what_a_cache_holds_and_its_gradient_passes_through(dtype):
    x, weight = torch.randn(2, 3, 75).to(dtype), torch.randn(75)
    cos_sin = {name: value.float() for name, value in random_angles(x, 4).items()}

    def key(rounds):
        return evaluate(
            lambda x, weight: rotate_normed(x, weight, **cos_sin, eps=EPS, rounds=rounds), x=x, weight=weight
        )

    plain, rounded = key(False), key(True)
    assert torch.equal(rounded.pop("output 0"), round_rows(plain.pop("output 0"), 64, 71))
    assert all(torch.equal(rounded[name], value) for name, value in plain.items())


# Errors

COS = torch.zeros(2, 3, 2)


@pytest.mark.parametrize(
    ("x", "cos", "sin", "message"),
    [
        (torch.zeros(2, 4, 6), COS, COS, r"x has shape \[2, 4, 6\]; expected \[B, T, K\] with B = 2 .*T = 3"),
        (torch.zeros(2, 4, 1, 6), COS, COS, r"x has shape \[2, 4, 1, 6\]; expected \[B, T, H, K\]"),
        (torch.zeros(6), COS, COS, r"x has shape \[6\]; expected \[B, T, H, K\]"),
        (torch.zeros(2, 3, 6), COS, COS[..., :1], r"sin has shape \[2, 3, 1\]; expected \[B, T, r\] with .*r = 2"),
        (torch.zeros(2, 3, 6), COS[0], COS, r"cos has shape \[3, 2\]; expected \[B, T, r\]"),
        (torch.zeros(2, 3, 3), COS, COS, r"cos rotates 4 channels; expected at most the 3 of x"),
    ],
)
def test_shapes_that_do_not_fit_are_errors(x, cos, sin, message):
    with pytest.raises(ValueError, match=message):
        rotate(x, cos, sin)


@pytest.mark.parametrize(
    ("x", "cos", "message"),
    [
        (torch.zeros(2, 3, 6), COS, r"x has shape \[2, 3, 6\]; expected \[B, T, H, K\]"),
        (torch.zeros(2, 4, 1, 6), COS, r"cos has shape \[2, 3, 2\]; expected \[B, T, r\] with .*T = 4"),
    ],
)
def test_queries_that_do_not_fit_are_errors(x, cos, message):
    with pytest.raises(ValueError, match=message):
        rotate_unit(x, cos, COS, EPS)


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.zeros(2, 3, 1, 6), torch.zeros(6), r"x has shape \[2, 3, 1, 6\]; expected \[B, T, K\]"),
        (torch.zeros(2, 3, 6), torch.zeros(5), r"weight has shape \[5\]; expected \[K\] with .*K = 6"),
        (torch.zeros(2, 4, 6), torch.zeros(6), r"cos has shape \[2, 3, 2\]; expected \[B, T, r\] with .*T = 4"),
        (torch.zeros(2, 3, 3), torch.zeros(3), r"cos rotates 4 channels; expected at most the 3 of x"),
    ],
)
def test_keys_that_do_not_fit_are_errors(x, weight, message):
    with pytest.raises(ValueError, match=message):
        rotate_normed(x, weight, COS, COS, EPS)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: rotate(x, COS, COS, backend="cuda"),
        lambda x: turn_unit(x, COS, COS, "cuda"),
        lambda x: rotate_normed(x[:, :, 0], x[0, 0, 0], COS, COS, EPS, backend="cuda"),
    ],
)
def test_an_unknown_backend_is_an_error(call):
    with pytest.raises(ValueError, match="backend is 'cuda'; expected one of reference, portable"):
        call(torch.zeros(2, 3, 1, 6))
