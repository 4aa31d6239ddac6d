"""Tokens of the engine follow the model's own probabilities exactly, decoded plainly or by rejection sampling."""

import math

import numpy as np
import pytest
import torch

from dsv4.config.sampling import Sampling
from dsv4.engine import speculate
from dsv4.engine.engine import Engine

V, LENGTH = 11, 4
PROMPT = [0, 3, 4, 9, 2, 7]
DRAWS = 2500
LEAST = 8  # expected in a cell of the statistic: below, it is no chi-square any more
SAMPLINGS = {
    "all tokens": Sampling(max_tokens=LENGTH, ignore_eos=True),
    "temperature and cuts": Sampling(max_tokens=LENGTH, temperature=1.3, top_k=6, min_p=0.02, ignore_eos=True),
}


@torch.inference_mode()
def exact(model, sampling):
    """The joint distribution of the first LENGTH tokens after the prompt, [V] * LENGTH float64, by brute force."""
    joint = np.ones(())
    for length in range(LENGTH):
        before = torch.cartesian_prod(*[torch.arange(V)] * length).reshape(-1, length) if length else torch.zeros(1, 0)
        ids = torch.cat([torch.tensor(PROMPT).expand(len(before), -1), before.long()], dim=1)
        logits = model(ids).logits[:, -1].double().numpy() / sampling.temperature
        if sampling.top_k:
            logits[logits < np.sort(logits)[:, -sampling.top_k, None]] = -np.inf
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p[p < sampling.min_p] = 0
        p /= p.sum(axis=1, keepdims=True)
        joint = joint[..., None] * p.reshape([V] * (length + 1))
    return joint


def draws(model, limits, sampling):
    """Outputs of the engine, [DRAWS, LENGTH], and the share of drafts that held."""
    engine = Engine(model, limits)
    found = engine.generate([PROMPT] * DRAWS, [_seeded(sampling, seed) for seed in range(DRAWS)])
    drafted, accepted = sum(c.num_drafted for c in found), sum(c.num_accepted for c in found)
    return np.array([completion.token_ids for completion in found]), accepted / max(1, drafted)


def _seeded(sampling, seed):
    return Sampling(**{**vars(sampling), "seed": seed})


def statistic(found, joint):
    """Pearson's statistic and its degrees of freedom. Rare outputs are one cell, chosen by what is expected alone."""
    expected = joint.ravel() * len(found)
    counts = np.bincount(np.ravel_multi_index(found.T, joint.shape), minlength=joint.size)
    assert not counts[expected == 0].any()  # what is impossible never comes
    large = expected >= LEAST
    expected, counts = (np.append(x[large], x[~large].sum()) for x in (expected, counts))
    assert expected[-1] > LEAST
    assert len(expected) > 25
    return float(((counts - expected) ** 2 / expected).sum()), len(expected) - 1


def bound(degrees, chance=1e-6):
    """What a chi-square goes over with at most this chance (Laurent and Massart, 2000, lemma 1)."""
    x = math.log(1 / chance)
    return degrees + 2 * math.sqrt(degrees * x) + 2 * x


@pytest.fixture(scope="module")
def limits(small):
    return lambda drafts: small(max_requests=250, draft_tokens=drafts)


@pytest.mark.parametrize("drafts", [0, 1, 2])
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
def test_joint_distribution_of_the_first_tokens(tiny, limits, drafts, sampling):
    found, acceptance = draws(tiny, limits(drafts), sampling)
    value, degrees = statistic(found, exact(tiny, sampling))
    assert value < bound(degrees)
    if drafts:
        assert 0.1 < acceptance < 0.9  # both rules are at work


def test_the_statistic_tells_a_wrong_rule(tiny, limits, monkeypatch):
    """Drafts that always hold are distributed as the MTP block has it, not as the model does."""
    monkeypatch.setattr(speculate, "uniform", _never_rejecting(speculate.uniform))
    sampling = SAMPLINGS["all tokens"]
    found, acceptance = draws(tiny, limits(1), sampling)
    assert acceptance > 0.9
    value, degrees = statistic(found, exact(tiny, sampling))
    assert value > 3 * bound(degrees)


def _never_rejecting(uniform):
    return lambda seed, place, purpose: 0.0 if purpose == "accept" else uniform(seed, place, purpose)
