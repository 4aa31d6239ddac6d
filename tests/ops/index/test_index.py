"""Index scores and choices: loops, ties, visibility, and the memory that a long row takes."""

import itertools

import pytest
import torch

from dsv4.ops.index import portable, score, select
from dsv4.testing.compare import assert_backends_agree, assert_repeatable, evaluate, relative_distance
from dsv4.testing.memory import largest_tensor, saved_elements

BACKENDS = ["reference", "portable"]
# B, T, C, I, J
SIZES = [(1, 1, 1, 1, 1), (2, 7, 5, 3, 4), (1, 30, 17, 2, 3), (2, 3, 40, 4, 1)]
SMALL_SLICES = [
    {"SCORES_HELD": 1, "DOTS_HELD": 1, "ENTRIES_AT_ONCE": 1},
    {"SCORES_HELD": 100, "DOTS_HELD": 64, "ENTRIES_AT_ONCE": 3},
    {"SCORES_HELD": 1 << 20, "DOTS_HELD": 1 << 10, "ENTRIES_AT_ONCE": 4},
]


def inputs(B, T, C, I, J, dtype=torch.float64):  # noqa: E741
    return {
        "q": torch.randn(B, T, I, J, dtype=dtype),
        "k": torch.randn(B, C, J, dtype=dtype),
        "weights": torch.randn(B, T, I, dtype=dtype),
    }


def tied_inputs(B, T, C, I, J):  # noqa: E741
    """Small integers: every sum is exact, so equal scores are equal in bits, and there are many."""
    return {name: value.round().clamp(-1, 1) for name, value in inputs(B, T, C, I, J, torch.float32).items()}


def random_picks(B, T, C, P):
    picks = torch.rand(B, T, C).argsort(dim=-1)[..., :P].sort(dim=-1).values
    return picks.masked_fill(torch.rand(B, T, P) < 0.3, -1)


def intervals(B, T, C):
    begin = torch.randint(0, C, (B, T))
    return {"entry_begin": begin, "entry_end": begin + torch.randint(0, C + 1, (B, T))}


