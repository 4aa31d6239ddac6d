"""The kernel of the divergence against float64: values, gradients in place of logits, slices, what a token hangs on."""

import math

import pytest
import torch

from dsv4.ops.cross_entropy import triton_logits
from dsv4.ops.vocabulary_kl import portable, reference, triton, vocabulary_kl
from tests.ops.triton_lane import DEVICE, assert_near, poisoned

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # the products are not the interpreter's

# T, V, D, E: fewer logits than a block, a block and one more, several, one token, one word
SIZES = [(5, 7, 3, 4), (3, triton.BLOCK + 1, 2, 2), (4, 3 * triton.BLOCK - 5, 8, 3), (1, 40, 1, 2), (6, 1, 4, 3)]


def case(T, V, D, E, dtype=torch.float32, size=1.0, taught=1.0):
    """Vectors of student and teacher, and token weights, some of them 0."""
    of_student = ((size * torch.randn(T, D)).to(DEVICE, dtype), torch.randn(V, D).to(DEVICE, dtype))
    of_teacher = ((taught * torch.randn(T, E)).to(DEVICE, dtype), torch.randn(V, E).to(DEVICE, dtype))
    token_weights = (torch.rand(T) + 0.5) * (torch.arange(T) % 4 != 2)
    return *of_student, *of_teacher, token_weights.to(DEVICE)


def with_gradients(operation, hidden, weight, *given, factor=1.0):
    leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
    loss, kl = operation(*leaves, *given)
    return loss.detach(), kl, *torch.autograd.grad(factor * loss, leaves)


def check(given, factor=1.0, room=1.0):
    """All that is computed, over memory full of NaN."""
    wanted = with_gradients(reference.vocabulary_kl, *(x.double() for x in given), factor=factor)
    with poisoned():
        found = with_gradients(triton.vocabulary_kl, *given, factor=factor)
    for mine, other in zip(found[:2], wanted[:2], strict=True):
        assert mine.dtype == torch.float32
        assert_near(mine, other, torch.float32)  # logits are float32, whatever they are made of
    for mine, other, vectors in zip(found[2:], wanted[2:], given, strict=False):
        assert mine.dtype == vectors.dtype
        assert_near(mine, other, vectors.dtype, room)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_divergences_and_gradients(sizes, dtype):
    check(case(*sizes, dtype), factor=0.5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_slices_add_up(monkeypatch, dtype):
    """Eleven tokens in slices of four, four and three; memory for logits is used again."""
    monkeypatch.setattr(triton_logits, "TOKENS_OF_A_TILE", 2)
    monkeypatch.setattr(triton, "LOGITS_HELD", 4 * 21 + 1)
    check(case(11, 21, 5, 3, dtype))


def test_strided_inputs():
    hidden, weight, taught, teacher_weight, token_weights = case(5, 9, 6, 4, torch.float16)
    cut = (
        hidden.T.contiguous().T,
        torch.cat([weight, weight], 1)[:, ::2],
        torch.cat([taught, taught])[::2],
        teacher_weight.T.contiguous().T,
        token_weights.repeat(2)[::2],
    )
    assert not any(x.is_contiguous() for x in (*cut[:2], *cut[3:]))
    check(cut)


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32, torch.bfloat16, torch.float32),
    ],
)
def test_each_model_has_its_dtypes_and_a_wider_head_is_not_rounded_for_its_logits(dtypes):
    given = case(5, 40, 6, 4)
    given = (*(x.to(dtype) for x, dtype in zip(given, dtypes, strict=False)), given[-1])
    wanted = with_gradients(reference.vocabulary_kl, *(x.double() for x in given))
    found = with_gradients(triton.vocabulary_kl, *given)
    assert [x.dtype for x in found] == [torch.float32, torch.float32, *dtypes[:2]]
    for mine, other, of in zip(found, wanted, (torch.float32, torch.float32, dtypes[0], dtypes[0]), strict=True):
        assert_near(mine, other, of)


@pytest.mark.parametrize(("size", "taught"), [(1e3, 1.0), (1.0, 1e3), (1e3, 1e3), (1e-3, 1e-3)])
def test_logits_of_thousands_and_of_thousandths(size, taught):
    """What float32 leaves is a part in 1e-7 of the logarithms of likelihoods, of which divergences are differences."""
    given = case(5, triton.BLOCK + 300, 3, 2, size=size, taught=taught)
    _, kl, *grads = with_gradients(triton.vocabulary_kl, *given)
    _, exact, *wanted = with_gradients(reference.vocabulary_kl, *(x.double() for x in given))
    largest = max(1.0, float(exact.max()))
    torch.testing.assert_close(kl.double(), exact, rtol=0, atol=1e-6 * largest)
    for mine, other, of in zip(grads, wanted, (given[1], given[0]), strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=0, atol=1e-6 * largest * float(of.abs().max()))


