"""What the MTP block runs over and leaves behind: as much as is read later, and not a row less."""

from dataclasses import replace

import numpy as np
import pytest

from dsv4 import native
from dsv4.config.engine import PrefixLimits
from dsv4.config.sampling import Sampling
from dsv4.engine.engine import Engine
from dsv4.testing.toys import toy_model

needs_kernels = pytest.mark.skipif(not native.available(), reason="no C compiler here")

PROMPT = [0, *np.random.default_rng(3).integers(2, 11, 400).tolist()]
WINDOW = 5


def watch(engine):
    """What the MTP block is run over, and what it says, by position of the last token."""
    draft, rows, logits = engine.runner.draft, [], {}

    def watched(streams, spans):
        after, found = draft(streams, spans)
        for span, row in zip(spans, found, strict=True):
            rows.append(len(span.next_ids))
            logits[span.position + len(span.next_ids) - 1] = row.copy()
        return after, found

    engine.runner.draft = watched
    return rows, logits


def greedy(max_tokens):
    return Sampling(max_tokens=max_tokens, temperature=0, ignore_eos=True)


def run(model, limits, *asked):
    """Run requests one after the other; return the outputs, and of the last one what ``watch`` saw."""
    engine, outputs = Engine(model, limits), []
    for prompt, sampling in asked[:-1]:
        outputs += engine.generate([prompt], sampling)
    rows, logits = watch(engine)
    outputs += engine.generate([asked[-1][0]], asked[-1][1])
    return outputs, rows, logits


def same_at(one, other, places):
    """Up to rounding: not all of the block is in a fixed order. A row that is missing makes a difference of 1."""
    return all(np.abs(one[place] - other[place]).max() < 1e-4 for place in places)


@needs_kernels
@pytest.mark.parametrize("step_tokens", [24, 37, 100])
def test_drafts_do_not_depend_on_chunks(tiny, small, step_tokens):
    """Of a chunk, the block runs over what its window and its drafts reach, which is all that is read."""
    whole = small(numerics="invariant", draft_tokens=2, step_tokens=512)
    cut = small(numerics="invariant", draft_tokens=2, step_tokens=step_tokens)
    _, rows, wanted = run(tiny, whole, (PROMPT[:300], greedy(9)))
    (found,), more_rows, logits = run(tiny, cut, (PROMPT[:300], greedy(9)))
    assert rows[0] == more_rows[0] == WINDOW + 2
    assert found.num_drafted > 5
    assert same_at(wanted, logits, range(299, 306))


@needs_kernels
@pytest.mark.parametrize("length", [256, 260])
def test_a_state_of_a_request_that_ended_has_the_rows_of_its_last_chunk(tiny, small, length):
    """A prompt of whole pages ends in the very step that gives the state."""
    limits = small(numerics="invariant", draft_tokens=1, prefix=PrefixLimits(state_every=128))
    fresh = small(numerics="invariant", draft_tokens=1, prefix=PrefixLimits(memory=False))
    (first,), _, _ = run(tiny, fresh, (PROMPT[:length], greedy(1)))
    longer = [*PROMPT[:length], *first.token_ids, 4, 3]
    outputs, rows, logits = run(tiny, limits, (PROMPT[:length], greedy(1)), (longer, greedy(6)))
    assert outputs[1].num_cached == 256
    _, _, wanted = run(tiny, fresh, (longer, greedy(6)))
    assert rows[0] <= WINDOW + 1
    assert same_at(wanted, logits, range(len(longer) - 1, len(longer) + 3))


def test_a_request_that_ends_costs_no_row_unless_its_state_is_kept(tiny, small):
    for length, num_rows in ((256, [WINDOW + 1]), (200, [WINDOW + 1]), (100, [])):
        engine = Engine(tiny, small(draft_tokens=1, prefix=PrefixLimits(state_every=128)))
        rows, _ = watch(engine)
        engine.generate([PROMPT[:length]], greedy(1))
        assert rows[-1:] == num_rows
        assert len(rows) == length // 128


def test_without_drafts_the_block_is_left_alone(tiny, small, monkeypatch):
    engine = Engine(tiny, small())
    monkeypatch.setattr(tiny, "mtp_step", lambda *_: pytest.fail("the MTP block was run"))
    assert engine.generate([PROMPT], greedy(5))[0].num_drafted == 0


@needs_kernels
@pytest.mark.parametrize(("drafts", "num_repeated"), [(0, 128), (1, 256)])
def test_without_drafts_nothing_is_run_again_for_its_window(tiny, small, drafts, num_repeated):
    """The state after 256 tokens needs 2 x 43 tokens before it, and 43 more where the MTP block is read."""
    config = replace(tiny.config, attention=replace(tiny.config.attention, window=44))
    model = toy_model(config).requires_grad_(False).eval()
    limits = small(numerics="invariant", draft_tokens=drafts, prefix=PrefixLimits(state_bytes=1))
    engine = Engine(model, limits)
    wanted = engine.generate([PROMPT[:300]], greedy(6))[0].token_ids
    id = engine.add(PROMPT[:300], greedy(6))
    engine.step()
    entries = engine.last_step.entries
    assert sum(min(entry.end, 256) - entry.begin for entry in entries) == num_repeated
    while not engine.is_idle:
        engine.step()
    assert engine.take(id).token_ids == wanted


def test_a_step_can_be_looked_at(tiny, small):
    engine = Engine(tiny, small(step_tokens=64, draft_tokens=2))
    engine.keeps_logits = True
    assert engine.last_step == ((), ())
    long, short = engine.add(PROMPT[:100], greedy(4)), engine.add(PROMPT[:8], greedy(1))
    engine.step()
    entries, logits = engine.last_step
    assert [(entry.request.id, entry.begin, entry.end) for entry in entries] == [(long, 0, 56), (short, 0, 8)]
    assert logits[0] is None
    assert logits[1].shape == (1, 11)
    assert int(logits[1].argmax()) == engine.take(short).token_ids[0]
    engine.step()
    engine.step()
    assert engine.last_step.logits[0].shape == (3, 11)
    while not engine.is_idle:
        engine.step()
    assert engine.step() == []
    assert engine.last_step == ((), ())
    engine.keeps_logits = False
    engine.add(PROMPT[:8], greedy(1))
    engine.step()
    assert (len(engine.last_step.entries), engine.last_step.logits) == (1, ())
