"""The kernels of pooling against float64: values, every gradient, entries without a block before, strides, tails."""

import pytest
import torch
from torch.nn.functional import pad

from dsv4.ops.compress import portable, reference, triton
from tests.ops.triton_lane import DEVICE, DTYPES, IS_INTERPRETED, TOLERANCE, poisoned

# B, C, m, K: m a power of two and not, K of one block of channels and of several, one entry, one token
SHAPES = [(2, 3, 4, 20), (1, 5, 3, 17), (3, 1, 2, 5), (2, 2, 1, 1), (1, 3, 128, 37), (1, 2, 4, 300)]
# A dtype is rounded to in the same places whatever the sizes: the interpreter, which is slow, sees each of them once.
CASES = [(s, d) for d in DTYPES for s in SHAPES if d == torch.float32 or s == SHAPES[1] or not IS_INTERPRETED]


def inputs(B, C, m, width, dtype=torch.float32):
    """Values of magnitudes that differ by channel, and scores far from 0."""
    kv = torch.randn(B, C, m, width) * 10.0 ** torch.randint(-2, 3, (width,))
    score = 2 * torch.randn(B, C, m, width) + 50 * torch.randn(B, 1, 1, 1)
    return kv.to(DEVICE, dtype), score.to(DEVICE, dtype)


def firsts(B, C):
    """Block 0 of each row, and another one that no two neighbouring rows share."""
    row, block = torch.arange(B)[:, None], torch.arange(C)
    return ((block == 0) | ((row + block) % 3 == 2)).to(DEVICE)


def with_gradients(operation, kv, score, grad, *rest):
    kv, score = (x.detach().clone().requires_grad_() for x in (kv, score))
    entries = operation(kv, score, *rest)
    return entries.detach(), *torch.autograd.grad(entries, (kv, score), grad.to(entries.dtype))


def check(name, kv, score, *rest):
    """All that a kernel computes, over memory full of NaN, and again from inputs that are strided."""
    K = kv.shape[-1] // 2 if rest else kv.shape[-1]
    grad = torch.randn(*kv.shape[:2], K).to(kv)
    doubles = (x.double() for x in (kv, score, grad))
    wanted = with_gradients(getattr(reference, name), *doubles, *rest)
    with poisoned():
        found = with_gradients(getattr(triton, name), kv, score, grad, *rest)
    for mine, other, size in zip(found, wanted, sizes(kv, grad), strict=True):
        assert (mine.dtype, mine.shape) == (kv.dtype, other.shape)
        # Weights are right to a few roundings, of which a difference of two values may leave nothing else.
        assert ((mine.double() - other).abs() <= 4 * TOLERANCE[kv.dtype] * size).all()


def sizes(kv, grad):
    """Of what entries, the gradients of values, and those of scores are made, by channel."""
    parts = kv.shape[-1] // grad.shape[-1]
    values = kv.abs().double().flatten(0, 2).amax(0).view(parts, -1).amax(0)  # [K]
    grads = grad.abs().double().flatten(0, 1).amax(0)
    return values, grads.repeat(parts), (values * grads).repeat(parts)


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_plain_entries_and_their_gradients(shape, dtype):
    check("pool_plain", *inputs(*shape, dtype=dtype))


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_overlapped_entries_and_their_gradients(shape, dtype):
    B, C, m, K = shape
    check("pool_overlapped", *inputs(B, C, m, 2 * K, dtype=dtype), firsts(B, C))


def test_an_entry_that_is_first_gives_nothing_to_the_block_before():
    kv, score = inputs(1, 4, 2, 6)
    is_first = torch.tensor([[True, False, True, False]], device=DEVICE)
    kv[0, 1, :, :3] = torch.nan  # the first halves of block 1 are nobody's
    _, dkv, dscore = with_gradients(triton.pool_overlapped, kv, score, torch.ones(1, 4, 3, device=DEVICE), is_first)
    for gradient in (dkv, dscore):
        assert not gradient[0, [1, 3], :, :3].any()
        assert gradient[0, [0, 2], :, :3].all()
        assert gradient[..., 3:].isfinite().all()


