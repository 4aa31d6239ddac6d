"""The Triton kernels of the rotation against float64, to the bit over neighbours and runs."""

import pytest
import torch

from dsv4.ops import rope
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


def check(dtype, x, cos, sin, operation, wanted_operation, roundings=1):
    x = x.to(DEVICE, dtype)
    with poisoned():
        found = evaluate(lambda x: operation(x, cos, sin), x=x)
    wanted = evaluate(lambda x: wanted_operation(x, cos.double(), sin.double()), x=x.double())
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == dtype
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


def test_non_contiguous_input():
    x = torch.randn(3, 7, 2, 12).transpose(0, 1)[..., ::2]  # [7, 3, 2, 6]
    cos, sin = (x.unsqueeze(2).mT.contiguous().mT for x in table(7, 3, 2))
    wide = torch.stack([cos, cos], dim=-1)[..., 0]
    check(torch.float32, x, wide, sin, lambda *g: kernels.rotate(*g, False), lambda *g: reference.rotate(*g, False))
    check(
        torch.float32, x, wide, sin, lambda *g: kernels.rotate_unit(*g, EPS), lambda *g: reference.rotate_unit(*g, EPS)
    )


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
    for head in range(5):
        assert_near(found[:, :, head], wanted[:, :, head], torch.float32)


def test_a_token_is_the_same_alone():
    x, grad = torch.randn(2, 1, 17, 3, 300, device=DEVICE)
    cos, sin = (x.unsqueeze(2) for x in table(1, 17, 5))

    def all_of(tokens):
        leaf = x[:, tokens].clone().requires_grad_()
        ys = (
            kernels.rotate(leaf, cos[:, tokens], sin[:, tokens], True),
            kernels.rotate_unit(leaf, cos[:, tokens], sin[:, tokens], EPS),
        )
        return *ys, *(torch.autograd.grad(y, leaf, grad[:, tokens])[0] for y in ys)

    whole = all_of(slice(None))
    for tokens in (slice(0, 1), slice(6, 7), slice(3, 16)):
        for all_tokens, some in zip(whole, all_of(tokens), strict=True):
            assert torch.equal(all_tokens[:, tokens], some)


def test_what_the_kernel_does_not_take_goes_to_the_portable_path(monkeypatch):
    for name in ("_Rotate", "_RotateUnit"):
        monkeypatch.setattr(getattr(kernels, name), "apply", lambda *_: pytest.fail("the kernel ran"))
    x = torch.randn(1, 2, 3, 8, dtype=torch.float64)
    cos, sin = (x.cpu().unsqueeze(2) for x in table(1, 2, 2))
    assert torch.equal(kernels.rotate(x, cos, sin, True), portable.rotate(x, cos, sin, True))
    assert torch.equal(kernels.rotate_unit(x, cos, sin, EPS), portable.rotate_unit(x, cos, sin, EPS))