def test_peaks_that_rise_and_fall_along_a_row():
    """Every lane meets its peak late in one model and early in the other, and large offsets that mean nothing."""
    V = 3 * triton.BLOCK + 17
    place = torch.arange(V, device=DEVICE) / V
    weight, teacher_weight = torch.stack([30 * place, 0 * place], 1), torch.stack([5 - 40 * place, place - place], 1)
    offset = torch.tensor([[1.0, 0.0]], device=DEVICE)
    token_weights = torch.ones(1, device=DEVICE)
    check((offset, weight, offset, teacher_weight, token_weights), room=5)  # a gradient is what 37 less 37 leaves
    moved = (offset, weight + torch.tensor([4096.0, 0], device=DEVICE), offset, teacher_weight, token_weights)
    _, kl = triton.vocabulary_kl(*moved)
    assert kl.item() == pytest.approx(triton.vocabulary_kl(*moved[:1], weight, *moved[2:])[1].item(), rel=1e-4)


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    hidden, weight, _, _, token_weights = case(5, 2 * triton.BLOCK, 3, 3)
    found = with_gradients(triton.vocabulary_kl, hidden, weight, hidden, weight, token_weights)
    assert not any(x.any() for x in found)


def test_a_likelihood_that_is_0_as_a_number_costs_its_logarithm():
    one = torch.ones(1, 1, device=DEVICE)
    sure, torn = torch.tensor([[0.0], [-2000.0]], device=DEVICE), torch.zeros(2, 1, device=DEVICE)
    for student, teacher, wanted in ((torn, sure, 1000 - math.log(2)), (sure, torn, math.log(2))):
        _, kl, *grads = with_gradients(triton.vocabulary_kl, one, student, one, teacher, one[0])
        assert kl.item() == pytest.approx(wanted, rel=1e-6)
        assert all(grad.isfinite().all() for grad in grads)


def test_a_token_of_weight_zero_teaches_nothing_and_one_that_is_no_number_spoils_its_own():
    hidden, weight, *given = case(5, 7, 4, 3)
    _, _, grad_hidden, _ = with_gradients(triton.vocabulary_kl, hidden, weight, *given)
    assert grad_hidden.any(dim=-1).tolist() == (given[-1] != 0).tolist()
    hidden[1, 2] = torch.nan
    given[0][3, 1] = torch.nan
    _, kl = triton.vocabulary_kl(hidden, weight, *given)
    assert kl.isnan().tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_a_token_has_the_same_bits_whatever_stands_beside_it(monkeypatch, dtype):
    """Numbers whose products are exact, so that only the kernel's own sums could differ."""
    T, V = 9, triton.BLOCK + 900
    hidden, weight, taught, teacher_weight = (
        torch.randint(-4, 5, shape).to(DEVICE, dtype) / 2 for shape in ((T, 4), (V, 4), (T, 3), (V, 3))
    )
    token_weights = torch.rand(T, device=DEVICE)

    def run(now=slice(None)):
        return with_gradients(
            triton.vocabulary_kl, hidden[now], weight, taught[now], teacher_weight, token_weights[now]
        )

    whole, again = run(), run()
    assert all(torch.equal(x, y) for x, y in zip(whole, again, strict=True))
    for now in (slice(0, 1), slice(4, 5), slice(2, 9)):
        assert torch.equal(run(now)[1], whole[1][now])
    monkeypatch.setattr(triton_logits, "TOKENS_OF_A_TILE", 2)
    monkeypatch.setattr(triton, "LOGITS_HELD", 1)
    assert torch.equal(run()[1], whole[1])


@pytest.mark.parametrize("frozen", [0, 1])
def test_only_what_learns_gets_a_gradient(frozen):
    hidden, weight, *given = case(5, 7, 3, 4)
    _, _, *wanted = with_gradients(triton.vocabulary_kl, hidden, weight, *given)
    (hidden, weight)[1 - frozen].requires_grad_()
    loss, kl = triton.vocabulary_kl(hidden, weight, *given)
    assert not kl.requires_grad
    loss.backward()
    assert (hidden, weight)[frozen].grad is None
    assert torch.equal((hidden, weight)[1 - frozen].grad, wanted[1 - frozen])
    with torch.no_grad():
        still = triton.vocabulary_kl(hidden, weight, *given)
    assert not still[0].requires_grad
    assert torch.equal(still[0], loss)
    assert torch.equal(still[1], kl)


def test_no_tokens():
    hidden, weight, *given = case(0, 7, 3, 2)
    with poisoned():
        loss, kl, grad_hidden, grad_weight = with_gradients(triton.vocabulary_kl, hidden, weight, *given)
    assert loss.item() == 0
    assert kl.shape == (0,)
    assert grad_hidden.shape == (0, 3)
    assert torch.equal(grad_weight, torch.zeros_like(weight))


def test_the_operation_takes_the_kernel_and_float64_is_what_portable_makes_of_it():
    given = case(4, 7, 3, 5)
    for mine, other in zip(vocabulary_kl(*given, backend="unproved"), triton.vocabulary_kl(*given), strict=True):
        assert torch.equal(mine, other)
    doubles = tuple(x.double() for x in given)
    for mine, other in zip(triton.vocabulary_kl(*doubles), portable.vocabulary_kl(*doubles), strict=True):
        assert torch.equal(mine, other)
