"""Speculation: exact distributions of whole sequences, the best acceptance, plain decoding where promised."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv4.config.sampling import Sampling
from dsv4.engine import speculate
from dsv4.engine.sample import Seen, choose, distribution, next_token, uniform
from dsv4.engine.speculate import match, verify

V = 3
P = np.array([[0.50, 0.30, 0.20], [0.15, 0.60, 0.25], [0.35, 0.20, 0.45]])  # [V, V]: the model, after each token
Q = np.array([[0.20, 0.30, 0.50], [0.55, 0.25, 0.20], [0.35, 0.20, 0.45]])  # the drafts; after token 2 they agree
LENGTH = 3
DRAWS = 6000


def decode(seed, num_drafts, length=LENGTH):
    """Tokens after token 0, in steps of ``num_drafts`` drafts each, cut to ``length``."""
    tokens = []
    while len(tokens) < length:
        last, drafts, proposals = (tokens or [0])[-1], [], []
        for index in range(num_drafts):
            proposals.append(Q[last])
            last = choose(Q[last], uniform(seed, len(tokens) + index, "draft"))
            drafts.append(last)
        targets = [P[token] for token in [(tokens or [0])[-1], *drafts]]
        tokens += verify(targets, drafts, proposals, seed=seed, position=len(tokens))
    return tuple(tokens[:length])


def statistic(sequences, model):
    """Pearson's statistic of sequences from token 0 against a chain, and its degrees of freedom."""
    cells = list(itertools.product(range(V), repeat=LENGTH))
    expected = [len(sequences) * math.prod(model[a][b] for a, b in itertools.pairwise((0, *cell))) for cell in cells]
    assert min(expected) > 20  # far from where the statistic is no chi-square
    found = [sequences.count(cell) for cell in cells]
    return sum((a - b) ** 2 / b for a, b in zip(found, expected, strict=True)), len(cells) - 1


def bound(degrees, chance=1e-6):
    """What a chi-square goes over with at most this chance (Laurent and Massart, 2000, lemma 1)."""
    x = math.log(1 / chance)
    return degrees + 2 * math.sqrt(degrees * x) + 2 * x


@pytest.mark.parametrize("num_drafts", [0, 1, 2, 4])
def test_sequences_follow_the_model_exactly(num_drafts):
    """All three tokens together: across steps, whose drafts use the numbers of drafts thrown away before."""
    value, degrees = statistic([decode(seed, num_drafts) for seed in range(DRAWS)], P)
    assert value < bound(degrees)


def test_the_statistic_tells_wrong_rules_apart(monkeypatch):
    value, degrees = statistic([decode(seed, 2) for seed in range(DRAWS)], Q)
    assert value > 4 * bound(degrees)
    monkeypatch.setattr(speculate, "_residual", lambda p, q: p)
    value, degrees = statistic([decode(seed, 2) for seed in range(DRAWS)], P)
    assert value > 4 * bound(degrees)


def test_drafts_hold_as_often_as_any_rule_allows():
    p, q = P[0], Q[0]
    held = 0
    for seed in range(DRAWS):
        draft = choose(q, uniform(seed, 0, "draft"))
        held += len(verify([p, p], [draft], [q], seed=seed, position=0)) - 1
    # Hoeffding: further from the mean with a chance of 2e-9
    assert abs(held / DRAWS - np.minimum(p, q).sum()) < math.sqrt(20 / (2 * DRAWS))


def random_rows(seed, rows, size=50):
    weights = np.random.default_rng(seed).random((rows, size)) ** 6
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("seed", range(100))
def test_drafts_from_the_model_itself_always_hold(seed):
    """Also where p and q differ by rounding alone, whichever of the two is larger."""
    p = random_rows(seed, 5)
    for q in (p, p * (1 - 2**-53), p * (1 + 2**-52)):
        drafts = [choose(q[index], uniform(seed, 3 + index, "draft")) for index in range(4)]
        tokens = verify(p, drafts, q[:4], seed=seed, position=3)
        assert tokens == [*drafts, choose(p[4], uniform(seed, 7, "token"))]


def test_the_largest_and_the_smallest_number_drawn(monkeypatch):
    """At the largest, u q is still below q; at 0, a draft that is impossible in the model is not let through."""
    monkeypatch.setattr(speculate, "uniform", lambda seed, place, purpose: 1 - 2**-53)
    for q in np.concatenate([random_rows(1, 1)[0], 2.0 ** -np.arange(0, 50), 1 - 2.0 ** -np.arange(1, 54)]):
        rows = np.array([[q, 1 - q]])
        assert len(verify([*rows, *rows], [0], rows, seed=0, position=0)) == 2
    monkeypatch.setattr(speculate, "uniform", lambda seed, place, purpose: 0.0)
    assert verify([np.array([0.0, 1.0])], [0], [np.array([0.5, 0.5])], seed=0, position=0) == [1]


@pytest.mark.parametrize("seed", range(50))
def test_drafts_the_model_never_takes_fail_at_once(seed):
    p, q = random_rows(seed, 3), random_rows(seed + 1000, 2)
    p[:, :25] = 0
    q[:, 25:] = 0
    drafts = [choose(row, uniform(seed, index, "draft")) for index, row in enumerate(q)]
    assert verify(p, drafts, q, seed=seed, position=0) == [choose(p[0], uniform(seed, 0, "correct"))]


