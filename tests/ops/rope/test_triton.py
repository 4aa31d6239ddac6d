"""The Triton kernels of the rotation against float64, to the bit over neighbours and runs."""

import pytest
import torch

from dsv4.ops import rope
from dsv4.ops.rmsnorm.reference import rmsnorm
from dsv4.ops.rope import portable, reference
from dsv4.ops.rope import triton as kernels
from dsv4.testing.compare import evaluate
from tests.ops.triton_lane import DEVICE, DTYPES, assert_near, poisoned

EPS = 0.1  # with two channels much of a gradient lies along x, and what is left is held to its own size
# B, T, H, K, pairs: all channels turned, a tail of an even and of an odd channel, more rows than a tile, no rows
SIZES = [(1, 1, 1, 2, 1), (2, 5, 3, 16, 8), (1, 9, 4, 37, 7), (2, 3, 2, 40, 4), (1, 19, 3, 1030, 2), (1, 0, 2, 8, 2)]


def table(B, T, pairs):
    positions = torch.randint(0, 5000, (B, T))
    return [x.to(DEVICE) for x in rope.angles(positions, rope.frequencies(2 * pairs, 10000.0))]


def check(dtype, x, cos, sin, operation, wanted_operation, roundings=1, **weight):
    x, weight = x.to(DEVICE, dtype), {name: w.to(DEVICE) for name, w in weight.items()}
    with poisoned():
        found = evaluate(lambda x, **weight: operation(x, *weight.values(), cos, sin), x=x, **weight)
    wide = {name: given.double() for name, given in {"x": x, **weight}.items()}
    wanted = evaluate(lambda x, **weight: wanted_operation(x, *weight.values(), cos.double(), sin.double()), **wide)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == (weight["weight"].dtype if name == "gradient of weight" else dtype)
        assert found[name].shape == value.shape
        if value.numel():
            assert_near(found[name], value, dtype, roundings)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_rotate(sizes, inverse, dtype):
    B, T, H, K, pairs = sizes
    cos, sin = table(B, T, pairs)

    def turn(x, cos, sin):
        return kernels.rotate(x, cos, sin, inverse)

    def wanted(x, cos, sin):
        return reference.rotate(x, cos, sin, inverse)

    check(dtype, torch.randn(B, T, K), cos, sin, turn, wanted)
    check(dtype, torch.randn(B, T, H, K), cos.unsqueeze(2), sin.unsqueeze(2), turn, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_rotate_unit(sizes, dtype):
    B, T, H, K, pairs = sizes
    cos, sin = (x.unsqueeze(2) for x in table(B, T, pairs))

    def turn(x, cos, sin):
        return kernels.rotate_unit(x, cos, sin, EPS)

    def wanted(x, cos, sin):
        return reference.rotate_unit(x, cos, sin, EPS)

    # Rounded before the rotation and after, and the gradient starts from the rounded output.
    check(dtype, torch.randn(B, T, H, K), cos, sin, turn, wanted, roundings=4)


def normed(x, weight, cos, sin, rounds=False):
    return kernels.rotate_normed(x, weight, cos, sin, EPS, rounds)


def normed_wanted(x, weight, cos, sin):
    return reference.rotate(rmsnorm(x, weight, EPS), cos, sin)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_rotate_normed(sizes, dtype):
    B, T, _, K, pairs = sizes
    x, weight = torch.randn(B, T, K), torch.randn(K).to(dtype if T % 2 else torch.float32)
    check(dtype, x, *table(B, T, pairs), normed, normed_wanted, roundings=4, weight=weight)


def test_each_step_rounds():
    """But for a last bit of an RMS what the operations one by one make of float16."""
    x, weight = torch.randn(3, 5, 40, device=DEVICE).half(), torch.randn(40, device=DEVICE)
    cos, sin = table(3, 5, 20)
    found = normed(x, weight, cos, sin), kernels.rotate_unit(x[:, :, None], cos[:, :, None], sin[:, :, None], EPS)
    wanted = normed_wanted(x, weight, cos, sin), normed_wanted(x, None, cos, sin)[:, :, None]
    for one, other in zip(found, wanted, strict=True):
        assert (one == other).float().mean() > 0.98


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("K", "pairs"), [(200, 10), (20, 3), (6, 3)])
def test_a_key_is_rounded_as_released(K, pairs, dtype):
    """Numbers of size 1 have an RMS of 1 in whatever order their squares are added."""
    x = torch.randint(0, 2, (2, 3, K), device=DEVICE).to(dtype) * 2 - 1
    turn, coded = table(2, 3, pairs), K - 2 * pairs
    weight = torch.randn(K, device=DEVICE) * 2.0 ** torch.randint(-9, 4, (K,), device=DEVICE)
    weight[coded:] *= 64  # which no scale may see
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    with poisoned():
        found = kernels.rotate_normed(*leaves, *turn, 1e-12, True)
    wanted = rope.rotate_normed(*leaves, *turn, 1e-12, rounds=True)
    assert torch.equal(found[..., :coded], wanted[..., :coded])
    assert_near(found, wanted, dtype)
    exact = kernels.rotate_normed(*leaves, *turn, 1e-12, False)
    assert torch.equal(found[..., coded:], exact[..., coded:])
    assert not coded or (found != exact)[..., :coded].float().mean() > 0.5
    grad = torch.randn_like(found)
    rounded, plain = (torch.autograd.grad(y, leaves, grad) for y in (found, exact))
    assert all(torch.equal(*pair) for pair in zip(rounded, plain, strict=True))