def causal(T, ratio, B=1):
    """Entries below (t + 1) // ratio, all of them from 0."""
    end = ((torch.arange(T) + 1) // ratio).expand(B, T)
    return {"entry_begin": torch.zeros_like(end), "entry_end": end}


def loop_score(q, k, weights, b, t, c):
    total = 0.0
    for head, weight in enumerate(weights[b, t].tolist()):
        dot = sum(x * y for x, y in zip(q[b, t, head].tolist(), k[b, c].tolist(), strict=True))
        total += weight * max(dot, 0.0)
    return total


def loop_select(q, k, weights, begin, end, top_k):
    """Best first, the smaller entry first among equals; ascending, filled up with -1."""
    B, T, C = q.shape[0], q.shape[1], k.shape[1]
    chosen = torch.full((B, T, min(top_k, C)), -1)
    for b, t in itertools.product(range(B), range(T)):
        visible = range(max(0, int(begin[b, t])), min(C, int(end[b, t])))
        best = sorted(visible, key=lambda c: (-loop_score(q, k, weights, b, t, c), c))[:top_k]
        chosen[b, t, : len(best)] = torch.tensor(sorted(best), dtype=torch.int64)
    return chosen


# Choices


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [tied_inputs, inputs])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("top_k", [1, 3, 100])
def test_choice_in_plain_loops(backend, make, sizes, top_k):
    given, seen = make(*sizes), intervals(*sizes[:3])
    wanted = loop_select(**given, begin=seen["entry_begin"], end=seen["entry_end"], top_k=top_k)
    assert torch.equal(select(**given, **seen, top_k=top_k, backend=backend), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_entries_become_visible_when_their_last_token_is_seen(backend):
    given = inputs(1, 9, 2, 3, 4)
    picked = select(**given, **causal(9, 4), top_k=2, backend=backend)
    assert picked.tolist() == [[[-1, -1]] * 3 + [[0, -1]] * 4 + [[0, 1]] * 2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_documents_of_a_row_do_not_see_each_other(backend):
    given = inputs(1, 3, 5, 2, 4)
    begin, end = torch.tensor([[0, 2, 3]]), torch.tensor([[2, 5, 3]])
    picked = select(**given, entry_begin=begin, entry_end=end, top_k=3, backend=backend)
    assert picked.tolist() == [[[0, 1, -1], [2, 3, 4], [-1, -1, -1]]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_scores_go_to_the_smaller_entry(backend):
    # Heads that all point away give exact zeros; entry 4 alone is above, entries 1 and 6 are below.
    dots = torch.tensor([-1.0, 1, -1, -2, 1, -3, 1, -1])
    k, weights = dots.view(1, 8, 1), torch.tensor([[[-1.0, 0.0], [1.0, 0.0]]])
    q, end = torch.ones(1, 2, 2, 1), torch.tensor([[8, 8]])
    picked = select(q, k, weights, torch.zeros_like(end), end, 4, backend=backend)
    assert picked.tolist() == [[[0, 2, 3, 5], [0, 1, 4, 6]]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_visible", [0, 1, 5, 9])
def test_when_every_score_is_zero_the_first_visible_are_taken(backend, num_visible):
    given = inputs(1, 1, 9, 2, 3)
    begin = torch.full((1, 1), 9 - num_visible)
    picked = select(given["q"], given["k"], 0 * given["weights"], begin, torch.full((1, 1), 9), 4, backend=backend)
    first = [*range(9 - num_visible, 9)][:4]
    assert picked.tolist() == [[first + [-1] * (4 - len(first))]]


@pytest.mark.parametrize("held", SMALL_SLICES)
@pytest.mark.parametrize("sizes", [*SIZES, (2, 65, 33, 2, 3)])
def test_slices_change_no_choice(monkeypatch, held, sizes):
    given, seen = tied_inputs(*sizes), intervals(*sizes[:3])
    whole = select(**given, **seen, top_k=5)
    for name, value in held.items():
        monkeypatch.setattr(portable, name, value)
    assert torch.equal(select(**given, **seen, top_k=5), whole)
    assert torch.equal(select(**given, **seen, top_k=5, backend="reference"), whole)


@pytest.mark.parametrize("cut", [1, 4, 6])
def test_a_sequence_cut_into_calls_makes_the_same_choices(cut):
    given, seen = tied_inputs(2, 7, 5, 3, 4), intervals(2, 7, 5)
    whole = select(**given, **seen, top_k=3)
    parts = [
        select(
            given["q"][:, now],
            given["k"],
            given["weights"][:, now],
            *(bound[:, now] for bound in seen.values()),
            top_k=3,
        )
        for now in (slice(0, cut), slice(cut, 7))
    ]
    assert torch.equal(torch.cat(parts, dim=1), whole)


def test_entries_a_query_does_not_see_cannot_change_its_choice():
    given, seen = inputs(1, 24, 6, 3, 4), causal(24, 4)
    changed = given["k"].clone()
    changed[:, 3:] += 10
    before, after = (select(given["q"], k, given["weights"], **seen, top_k=2) for k in (given["k"], changed))
    assert torch.equal(after[:, :15], before[:, :15])  # query 15 is the first that sees entry 3
    assert (after[:, 15] != before[:, 15]).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("T", "C"), [(0, 3), (4, 0)])
def test_nothing_to_choose_is_an_empty_choice(backend, T, C):
    seen = {name: torch.zeros(2, T, dtype=torch.int64) for name in ("entry_begin", "entry_end")}
    picked = select(**inputs(2, T, C, 3, 4), **seen, top_k=2, backend=backend)
    assert picked.shape == (2, T, min(2, C))


def test_choices_from_bfloat16_are_those_from_the_same_numbers_in_float32():
    seen = causal(40, 2, B=2)
    narrow = {name: value.bfloat16() for name, value in inputs(2, 40, 20, 4, 16, torch.float32).items()}
    wide = {name: value.float() for name, value in narrow.items()}
    assert torch.equal(select(**narrow, **seen, top_k=6), select(**wide, **seen, top_k=6))


def test_no_gradient_passes_through_the_choice():
    seen = causal(8, 2)
    result = evaluate(lambda **given: select(**given, **seen, top_k=2), **inputs(1, 8, 4, 2, 3))
    assert list(result) == ["output 0"]


# Scores of the chosen


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_in_plain_loops(backend):
    given, picked = inputs(2, 7, 5, 3, 4), random_picks(2, 7, 5, 3)
    scores = score(**given, picked=picked, backend=backend)
    for b, t, p in itertools.product(range(2), range(7), range(3)):
        c = int(picked[b, t, p])
        wanted = loop_score(**given, b=b, t=t, c=c) if c >= 0 else float("-inf")
        assert scores[b, t, p].item() == pytest.approx(wanted, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("sizes", [*SIZES, (1, 0, 3, 2, 4)])
def test_backends_agree(sizes):
    B, T, C = sizes[:3]
    picked = random_picks(B, T, C, min(4, C))
    assert_backends_agree(
        lambda backend, **given: score(**given, picked=picked, backend=backend),
        **inputs(*sizes),
    )


def test_backends_agree_when_there_are_no_entries():
    picked = torch.zeros(2, 3, 0, dtype=torch.int64)
    assert_backends_agree(
        lambda backend, **given: score(**given, picked=picked, backend=backend),
        **inputs(2, 3, 0, 2, 4),
    )


def test_backends_agree_on_non_contiguous_input():
    given = {name: value.transpose(0, 1) for name, value in inputs(7, 2, 2, 3, 4).items()}  # k: [2, 7, J]
    picked = random_picks(2, 7, 7, 3)
    assert_backends_agree(lambda backend, **given: score(**given, picked=picked, backend=backend), **given)
    seen = intervals(2, 7, 7)
    both = [select(**given, **seen, top_k=3, backend=backend) for backend in BACKENDS]
    assert torch.equal(*both)


def test_gradients_are_those_of_finite_differences():
    picked = torch.tensor([[[0, 2], [1, 2]]])
    given = [value.requires_grad_() for value in inputs(1, 2, 3, 2, 3).values()]
    assert torch.autograd.gradcheck(lambda *given: score(*given, picked), given)


def test_bfloat16_products_are_rounded_and_summed_in_float32():
    picked = random_picks(2, 9, 8, 4)
    narrow = {name: value.bfloat16() for name, value in inputs(2, 9, 8, 3, 16, torch.float32).items()}
    rounded = evaluate(lambda **given: score(**given, picked=picked), **narrow)
    exact = evaluate(lambda **given: score(**given, picked=picked), **{n: v.float() for n, v in narrow.items()})
    assert rounded["output 0"].dtype == torch.float32
    seen = picked >= 0
    # Each of 3 products is off by at most half a place, 2^-8 of itself; their weighted sizes bound the sum's error.
    dots = torch.einsum("btij,bcj->btic", narrow["q"].float(), narrow["k"].float()).relu()
    sizes = torch.einsum("bti,btic->btc", narrow["weights"].float().abs(), dots).gather(-1, picked.clamp(min=0))
    difference = (rounded["output 0"] - exact["output 0"]).abs()
    assert (difference[seen] <= 2**-8 * sizes[seen] + 1e-6).all()
    assert difference[seen].max() > 1e-4
    # Gradients add the roundings of the products that are weighed and of the way out.
    for name in narrow:
        assert relative_distance(rounded[f"gradient of {name}"], exact[f"gradient of {name}"]) < 2**-7


def test_two_runs_give_the_same_bits():
    picked, seen = random_picks(2, 50, 40, 9), causal(50, 2, B=2)
    given = inputs(2, 50, 40, 4, 8, torch.float32)
    assert_repeatable(lambda **given: score(**given, picked=picked), **given)
    assert torch.equal(*(select(**given, **seen, top_k=9) for _ in range(2)))


# Memory


def hold_little(monkeypatch):
    for name, value in {"SCORES_HELD": 1 << 15, "DOTS_HELD": 1 << 14, "ENTRIES_AT_ONCE": 64}.items():
        monkeypatch.setattr(portable, name, value)


@pytest.mark.parametrize("make", [inputs, tied_inputs])
def test_a_choice_never_holds_scores_of_the_whole_row(monkeypatch, make):
    hold_little(monkeypatch)
    T, C = 2048, 512
    given, seen = make(1, T, C, 2, 8), causal(T, 4)
    linear = T * 2 * 8 + C * 8 + T * 8
    assert largest_tensor(lambda: select(**given, **seen, top_k=8)) <= linear < T * C / 8


def test_scores_of_the_chosen_take_memory_linear_in_the_tokens():
    def keeps(T):
        given = {name: value.requires_grad_() for name, value in inputs(1, T, T // 4, 2, 8).items()}
        picked = random_picks(1, T, T // 4, 8)
        held = largest_tensor(lambda: score(**given, picked=picked))
        return saved_elements(lambda: score(**given, picked=picked)), held

    (saved, held), (saved_twice, held_twice) = keeps(512), keeps(1024)
    assert saved_twice <= 2.05 * saved
    assert held_twice <= 2.05 * held


# Errors

Q, K, WEIGHTS, BOUND = torch.zeros(2, 3, 4, 5), torch.zeros(2, 6, 5), torch.zeros(2, 3, 4), torch.zeros(2, 3).long()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": Q[0]}, r"q has shape \[3, 4, 5\]; expected \[B, T, I, J\]"),
        ({"k": K[..., :4]}, r"k has shape \[2, 6, 4\]; expected \[B, C, J\] with .*J = 5 \(from q\)"),
        ({"weights": WEIGHTS[:, :2]}, r"weights has shape \[2, 2, 4\]; expected \[B, T, I\] with .*T = 3"),
        ({"entry_begin": BOUND[:1]}, r"entry_begin has shape \[1, 3\]; expected \[B, T\] with B = 2"),
        ({"entry_end": BOUND[:, :1]}, r"entry_end has shape \[2, 1\]; expected \[B, T\] with .*T = 3"),
        ({"entry_begin": BOUND.int()}, r"entry_begin has dtype torch\.int32; expected torch\.int64"),
        ({"entry_end": BOUND.float()}, r"entry_end has dtype torch\.float32; expected torch\.int64"),
        ({"top_k": 0}, "top_k is 0; expected at least 1"),
        ({"backend": "cuda"}, "backend is 'cuda'; expected one of reference, portable"),
    ],
)
def test_what_does_not_fit_a_choice_is_an_error(changed, message):
    fitting = {"q": Q, "k": K, "weights": WEIGHTS, "entry_begin": BOUND, "entry_end": BOUND, "top_k": 2}
    with pytest.raises(ValueError, match=message):
        select(**fitting | changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"k": K[:1]}, r"k has shape \[1, 6, 5\]; expected \[B, C, J\] with B = 2"),
        ({"weights": WEIGHTS[..., :3]}, r"weights has shape \[2, 3, 3\]; expected \[B, T, I\] with .*I = 4"),
        pytest.param(
            {"picked": BOUND[:1, :, None]},
            r"picked has shape \[1, 3, 1\]; expected \[B, T, P\] with B = 2",
        ),
        ({"picked": BOUND[..., None].int()}, r"picked has dtype torch\.int32; expected torch\.int64"),
        ({"backend": "cuda"}, "backend is 'cuda'; expected one of reference, portable"),
    ],
)
def test_what_does_not_fit_a_score_is_an_error(changed, message):
    with pytest.raises(ValueError, match=message):
        score(**{"q": Q, "k": K, "weights": WEIGHTS, "picked": BOUND[..., None]} | changed)