def test_a_replacement_is_never_more_likely_a_draft_than_a_token():
    for seed in range(300):
        p, q = random_rows(seed, 2), random_rows(seed + 1000, 1)
        draft = choose(q[0], uniform(seed, 0, "draft"))
        tokens = verify(p, [draft], q, seed=seed, position=0)
        if len(tokens) == 1:
            assert p[0][tokens[0]] > q[0][tokens[0]]


def test_an_empty_residual_leaves_the_model():
    """q is a rounding above p everywhere, and the number drawn is the largest there is."""
    p = np.array([0.5, 0.25, 0.25])
    assert (speculate._residual(p, p * (1 + 2**-52)) == p).all()
    assert (speculate._residual(p, np.array([0.25, 0.5, 0.25])) == [0.25, 0, 0]).all()


def test_a_draft_its_proposal_excludes_is_our_mistake():
    with pytest.raises(AssertionError, match="draft 2 of output position 4 has probability 0"):
        verify([P[0], P[0]], [2], [np.array([0.5, 0.5, 0.0])], seed=0, position=4)


# Plain decoding


def toy_logits(tokens, vocab=11, salt=0):
    """Logits that every token so far decides, with ties."""
    seed = [salt, len(tokens), *tokens[-3:]]
    return np.random.default_rng(seed).normal(size=vocab).round(1).astype(np.float32)


def plain(sampling, length, seed=5):
    tokens, seen = [1], Seen(11, [1])
    for position in range(length):
        tokens.append(next_token(toy_logits(tokens), sampling, seed=seed, position=position, seen=seen))
        seen.add(tokens[-1])
    return tokens[1:]


def chosen(tokens, drafts, sampling, seed, seen):
    """The tokens plain decoding takes while the drafts hold, each counted before the next."""
    for index in range(len(drafts) + 1):
        logits = toy_logits([*tokens, *drafts[:index]])
        token = next_token(logits, sampling, seed=seed, position=len(tokens) - 1 + index, seen=seen)
        seen.add(token)
        yield token


def speculated(sampling, length, steps, guess, seed=5):
    """Decode with ``steps`` drafts in turn; ``guess(tokens, position, seen)`` makes one. Counts as the engine does."""
    tokens, seen, accepted = [1], Seen(11, [1]), 0
    turns = itertools.cycle(steps)
    while len(tokens) <= length:
        drafts = []
        for _ in range(next(turns)):
            drafts.append(guess([*tokens, *drafts], len(tokens) - 1 + len(drafts), seen))

        kept = match(chosen(tokens, drafts, sampling, seed, seen), drafts)
        accepted += len(kept) - 1
        tokens += kept
    return tokens[1 : length + 1], accepted


SAMPLINGS = [
    Sampling(temperature=0.0),
    Sampling(temperature=0.0, repetition_penalty=1.3, frequency_penalty=0.5),
    Sampling(temperature=0.9, top_p=0.9),
    Sampling(temperature=1.2, presence_penalty=0.7),
]


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("steps", [(0,), (1,), (4,), (2, 0, 3, 1)])
def test_matched_drafts_give_plain_decoding_token_for_token(sampling, steps):
    """Good drafts and bad ones, greedy and sampled, wherever the steps begin."""
    expected = plain(sampling, 40)

    def good(tokens, position, seen):
        return next_token(toy_logits(tokens), sampling, seed=5, position=position, seen=seen)

    def middling(tokens, position, seen):
        return good(tokens, position, seen) if position % 3 else 0

    def bad(tokens, position, seen):
        return (good(tokens, position, seen) + 1) % 11

    for guess in (good, middling, bad):
        tokens, accepted = speculated(sampling, 40, steps, guess)
        assert tokens == expected
        if steps == (0,):
            assert accepted == 0
        elif guess is middling:
            assert accepted > 0


@given(st.lists(st.integers(0, 3), max_size=5), st.lists(st.integers(0, 3), min_size=6, max_size=6))
def test_match_keeps_the_drafts_before_the_first_difference(drafts, chosen):
    read = []
    tokens = match((read.append(token) or token for token in chosen), drafts)
    same = next((i for i, draft in enumerate(drafts) if draft != chosen[i]), len(drafts))
    assert tokens == chosen[: same + 1] == read


@pytest.mark.parametrize("seed", range(30))
def test_greedy_targets_give_plain_decoding_from_any_proposals(seed):
    """One-hot targets against sampled drafts: a draft holds where it is the argmax, else the argmax comes instead."""
    logits = np.stack([toy_logits([seed, index]) for index in range(4)])
    targets = [distribution(row, Sampling(temperature=0.0)) for row in logits]
    proposals = [distribution(row * 2, Sampling(temperature=0.7)) for row in logits[:3]]
    drafts = [choose(q, uniform(seed, index, "draft")) for index, q in enumerate(proposals)]
    best = [int(row.argmax()) for row in logits]
    assert verify(targets, drafts, proposals, seed=seed, position=0) == match(best, drafts)


def test_targets_are_read_no_further_than_the_drafts_hold():
    read = []

    def targets():
        for index in range(3):
            read.append(index)
            yield np.eye(V)[index]

    assert verify(targets(), [0, 2], [np.eye(V)[0], np.eye(V)[2]], seed=0, position=0) == [0, 1]
    assert read == [0, 1]
