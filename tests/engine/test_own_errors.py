"""A request whose mask fails, or whose logits give no token, ends alone: the others do not notice."""

import asyncio
import math

import numpy as np
import pytest

from dsv4 import native
from dsv4.config.sampling import Sampling
from dsv4.engine.engine import Engine
from dsv4.engine.sample import NoTokenError

needs_kernels = pytest.mark.skipif(not native.available(), reason="no C compiler here")

V = 11
PROMPTS = [[0, 3, 4], [0, 5] * 70, [0, 7, 7, 2]]
SAMPLINGS = [Sampling(max_tokens=12, seed=seed, ignore_eos=True) for seed in range(3)]


def raises_at(length):
    """A mask that allows all, and raises once the output is so long."""

    def mask(output):
        if len(output) >= length:
            raise KeyError("state 7")
        return None

    return mask


def run(engine):
    """The pieces of every request, to the end."""
    pieces = {}
    while not engine.is_idle:
        for piece in engine.step():
            pieces.setdefault(piece.id, []).append(piece)
    return pieces


@needs_kernels
@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("length", [0, 1, 5, 11])
def test_a_mask_that_raises_ends_its_own_request(tiny, small, drafts, length):
    """What came before the error is given, whether it was decoded or drafted; the others' tokens are as ever."""
    alone = Engine(tiny, small(numerics="invariant")).generate(PROMPTS, SAMPLINGS)
    engine = Engine(tiny, small(numerics="invariant", draft_tokens=drafts, step_tokens=60))
    masks = [None, raises_at(length), None]
    ids = [engine.add(p, s, mask=mask) for p, s, mask in zip(PROMPTS, SAMPLINGS, masks, strict=True)]
    pieces = run(engine)
    first, failed, last = (engine.take(id) for id in ids)
    assert [first.token_ids, last.token_ids] == [alone[0].token_ids, alone[2].token_ids]
    assert (first.finish, first.error, last.finish) == ("length", None, "length")
    assert (failed.finish, failed.token_ids) == ("error", alone[1].token_ids[:length])
    assert str(failed.error) == "request request-1: its mask raised KeyError('state 7')"
    assert isinstance(failed.error, NoTokenError)
    assert isinstance(failed.error.__cause__, KeyError)
    assert (pieces[ids[1]][-1].finish, pieces[ids[1]][-1].error) == ("error", failed.error)
    assert failed.num_drafted >= failed.num_accepted >= 0
    engine.pool.assert_consistent()
    assert engine.pool.num_free == engine.pool.num_pages
    assert engine.generate(PROMPTS, SAMPLINGS)[1].token_ids == alone[1].token_ids  # its slot is as good as new


@pytest.mark.parametrize("drafts", [1, 2])
def test_rejection_sampling_keeps_what_came_before_the_error(tiny, small, drafts):
    for length in (0, 1, 2, 3, 6):
        engine = Engine(tiny, small(draft_tokens=drafts))
        id = engine.add(PROMPTS[0], SAMPLINGS[0], mask=raises_at(length))
        run(engine)
        failed = engine.take(id)
        assert (failed.finish, len(failed.token_ids)) == ("error", length)
    assert failed.num_accepted > 0


@pytest.mark.parametrize("numerics", ["fast", pytest.param("invariant", marks=needs_kernels)])
def test_an_error_after_the_end_is_none(tiny, small, numerics):
    """With drafts a mask is asked about tokens after the end, where a grammar may know no state."""
    accepted = 0
    for seed in range(12):
        for sampling in (Sampling(max_tokens=3, seed=seed, ignore_eos=True), Sampling(max_tokens=40, seed=seed)):
            engine = Engine(tiny, small(numerics=numerics, draft_tokens=2))

            def mask(output, most=sampling.max_tokens, end=-1 if sampling.ignore_eos else tiny.config.eos_token_id):
                if len(output) == most or end in output:
                    raise ValueError("the end")
                return None

            id = engine.add(PROMPTS[0], sampling, mask=mask)
            run(engine)
            found = engine.take(id)
            assert (found.finish in ("stop", "length"), found.error) == (True, None)
            accepted += found.num_accepted
    assert accepted > 10


