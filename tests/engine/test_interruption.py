"""Interruptions: starting again from scratch makes outputs shorter, going on from the log changes nothing.

An output of n tokens comes through from scratch only if no interruption falls into n tokens, so that of the outputs
that are given at last, too many are short: with a hazard h a token, those of n tokens are (1 - h)^n times as many.
"""

import math
import random

import numpy as np
import pytest

from dsv4.config.sampling import Sampling
from dsv4.engine.engine import Engine

COUNT = 400
PROMPT = [0, 3, 4, 9, 2]
HAZARD = 0.15  # of an interruption, a token
NEVER = 10**9


def sampling(seed):
    """Ends after nine tokens on average, at any time."""
    return Sampling(max_tokens=200, seed=seed, logit_bias=((1, 1.5),))


@pytest.fixture(scope="module")
def limits(small):
    return lambda **options: small(max_requests=COUNT, **options)


@pytest.fixture(scope="module")
def whole(tiny, limits):
    """Outputs that were never interrupted."""
    found = Engine(tiny, limits()).generate([PROMPT] * COUNT, [sampling(seed) for seed in range(COUNT)])
    assert all(completion.finish == "stop" for completion in found)
    return [completion.token_ids for completion in found]


def restarted(engine, chance, hazard):
    """Outputs of requests that each begin anew, with another seed, whenever they are interrupted."""
    fresh, outputs, due = iter(range(10**6, 2 * 10**6)), [], {}

    def begin():
        tokens = int(math.log(1 - chance.random()) / math.log(1 - hazard)) if hazard else NEVER
        due[engine.add(PROMPT, sampling(next(fresh)))] = tokens

    for _ in range(COUNT):
        begin()
    while not engine.is_idle:
        for piece in engine.step():
            num_tokens = len(engine.completion(piece.id).token_ids)
            if num_tokens > due[piece.id]:
                engine.drop(piece.id)
                begin()
            elif piece.finish is not None:
                outputs.append(engine.take(piece.id).token_ids)
    return outputs


def deviations(outputs, whole):
    """By how many standard deviations of their difference the mean lengths differ."""
    ours, theirs = (np.array([len(tokens) for tokens in found]) for found in (outputs, whole))
    spread = math.sqrt(ours.var(ddof=1) / len(ours) + theirs.var(ddof=1) / len(theirs))
    return (ours.mean() - theirs.mean()) / spread


def test_starting_from_scratch_makes_outputs_shorter(tiny, limits, whole):
    outputs = restarted(Engine(tiny, limits()), random.Random(1), HAZARD)
    assert len(outputs) == COUNT
    assert deviations(outputs, whole) < -8
    # As the hazard says it: what is kept of n tokens is (1 - h)^n of them.
    kept = np.array([(1 - HAZARD) ** len(tokens) for tokens in whole])
    expected = sum(share * len(tokens) for share, tokens in zip(kept, whole, strict=True)) / kept.sum()
    assert np.mean([len(tokens) for tokens in outputs]) == pytest.approx(expected, rel=0.15)
    means = [np.mean([len(tokens) for tokens in found]) for found in (whole, outputs)]
    assert means == pytest.approx([8.9, 4.9], rel=0.05)  # docs/engine.md says so


def test_other_seeds_alone_make_no_difference(tiny, limits, whole):
    """The statistic is near 0 where nothing is interrupted: at 4 it is wrong once in 16,000."""
    assert abs(deviations(restarted(Engine(tiny, limits()), random.Random(2), 0), whole)) < 4


def test_going_on_from_the_log_gives_the_very_outputs(tiny, limits, whole, tmp_path):
    """The engine stops at random moments, as often as outputs are long; every length is what it was."""
    chance, num_stops = random.Random(3), 0
    log = limits(log=str(tmp_path / "log"))
    with Engine(tiny, log) as engine:
        commit, engine._journal.commit = engine._journal.commit, lambda: None  # one commit for all, not one for each
        ids = [engine.add(PROMPT, sampling(seed)) for seed in range(COUNT)]
        commit()
    found = {}
    while len(found) < COUNT:
        with Engine(tiny, log) as engine:
            engine.resume()
            for _ in range(chance.randint(1, 6)):
                for piece in engine.step():
                    if piece.finish is not None:
                        found[piece.id] = engine.take(piece.id).token_ids
            num_stops += not engine.is_idle
    assert num_stops > 5
    assert [found[id] for id in ids] == whole
