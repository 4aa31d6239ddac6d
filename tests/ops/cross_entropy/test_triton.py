"""The kernel of the loss against float64: losses, gradients in place of logits, slices, and what a token depends on."""

import math

import pytest
import torch

from dsv4.ops.cross_entropy import cross_entropy, portable, reference, triton, triton_logits
from tests.ops.triton_lane import DEVICE, assert_near, poisoned

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # the products are not the interpreter's

# T, V, D: fewer logits than a block, a block and one more, several, one token, one word
SIZES = [(5, 7, 3), (3, triton.BLOCK + 1, 2), (4, 9001, 8), (1, 40, 1), (6, 1, 4)]


def case(T, V, D, dtype=torch.float32, size=1.0):
    """Vectors, targets with the first and the last word among them, and token weights, some of them 0."""
    hidden, weight = (size * torch.randn(T, D)).to(DEVICE, dtype), torch.randn(V, D).to(DEVICE, dtype)
    targets = torch.randint(0, V, (T,))
    targets[0], targets[-1] = V - 1, 0
    token_weights = (torch.rand(T) + 0.5) * (torch.arange(T) % 4 != 2)
    return hidden, weight, targets.to(DEVICE), token_weights.to(DEVICE)


def with_gradients(operation, hidden, weight, targets, token_weights, factor=1.0):
    leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
    loss, nll = operation(*leaves, targets, token_weights)
    return loss.detach(), nll, *torch.autograd.grad(factor * loss, leaves)