NO_MASKS = [
    (lambda output: np.zeros(V, bool), "the mask allows no token; expected at least one of 11"),
    (lambda output: np.ones(V + 1, bool), r"the mask has shape \[12\]; expected the logits', \[11\]"),
    (lambda output: np.ones(V, int), "its mask gave an array of int64; expected an array of bool, or None"),
    (lambda output: [True] * V, r"its mask gave \[True, True.*; expected an array of bool, or None"),
    (lambda: None, "its mask raised TypeError"),
]


@pytest.mark.parametrize(("mask", "message"), NO_MASKS)
def test_what_is_no_mask(tiny, small, mask, message):
    engine = Engine(tiny, small())
    wrong, right = engine.add(PROMPTS[0], SAMPLINGS[0], mask=mask), engine.add(PROMPTS[1], SAMPLINGS[1])
    run(engine)
    with pytest.raises(NoTokenError, match=message):
        raise engine.take(wrong).error
    assert engine.take(right).finish == "length"


def test_penalties_that_leave_no_finite_logit(tiny, small):
    engine = Engine(tiny, small())
    wild = Sampling(max_tokens=9, repetition_penalty=1e-310, seed=0)
    found = engine.generate(PROMPTS, [SAMPLINGS[0], wild, SAMPLINGS[2]])
    assert [completion.finish for completion in found] == ["length", "error", "length"]
    assert "the largest logit is" in str(found[1].error)
    assert engine.pool.num_free == engine.pool.num_pages


@pytest.mark.parametrize("temperature", [0, 1])
def test_drafts_that_are_no_numbers_are_no_drafts(tiny, small, temperature, monkeypatch):
    sampling = Sampling(max_tokens=12, temperature=temperature, seed=3, ignore_eos=True)
    plain = Engine(tiny, small()).generate(PROMPTS, sampling)
    engine = Engine(tiny, small(draft_tokens=2))
    draft = engine.runner.draft

    def spoilt(streams, spans):
        streams, logits = draft(streams, spans)
        return streams, np.full_like(logits, math.nan)

    monkeypatch.setattr(engine.runner, "draft", spoilt)
    found = engine.generate(PROMPTS, sampling)
    assert [completion.num_drafted for completion in found] == [0, 0, 0]
    if temperature == 0:
        assert [completion.token_ids for completion in found] == [completion.token_ids for completion in plain]


def test_an_error_is_in_the_log(tiny, small, tmp_path):
    limits = small(log=str(tmp_path / "log"))
    with Engine(tiny, limits) as engine:
        id = engine.add(PROMPTS[0], SAMPLINGS[0], mask=raises_at(2))
        run(engine)
        failed = engine.completion(id)
    with Engine(tiny, limits) as engine:
        assert engine.resume() == [id]
        assert engine.is_idle
        again = engine.take(id)
        assert (again.token_ids, again.finish, str(again.error)) == (failed.token_ids, "error", str(failed.error))
    with Engine(tiny, limits) as engine:
        assert engine.resume() == []


def test_a_stream_ends_with_the_error_and_the_others_go_on(tiny, small):
    engine = Engine(tiny, small())

    async def one(index, mask):
        return [piece async for piece in engine.stream(PROMPTS[index], SAMPLINGS[index], mask=mask)]

    async def both():
        return await asyncio.gather(one(0, raises_at(3)), one(2, None))

    failed, other = asyncio.run(both())
    assert (failed[-1].finish, sum(len(piece.token_ids) for piece in failed)) == ("error", 3)
    assert isinstance(failed[-1].error.__cause__, KeyError)
    assert (other[-1].finish, sum(len(piece.token_ids) for piece in other)) == ("length", 12)
    assert engine.is_idle
