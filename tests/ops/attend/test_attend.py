"""Attention over window and entries: what is seen drawn as small matrices, numbers against plain loops."""

import itertools
import math

import pytest
import torch

from dsv4.ops.attend import Entries, attend, portable
from dsv4.testing.compare import assert_backends_agree, assert_repeatable, evaluate, relative_distance
from dsv4.testing.memory import largest_tensor, saved_elements

BACKENDS = ["reference", "portable"]
KINDS = ["none", "empty", "interval", "picked"]
NUM_TOKENS = [1, 9, 63, 64, 65, 130]  # around and beyond a block of 64 queries
WINDOW_AND_HISTORY = [(1, 0), (5, 3), (16, 40), (128, 0), (128, 200)]
SMALL_SLICES = [
    {"BLOCK": 4, "SCORES_HELD": 1, "GATHERED_HELD": 1},
    {"BLOCK": 16, "SCORES_HELD": 3000, "GATHERED_HELD": 400},
    {"BLOCK": 5, "SCORES_HELD": 1 << 20, "GATHERED_HELD": 1 << 20},
]
SCALE = 0.7


def float64(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def vectors(T, history, C, B=2, H=3, K=5):
    """What carries gradients; no entries at all when C is None."""
    given = {"q": float64(B, T, H, K), "kv": float64(B, history + T, K), "sink": float64(H)}
    return given if C is None else given | {"values": float64(B, C, K)}


def raw_begins(T, history, B=2):
    """Documents of random lengths: the first raw token each query may see."""
    own = history + torch.arange(T)
    starts = (torch.rand(B, history + T) < 0.05).long() * torch.arange(history + T)
    return torch.minimum(starts.cummax(dim=1).values[:, history:], own)


def entries_seen(kind, T, C, B=2):
    """The index tensors of ``Entries`` of a kind."""
    if kind == "picked":
        picked = torch.rand(B, T, C).argsort(dim=-1)[..., : max(1, C // 2)]
        return {"picked": picked.masked_fill(torch.rand(picked.shape) < 0.3, -1)}
    begin = torch.randint(0, max(1, C), (B, T))
    return {"begin": begin, "end": begin + torch.randint(0, C + 1, (B, T))}


def case(kind, T, history, num_entries=7, **sizes):
    """Vectors with gradients, and the indices that go with them."""
    C = {"none": None, "empty": 0}.get(kind, num_entries)
    given = vectors(T, history, C, **sizes)
    B = given["q"].shape[0]
    seen = {} if C is None else entries_seen(kind, T, C, B)
    return given, raw_begins(T, history, B), seen


def operation(raw_begin, seen, window):
    """Attention as a function of the vectors alone."""

    def run(q, kv, sink, values=None, backend="portable"):
        entries = None if values is None else Entries(values, **seen)
        return attend(q, kv, sink, raw_begin, entries, window=window, scale=SCALE, backend=backend)

    return run


# What a query sees. With a query of zeros every score is 0, and with keys that are rows of the identity the
# output is the list of seen keys over their number plus one, for a sink of 0.


def seen_matrix(backend, T, S, window, raw_begin=None, C=0, **seen):
    keys = torch.eye(S + C)
    raw_begin = torch.zeros(1, T, dtype=torch.int64) if raw_begin is None else torch.tensor([raw_begin])
    entries = Entries(keys[None, S:], **{name: torch.tensor([value]) for name, value in seen.items()}) if C else None
    q, sink = torch.zeros(1, T, 1, S + C), torch.zeros(1)
    kwargs = {"window": window, "scale": 1.0, "backend": backend}
    out, log_total = attend(q, keys[None, :S], sink, raw_begin, entries, **kwargs)
    is_seen = out[0, :, 0] > 0
    share = 1 / (is_seen.sum(dim=-1, keepdim=True) + 1)
    torch.testing.assert_close(out[0, :, 0], is_seen * share)
    torch.testing.assert_close(log_total[0, :, 0], -share[:, 0].log())
    return ["".join(".x"[int(one)] for one in row) for row in is_seen]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_window_holds_w_tokens_and_the_query_is_the_last(backend):
    assert seen_matrix(backend, T=5, S=5, window=3) == [
        "x....",
        "xx...",
        "xxx..",
        ".xxx.",
        "..xxx",
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_of_one_is_the_query_itself(backend):
    assert seen_matrix(backend, T=3, S=4, window=1) == [".x..", "..x.", "...x"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_earlier_tokens_come_first_in_the_source(backend):
    assert seen_matrix(backend, T=3, S=7, window=4) == [".xxxx..", "..xxxx.", "...xxxx"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_document_starts_at_raw_begin(backend):
    assert seen_matrix(backend, T=5, S=6, window=3, raw_begin=[1, 1, 3, 3, 5]) == [
        ".x....",
        ".xx...",
        "...x..",
        "...xx.",
        ".....x",
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_entries_of_an_interval(backend):
    assert seen_matrix(backend, T=4, S=4, window=2, C=3, begin=[0, 0, 1, 2], end=[0, 2, 3, 3]) == [
        "x..." + "...",
        "xx.." + "xx.",
        ".xx." + ".xx",
        "..xx" + "..x",
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_picked_entries_in_any_order_and_none(backend):
    assert seen_matrix(backend, T=4, S=4, window=1, C=3, picked=[[-1, -1], [2, 0], [1, -1], [-1, 2]]) == [
        "x..." + "...",
        ".x.." + "x.x",
        "..x." + ".x.",
        "...x" + "..x",
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_released_window_is_128_with_the_query(backend):
    seen = seen_matrix(backend, T=200, S=200, window=128)
    assert [row.count("x") for row in seen] == [min(t + 1, 128) for t in range(200)]
    assert seen[199] == "." * 72 + "x" * 128


# Numbers


def loop_attend(given, raw_begin, seen, window, b, t, h):
    """One query and head: the output and the log-sum-exp."""
    kv, q = given["kv"][b].tolist(), given["q"][b, t, h].tolist()
    own = len(kv) - given["q"].shape[1] + t
    sources = [kv[j] for j in range(max(int(raw_begin[b, t]), own - window + 1, 0), own + 1)]
    if "values" in given:
        values = given["values"][b].tolist()
        if "picked" in seen:
            sources += [values[c] for c in seen["picked"][b, t].tolist() if c >= 0]
        else:
            sources += values[int(seen["begin"][b, t]) : int(seen["end"][b, t])]
    weights = [math.exp(SCALE * sum(x * y for x, y in zip(q, source, strict=True))) for source in sources]
    total = sum(weights) + math.exp(given["sink"][h].item())
    out = [sum(w * source[d] for w, source in zip(weights, sources, strict=True)) / total for d in range(len(q))]
    return out, math.log(total)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_formula_in_plain_loops(backend, kind):
    given, raw_begin, seen = case(kind, T=6, history=2)
    out, log_total = operation(raw_begin, seen, window=4)(**given, backend=backend)
    for b, t, h in itertools.product(range(2), range(6), range(3)):
        wanted, wanted_log_total = loop_attend(given, raw_begin, seen, 4, b, t, h)
        assert out[b, t, h].tolist() == pytest.approx(wanted, rel=1e-12, abs=1e-12)
        assert log_total[b, t, h].item() == pytest.approx(wanted_log_total, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("window", "history"), WINDOW_AND_HISTORY)
@pytest.mark.parametrize("T", NUM_TOKENS)
def test_backends_agree(kind, window, history, T):
    given, raw_begin, seen = case(kind, T, history)
    assert_backends_agree(operation(raw_begin, seen, window), **given)


@pytest.mark.parametrize("held", SMALL_SLICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("T", "window", "history"), [(1, 5, 9), (70, 6, 0), (43, 16, 21)])
def test_backends_agree_in_small_slices(monkeypatch, held, kind, T, window, history):
    for name, value in held.items():
        monkeypatch.setattr(portable, name, value)
    given, raw_begin, seen = case(kind, T, history)
    assert_backends_agree(operation(raw_begin, seen, window), **given)


@pytest.mark.parametrize("kind", KINDS)
def test_backends_agree_on_one_row_one_head_one_channel(kind):
    given, raw_begin, seen = case(kind, T=10, history=4, num_entries=2, B=1, H=1, K=1)
    assert_backends_agree(operation(raw_begin, seen, window=3), **given)


@pytest.mark.parametrize("kind", ["interval", "picked"])
def test_backends_agree_on_non_contiguous_input(kind):
    given, raw_begin, seen = case(kind, T=66, history=10)
    given["q"] = float64(2, 3, 66, 5).transpose(1, 2)
    given["kv"], given["values"] = float64(76, 2, 5).transpose(0, 1), float64(2, 7, 10)[..., ::2]
    assert_backends_agree(operation(raw_begin, seen, window=16), **given)


@pytest.mark.parametrize("kind", KINDS)
def test_backends_agree_without_tokens(kind):
    given, raw_begin, seen = case(kind, T=0, history=4)
    assert_backends_agree(operation(raw_begin, seen, window=3), **given)


def test_backends_agree_when_queries_pick_from_no_places():
    given, raw_begin, _ = case("picked", T=6, history=4)
    seen = {"picked": torch.zeros(2, 6, 0, dtype=torch.int64)}
    assert_backends_agree(operation(raw_begin, seen, window=3), **given)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind):
    given, raw_begin, seen = case(kind, T=5, history=2, num_entries=3, B=1, H=2, K=2)
    run = operation(raw_begin, seen, window=3)
    names = list(given)
    leaves = [value.requires_grad_() for value in given.values()]
    assert torch.autograd.gradcheck(lambda *leaves: run(**dict(zip(names, leaves, strict=True)))[0], leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_log_sum_exp_carries_no_gradient(backend):
    given, raw_begin, seen = case("none", T=3, history=0)
    leaves = {name: value.requires_grad_() for name, value in given.items()}
    out, log_total = operation(raw_begin, seen, window=2)(**leaves, backend=backend)
    assert out.requires_grad
    assert not log_total.requires_grad


# The sink


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sink_takes_its_share_and_gives_no_value(backend):
    q, kv = torch.zeros(1, 1, 2, 3), torch.full((1, 1, 3), 8.0)
    sink, begin = torch.tensor([0.0, math.log(3)]), torch.zeros(1, 1, dtype=torch.int64)
    out, log_total = attend(q, kv, sink, begin, None, window=4, scale=5.0, backend=backend)
    torch.testing.assert_close(out[0, 0, :, 0], torch.tensor([4.0, 2.0]))
    torch.testing.assert_close(log_total[0, 0], torch.tensor([math.log(2), math.log(4)]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("size", "expected"), [(1e4, 0.0), (-1e4, 8.0)])
def test_a_large_sink_takes_all_and_a_very_negative_one_nothing(backend, size, expected):
    given = {"q": torch.zeros(1, 2, 1, 3), "kv": torch.full((1, 2, 3), 8.0), "sink": torch.tensor([size])}
    run = operation(torch.zeros(1, 2, dtype=torch.int64), {}, window=2)
    result = evaluate(lambda **leaves: run(**leaves, backend=backend), **given)
    torch.testing.assert_close(result["output 0"], torch.full((1, 2, 1, 3), expected))
    assert all(value.isfinite().all() for value in result.values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_ten_thousand_stay_finite(backend, kind):
    given, raw_begin, seen = case(kind, T=9, history=3)
    given = {name: value.float() for name, value in given.items()} | {"q": 1e4 * given["q"].float()}
    run = operation(raw_begin, seen, window=4)
    result = evaluate(lambda **leaves: run(**leaves, backend=backend), **given)
    assert all(value.isfinite().all() for value in result.values())


# Causality, precision, repeatability


def test_later_tokens_do_not_reach_earlier_queries():
    given, raw_begin, _ = case("none", T=100, history=0)
    changed = given["kv"].clone()
    changed[:, 70:] += 3
    run = operation(raw_begin, {}, window=16)
    before, after = run(**given)[0], run(**given | {"kv": changed})[0]
    assert torch.equal(after[:, :70], before[:, :70])
    assert (after[:, 70:] != before[:, 70:]).any(dim=-1).all()


@pytest.mark.parametrize("cut", [1, 63, 64, 90])
def test_a_sequence_cut_into_two_calls_gives_the_same_output(cut):
    given, raw_begin, seen = case("interval", T=100, history=0)
    whole, _ = operation(raw_begin, seen, window=16)(**given)
    parts = []
    for first, now in ((0, slice(0, cut)), (max(0, cut - 15), slice(cut, 100))):
        part = given | {"q": given["q"][:, now], "kv": given["kv"][:, first : now.stop]}
        bounds = {name: bound[:, now] for name, bound in seen.items()}
        parts.append(operation(raw_begin[:, now] - first, bounds, window=16)(**part)[0])
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_close_to_float32_on_the_same_numbers(kind):
    given, raw_begin, seen = case(kind, T=70, history=20, K=32)
    narrow = {name: value.bfloat16() for name, value in given.items()} | {"sink": given["sink"].float()}
    run = operation(raw_begin, seen, window=16)
    rounded, exact = evaluate(run, **narrow), evaluate(run, **{name: value.float() for name, value in narrow.items()})
    assert rounded["output 0"].dtype == torch.bfloat16
    assert rounded["output 1"].dtype == torch.float32
    # Scores are float32 sums of exact products. Rounded to 8 bits, 2^-8 each: the weights, the sums over the
    # window and over the entries, the output. None exceeds the largest value, of which they are weighted means.
    largest = max(
        float(narrow[name].abs().max()) for name in ("kv", "values") if name in narrow and narrow[name].numel()
    )
    assert float((rounded["output 0"].float() - exact["output 0"]).abs().max()) <= 3 * 2**-8 * largest
    torch.testing.assert_close(rounded["output 1"], exact["output 1"], rtol=1e-5, atol=1e-5)
    # Gradients pass some eight independent roundings of 2^-8 at most, sqrt(8) together in the norm.
    for name in narrow:
        if narrow[name].numel():
            assert relative_distance(rounded[f"gradient of {name}"], exact[f"gradient of {name}"]) < 3 * 2**-8


@pytest.mark.parametrize("kind", KINDS)
def test_two_runs_give_the_same_bits(kind):
    given, raw_begin, seen = case(kind, T=150, history=30, K=16)
    assert_repeatable(operation(raw_begin, seen, window=16), **{name: value.float() for name, value in given.items()})


# Memory


def long_row(kind, T):
    """A row of T tokens with T / 4 entries of 8 channels, two heads; attention as a function without arguments."""
    given, raw_begin, seen = case(kind, T, history=0, num_entries=T // 4, B=1, H=2, K=8)
    if kind == "picked":
        seen = {"picked": seen["picked"][..., :8].contiguous()}
    leaves = {name: value.float().requires_grad_() for name, value in given.items()}
    run = operation(raw_begin, seen, window=16)
    return lambda: run(**leaves)[0]


@pytest.mark.parametrize("kind", ["none", "interval", "picked"])
def test_no_tensor_is_as_large_as_queries_times_keys(monkeypatch, kind):
    for name in ("SCORES_HELD", "GATHERED_HELD"):
        monkeypatch.setattr(portable, name, 1 << 14)
    T = 2048
    queries = T * 2 * 8
    assert largest_tensor(long_row(kind, T)) <= 4 * queries < T * (T // 4) / 4


@pytest.mark.parametrize("kind", ["none", "interval", "picked"])
def test_what_autograd_keeps_is_linear_in_the_tokens(kind):
    saved, saved_twice = (saved_elements(long_row(kind, T)) for T in (512, 1024))
    assert saved_twice <= 2.05 * saved


# Errors

Q, KV, SINK, VALUES = torch.zeros(2, 3, 4, 5), torch.zeros(2, 6, 5), torch.zeros(4), torch.zeros(2, 7, 5)
BEGIN, PICKED = torch.zeros(2, 3).long(), torch.zeros(2, 3, 2).long()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": Q[0]}, r"q has shape \[3, 4, 5\]; expected \[B, T, H, K\]"),
        ({"kv": KV[:1]}, r"kv has shape \[1, 6, 5\]; expected \[B, S, K\] with B = 2 \(from q\)"),
        ({"sink": SINK[:3]}, r"sink has shape \[3\]; expected \[H\] with H = 4"),
        ({"raw_begin": BEGIN[:, :2]}, r"raw_begin has shape \[2, 2\]; expected \[B, T\] with .*T = 3"),
        ({"raw_begin": BEGIN.int()}, r"raw_begin has dtype torch\.int32; expected torch\.int64"),
        ({"kv": KV[:, :2]}, "kv has 2 tokens; expected at least the 3 of q"),
        ({"backend": "cuda"}, "backend is 'cuda'; expected one of reference, portable"),
        (
            {"entries": Entries(VALUES[..., :4], PICKED)},
            r"entries\.values has shape .* expected \[B, C, K\] with .*K = 5",
        ),
        ({"entries": Entries(VALUES, PICKED[:, :2])}, r"entries\.picked has shape \[2, 2, 2\]; expected \[B, T, P\]"),
        ({"entries": Entries(VALUES, PICKED.int())}, r"entries\.picked has dtype torch\.int32; expected torch\.int64"),
        (
            {"entries": Entries(VALUES, begin=BEGIN[:1], end=BEGIN)},
            r"entries\.begin has shape \[1, 3\]; expected \[B, T\]",
        ),
        (
            {"entries": Entries(VALUES, begin=BEGIN, end=BEGIN[:1])},
            r"entries\.end has shape \[1, 3\]; expected \[B, T\]",
        ),
        ({"entries": Entries(VALUES, begin=BEGIN.int(), end=BEGIN)}, r"entries\.begin has dtype torch\.int32"),
        ({"entries": Entries(VALUES, begin=BEGIN, end=BEGIN.int())}, r"entries\.end has dtype torch\.int32"),
        ({"entries": Entries(VALUES)}, "entries give picked and an interval, or neither; expected exactly one"),
        ({"entries": Entries(VALUES, begin=BEGIN)}, "entries give picked and an interval, or neither"),
        ({"entries": Entries(VALUES, PICKED, BEGIN, BEGIN)}, "entries give picked and an interval, or neither"),
        pytest.param(
            {"entries": Entries(VALUES, PICKED, begin=BEGIN)},
            "entries give picked and an interval, or neither",
        ),
    ],
)
def test_what_does_not_fit_is_an_error(changed, message):
    fitting = {"q": Q, "kv": KV, "sink": SINK, "raw_begin": BEGIN, "entries": None, "window": 2, "scale": 1.0}
    with pytest.raises(ValueError, match=message):
        attend(**fitting | changed)
