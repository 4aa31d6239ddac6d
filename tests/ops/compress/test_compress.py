"""Pooling of tokens into entries: against the formula, and over every way to cut a sequence into calls."""

import itertools
import math

import pytest
import torch

from dsv4.ops.compress import Tail, compress, pool
from dsv4.testing.compare import assert_backends_agree, assert_repeatable

BACKENDS = ["reference", "portable"]
OVERLAP = [False, True]


def float64(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def inputs(B, T, m, E):
    return {"kv": float64(B, T, E), "gate": 2 * float64(B, T, E), "position_bias": 2 * float64(m, E)}


def weighted_mean(values, scores):
    weights = [math.exp(score) for score in scores]
    return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)


def entry(kv, gate, bias, i, channel, overlap):
    """Entry i of one row at one channel, all tokens of the row known: (token, channel) slots, one softmax."""
    m, width = len(bias), len(bias[0])
    half = width // 2
    own = [(i * m + p, half + channel if overlap else channel) for p in range(m)]
    previous = [((i - 1) * m + p, channel) for p in range(m)] if overlap and i else []
    slots = previous + own
    return weighted_mean([kv[t][e] for t, e in slots], [gate[t][e] + bias[t % m][e] for t, e in slots])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("overlap", OVERLAP)
def test_formula_in_plain_loops(backend, overlap):
    given = inputs(B=2, T=11, m=3, E=4)
    entries, _ = compress(**given, overlap=overlap, backend=backend)
    kv, gate, bias = (value.tolist() for value in given.values())
    width = 2 if overlap else 4
    wanted = [
        [[entry(kv[b], gate[b], bias, i, channel, overlap) for channel in range(width)] for i in range(3)]
        for b in range(2)
    ]
    torch.testing.assert_close(entries, torch.tensor(wanted, dtype=torch.float64))


