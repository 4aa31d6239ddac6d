"""Sampling: each step against its formula and transformers, draws by the seed alone, rows that ignore others."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as published

from dsv4.config.sampling import Sampling
from dsv4.engine.sample import PURPOSES, Seen, choose, distribution, log_probabilities, needs_seen, next_token, uniform

V = 37
PROMPT, OUTPUT = [3, 5, 5, 8, 36], [5, 9, 9, 9, 0]


def row(seed, size=V, scale=2.0):
    return (np.random.default_rng(seed).normal(size=size) * scale).astype(np.float32)


def softmax(values):
    best = max(values)
    weights = [math.exp(value - best) for value in values]
    return [weight / math.fsum(weights) for weight in weights]


def by_formula(logits, sampling, mask=None):
    """The steps of the module's docstring, one token at a time."""
    logits = [float(value) for value in logits]
    counts = Counter(OUTPUT)
    for token in {*PROMPT, *OUTPUT}:
        factor = sampling.repetition_penalty
        logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
    for token, count in counts.items():
        logits[token] -= sampling.presence_penalty + sampling.frequency_penalty * count
    for token, value in sampling.logit_bias:
        logits[token] += value
    if mask is not None:
        logits = [value if allowed else -math.inf for value, allowed in zip(logits, mask, strict=True)]
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if sampling.temperature == 0:
        return np.eye(len(logits))[order[0]]
    kept = order[: sampling.top_k or None]
    p = dict(zip(kept, softmax([logits[token] / sampling.temperature for token in kept]), strict=True))
    before, nucleus = 0.0, []
    for token in kept:
        if before < sampling.top_p or sampling.top_p == 1:
            nucleus.append(token)
        before += p[token]
    nucleus = [token for token in nucleus if p[token] >= sampling.min_p * p[order[0]]]
    total = math.fsum(p[token] for token in nucleus)
    return np.array([p[token] / total if token in nucleus else 0.0 for token in range(len(logits))])


# The numbers drawn


def philox(key, counter):
    """Philox4x64 with ten rounds, as published (Salmon et al., 2011): four 64-bit words."""
    low = 2**64 - 1
    k0, k1 = key
    a, b, c, d = counter
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * a, 0xCA5A826395121157 * c
        a, b, c, d = (second >> 64) ^ b ^ k0, second & low, (first >> 64) ^ d ^ k1, first & low
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & low, (k1 + 0xBB67AE8584CAA73B) & low
    return a, b, c, d


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1, 2**64 - 1])
def test_uniform_is_philox_keyed_by_seed_and_purpose(seed):
    for position in (0, 1, 77, 2**20):
        for purpose, number in PURPOSES.items():
            word = philox((seed, number), (1, position, 0, 0))[0]  # NumPy counts up before it draws
            assert uniform(seed, position, purpose) == (word >> 11) / 2**53


def test_the_meaning_of_a_seed_does_not_change():
    assert PURPOSES == {"token": 0, "draft": 1, "accept": 2, "correct": 3}
    assert [uniform(7, position, "token") for position in (0, 1)] == [0.8720734548204873, 0.8734503010139788]


def test_uniform_numbers_are_even_and_differ():
    numbers = np.array([uniform(seed, position, "token") for seed in range(40) for position in range(50)])
    assert len(set(numbers)) == 2000
    counts = np.histogram(numbers, bins=10, range=(0, 1))[0]
    # Pearson's statistic with 9 degrees of freedom; over 55 with a chance of 1e-8
    assert ((counts - 200) ** 2 / 200).sum() < 55


def test_draws_disturb_no_global_generator():
    np.random.seed(3)
    torch.manual_seed(3)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    next_token(row(0), Sampling(), seed=1, position=0)
    assert (np.random.get_state()[1] == before[0]).all()
    assert torch.equal(torch.get_rng_state(), before[1])


# The distribution


