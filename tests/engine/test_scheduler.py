"""Who runs in a step with how many tokens, who is admitted, and how requests end."""

from __future__ import annotations

import random

import pytest

from dsv4.config.engine import Limits, PrefixLimits
from dsv4.config.sampling import Sampling
from dsv4.engine.pages import PagePool
from dsv4.engine.prefix import PrefixIndex, Restore
from dsv4.engine.request import Request
from dsv4.engine.scheduler import Scheduler, divide
from dsv4.engine.step import Admitted, Entry, Finished, Refused, StepPlan
from dsv4.testing.schedules import advance, ask, make, names, run, step, tokens_of

# Tokens of a step


def test_a_prompt_runs_in_chunks_and_then_decodes():
    scheduler = make()
    request = ask(scheduler, "a", 150, max_tokens=3)
    plan = scheduler.plan()
    assert plan.events == (Admitted(request, Restore(0, 0, 0), None),)
    assert plan.entries == (Entry(request, 0, 64),)
    assert (plan.entries[0].samples, plan.entries[0].is_last_of_prompt) == (False, False)
    assert advance(scheduler, plan) == []
    assert step(scheduler) == ({"a": (64, 64)}, [])
    plan = scheduler.plan()
    assert tokens_of(plan) == {"a": (128, 22)}
    assert (plan.entries[0].samples, plan.entries[0].is_last_of_prompt) == (True, True)
    advance(scheduler, plan)
    assert (request.output_ids, request.num_computed, request.is_decoding) == ([7], 150, True)
    plan = scheduler.plan()
    assert tokens_of(plan) == {"a": (150, 1)}
    assert (plan.entries[0].samples, plan.entries[0].is_last_of_prompt) == (True, False)
    advance(scheduler, plan)
    assert step(scheduler) == ({"a": (151, 1)}, [Finished(request, 0)])
    assert (request.finish, request.output_ids, request.slot, request.pages) == ("length", [7, 7, 7], None, [])
    assert scheduler.is_idle
    assert scheduler.plan() == StepPlan((), ())


def test_decoding_goes_on_beside_a_long_prompt():
    scheduler = make(max_requests=3, step_tokens=10)
    ask(scheduler, "a", 2)
    ask(scheduler, "b", 1)
    assert list(step(scheduler)[0].items()) == [("b", (0, 1)), ("a", (0, 2))]  # a prompt of one token decodes
    ask(scheduler, "long", 1000)
    for i in range(50):
        assert step(scheduler)[0] == {"a": (2 + i, 1), "b": (1 + i, 1), "long": (8 * i, 8)}


def test_a_short_prompt_does_not_wait_for_a_long_one():
    scheduler = make(num_pages=40, step_tokens=100)
    ask(scheduler, "long", 3000)
    assert step(scheduler)[0] == {"long": (0, 100)}
    ask(scheduler, "short", 60)
    assert step(scheduler)[0] == {"long": (100, 50), "short": (0, 50)}
    assert step(scheduler)[0] == {"long": (150, 90), "short": (50, 10)}
    assert step(scheduler)[0] == {"short": (60, 1), "long": (240, 99)}


@pytest.mark.parametrize(
    ("needs", "budget", "given"),
    [
        ([], 10, []),
        ([20], 10, [10]),
        ([4], 10, [4]),
        ([20, 20], 10, [5, 5]),
        ([20, 20], 11, [6, 5]),
        ([20, 20, 20], 12, [6, 3, 3]),
        ([2, 20, 20], 12, [2, 7, 3]),  # what the oldest leaves goes on in order
        ([20, 1, 20], 12, [6, 1, 5]),
        ([20, 20, 1], 12, [6, 5, 1]),
        ([20, 1, 1], 12, [10, 1, 1]),
        ([20, 20, 20], 3, [1, 1, 1]),
        ([20, 20, 20], 4, [2, 1, 1]),
        ([20, 20, 20], 1, [1, 0, 0]),
        ([20, 20], 0, [0, 0]),
        ([3, 3, 3], 100, [3, 3, 3]),
    ],
)
def test_prompts_share_a_budget(needs, budget, given):
    assert divide(needs, budget) == given


