"""Steps of few tokens are played from tapes, and give what steps that are run give."""

import pytest

from dsv4 import native
from dsv4.config.engine import Limits
from dsv4.config.sampling import Sampling
from dsv4.engine import runner
from dsv4.engine.engine import Engine

pytestmark = pytest.mark.skipif(not native.available(), reason="no C compiler here")

SAMPLED = Sampling(max_tokens=40, temperature=1, seed=3, ignore_eos=True, logprobs=2)


@pytest.mark.parametrize("draft_tokens", [0, 2])
def test_played_steps_give_the_same(model, prompts, monkeypatch, draft_tokens):
    limits = Limits(max_requests=3, step_tokens=64, draft_tokens=draft_tokens)
    played = Engine(model, limits)
    with_tapes = played.generate(prompts, SAMPLED)
    tapes = [tape for tape, _, _ in played.runner._play._kept.values()]
    assert len(tapes) > 3
    assert all(tape.unplayable is None for tape in tapes)
    monkeypatch.setattr(runner, "MOST_PLAYED", 0)
    run = Engine(model, limits)
    without = run.generate(prompts, SAMPLED)
    assert not run.runner._play._kept
    assert [c.token_ids for c in with_tapes] == [c.token_ids for c in without]
    assert [c.logprobs for c in with_tapes] == [c.logprobs for c in without]