@pytest.mark.parametrize("case", range(60))
def test_all_steps_together_are_the_formula(case):
    """Half of the logits are rounded, so that many are equal."""
    draw = np.random.default_rng(case)
    logits = row(case).round(case % 2 * 7)
    sampling = Sampling(
        temperature=float(draw.choice([0.3, 1.0, 1.7, 0.0])),
        top_p=float(draw.choice([1.0, draw.uniform(0.05, 1)])),
        top_k=int(draw.choice([0, 1, 5, 20, 36, 37, 90])),
        min_p=float(draw.choice([0.0, draw.uniform(0, 0.3)])),
        presence_penalty=float(draw.choice([0.0, 0.7, -1.1])),
        frequency_penalty=float(draw.choice([0.0, 0.3, -0.6])),
        repetition_penalty=float(draw.choice([1.0, 1.3, 0.8])),
        logit_bias=((4, 1.5), (9, -2.25)) if draw.random() < 0.5 else (),
    )
    mask = draw.random(V) < 0.6 if draw.random() < 0.5 else None
    kept = logits.copy()
    p = distribution(logits, sampling, seen=Seen(V, PROMPT, OUTPUT), mask=mask, name="a")
    expected = by_formula(logits, sampling, mask)
    assert p.dtype == np.float64
    assert (logits == kept).all()
    assert ((p > 0) == (expected > 0)).all()
    np.testing.assert_allclose(p, expected, rtol=1e-12)  # sums of 37 numbers, in another order


@pytest.mark.parametrize("case", range(12))
def test_the_steps_are_those_of_transformers(case):
    draw = np.random.default_rng(100 + case)
    options = {
        "repetition_penalty": draw.uniform(0.7, 1.5), "temperature": draw.uniform(0.2, 2),
        "top_k": int(draw.integers(2, V)), "top_p": draw.uniform(0.3, 0.99), "min_p": draw.uniform(0, 0.2),
    }  # fmt: skip
    logits = row(case)
    scores = torch.tensor(logits, dtype=torch.float64)[None]
    ids = torch.tensor([PROMPT + OUTPUT])
    for step in (
        published.RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]),
        published.TemperatureLogitsWarper(options["temperature"]),
        published.TopKLogitsWarper(options["top_k"]),
        published.TopPLogitsWarper(options["top_p"]),
        published.MinPLogitsWarper(options["min_p"]),
    ):
        scores = step(ids, scores)
    p = distribution(logits, Sampling(**options), seen=Seen(V, PROMPT, OUTPUT))
    np.testing.assert_allclose(p, scores[0].softmax(-1).numpy(), rtol=1e-12)


def test_penalties_on_four_tokens():
    """Token 0 is in the prompt, 1 in both, 2 twice in the output, 3 in neither."""
    logits = np.array([2.0, -2.0, 1.0, 1.0], np.float32)
    seen = Seen(4, [0, 1, 1], [1, 2, 2])

    def log_odds(**penalties):
        p = distribution(logits, Sampling(**penalties), seen=seen)
        return np.log(p / p[3]).round(9).tolist()

    assert log_odds(repetition_penalty=2.0) == [0, -5, -0.5, 0]
    assert log_odds(presence_penalty=0.5) == [1, -3.5, -0.5, 0]
    assert log_odds(frequency_penalty=0.5) == [1, -3.5, -1, 0]


def test_counts_follow_the_output():
    seen = Seen(V, PROMPT)
    for token in [*OUTPUT, 11]:
        seen.add(token)
    seen.remove(11)
    expected = Seen(V, PROMPT, OUTPUT)
    assert (seen.in_output == expected.in_output).all()
    assert expected.in_output[[5, 9, 0, 3]].tolist() == [1, 3, 1, 0]
    assert np.flatnonzero(expected.in_prompt).tolist() == [3, 5, 8, 36]
    assert not needs_seen(Sampling(temperature=0.5, top_k=3, logit_bias=((1, 2.0),)))
    for name in ("presence_penalty", "frequency_penalty", "repetition_penalty"):
        assert needs_seen(Sampling(**{name: 0.5}))


@pytest.mark.parametrize("dtype", ["float", "bfloat"])
@pytest.mark.parametrize("scale", [0.0, 0.7, 3.0, 9.0])
@pytest.mark.parametrize("top_p", [1e-6, 0.5, 0.95, 1 - 1e-12])
def test_top_p_of_a_large_vocabulary_is_that_of_a_full_sort(dtype, scale, top_p):
    """bfloat: 8 bits of mantissa, so thousands of tokens are equal."""
    logits = row(1, 129_280, scale)
    if dtype == "bfloat":
        logits = torch.from_numpy(logits).bfloat16().float().numpy()
    p = distribution(logits, Sampling(top_p=top_p))
    plain = distribution(logits, Sampling())
    order = np.argsort(-logits, kind="stable")
    count = np.count_nonzero(p)
    assert sorted(order[:count]) == np.flatnonzero(p).tolist()
    sums = plain[order].cumsum()
    error = 129_280 * 2**-53  # of a running sum of as many numbers
    assert sums[count - 1] >= top_p - error
    assert count == 1 or sums[count - 2] < top_p + error
    np.testing.assert_allclose(p[order[:count]], plain[order[:count]] / sums[count - 1], rtol=1e-10)


