"""The indexer's loss: in loops over attention's own probabilities, its two forms, its memory."""

import itertools
import math

import pytest
import torch

from dsv4.ops.attend import Entries, attend
from dsv4.ops.indexer_kl import indexer_kl, portable
from dsv4.testing.compare import assert_backends_agree, assert_repeatable, evaluate
from dsv4.testing.memory import largest_tensor, saved_elements

BACKENDS = ["reference", "portable"]
KINDS = ["interval", "picked"]
# B, T, C, I, J, H, K
SIZES = [(1, 1, 1, 1, 1, 1, 1), (2, 7, 5, 3, 4, 2, 6), (1, 30, 17, 2, 3, 5, 4), (3, 4, 40, 4, 1, 1, 7)]
EMPTY = [(2, 3, 0, 2, 4, 3, 5), (2, 0, 6, 2, 4, 3, 5)]
SMALL_SLICES = [{"SCORES_HELD": 1, "GATHERED_HELD": 1}, {"SCORES_HELD": 300, "GATHERED_HELD": 90}]
SCALE = 0.7


def student_of(B, T, C, I, J, dtype=torch.float64):  # noqa: E741
    return {
        "index_q": torch.randn(B, T, I, J, dtype=dtype),
        "index_k": torch.randn(B, C, J, dtype=dtype),
        "index_weights": torch.randn(B, T, I, dtype=dtype),
    }