def test_non_contiguous_input():
    x = torch.randn(3, 7, 2, 12).transpose(0, 1)[..., ::2]  # [7, 3, 2, 6]
    cos, sin = (x.unsqueeze(2).mT.contiguous().mT for x in table(7, 3, 2))
    wide = torch.stack([cos, cos], dim=-1)[..., 0]
    check(torch.float32, x, wide, sin, lambda *g: kernels.rotate(*g, False), lambda *g: reference.rotate(*g, False))
    check(
        torch.float32, x, wide, sin, lambda *g: kernels.rotate_unit(*g, EPS), lambda *g: reference.rotate_unit(*g, EPS)
    )
    given = x[:, :, 0], wide[:, :, 0], sin[:, :, 0]
    check(torch.float32, *given, normed, normed_wanted, weight=torch.randn(12)[::2])


def test_channels_that_do_not_turn_keep_their_bits():
    x = torch.randn(2, 3, 9, device=DEVICE).half()
    x[0, 0, 0], x[0, 0, 1] = -0.0, torch.inf
    cos, sin = table(2, 3, 2)
    turned = kernels.rotate(x, cos, sin, False)
    assert torch.equal(turned[..., :5].view(torch.int16), x[..., :5].view(torch.int16))


def test_heads_of_very_different_sizes():
    x = (torch.randn(1, 4, 5, 16) * torch.logspace(-5, 5, 5)[:, None]).to(DEVICE)
    cos, sin = (x.unsqueeze(2) for x in table(1, 4, 4))
    found = kernels.rotate_unit(x, cos, sin, EPS)
    wanted = reference.rotate_unit(x.double(), cos.double(), sin.double(), EPS)
    weight, turn = torch.randn(16, device=DEVICE), [x[:, :, 0].expand(-1, 5, -1) for x in (cos[:, :1], sin[:, :1])]
    keys = normed(x[:, 0], weight, *turn)
    wanted_keys = normed_wanted(x[:, 0].double(), weight.double(), *(x.double() for x in turn))
    for head in range(5):
        assert_near(found[:, :, head], wanted[:, :, head], torch.float32)
        assert_near(keys[:, head], wanted_keys[:, head], torch.float32)


def test_a_token_is_the_same_alone():
    x, grad = torch.randn(2, 1, 17, 3, 300, device=DEVICE)
    cos, sin = (x.unsqueeze(2) for x in table(1, 17, 5))

    def all_of(tokens):
        leaf = x[:, tokens].clone().requires_grad_()
        ys = (
            kernels.rotate(leaf, cos[:, tokens], sin[:, tokens], True),
            kernels.rotate_unit(leaf, cos[:, tokens], sin[:, tokens], EPS),
            normed(leaf[:, :, 0], grad[0, 0, 0], cos[:, tokens, 0], sin[:, tokens, 0], rounds=True),
        )
        grads = grad[:, tokens], grad[:, tokens], grad[:, tokens, 0]
        return *ys, *(torch.autograd.grad(*one)[0] for one in zip(ys, [leaf] * 3, grads, strict=True))

    whole = all_of(slice(None))
    for tokens in (slice(0, 1), slice(6, 7), slice(3, 16)):
        for all_tokens, some in zip(whole, all_of(tokens), strict=True):
            assert torch.equal(all_tokens[:, tokens], some)


def test_what_the_kernel_does_not_take_goes_to_the_portable_path(monkeypatch):
    for name in ("_Rotate", "_RotateUnit", "_RotateNormed"):
        monkeypatch.setattr(getattr(kernels, name), "apply", lambda *_: pytest.fail("the kernel ran"))
    x = torch.randn(1, 2, 3, 8, dtype=torch.float64)
    cos, sin = (x.cpu().unsqueeze(2) for x in table(1, 2, 2))
    assert torch.equal(kernels.rotate(x, cos, sin, True), portable.rotate(x, cos, sin, True))
    assert torch.equal(kernels.rotate_unit(x, cos, sin, EPS), portable.rotate_unit(x, cos, sin, EPS))
    given = x[:, :, 0], x[0, 0, 0], cos[:, :, 0], sin[:, :, 0], EPS
    assert torch.equal(rope.rotate_normed(*given, backend="unproved"), rope.rotate_normed(*given))