@pytest.mark.parametrize("backend", BACKENDS)
def test_first_halves_go_to_the_next_entry_and_second_halves_to_their_own(backend):
    kv = torch.tensor([[[1.0, 100], [3, 300], [5, 500], [7, 700], [9, 900]]])
    entries, tail = compress(kv, torch.zeros(1, 5, 2), torch.zeros(2, 2), overlap=True, backend=backend)
    assert entries.tolist() == [[[(100 + 300) / 2], [(1 + 3 + 500 + 700) / 4]]]
    assert tail.kv.tolist() == [[[5, 500], [7, 700], [9, 900]]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_plain_entries_are_means_of_their_blocks_when_gates_are_equal(backend):
    kv = torch.tensor([[[1.0, 10], [3, 30], [5, 50], [7, 70], [9, 90]]])
    entries, tail = compress(kv, torch.zeros(1, 5, 2), torch.zeros(2, 2), overlap=False, backend=backend)
    assert entries.tolist() == [[[2, 20], [6, 60]]]
    assert tail.kv.tolist() == [[[9, 90]]]


@pytest.mark.parametrize("overlap", OVERLAP)
def test_a_constant_on_all_gates_changes_nothing(overlap):
    given = inputs(B=1, T=8, m=2, E=6)
    entries, _ = compress(**given, overlap=overlap)
    moved, _ = compress(**given | {"gate": given["gate"] + 5}, overlap=overlap)
    torch.testing.assert_close(moved, entries)


@pytest.mark.parametrize("overlap", OVERLAP)
def test_a_token_reaches_its_own_entry_and_overlapped_the_next(overlap):
    given = inputs(B=1, T=15, m=3, E=4)
    other = given["kv"].clone()
    other[0, 7] += 1  # block 2
    entries, moved = (compress(**given | {"kv": kv}, overlap=overlap)[0][0] for kv in (given["kv"], other))
    touched = (entries != moved).any(dim=-1)
    assert touched.tolist() == [False, False, True, overlap, False]


# The tail


@pytest.mark.parametrize(
    ("overlap", "lengths"), [(False, [0, 1, 2, 0, 1, 2, 0, 1, 2]), (True, [0, 1, 2, 3, 4, 5, 3, 4, 5])]
)
def test_the_tail_is_the_block_in_progress_and_overlapped_the_one_before(overlap, lengths):
    for T, kept in enumerate(lengths):
        given = inputs(B=2, T=T, m=3, E=4)
        entries, tail = compress(**given, overlap=overlap)
        assert entries.shape == (2, T // 3, 2 if overlap else 4)
        assert torch.equal(tail.kv, given["kv"][:, T - kept :])
        assert torch.equal(tail.gate, given["gate"][:, T - kept :])


def in_calls(given, cuts, overlap, backend):
    """Compress row by parts between the cuts, the tail carried from call to call."""
    tail, parts = None, []
    bounds = [0, *cuts, given["kv"].shape[1]]
    for begin, end in itertools.pairwise(bounds):
        kv, gate = given["kv"][:, begin:end], given["gate"][:, begin:end]
        entries, tail = compress(kv, gate, given["position_bias"], overlap=overlap, tail=tail, backend=backend)
        parts.append(entries)
    return torch.cat(parts, dim=1), tail


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("overlap", OVERLAP)
@pytest.mark.parametrize("num_cuts", [1, 2, 3])
def test_every_way_to_cut_a_sequence_gives_the_entries_of_one_call(backend, overlap, num_cuts):
    given = inputs(B=1, T=8, m=2, E=4)
    entries, tail = in_calls(given, (), overlap, backend)
    for cuts in itertools.combinations_with_replacement(range(9), num_cuts):
        cut_entries, cut_tail = in_calls(given, cuts, overlap, backend)
        torch.testing.assert_close(cut_entries, entries)
        assert torch.equal(cut_tail.kv, tail.kv)
        assert torch.equal(cut_tail.gate, tail.gate)


@pytest.mark.parametrize("overlap", OVERLAP)
@pytest.mark.parametrize("T", [11, 12])
def test_token_by_token_gives_the_entries_of_one_call(overlap, T):
    given = inputs(B=2, T=T, m=4, E=6)
    entries, tail = in_calls(given, (), overlap, "portable")
    by_token, last_tail = in_calls(given, range(1, T), overlap, "portable")
    torch.testing.assert_close(by_token, entries)
    assert torch.equal(last_tail.kv, tail.kv)


# Backends


@pytest.mark.parametrize("overlap", OVERLAP)
@pytest.mark.parametrize(
    ("B", "T", "m", "E"), [(1, 1, 1, 2), (2, 13, 3, 4), (1, 2, 4, 6), (2, 0, 3, 4), (1, 260, 128, 2)]
)
def test_backends_agree(overlap, B, T, m, E):
    def operation(kv, gate, position_bias, backend):
        return compress(kv, gate, position_bias, overlap=overlap, backend=backend)

    assert_backends_agree(operation, **inputs(B, T, m, E))


@pytest.mark.parametrize(("overlap", "length"), [(False, 2), (True, 2), (True, 3), (True, 5)])
def test_backends_agree_on_a_carried_tail(overlap, length):
    def operation(kv, gate, position_bias, tail_kv, tail_gate, backend):
        tail = Tail(tail_kv, tail_gate)
        return compress(kv, gate, position_bias, overlap=overlap, tail=tail, backend=backend)

    tail = {"tail_kv": float64(2, length, 4), "tail_gate": float64(2, length, 4)}
    assert_backends_agree(operation, **inputs(B=2, T=8, m=3, E=4), **tail)


@pytest.mark.parametrize("num_blocks", [0, 1, 5])
def test_backends_agree_on_blocks_that_start_documents(num_blocks):
    is_first = torch.rand(2, num_blocks) < 0.5
    is_first[:, :1] = True

    def operation(kv, gate, position_bias, backend):
        return pool(kv, gate, position_bias, overlap=True, is_first=is_first, backend=backend)

    blocks = {"kv": float64(2, num_blocks, 3, 4), "gate": float64(2, num_blocks, 3, 4)}
    assert_backends_agree(operation, **blocks, position_bias=float64(3, 4))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_block_that_starts_a_document_takes_nothing_from_the_one_before(backend):
    given = inputs(B=1, T=12, m=3, E=4)
    blocks = {name: given[name].unflatten(1, (4, 3)) for name in ("kv", "gate")}
    is_first = torch.tensor([[True, False, True, False]])
    bias = given["position_bias"]
    packed = pool(**blocks, position_bias=bias, overlap=True, is_first=is_first, backend=backend)
    alone = [
        compress(given["kv"][:, now], given["gate"][:, now], bias, overlap=True, backend=backend)[0]
        for now in (slice(0, 6), slice(6, 12))
    ]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1))