def test_any_division_uses_the_budget_and_keeps_the_promise():
    rng = random.Random(3)
    for _ in range(5000):
        needs = [rng.randrange(1, 60) for _ in range(rng.randrange(1, 9))]
        budget = rng.randrange(100)
        given = divide(needs, budget)
        assert sum(given) == min(sum(needs), budget)
        assert all(0 <= g <= need for g, need in zip(given, needs, strict=True))
        behind = len(needs) - 1
        assert given[0] >= min(needs[0], -(-budget // 2), max(budget - behind, 1 if budget else 0))
        assert all(given) or budget < len(needs)
        assert all(g >= min(need, budget // 2 // behind) for g, need in zip(given[1:], needs[1:], strict=True))


# Admission


def test_requests_are_admitted_in_order_and_wait_for_a_slot():
    scheduler = make(step_tokens=8)
    for name in "abc":
        ask(scheduler, name, 3, max_tokens=4)
    tokens, events = step(scheduler)
    assert tokens == {"a": (0, 3), "b": (0, 3)}
    assert names(events, Admitted) == ["a", "b"]
    assert [r.id for r in scheduler.waiting] == ["c"]
    run(scheduler, lambda: "a" not in [r.id for r in scheduler.running])
    tokens, events = step(scheduler)
    assert tokens == {"c": (0, 3)}
    assert events[0].request.slot in (0, 1)


def test_all_slots_are_different_and_used_again():
    scheduler = make(max_requests=3)
    requests = [ask(scheduler, name, 2, max_tokens=9) for name in "abcd"]
    step(scheduler)
    assert sorted(r.slot for r in requests[:3]) == [0, 1, 2]
    slot = requests[1].slot
    assert scheduler.cancel("b") == Finished(requests[1], slot)
    step(scheduler)
    assert requests[3].slot == slot


def test_a_request_waits_for_pages_and_none_overtakes():
    scheduler = make(num_pages=5, max_requests=4, step_tokens=512)
    ask(scheduler, "a", 300, max_tokens=200)
    step(scheduler)  # three pages, and one more at 384
    ask(scheduler, "b", 129, max_tokens=10)  # two pages: they are there, but then none is left for a to go on
    ask(scheduler, "c", 1, max_tokens=10)
    tokens, events = step(scheduler)
    assert tokens == {"a": (300, 1)}
    assert names(events, Admitted) == []
    run(scheduler, lambda: not any(r.id == "a" for r in scheduler.running))
    tokens, events = step(scheduler)
    assert names(events, Admitted) == ["b", "c"]


def test_a_page_is_left_only_for_those_that_need_another():
    scheduler = make(num_pages=3, step_tokens=512)
    ask(scheduler, "a", 10, max_tokens=100)
    step(scheduler)
    ask(scheduler, "b", 256, max_tokens=1)
    assert names(step(scheduler)[1], Admitted) == ["b"]


def test_only_the_next_chunk_must_fit():
    """A prompt begins in what is free, though all of it would not fit yet."""
    scheduler = make(num_pages=10, step_tokens=200)
    ask(scheduler, "a", 128 * 6, max_tokens=1)
    for _ in range(3):
        step(scheduler)
    b = ask(scheduler, "b", 128 * 8, max_tokens=1)
    tokens, events = step(scheduler)
    assert tokens == {"a": (600, 100), "b": (0, 100)}
    assert names(events, Admitted) == ["b"]
    run(scheduler, lambda: b.is_finished)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        (0, 10, "the prompt is empty; expected at least one token"),
        (600, 10, "the prompt has 600 tokens; expected fewer than the context of 600, so that one can follow"),
        (601, 10, "the prompt has 601 tokens; expected fewer than the context of 600"),
        (
            500,
            14,
            "the prompt's 500 tokens and max_tokens = 14 need 5 pages; expected at most the cache's 4",
        ),
        (500, 10**6, "the prompt's 500 tokens and max_tokens = 100 need 5 pages"),
    ],
)
def test_what_can_never_run_is_refused(prompt, max_tokens, message):
    scheduler = make(num_pages=4, max_context=600)
    request = Request(id="a", prompt_ids=[1] * prompt, sampling=Sampling(max_tokens=max_tokens), seed=0)
    refused = scheduler.add(request)
    assert isinstance(refused, Refused)
    assert refused.request is request
    assert refused.reason.startswith(message)
    assert request.finish == "refused"
    assert scheduler.is_idle
    ask(scheduler, "a", 5)  # its id is free


def test_what_just_fits_runs_to_its_end():
    scheduler = make(num_pages=4, max_context=600, step_tokens=500)
    request = ask(scheduler, "a", 500, max_tokens=13)  # 512 tokens are run
    run(scheduler, lambda: scheduler.is_idle)
    assert (request.finish, len(request.output_ids)) == ("length", 13)


def test_output_ends_with_the_context():
    scheduler = make(max_context=20)
    request = ask(scheduler, "a", 17)
    assert request.max_tokens == 3
    run(scheduler, lambda: scheduler.is_idle)
    assert (request.finish, request.num_tokens) == ("length", 20)


def test_an_id_is_for_one_request_at_a_time():
    scheduler = make()
    first = ask(scheduler, "a", 5, max_tokens=1)
    other = Request(id="a", prompt_ids=[1], sampling=Sampling(), seed=0)
    for _ in range(2):
        with pytest.raises(ValueError, match="request id is 'a', which is waiting or running; expected another"):
            scheduler.add(other)
        scheduler.plan()
    run(scheduler, lambda: first.is_finished)
    assert scheduler.add(other) is None


def test_a_resumed_request_goes_on_behind_its_output():
    scheduler = make()
    request = ask(scheduler, "a", 5, max_tokens=4, output_ids=[1, 2])
    plan = scheduler.plan()
    assert tokens_of(plan) == {"a": (0, 7)}
    assert (plan.entries[0].samples, plan.entries[0].is_last_of_prompt) == (True, False)
    advance(scheduler, plan)
    run(scheduler, lambda: scheduler.is_idle)
    assert request.output_ids == [1, 2, 7, 7]
    done = Request(id="b", prompt_ids=[1], sampling=Sampling(max_tokens=2), seed=0, output_ids=[1, 2])
    refused = scheduler.add(done)
    assert refused == Refused(done, "the output has 2 tokens already; expected fewer than max_tokens = 2")


# Ends


def test_a_stop_goes_before_the_length():
    scheduler = make()
    request = ask(scheduler, "a", 5, max_tokens=1)
    (entry,) = scheduler.plan().entries
    assert scheduler.advance(entry, [3], is_stopped=True) == [Finished(request, 0)]
    assert (request.finish, request.output_ids) == ("stop", [3])


def test_a_request_is_cancelled_at_any_time():
    scheduler = make(max_requests=1)
    running, waiting = ask(scheduler, "a", 200), ask(scheduler, "b", 5)
    step(scheduler)
    assert scheduler.cancel("b") == Finished(waiting, None)
    plan = scheduler.plan()
    assert scheduler.cancel("a") == Finished(running, 0)
    assert (running.finish, waiting.finish) == ("cancelled", "cancelled")
    assert advance(scheduler, plan) == []  # the step was under way
    assert running.num_computed == 64
    assert scheduler.cancel("a") is None
    assert scheduler.cancel("unknown") is None
    assert scheduler.is_idle
    assert scheduler._pool.num_free == 16


def test_what_a_step_gave_must_fit_its_entry():
    scheduler = make(draft_tokens=2)
    ask(scheduler, "a", 100)
    (entry,) = scheduler.plan().entries
    with pytest.raises(ValueError, match="token_ids has 1 tokens; expected 0 to 0"):
        scheduler.advance(entry, [1])
    with pytest.raises(ValueError, match="is_stopped is True for tokens before the last known one; expected False"):
        scheduler.advance(entry, is_stopped=True)
    scheduler.advance(entry)
    (entry,) = scheduler.plan().entries
    for ids in ([], [1, 2]):
        with pytest.raises(ValueError, match=f"token_ids has {len(ids)} tokens; expected 1 to 1"):
            scheduler.advance(entry, ids)
    scheduler.advance(entry, [1])
    (entry,) = scheduler.plan(lambda _: 2).entries
    for ids in ([], [1, 2, 3, 4]):
        with pytest.raises(ValueError, match=f"token_ids has {len(ids)} tokens; expected 1 to 3"):
            scheduler.advance(entry, ids)


def test_index_and_limits_agree():
    pool = PagePool(2)
    options = {"max_context": 10, "window": 3, "depth": 2}
    with pytest.raises(ValueError, match=r"prefix is None; expected an index: limits\.prefix\.memory is True"):
        Scheduler(Limits(), pool, None, **options)
    without = Limits(prefix=PrefixLimits(memory=False))
    with pytest.raises(ValueError, match=r"expected None: limits\.prefix\.memory is False"):
        Scheduler(without, pool, PrefixIndex(pool, state_bytes=1), **options)
    with pytest.raises(ValueError, match="fetch is given without prefix"):
        Scheduler(without, pool, None, **options, fetch=print)


# Drafts


def test_drafts_are_run_behind_the_last_token_and_those_accepted_stay():
    scheduler = make(draft_tokens=3, step_tokens=40)
    request = ask(scheduler, "a", 10, max_tokens=20)
    step(scheduler)
    for accepted, begin, computed in ((0, 10, 11), (3, 11, 15), (1, 15, 17)):
        plan = scheduler.plan(lambda _: 3)
        assert plan.entries == (Entry(request, begin, 4, 3),)
        assert plan.entries[0].samples
        scheduler.advance(plan.entries[0], list(range(accepted + 1)))
        assert (request.num_computed, request.num_tokens) == (computed, computed + 1)
    assert request.output_ids == [7, 0, 0, 1, 2, 3, 0, 1]


def test_drafts_end_with_the_output():
    scheduler = make(draft_tokens=3)
    request = ask(scheduler, "a", 10, max_tokens=4)
    step(scheduler)
    (entry,) = scheduler.plan(lambda _: 3).entries
    assert (entry.num_tokens, entry.num_drafts) == (3, 2)
    scheduler.advance(entry, [1, 2])
    (entry,) = scheduler.plan(lambda _: 3).entries
    assert (entry.num_tokens, entry.num_drafts) == (1, 0)
    assert scheduler.advance(entry, [3]) == [Finished(request, 0)]


def test_each_request_has_drafts_of_its_own_and_prompts_get_the_rest():
    scheduler = make(max_requests=3, draft_tokens=4, step_tokens=20)
    ask(scheduler, "a", 5)
    ask(scheduler, "b", 6)
    step(scheduler)
    ask(scheduler, "c", 100)
    plan = scheduler.plan(lambda request: {"a": 4, "b": 0}[request.id])
    assert tokens_of(plan) == {"a": (5, 5), "b": (6, 1), "c": (0, 14)}
    assert [entry.num_drafts for entry in plan.entries] == [4, 0, 0]


@pytest.mark.parametrize("asked", [-1, 3])
def test_a_number_of_drafts_that_cannot_be_is_refused(asked):
    scheduler = make(draft_tokens=2)
    ask(scheduler, "a", 5)
    step(scheduler)
    with pytest.raises(ValueError, match=f"num_drafts is {asked}; expected 0 to limits.draft_tokens = 2"):
        scheduler.plan(lambda _: asked)


def test_drafts_give_way_where_pages_end():
    scheduler = make(num_pages=3, draft_tokens=4)
    a = ask(scheduler, "a", 30, max_tokens=100)
    b = ask(scheduler, "b", 30, max_tokens=100)
    run(scheduler, lambda: a.num_tokens == 127)
    plan = scheduler.plan(lambda _: 4)
    assert tokens_of(plan) == {"a": (126, 3), "b": (126, 2)}
    assert [entry.num_drafts for entry in plan.entries] == [2, 1]
    assert b.slot is not None
    assert plan.events == ()