@pytest.mark.parametrize("allowed", [1, 3, 3000, 100_000])
def test_top_p_that_only_rounding_keeps_from_being_all(allowed):
    """What is missing to the share may then be less than any weight, and only zeros may be left to search."""
    for seed in range(4):
        mask = np.random.default_rng(seed).permutation(129_280) < allowed
        for scale in (0.0, 1.0, 5.0):
            p = distribution(row(seed, 129_280, scale), Sampling(top_p=1 - 2**-53), mask=mask)
            assert not p[~mask].any()
            assert abs(p.sum() - 1) < 1e-12
            assert np.count_nonzero(p) >= 0.99 * allowed


@pytest.mark.parametrize("top_k", [1, 7, 1010, 1011, 5000, 129_279])
def test_top_k_of_a_large_vocabulary_keeps_the_smaller_of_equal_ids(top_k):
    logits = row(2, 129_280).round(1)
    kept = np.flatnonzero(distribution(logits, Sampling(top_k=top_k)))
    assert kept.tolist() == sorted(np.argsort(-logits, kind="stable")[:top_k])


def test_temperature_0_takes_the_first_of_the_largest():
    logits = np.array([1.0, 4.0, 3.0, 4.0], np.float32)
    greedy = Sampling(temperature=0.0, top_k=2, top_p=0.4, min_p=0.1)
    assert distribution(logits, greedy).tolist() == [0, 1, 0, 0]
    assert next_token(logits, greedy, seed=0, position=0) == 1
    mask = np.array([True, False, True, True])
    assert next_token(logits, greedy, seed=0, position=0, mask=mask) == 3
    biased = Sampling(temperature=0.0, logit_bias=((2, 1.5),), presence_penalty=1.0)
    assert next_token(logits, biased, seed=0, position=0, seen=Seen(4, [1], [3])) == 2


def test_min_p_keeps_what_is_just_as_likely_as_it_asks():
    logits = np.array([1.0, 4.0, 3.0, 4.0], np.float32)
    assert distribution(logits, Sampling(min_p=1.0)).tolist() == [0, 0.5, 0, 0.5]


def test_no_temperature_is_too_small_or_too_large():
    logits = row(4)
    best = np.eye(V)[logits.argmax()]
    assert (distribution(logits, Sampling(temperature=5e-324)) == best).all()
    np.testing.assert_allclose(distribution(logits, Sampling(temperature=1e300)), 1 / V)
    mask = np.arange(V) < 5
    p = distribution(logits, Sampling(temperature=1e300, top_p=0.99), mask=mask)
    np.testing.assert_allclose(p, mask / 5)


# The draw


def test_choose_gives_each_id_its_share_of_the_line():
    """Across blocks, with zeros at both ends, for weights that are no probabilities: at most one of a grid amiss."""
    weights = np.random.default_rng(5).random(300) * 3
    weights[[0, 1, 127, 128, 200, 298, 299]] = 0
    grid = 20_000
    counts = np.bincount([choose(weights, (index + 0.5) / grid) for index in range(grid)], minlength=300)
    assert (np.abs(counts - grid * weights / weights.sum()) <= 1 + 1e-6).all()
    assert (counts[weights == 0] == 0).all()
    edges = np.linspace(0, 1, 101)[:-1]
    chosen = [choose(weights, edge) for edge in edges]
    assert chosen == sorted(chosen)


@pytest.mark.parametrize("size", [1, 5, 128, 129, 300])
@pytest.mark.parametrize("u", [0.0, 1e-300, 1 - 2**-53])
def test_choose_never_takes_an_impossible_token(size, u):
    for index in range(size):
        weights = np.zeros(size)
        weights[index] = 0.1
        assert choose(weights, u) == index
    tiny = np.full(size, 5e-324)
    tiny[0] = 0 if size > 1 else 1
    assert tiny[choose(tiny, u)] > 0