def test_backends_agree_on_non_contiguous_input():
    def operation(kv, gate, position_bias, backend):
        return compress(kv, gate, position_bias, overlap=True, backend=backend)

    given = inputs(B=2, T=9, m=2, E=4)
    assert_backends_agree(operation, **given | {"kv": float64(4, 9, 2).transpose(0, 2)})


@pytest.mark.parametrize("overlap", OVERLAP)
def test_gradients_are_those_of_finite_differences(overlap):
    given = [value.requires_grad_() for value in inputs(B=1, T=7, m=2, E=2).values()]
    assert torch.autograd.gradcheck(lambda *given: compress(*given, overlap=overlap)[0], given)


@pytest.mark.parametrize("overlap", OVERLAP)
def test_two_runs_give_the_same_bits(overlap):
    given = {name: value.float() for name, value in inputs(B=2, T=67, m=4, E=8).items()}
    assert_repeatable(lambda **given: compress(**given, overlap=overlap), **given)


# Errors

KV, BIAS = torch.zeros(2, 6, 4), torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("kv", "gate", "bias", "message"),
    [
        (KV[0], KV, BIAS, r"kv has shape \[6, 4\]; expected \[B, T, E\]"),
        (KV, KV[:, :5], BIAS, r"gate has shape \[2, 5, 4\]; expected \[B, T, E\] with .*T = 6 \(from kv\)"),
        (KV, KV, BIAS[:, :3], r"position_bias has shape \[3, 3\]; expected \[m, E\] with E = 4"),
    ],
)
def test_shapes_that_do_not_fit_are_errors(kv, gate, bias, message):
    with pytest.raises(ValueError, match=message):
        compress(kv, gate, bias, overlap=False)


@pytest.mark.parametrize(
    ("tail", "message"),
    [
        (Tail(KV[:1, :2], KV[:1, :2]), r"tail\.kv has shape \[1, 2, 4\]; expected \[B, n, E\] with B = 2"),
        (Tail(KV[:, :2], KV[:, :1]), r"tail\.gate has shape \[2, 1, 4\]; expected \[B, n, E\] with .*n = 2"),
    ],
)
def test_a_tail_that_does_not_fit_is_an_error(tail, message):
    with pytest.raises(ValueError, match=message):
        compress(KV, KV, BIAS, overlap=False, tail=tail)


@pytest.mark.parametrize(("overlap", "length"), [(False, 3), (True, 6)])
def test_a_tail_with_a_complete_block_too_many_is_an_error(overlap, length):
    tail = Tail(KV[:, :length], KV[:, :length])
    with pytest.raises(ValueError, match=f"tail holds {length} tokens; expected fewer than {length}"):
        compress(KV, KV, BIAS, overlap=overlap, tail=tail)


def test_halves_of_an_odd_number_of_channels_are_an_error():
    blocks = torch.zeros(2, 1, 3, 5)
    with pytest.raises(ValueError, match="kv has 5 channels; expected an even number"):
        pool(blocks, blocks, torch.zeros(3, 5), overlap=True)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("kv", KV, r"kv has shape \[2, 6, 4\]; expected \[B, C, m, E\]"),
        ("gate", KV[:, None], r"gate has shape \[2, 1, 6, 4\]; expected \[B, C, m, E\] with .*m = 3"),
        ("position_bias", BIAS[:2], r"position_bias has shape \[2, 4\]; expected \[m, E\] with m = 3"),
        ("is_first", torch.zeros(2, 3, dtype=torch.bool), r"is_first has shape \[2, 3\]; expected \[B, C\]"),
    ],
)
def test_blocks_that_do_not_fit_are_errors(name, value, message):
    blocks = torch.zeros(2, 2, 3, 4)
    with pytest.raises(ValueError, match=message):
        pool(**{"kv": blocks, "gate": blocks, "position_bias": BIAS} | {name: value}, overlap=True)


@pytest.mark.parametrize("overlap", OVERLAP)
def test_an_unknown_backend_is_an_error(overlap):
    with pytest.raises(ValueError, match="backend is 'cuda'; expected one of reference, portable"):
        compress(KV, KV, BIAS, overlap=overlap, backend="cuda")