def seen(kind, B, T, C):
    """What queries see, some of them nothing."""
    if kind == "picked":
        picked = torch.rand(B, T, C).argsort(dim=-1)[..., : max(1, C // 2)].sort(dim=-1).values
        picked = picked.masked_fill(torch.rand(picked.shape) < 0.3, -1)
        return {"picked": picked.masked_fill(torch.rand(B, T, 1) < 0.2, -1)}
    begin = torch.randint(0, max(1, C), (B, T))
    return {"begin": begin, "end": begin + torch.randint(0, C + 1, (B, T))}


def causal(T, ratio, B=1):
    end = ((torch.arange(T) + 1) // ratio).expand(B, T)
    return {"begin": torch.zeros_like(end), "end": end}


def teacher_of(kind, B, T, C, H, K, dtype=torch.float64):
    """Queries, entries and a log-sum-exp as attention gives it, with a window of 3 tokens and a sink."""
    q, values = torch.randn(B, T, H, K, dtype=dtype), torch.randn(B, C, K, dtype=dtype)
    kv, sink = torch.randn(B, T, K, dtype=dtype), torch.randn(H, dtype=torch.promote_types(dtype, torch.float32))
    entries, begin = Entries(values, **seen(kind, B, T, C)), torch.zeros(B, T, dtype=torch.int64)
    _, log_sum_exp = attend(q, kv, sink, begin, entries, window=3, scale=SCALE)
    return {"q": q, "entries": entries, "log_sum_exp": log_sum_exp}


def case(kind, B, T, C, I, J, H, K, dtype=torch.float64):  # noqa: E741
    """What learns; and what teaches, with weights, some of them 0."""
    query_weights = torch.rand(B, T, dtype=torch.promote_types(dtype, torch.float32)) * (torch.rand(B, T) < 0.8)
    teaches = teacher_of(kind, B, T, C, H, K, dtype) | {"query_weights": query_weights}
    return student_of(B, T, C, I, J, dtype), teaches


def operation(teaches):
    def run(backend="portable", **learns):
        return indexer_kl(**learns, **teaches, scale=SCALE, backend=backend)

    return run


# The formula, with the teacher read off the output of attention


def attention_probabilities(q, kv, sink, entries, window):
    """[B, T, H, C]: a channel for each entry, 1 in it alone and 0 in queries, comes out as its probability."""
    C, K = entries.values.shape[1:]
    marks = torch.eye(C, dtype=q.dtype).expand(len(q), C, C)
    q, kv = (torch.nn.functional.pad(x, (0, C)) for x in (q, kv))
    marked = entries._replace(values=torch.cat([entries.values, marks], dim=-1))
    begin = torch.zeros(q.shape[:2], dtype=torch.int64)
    out, log_sum_exp = attend(q, kv, sink, begin, marked, window=window, scale=SCALE, backend="reference")
    return out[..., K:], log_sum_exp


def loop_score(index_q, index_k, index_weights, b, t, c):
    total = 0.0
    for head, weight in enumerate(index_weights[b, t].tolist()):
        dot = sum(x * y for x, y in zip(index_q[b, t, head].tolist(), index_k[b, c].tolist(), strict=True))
        total += weight * max(dot, 0.0)
    return total


def loop_kl(probabilities, scores):
    """probabilities: by head, of the entries seen; scores: of these entries. Returns both divergences."""
    if not scores:
        return 0.0, 0.0
    mass = [sum(head[c] for head in probabilities) for c in range(len(scores))]
    teacher = [m / sum(mass) for m in mass]
    student = [math.exp(s) / sum(map(math.exp, scores)) for s in scores]
    kl = sum(p * math.log(p / r) for p, r in zip(teacher, student, strict=True))
    return kl, sum(p * math.log(p * len(scores)) for p in teacher)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_formula_in_loops_over_the_probabilities_of_attention(backend, kind):
    B, T, C, H, K = 2, 7, 5, 3, 4
    learns, query_weights = student_of(B, T, C, 6, 2), torch.rand(B, T, dtype=torch.float64)
    q, kv, sink = (torch.randn(*s, dtype=torch.float64) for s in ((B, T, H, K), (B, T, K), (H,)))
    entries = Entries(torch.randn(B, C, K, dtype=torch.float64), **seen(kind, B, T, C))
    probabilities, log_sum_exp = attention_probabilities(q, kv, sink, entries, window=3)
    loss, kl, uniform_kl = indexer_kl(
        **learns, q=q, entries=entries, log_sum_exp=log_sum_exp, query_weights=query_weights, scale=SCALE,
        backend=backend,
    )  # fmt: skip
    total, some_see_nothing = 0.0, False
    for b, t in itertools.product(range(B), range(T)):
        picked, begin, end = (None if x is None else x[b, t].tolist() for x in entries[1:])
        visible = [c for c in picked if c >= 0] if picked is not None else list(range(begin, min(end, C)))
        by_head = [[probabilities[b, t, h, c].item() for c in visible] for h in range(H)]
        wanted, uniform = loop_kl(by_head, [loop_score(**learns, b=b, t=t, c=c) for c in visible])
        assert kl[b, t].item() == pytest.approx(wanted, rel=1e-10, abs=1e-12)
        assert uniform_kl[b, t].item() == pytest.approx(uniform, rel=1e-10, abs=1e-12)
        total, some_see_nothing = total + query_weights[b, t].item() * wanted, some_see_nothing or not visible
    assert loss.item() == pytest.approx(total, rel=1e-10)
    assert some_see_nothing


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_head_that_looks_at_the_window_says_little(backend):
    # Head 0 would choose entry 0 and head 1 entry 1; but head 0 gives the window e^5 times what it gives its entry.
    q, values = torch.eye(2).view(1, 1, 2, 2), torch.tensor([[[3.0, 0.0], [0.0, 3.0]]])
    share_0, share_1 = 1 / (1 + math.exp(5)), 0.5
    log_sum_exp = torch.tensor([[[3 - math.log(share_0), 3 - math.log(share_1)]]])
    entries = Entries(values, picked=torch.tensor([[[0, 1]]]))
    one = torch.ones(1, 1)
    # A student who knows the answer: mass of an entry is the share of its head, and e^-3 of the other's.
    mass = torch.tensor([share_0 + share_1 * math.exp(-3), share_1 + share_0 * math.exp(-3)])
    scores = (mass.log() - mass.log().min()).view(1, 1, 1, 2)
    _, kl, _ = indexer_kl(
        scores, torch.eye(2)[None], one[..., None], q, entries, log_sum_exp, one, scale=1.0, backend=backend
    )
    assert kl.item() == pytest.approx(0, abs=1e-6)
    # The softmax over entries alone, where both heads count the same, is far from it.
    _, wrong, _ = indexer_kl(
        0 * scores, torch.eye(2)[None], one[..., None], q, entries, log_sum_exp, one, scale=1.0, backend=backend
    )
    assert wrong.item() > 0.4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_indifferent_student_is_the_uniform_one(backend, kind):
    learns, teaches = case(kind, *SIZES[1])
    _, kl, uniform_kl = operation(teaches)(**learns | {"index_weights": 0 * learns["index_weights"]}, backend=backend)
    torch.testing.assert_close(kl, uniform_kl, rtol=0, atol=1e-12)
    assert kl.max() > 0.01


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_student_who_knows_has_nothing_to_learn(backend, kind):
    B, T, C = 2, 6, 5
    teaches = teacher_of(kind, B, T, C, 3, 4) | {"query_weights": torch.ones(B, T, dtype=torch.float64)}
    scores = torch.einsum("bthk,bck->bthc", teaches["q"], teaches["entries"].values) * SCALE
    mass = (scores - teaches["log_sum_exp"][..., None]).logsumexp(dim=2)  # [B, T, C]
    learns = {
        "index_q": (mass + 100)[:, :, None],  # an entry's score is a channel of the query
        "index_k": torch.eye(C, dtype=torch.float64).expand(B, C, C),
        "index_weights": torch.ones(B, T, 1, dtype=torch.float64),
    }
    result = evaluate(lambda **given: operation(teaches)(**given, backend=backend), **learns)
    for name in ("output 0", "output 1", *(f"gradient of {name}" for name in learns)):
        assert result[name].abs().max() < 1e-10, name


# Implementations


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [*SIZES, *EMPTY])
def test_backends_agree(kind, sizes):
    learns, teaches = case(kind, *sizes)
    assert_backends_agree(operation(teaches), **learns)


@pytest.mark.parametrize("held", SMALL_SLICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SIZES)
def test_backends_agree_in_small_slices(monkeypatch, held, kind, sizes):
    for name, value in held.items():
        monkeypatch.setattr(portable, name, value)
    learns, teaches = case(kind, *sizes)
    assert_backends_agree(operation(teaches), **learns)


def test_backends_agree_when_queries_pick_from_no_places():
    learns, teaches = case("picked", *SIZES[1])
    none = teaches["entries"]._replace(picked=torch.zeros(2, 7, 0, dtype=torch.int64))
    assert_backends_agree(operation(teaches | {"entries": none}), **learns)


@pytest.mark.parametrize("kind", KINDS)
def test_backends_agree_on_non_contiguous_input(kind):
    B, T, C, I, J, H, K = sizes = SIZES[1]  # noqa: E741
    _, teaches = case(kind, *sizes)
    learns = student_of(T, B, C, I, J)
    learns = {n: x.transpose(0, 1) for n, x in learns.items()} | {"index_k": student_of(B, T, C, I, 2 * J)["index_k"]}
    learns["index_k"] = learns["index_k"][..., ::2]
    teaches["q"] = torch.randn(B, H, T, K, dtype=torch.float64).transpose(1, 2)
    wide = torch.randn(B, C, 2 * K, dtype=torch.float64)
    teaches["entries"] = teaches["entries"]._replace(values=wide[..., 1::2])
    assert_backends_agree(operation(teaches), **learns)


@pytest.mark.parametrize("frozen", ["index_q", "index_k", "index_weights"])
def test_backends_agree_when_one_input_does_not_learn(frozen):
    learns, teaches = case("interval", *SIZES[1])
    fixed = {frozen: learns.pop(frozen)}
    assert_backends_agree(lambda backend, **given: operation(teaches)(backend, **given, **fixed), **learns)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind):
    learns, teaches = case(kind, 1, 4, 3, 2, 3, 2, 2)
    names, leaves = list(learns), [value.requires_grad_() for value in learns.values()]
    run = operation(teaches)
    assert torch.autograd.gradcheck(lambda *given: run(**dict(zip(names, given, strict=True)))[0], leaves)


def test_gradients_scale_with_the_gradient_of_the_loss():
    learns, teaches = case("picked", *SIZES[1])
    leaves = {name: value.requires_grad_() for name, value in learns.items()}
    once, thrice = (torch.autograd.grad(f * operation(teaches)(**leaves)[0], leaves.values()) for f in (1, 3))
    for one, three in zip(once, thrice, strict=True):
        torch.testing.assert_close(three, 3 * one)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_only_the_loss_carries_a_gradient_and_only_to_the_student(backend, kind):
    learns, teaches = case(kind, *SIZES[1])
    leaves = {name: value.requires_grad_() for name, value in learns.items()}
    for name in ("q", "log_sum_exp"):
        teaches[name].requires_grad_()
    teaches["entries"].values.requires_grad_()
    loss, kl, uniform_kl = operation(teaches)(**leaves, backend=backend)
    assert not kl.requires_grad
    assert not uniform_kl.requires_grad
    loss.backward()
    assert all(leaf.grad.any() for leaf in leaves.values())
    assert teaches["q"].grad is teaches["log_sum_exp"].grad is teaches["entries"].values.grad is None


def test_nothing_is_learned_and_nothing_kept_without_gradients():
    learns, teaches = case("picked", *SIZES[1])
    leaves = {name: value.requires_grad_() for name, value in learns.items()}
    learning = operation(teaches)(**leaves)
    with torch.no_grad():
        still = operation(teaches)(**leaves)
    assert not still[0].requires_grad
    assert all(torch.equal(a, b.detach()) for a, b in zip(still, learning, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_two_runs_give_the_same_bits(kind):
    learns, teaches = case(kind, 2, 40, 30, 4, 8, 3, 6, torch.float32)
    assert_repeatable(operation(teaches), **learns)


# Sparse and dense


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_entries_picked_is_dense_and_fewer_are_not(backend):
    B, T, C = 2, 12, 3
    bounds = causal(T, 4, B)
    learns, teaches = case("interval", B, T, C, 2, 4, 3, 5)
    values, entry = teaches["entries"].values, torch.arange(C)

    def loss_of(entries):
        return evaluate(
            lambda **given: operation(teaches | {"entries": entries})(**given, backend=backend), **learns
        )  # fmt: skip

    every = entry.masked_fill(entry >= bounds["end"][..., None], -1)
    dense, sparse, cut = (
        loss_of(Entries(values, **which)) for which in (bounds, {"picked": every}, {"picked": every[..., :2]})
    )
    for name, value in dense.items():
        torch.testing.assert_close(sparse[name], value, rtol=0, atol=1e-12)
    assert (cut["output 1"] != dense["output 1"]).nonzero().tolist() == [[0, 11], [1, 11]]  # the third entry's query


# Memory


def hold_little(monkeypatch):
    monkeypatch.setattr(portable, "SCORES_HELD", 1 << 13)
    monkeypatch.setattr(portable, "GATHERED_HELD", 1 << 13)


def long_row(kind, T, C):
    learns, teaches = case("interval", 1, T, C, 2, 8, 2, 8, torch.float32)
    which = causal(T, T // C)
    if kind == "picked":
        which = {"picked": torch.rand(1, T, C).argsort(dim=-1)[..., :8].clone()}
    teaches |= {"entries": Entries(teaches["entries"].values, **which)}
    leaves = {name: value.requires_grad_() for name, value in learns.items()}
    return lambda: operation(teaches)(**leaves)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_no_scores_of_the_whole_row_exist(monkeypatch, kind):
    hold_little(monkeypatch)
    T, C = 2048, 512
    assert largest_tensor(long_row(kind, T, C)) <= T * 2 * 8 < T * C / 8


@pytest.mark.parametrize("kind", KINDS)
def test_what_autograd_keeps_is_three_gradients(kind):
    T, C = 256, 64
    assert saved_elements(long_row(kind, T, C)) <= T * 2 * 8 + C * 8 + T * 2


# Errors

TEACHER = {
    "q": torch.zeros(2, 3, 4, 5),
    "entries": Entries(torch.zeros(2, 6, 5), begin=torch.zeros(2, 3).long(), end=torch.zeros(2, 3).long()),
    "log_sum_exp": torch.zeros(2, 3, 4),
}
STUDENT = {
    "index_q": torch.zeros(2, 3, 7, 8),
    "index_k": torch.zeros(2, 6, 8),
    "index_weights": torch.zeros(2, 3, 7),
    "query_weights": torch.zeros(2, 3),
}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": TEACHER["q"][0]}, r"q has shape \[3, 4, 5\]; expected \[B, T, H, K\]"),
        (
            {"log_sum_exp": torch.zeros(2, 3, 7)},
            r"log_sum_exp has shape \[2, 3, 7\]; expected \[B, T, H\] with .*H = 4",
        ),
        ({"entries": Entries(torch.zeros(2, 6, 5))}, "entries give picked and an interval, or neither"),
        (
            {"entries": TEACHER["entries"]._replace(values=torch.zeros(2, 6, 4))},
            r"entries.values has shape \[2, 6, 4\]; expected \[B, C, K\] with .*K = 5 \(from q\)",
        ),
        (
            {"entries": TEACHER["entries"]._replace(end=torch.zeros(2, 3))},
            r"entries.end has dtype torch\.float32; expected torch\.int64",
        ),
        ({"backend": "cuda"}, "backend is 'cuda'; expected one of reference, portable"),
        ({"index_k": torch.zeros(2, 5, 8)}, r"entries.values has shape .*; expected \[B, C, K\] with .*C = 5"),
        ({"index_weights": torch.zeros(2, 3, 4)}, r"index_weights has shape \[2, 3, 4\]; expected .*I = 7"),
        ({"query_weights": torch.zeros(2, 4)}, r"query_weights has shape \[2, 4\]; expected \[B, T\] with .*T = 3"),
    ],
)
def test_what_does_not_fit_is_an_error(changed, message):
    with pytest.raises(ValueError, match=message):
        indexer_kl(**{**STUDENT, **TEACHER, "scale": 1.0} | changed)
