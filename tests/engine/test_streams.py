"""Streams of one event loop: each gets its own pieces, and whatever stops the steps reaches all who wait."""

import asyncio
import time
from contextlib import aclosing
from dataclasses import replace

import pytest

from dsv4.config.sampling import Sampling
from dsv4.engine.engine import Engine
from dsv4.engine.streams import StepError

PROMPTS = [[0, 3, 4], [0, 5] * 70, [0, 7, 7, 2], [0, 9]]
SAMPLING = Sampling(max_tokens=12, temperature=0, ignore_eos=True)


async def tokens_of(engine, prompt, sampling=SAMPLING):
    return [token async for piece in engine.stream(prompt, sampling) for token in piece.token_ids]


async def gather(*streams):
    """Results and errors, of streams that all end by themselves."""
    return await asyncio.wait_for(asyncio.gather(*streams, return_exceptions=True), 60)


class BrokenError(Exception):
    """Raised in the place of a step."""


def break_after(engine, monkeypatch, num_steps, error):
    """Let the engine's steps fail once, after so many."""
    run, left = engine.runner.run, iter([*range(num_steps), None])

    def failing(*arguments):
        if next(left, 0) is None:
            raise error
        return run(*arguments)

    monkeypatch.setattr(engine.runner, "run", failing)


def slow_down(engine, monkeypatch, seconds):
    """Let each step take a while; return a list that holds something while one runs."""
    run, now = engine.runner.run, []

    def slowly(*arguments):
        now.append("step")
        time.sleep(seconds)
        found = run(*arguments)
        now.pop()
        return found

    monkeypatch.setattr(engine.runner, "run", slowly)
    return now


@pytest.mark.parametrize("num_steps", [0, 1, 5])
def test_a_step_that_fails_reaches_every_stream_with_its_cause(tiny, small, monkeypatch, num_steps):
    engine, error = Engine(tiny, small(max_requests=2, step_tokens=64)), BrokenError("no more")
    plain = engine.generate(PROMPTS, SAMPLING)
    break_after(engine, monkeypatch, num_steps, error)

    async def fail_and_go_on():
        failed = await gather(*(tokens_of(engine, prompt) for prompt in PROMPTS))
        return failed, await gather(*(tokens_of(engine, prompt) for prompt in PROMPTS))

    failed, again = asyncio.run(fail_and_go_on())
    assert [type(found) for found in failed] == [StepError] * 4
    assert len(set(map(id, failed))) == 4  # of its own each, so that no traceback grows by another's
    assert all(found.__cause__ is error for found in failed)
    assert again == [completion.token_ids for completion in plain]
    assert engine.is_idle
    assert engine.pool.num_free == engine.pool.num_pages


@pytest.mark.parametrize("num_turns", [0, 1, 5, 20])
def test_steps_that_were_cancelled_reach_every_stream(tiny, small, num_turns):
    """Before the first of them, and in the middle of one."""
    engine = Engine(tiny, small())

    async def cancelled():
        streams = [asyncio.create_task(tokens_of(engine, prompt)) for prompt in PROMPTS]
        while engine._streams._driver is None:
            await asyncio.sleep(0)
        for _ in range(num_turns):
            await asyncio.sleep(0)
        engine._streams._driver.cancel()
        return await gather(*streams)

    found = asyncio.run(cancelled())
    assert [type(error.__cause__) for error in found] == [asyncio.CancelledError] * 4
    assert engine.is_idle


def test_a_step_that_runs_on_is_waited_for(tiny, small, monkeypatch):
    """Requests leave an engine whose steps were cancelled only when it stands still."""
    engine = Engine(tiny, small())
    now, drop = slow_down(engine, monkeypatch, 0.1), engine.drop

    def check(id):
        assert now == []
        drop(id)

    monkeypatch.setattr(engine, "drop", check)

    async def cancelled():
        stream = asyncio.create_task(tokens_of(engine, PROMPTS[0]))
        while not now:
            await asyncio.sleep(0)
        engine._streams._driver.cancel()
        return await gather(stream)

    (found,) = asyncio.run(cancelled())
    assert isinstance(found, StepError)
    assert engine.is_idle