def check(given, factor=1.0):
    """All that is computed, over memory full of NaN."""
    hidden, weight, targets, token_weights = given
    exact = hidden.double(), weight.double(), targets, token_weights.double()
    wanted = with_gradients(reference.cross_entropy, *exact, factor)
    with poisoned():
        found = with_gradients(triton.cross_entropy, *given, factor)
    for mine, other in zip(found[:2], wanted[:2], strict=True):
        assert mine.dtype == torch.float32
        assert_near(mine, other, torch.float32)  # logits are float32, whatever they are made of
    for mine, other, vectors in zip(found[2:], wanted[2:], (hidden, weight), strict=True):
        assert mine.dtype == vectors.dtype
        assert_near(mine, other, vectors.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_losses_and_gradients(sizes, dtype):
    check(case(*sizes, dtype), factor=0.5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_slices_add_up(monkeypatch, dtype):
    """Eleven tokens in slices of four, four and three; memory for logits is used again."""
    monkeypatch.setattr(triton_logits, "TOKENS_OF_A_TILE", 2)
    monkeypatch.setattr(triton, "LOGITS_HELD", 4 * 21 + 1)
    assert triton_logits.slice_size(11, 21, triton.LOGITS_HELD) == 4
    check(case(11, 21, 5, dtype))


def test_slices_are_few_and_even():
    V = 129280
    sizes = [triton_logits.slice_size(T, V, triton.LOGITS_HELD) for T in (0, 1, 300, 4096, 4097, 8192, 16384)]
    assert sizes == [1, 1, 300, 4096, 2176, 4096, 4096]
    assert triton_logits.slice_size(300, 1 << 30, triton.LOGITS_HELD) == 128


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs(dtype):
    hidden, weight, targets, token_weights = case(5, 9, 6, dtype)
    cut = hidden.T.contiguous().T, torch.cat([weight, weight], 1)[:, ::2], targets.repeat(2)[::2], token_weights
    assert not any(x.is_contiguous() for x in cut[:3])
    check(cut)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_a_wider_head_is_not_rounded_for_its_logits(dtype):
    hidden, weight, targets, token_weights = case(5, 40, 6, dtype)
    wide = weight.float() * (1 + 1e-3 * torch.rand(40, 6, device=DEVICE))
    exact = hidden.double(), wide.double(), targets, token_weights.double()
    wanted = with_gradients(reference.cross_entropy, *exact)
    found = with_gradients(triton.cross_entropy, hidden, wide, targets, token_weights)
    assert [x.dtype for x in found] == [torch.float32, torch.float32, dtype, torch.float32]
    for mine, other, of in zip(found, wanted, (torch.float32, torch.float32, dtype, dtype), strict=True):
        assert_near(mine, other, of)


def test_a_float32_weight_is_the_sum_of_its_parts():
    size = 2.0 ** torch.randint(-60, 60, (7, 50), device=DEVICE)
    weight = size * torch.randn(7, 50, device=DEVICE)
    weight[0, :6] = torch.tensor([0.0, -0.0, 1 + 2**-23, 3e38, 2**-126, -1.0])
    with poisoned():
        parts = triton_logits.head_of(weight, torch.bfloat16)
    assert torch.equal(triton_logits.rounded_head(parts, torch.bfloat16, 50), weight.bfloat16())
    assert torch.equal(parts.double().view(7, triton_logits.PARTS, 50).sum(dim=1), weight.double())
    weight[1, 2:5] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    parts = triton_logits.head_of(weight, torch.bfloat16).view(7, triton_logits.PARTS, 50)
    assert parts[1, 0, 2:4].tolist() == [torch.inf, -torch.inf]
    assert parts[1, 0, 4].isnan()
    assert not parts[1, 1:, 2:5].any()


def test_every_part_of_a_float32_weight_is_in_the_logits():
    """Logits of 1 and 0: the difference of two weights is in the last of three parts, and 2^20 makes it whole."""
    weight = torch.tensor([[1 + 2**-10 + 2**-20, 1 + 2**-10], [1.0, 1.0]], device=DEVICE)
    hidden = torch.tensor([[2.0**20, -(2.0**20)]], device=DEVICE).bfloat16()
    _, nll = triton.cross_entropy(hidden, weight, torch.zeros(1, device=DEVICE).long(), torch.ones(1, device=DEVICE))
    assert nll.item() == pytest.approx(math.log1p(math.exp(-1)), rel=1e-6)


def test_logits_of_thousands_and_logits_that_are_equal():
    hidden, weight, targets, token_weights = case(5, 300, 3, size=1e3)
    check((hidden, weight, targets, token_weights))
    _, nll = triton.cross_entropy(0 * hidden, weight, targets, token_weights)
    torch.testing.assert_close(nll, torch.full_like(nll, math.log(300)))
    # Logits that differ by the last bit of a large number: their difference is exact.
    weight = torch.tensor([[8192.0], [8191.0], [0.0]], device=DEVICE)
    _, nll = triton.cross_entropy(torch.ones(1, 1, device=DEVICE), weight, targets[:1] * 0 + 1, token_weights[:1])
    assert nll.item() == pytest.approx(1 + math.log1p(math.exp(-1)), rel=1e-6)


def test_a_token_of_weight_zero_teaches_nothing_and_one_that_is_no_number_spoils_its_own_loss():
    hidden, weight, targets, token_weights = case(5, 7, 4)
    _, _, grad_hidden, _ = with_gradients(triton.cross_entropy, hidden, weight, targets, token_weights)
    assert grad_hidden.any(dim=-1).tolist() == (token_weights != 0).tolist()
    hidden[1, 2] = torch.nan
    _, nll = triton.cross_entropy(hidden, weight, targets, token_weights)
    assert nll.isnan().tolist() == [False, True, False, False, False]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_has_the_same_bits_whatever_stands_beside_it(monkeypatch, dtype):
    """Numbers whose products are exact, so that only the kernel's own sums could differ."""
    T, V, D = 9, 5000, 4
    hidden, weight = (torch.randint(-4, 5, (n, D)).to(DEVICE, dtype) / 2 for n in (T, V))
    targets, token_weights = torch.randint(0, V, (T,), device=DEVICE), torch.rand(T, device=DEVICE)
    whole, again = (with_gradients(triton.cross_entropy, hidden, weight, targets, token_weights) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(whole, again, strict=True))
    for now in (slice(0, 1), slice(4, 5), slice(2, 9)):
        part = with_gradients(triton.cross_entropy, hidden[now], weight, targets[now], token_weights[now])
        assert torch.equal(part[1], whole[1][now])
    monkeypatch.setattr(triton_logits, "TOKENS_OF_A_TILE", 2)
    monkeypatch.setattr(triton, "LOGITS_HELD", 1)
    sliced = with_gradients(triton.cross_entropy, hidden, weight, targets, token_weights)
    assert torch.equal(sliced[1], whole[1])


@pytest.mark.parametrize("frozen", [0, 1])
def test_only_what_learns_gets_a_gradient(frozen):
    hidden, weight, targets, token_weights = case(5, 7, 3)
    _, _, *wanted = with_gradients(triton.cross_entropy, hidden, weight, targets, token_weights)
    (hidden, weight)[1 - frozen].requires_grad_()
    loss, nll = triton.cross_entropy(hidden, weight, targets, token_weights)
    assert not nll.requires_grad
    loss.backward()
    assert (hidden, weight)[frozen].grad is None
    assert torch.equal((hidden, weight)[1 - frozen].grad, wanted[1 - frozen])


def test_nothing_is_kept_without_gradients():
    hidden, weight, targets, token_weights = case(5, 7, 3)
    loss, nll, *_ = with_gradients(triton.cross_entropy, hidden, weight, targets, token_weights)
    with torch.no_grad():
        still = triton.cross_entropy(hidden.requires_grad_(), weight, targets, token_weights)
    assert not still[0].requires_grad
    assert torch.equal(still[0], loss)
    assert torch.equal(still[1], nll)


def test_no_tokens():
    hidden, weight = torch.zeros(0, 3, device=DEVICE), torch.randn(7, 3, device=DEVICE)
    with poisoned():
        loss, nll, grad_hidden, grad_weight = with_gradients(
            triton.cross_entropy, hidden, weight, torch.zeros(0, dtype=torch.int64, device=DEVICE), hidden[:, 0]
        )
    assert loss.item() == 0
    assert nll.shape == (0,)
    assert grad_hidden.shape == (0, 3)
    assert torch.equal(grad_weight, torch.zeros_like(weight))


def test_the_operation_takes_the_kernel_and_float64_is_what_portable_makes_of_it():
    given = case(4, 7, 3)
    for mine, other in zip(cross_entropy(*given, backend="unproved"), triton.cross_entropy(*given), strict=True):
        assert torch.equal(mine, other)
    doubles = tuple(x.double() if x.is_floating_point() else x for x in given)
    for mine, other in zip(triton.cross_entropy(*doubles), portable.cross_entropy(*doubles), strict=True):
        assert torch.equal(mine, other)
