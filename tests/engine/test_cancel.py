"""Cancelling a request after any number of steps: waiting, in each chunk of its prompt, at each token, with drafts."""

import pytest

from dsv4 import native
from dsv4.config.sampling import Sampling
from dsv4.engine.engine import Engine

needs_kernels = pytest.mark.skipif(not native.available(), reason="no C compiler here")

PROMPTS = [[0, 3, 4], [0, *([5, 9, 2] * 57)], [0, 7, 7, 2], [0, *([5, 9, 2] * 44)]]
SAMPLINGS = [Sampling(max_tokens=n, seed=n, ignore_eos=True) for n in (15, 9, 12, 3)]
VICTIM = 1


def state(engine, id):
    """Where a request is in its life."""
    request = engine._running[id].request
    if request.slot is None:
        return ("waits",)
    if not request.is_decoding:
        return ("prompt", request.num_computed)
    return ("output", len(request.output_ids), engine.drafts.count(request))


@needs_kernels
@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("drafts", [0, 2])
def test_after_any_number_of_steps(tiny, small, drafts, is_first):
    """It keeps what it has given, the others give what they would have, and every page is free."""
    limits = small(numerics="invariant", max_requests=2, step_tokens=31, draft_tokens=drafts)
    order = [1, 0, 2, 3] if is_first else [0, 2, 1, 3]
    plain = [c.token_ids for c in Engine(tiny, small(numerics="invariant")).generate(PROMPTS, SAMPLINGS)]
    states = []
    for num_steps in range(100):
        engine = Engine(tiny, limits)
        ids = {i: engine.add(PROMPTS[i], SAMPLINGS[i]) for i in order}
        pieces = [piece for _ in range(num_steps) for piece in engine.step()]
        if engine.completion(ids[VICTIM]).finish is not None:
            break
        states.append(state(engine, ids[VICTIM]))
        last = engine.cancel(ids[VICTIM])
        assert (last.finish, last.token_ids) == ("cancelled", ())
        assert engine.cancel(ids[VICTIM]) is None
        given = [token for piece in pieces if piece.id == ids[VICTIM] for token in piece.token_ids]
        while not engine.is_idle:
            assert ids[VICTIM] not in [piece.id for piece in engine.step()]
        engine.pool.assert_consistent()
        engine.prefix.assert_consistent()
        assert engine.pool.num_free == engine.pool.num_pages
        found = {i: engine.take(id) for i, id in ids.items()}
        assert found[VICTIM].finish == "cancelled"
        assert found[VICTIM].token_ids == given == plain[VICTIM][: len(given)]
        assert all(found[i].token_ids == plain[i] for i in order if i != VICTIM)
    else:
        raise AssertionError("it never ended")
    assert states[0] == ("waits",)
    chunks = [at for kind, *at in states if kind == "prompt"]
    assert len(chunks) >= 5
    outputs = [at for kind, *at in states if kind == "output"]
    assert len({length for length, _ in outputs}) >= (8 if drafts == 0 else 4)
    assert {count for _, count in outputs} == {drafts}


@needs_kernels
def test_in_one_step_with_all_others(tiny, small):
    """Whoever waits, runs, or was pre-empted: nothing is left of any."""
    size = Engine(tiny, small()).runner.cache.page_bytes()
    sampling = Sampling(max_tokens=30, seed=1, ignore_eos=True)
    num_preempted = 0
    for num_steps in range(30):
        engine = Engine(tiny, small(max_requests=3, step_tokens=80, cache_bytes=3 * size, draft_tokens=1))
        # The second fills its page first, and takes the last one, which then the first needs.
        ids = [engine.add([0, *[3 + i] * length], sampling) for i, length in enumerate((110, 124, 4, 300))]
        for _ in range(num_steps):
            engine.step()
        num_preempted += any(request.output_ids for request in engine.scheduler.waiting)
        for id in ids:
            engine.drop(id)
        assert engine.is_idle
        assert engine.step() == []
        engine.pool.assert_consistent()
        assert engine.pool.num_free == engine.pool.num_pages
    assert num_preempted > 0