def test_what_the_log_cannot_take_reaches_every_stream(tiny, small, tmp_path, monkeypatch):
    engine = Engine(tiny, small(log=str(tmp_path / "log")))
    commit, left = engine._journal.commit, iter(range(7))

    def fail():
        if next(left, None) is None:
            raise OSError(28, "No space left on device")
        commit()

    async def full():
        monkeypatch.setattr(engine._journal, "commit", fail)
        failed = await gather(*(tokens_of(engine, prompt) for prompt in PROMPTS))
        monkeypatch.setattr(engine._journal, "commit", commit)
        return failed, await gather(*(tokens_of(engine, prompt) for prompt in PROMPTS))

    with engine:
        failed, again = asyncio.run(full())
        assert all(isinstance(found.__cause__, OSError) for found in failed)
        assert [len(tokens) for tokens in again] == [12] * 4
    with Engine(tiny, small(log=str(tmp_path / "log"))) as engine:
        assert engine.resume() == []


def test_a_stream_whose_request_is_cancelled_ends(tiny, small):
    engine = Engine(tiny, small())

    async def one():
        pieces = []
        async for piece in engine.stream(PROMPTS[0], SAMPLING):
            pieces.append(piece)
            if len(pieces) == 3:
                engine.cancel(piece.id)
        return pieces

    (pieces,) = asyncio.run(gather(one()))
    assert pieces[-1].finish == "cancelled"
    assert engine.is_idle


def test_a_stream_that_is_left_is_forgotten_also_by_the_log(tiny, small, tmp_path):
    limits = small(log=str(tmp_path / "log"))

    async def leave():
        stream = engine.stream(PROMPTS[0], SAMPLING)
        async for _ in stream:
            break
        await stream.aclose()

    with Engine(tiny, limits) as engine:
        asyncio.run(leave())
        assert engine.is_idle
        with pytest.raises(KeyError):
            engine.completion("request-0")
    with Engine(tiny, limits) as engine:
        assert engine.resume() == []


def test_one_loop_after_the_other(tiny, small, monkeypatch):
    """In each of them requests wait for a step under way."""
    engine = Engine(tiny, small())
    plain = [completion.token_ids for completion in engine.generate(PROMPTS, SAMPLING)]
    now = slow_down(engine, monkeypatch, 0.01)

    async def join():
        first = asyncio.create_task(tokens_of(engine, PROMPTS[0]))
        while not now:
            await asyncio.sleep(0)
        return await gather(first, *(tokens_of(engine, prompt) for prompt in PROMPTS[1:]))

    for _ in range(3):
        assert asyncio.run(join()) == plain
        assert engine.is_idle


def test_the_end_of_a_stream_waits_for_no_step(tiny, small, monkeypatch):
    """An answer that is whole is over, though others go on; and so is one that is left."""
    engine = Engine(tiny, small())
    slow_down(engine, monkeypatch, 0.05)

    async def two():
        longer = asyncio.create_task(tokens_of(engine, PROMPTS[1], replace(SAMPLING, max_tokens=20)))
        assert len(await tokens_of(engine, PROMPTS[0], replace(SAMPLING, max_tokens=2))) == 2
        assert engine._streams._lock.locked()  # a step is under way
        async with aclosing(engine.stream(PROMPTS[2], SAMPLING)) as left:
            await anext(left)
        assert engine._streams._lock.locked()  # a step is under way
        return await longer

    assert len(asyncio.run(two())) == 20
    assert engine.is_idle
    assert engine.pool.num_free == engine.pool.num_pages


def test_between_is_no_step(tiny, small, monkeypatch):
    """A call waits for the step under way and the next one waits for the call; its result and its error come back."""
    engine, calls = Engine(tiny, small()), []
    now = slow_down(engine, monkeypatch, 0.02)

    def call():
        calls.append(list(now))
        time.sleep(0.05)  # longer than a step: one that ran beside would begin and be seen
        calls.append(list(now))
        return len(calls)

    def fail():
        raise BrokenError("no more")

    async def between():
        stream = asyncio.create_task(tokens_of(engine, PROMPTS[0]))
        while not now:
            await asyncio.sleep(0)
        results = [await engine.between(call) for _ in range(3)]
        with pytest.raises(BrokenError, match="no more"):
            await engine.between(fail)
        assert not stream.done()
        return results, await stream

    results, tokens = asyncio.run(between())
    assert results == [2, 4, 6]
    assert calls == [[]] * 6
    assert len(tokens) == 12


def test_between_where_nothing_runs(tiny, small):
    engine = Engine(tiny, small())
    assert asyncio.run(engine.between(lambda: engine.add(PROMPTS[0], SAMPLING))) == "request-0"
    assert not engine.is_idle