@pytest.mark.parametrize("size", [128, 300])
def test_rounding_of_sums_never_leads_past_the_last_possible_token(size):
    """A block's running sum may end below the sum of the block, which is added in another order."""
    for seed in range(50):
        weights = np.random.default_rng(seed).random(size)
        weights[100:] = 0
        assert choose(weights, 1 - 2**-53) == 99


def test_tokens_follow_the_distribution():
    logits = row(6, 8, 1.0)
    sampling = Sampling(temperature=0.8, top_p=0.9)
    p = distribution(logits, sampling)
    draws = 4000
    counts = np.bincount([next_token(logits, sampling, seed=seed, position=2) for seed in range(draws)], minlength=8)
    possible = p > 0
    assert counts[~possible].sum() == 0
    assert possible.sum() < 8
    # Pearson's statistic with at most 6 degrees of freedom; over 50 with a chance of 1e-8
    assert ((counts - draws * p)[possible] ** 2 / (draws * p)[possible]).sum() < 50


SAMPLINGS = [
    Sampling(), Sampling(temperature=0.0), Sampling(temperature=0.6, top_p=0.9), Sampling(top_k=40, min_p=0.05),
    Sampling(presence_penalty=0.4, repetition_penalty=1.2, top_p=0.8), Sampling(logit_bias=((3, 4.0),), top_p=0.99),
]  # fmt: skip


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_row_is_the_same_to_the_bit_wherever_it_lies(sampling):
    """In a batch of any size and place, strided, at an odd address, with other seeds beside it."""
    size = 1000
    logits = row(8, size)
    seen = Seen(size, PROMPT, OUTPUT)
    alone = distribution(logits, sampling, seen=seen)
    token = next_token(logits, sampling, seed=5, position=9, seen=seen)
    assert choose(alone, uniform(5, 9, "token")) == token
    for rows, place in ((1, 0), (2, 1), (7, 3)):
        batch = np.stack([row(50 + index, size) for index in range(rows)])
        batch[place] = logits
        odd = np.zeros(size + 1, np.float32)[1:]
        odd[:] = logits
        for same in (batch[place], np.asfortranarray(batch)[place], odd):
            assert distribution(same, sampling, seen=seen).tobytes() == alone.tobytes()
            assert next_token(same, sampling, seed=5, position=9, seen=seen) == token


# What the model says


@pytest.mark.parametrize("size", [V, 5000])
def test_log_probabilities_are_the_models_own(size):
    logits = row(9, size).round(1)
    expected = torch.tensor(logits, dtype=torch.float64).log_softmax(0).numpy()
    order = np.argsort(-logits, kind="stable").tolist()
    for num in (0, 1, 20, V):
        found = log_probabilities(logits, 6, num)
        assert [token for token, _ in found.top] == order[:num]
        np.testing.assert_allclose([value for _, value in found.top], expected[order[:num]], atol=1e-12)
        assert abs(found.chosen - expected[6]) < 1e-12
    assert len(log_probabilities(logits[:4], 0, 20).top) == 4


def test_log_probability_of_the_impossible():
    logits = np.array([0.0, -np.inf, 0.0], np.float32)
    assert log_probabilities(logits, 1, 1).chosen == -math.inf
    assert log_probabilities(logits, 0, 3).top[1:] == [(2, -math.log(2)), (1, -math.inf)]


# Bad input


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bad_rows_name_the_request(temperature):
    sampling = Sampling(temperature=temperature)

    def fails(match, logits, **options):
        with pytest.raises(ValueError, match=f"request r7.*{match}"):
            next_token(logits, options.pop("sampling", sampling), seed=0, position=0, name="r7", **options)

    good = row(0)
    fails(f"the mask allows no token; expected at least one of {V}", good, mask=np.zeros(V, bool))
    fails(r"the mask has shape \[36\]; expected the logits', \[37\]", good, mask=np.ones(V - 1, bool))
    for value in (np.nan, np.inf):
        bad = good.copy()
        bad[11] = value
        fails(rf"the largest logit is {value} \(token 11\); expected a finite number", bad)
    fails("the largest logit is -inf", np.full(V, -np.inf, np.float32))
    banned = np.where(np.arange(V) < 3, -np.inf, good).astype(np.float32)
    fails("the largest logit is -inf", banned, mask=np.arange(V) < 3)
    outside = Sampling(temperature=temperature, logit_bias=((V, 1.0),))
    fails("logit_bias has token 37; expected 0 to 36", good, sampling=outside)