@pytest.mark.parametrize("overlap", [False, True])
def test_strided_inputs_give_the_same_bits(overlap):
    """Blocks, tokens and channels cut out of more of them, as tokens that fill no block are; channels far apart."""
    kv, score = inputs(2, 3, 4, 12)
    rest = (firsts(2, 3),) if overlap else ()
    operation = triton.pool_overlapped if overlap else triton.pool_plain
    grad = torch.randn(2, 3, 6 if overlap else 12, device=DEVICE)
    wanted = with_gradients(operation, kv, score, grad, *rest)
    longer = [pad(x, (0, 3, 0, 1, 0, 2), value=torch.nan)[:, :3, :4, :12] for x in (kv, score)]
    apart = [x.mT.contiguous().mT for x in (kv, score)]
    assert not any(x.is_contiguous() for x in (*longer, *apart))
    for kv_given, score_given in ((longer[0], score), (kv, longer[1]), apart):
        leaves = [x.detach().requires_grad_() for x in (kv_given, score_given)]
        entries = operation(*leaves, *rest)
        found = (entries.detach(), *torch.autograd.grad(entries, leaves, grad.mT.contiguous().mT))
        assert all(torch.equal(mine, other) for mine, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("overlap", [False, True])
def test_an_entry_has_the_same_bits_whatever_stands_beside_it(overlap):
    kv, score = inputs(3, 5, 4, 12)
    if overlap:
        first = torch.zeros(3, 5, dtype=torch.bool, device=DEVICE)
        first[:, 0] = True
        whole, again = (triton.pool_overlapped(kv, score, first) for _ in range(2))
        one = triton.pool_overlapped(kv[1:2, 2:4], score[1:2, 2:4], first[1:2, :2])[0, 1]
        assert torch.equal(triton.pool_overlapped(kv, score, torch.zeros_like(first)), whole)  # block 0 has none before
    else:
        whole, again = (triton.pool_plain(kv, score) for _ in range(2))
        one = triton.pool_plain(kv[1:2, 3:4], score[1:2, 3:4])[0, 0]
    assert torch.equal(whole, again)
    assert torch.equal(whole[1, 3], one)


def test_scores_far_apart_and_far_from_zero():
    kv, score = inputs(1, 2, 4, 16)
    score = score + torch.tensor([-1e4, 0, 1e4, 3e4], device=DEVICE)[:, None]
    assert torch.equal(triton.pool_plain(kv, score), kv[:, :, 3])


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_no_entries(shape):
    kv = torch.zeros(*shape, 4, 6, device=DEVICE, requires_grad=True)
    plain = triton.pool_plain(kv, kv)
    overlapped = triton.pool_overlapped(kv, kv, torch.zeros(shape, dtype=torch.bool, device=DEVICE))
    assert (plain.shape, overlapped.shape) == ((*shape, 6), (*shape, 3))
    (plain.sum() + overlapped.sum()).backward()
    assert kv.grad.shape == kv.shape


def test_float64_is_what_portable_makes_of_it():
    kv, score = (x.double() for x in inputs(2, 3, 4, 6))
    first = firsts(2, 3)
    assert torch.equal(triton.pool_plain(kv, score), portable.pool_plain(kv, score))
    assert torch.equal(triton.pool_overlapped(kv, score, first), portable.pool_overlapped(kv, score, first))


def test_scores_of_the_block_before_that_are_far_higher():
    kv, score = inputs(1, 2, 4, 8)
    score[0, 0, 2, :4] += 1e4
    first = torch.tensor([[True, False]], device=DEVICE)
    assert torch.equal(triton.pool_overlapped(kv, score, first)[0, 1], kv[0, 0, 2, :4])
