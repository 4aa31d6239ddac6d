"""What the scheduler finds of prefixes, where it runs tokens again, and where it wants states."""

from __future__ import annotations

import pytest

from dsv4.config.engine import Limits, PrefixLimits
from dsv4.engine.pages import PagePool
from dsv4.engine.prefix import PrefixIndex, Restore
from dsv4.engine.request import Request
from dsv4.engine.scheduler import Scheduler
from dsv4.engine.step import Admitted, Entry, Event, Filled, Finished, KeepState, Preempted
from dsv4.testing.schedules import DEPTH, WINDOW, advance, ask, make, names, run, step, tokens_of

MEMORY = PrefixLimits(state_bytes=1000)


def index_of(scheduler: Scheduler) -> PrefixIndex:
    assert scheduler._prefix is not None
    return scheduler._prefix


def with_states(scheduler: Scheduler, until) -> list[Event]:
    """Run, and keep each state that is wanted in memory: a tuple of the request and the position."""
    events = []
    while not until():
        new = step(scheduler)[1]
        for event in new:
            if isinstance(event, KeepState) and event.in_memory:
                index_of(scheduler).keep_state(event.digest, (event.request.id, event.position), 1)
        events += new
    return events


def test_filled_pages_are_told_and_the_state_at_the_end_of_the_prompt():
    scheduler = make(step_tokens=200, prefix=MEMORY)
    a = ask(scheduler, "a", 300, max_tokens=100)
    tokens, events = step(scheduler)
    assert tokens == {"a": (0, 200)}
    chain = index_of(scheduler).digests(a)
    assert events[1:] == [Filled(a, 0, a.pages[0], chain[0])]
    tokens, events = step(scheduler)
    assert tokens == {"a": (200, 56)}  # a state is kept at 256
    assert events == [Filled(a, 1, a.pages[1], chain[1]), KeepState(a, 0, 256, chain[1], True, False)]
    assert a.num_computed == 256
    assert step(scheduler)[0] == {"a": (256, 44)}
    page = a.pages[2]
    events = run(scheduler, lambda: a.is_finished)
    assert [e for e in events if not isinstance(e, Finished)] == [Filled(a, 2, page, a.digests[2])]


def test_filled_pages_follow_one_another():
    scheduler = make(prefix=MEMORY)
    a = ask(scheduler, "a", 400, max_tokens=1)
    run(scheduler, lambda: a.num_computed >= 384)
    assert index_of(scheduler).num_pages == 3
    index_of(scheduler).drop(a.pages[1])
    assert index_of(scheduler).longest(a.digests, 1000) == a.pages[:1]
    assert index_of(scheduler).num_pages == 1


def test_a_state_may_be_wanted_of_a_request_that_has_just_ended():
    scheduler = make(prefix=PrefixLimits(state_every=128), step_tokens=512)
    a = ask(scheduler, "a", 256, max_tokens=1)
    step(scheduler)
    (entry,) = scheduler.plan().entries
    page, slot = a.pages[1], a.slot
    digests = index_of(scheduler).digests(a)
    assert slot is not None
    assert scheduler.advance(entry, [7]) == [
        Filled(a, 1, page, digests[1]),
        KeepState(a, slot, 256, digests[1], True, False),
        Finished(a, slot),
    ]
    assert a.slot is None
    assert index_of(scheduler).keep_state(digests[1], "state", 1)


def test_a_known_prefix_is_shared_and_its_state_put_back():
    scheduler = make(prefix=MEMORY)
    a = ask(scheduler, "a", 300, max_tokens=1)
    with_states(scheduler, lambda: a.num_computed >= 256)
    shared = a.pages[:2]
    b = ask(scheduler, "b", [*a.prompt_ids[:256], 1, 2, 3])
    plan = scheduler.plan()
    assert plan.events == (Admitted(b, Restore(256, 256, 256), ("a", 256)),)
    assert b.pages[:2] == shared
    assert (b.writes_from, b.num_computed) == (256, 256)
    assert tokens_of(plan)["b"] == (256, 3)
    assert [scheduler._pool.users(page) for page in shared] == [2, 2]
    advance(scheduler, plan)
    run(scheduler, lambda: a.is_finished)
    assert [scheduler._pool.users(page) for page in shared] == [1, 1]


def test_without_a_state_the_last_tokens_are_run_again_but_not_written():
    scheduler = make(prefix=MEMORY, step_tokens=512)
    a = ask(scheduler, "a", 700, max_tokens=1)
    run(scheduler, lambda: a.is_finished)
    b = ask(scheduler, "b", a.prompt_ids)
    plan = scheduler.plan()
    assert plan.events == (Admitted(b, Restore(0, 512, 640), None),)
    assert plan.entries == (Entry(b, 512, 128),)  # no chunk is before writes_from and after
    events = advance(scheduler, plan)
    assert events == [KeepState(b, 0, 640, b.digests[4], True, False)]  # the next one need not run them again
    plan = scheduler.plan()
    assert plan.entries == (Entry(b, 640, 60),)
    assert plan.entries[0].samples


def test_a_state_on_the_way_is_used_if_it_is_nearer_than_the_fresh_start():
    scheduler = make(prefix=MEMORY, step_tokens=512, window=100)  # 297 tokens back
    a = ask(scheduler, "a", 1000, max_tokens=1)
    run(scheduler, lambda: a.is_finished)
    chain = index_of(scheduler).digests(a)
    index_of(scheduler).keep_state(chain[0], "early", 1)
    b = ask(scheduler, "b", a.prompt_ids, max_tokens=1)
    plan = scheduler.plan()
    assert plan.events == (Admitted(b, Restore(0, 512, 896), None),)
    assert tokens_of(plan) == {"b": (512, 384)}
    scheduler.cancel("b")
    index_of(scheduler).keep_state(chain[5], "late", 1)
    c = ask(scheduler, "c", a.prompt_ids, max_tokens=1)
    plan = scheduler.plan()
    assert plan.events == (Admitted(c, Restore(768, 768, 896), "late"),)
    assert tokens_of(plan) == {"c": (768, 128)}


def test_no_state_is_kept_on_the_way_to_the_known_end():
    """Before it, what runs without the window before it is wrong."""
    prefix = PrefixLimits(state_every=128)
    scheduler = make(num_pages=20, prefix=prefix, step_tokens=512, window=100)  # 297 tokens back
    a = ask(scheduler, "a", 641, max_tokens=1)
    run(scheduler, lambda: a.is_finished)
    b = ask(scheduler, "b", [*a.prompt_ids, *range(300)], max_tokens=1)
    tokens, events = step(scheduler)
    assert tokens == {"b": (256, 384)}
    assert events == [Admitted(b, Restore(0, 256, 640), None), KeepState(b, 0, 640, b.digests[4], True, False)]
    assert step(scheduler)[0] == {"b": (640, 128)}


def test_a_beginning_that_turns_out_to_be_shared_gets_a_state():
    scheduler = make(prefix=MEMORY, step_tokens=512)
    a = ask(scheduler, "a", 300, max_tokens=1)
    run(scheduler, lambda: a.is_finished)
    b = ask(scheduler, "b", [*a.prompt_ids, *range(300)], max_tokens=1)
    events = with_states(scheduler, lambda: b.is_finished)
    assert [e.position for e in events if isinstance(e, KeepState)] == [256, 512]
    c = ask(scheduler, "c", [*a.prompt_ids, *range(300, 600)], max_tokens=1)
    assert scheduler.plan().events == (Admitted(c, Restore(256, 256, 256), ("b", 256)),)


@pytest.mark.parametrize(("prompt", "position"), [(129, 128), (256, 128), (257, 256)])
def test_the_state_at_the_end_of_a_prompt_serves_the_same_prompt_again(prompt, position):
    scheduler = make(prefix=MEMORY, step_tokens=512)
    a = ask(scheduler, "a", prompt, max_tokens=1)
    with_states(scheduler, lambda: a.is_finished)
    again = ask(scheduler, "again", a.prompt_ids)
    assert scheduler.plan().events == (Admitted(again, Restore(position, position, position), ("a", position)),)


def test_users_do_not_share():
    scheduler = make(prefix=MEMORY)
    a = ask(scheduler, "a", 300, max_tokens=1, salt=b"one")
    run(scheduler, lambda: a.is_finished)
    ask(scheduler, "b", a.prompt_ids, salt=b"two")
    ask(scheduler, "c", a.prompt_ids, salt=b"one")
    plan = scheduler.plan()
    assert [event.restore.writes_from for event in plan.events if isinstance(event, Admitted)] == [0, 256]


def test_a_conversation_goes_on_from_its_output():
    scheduler = make(prefix=MEMORY)
    a = ask(scheduler, "a", 100, max_tokens=60)
    run(scheduler, lambda: a.is_finished)
    b = ask(scheduler, "b", [*a.token_ids, 1, 2])
    (event,) = scheduler.plan().events
    assert isinstance(event, Admitted)
    assert (event.restore.writes_from, b.num_computed) == (128, 0)


def test_a_preempted_request_finds_its_own_pages_again():
    scheduler = make(num_pages=5, prefix=MEMORY)
    a, b = ask(scheduler, "a", 250, max_tokens=200), ask(scheduler, "b", 130, max_tokens=300)
    events = with_states(scheduler, lambda: b.slot is None and len(b.output_ids) > 0)
    assert names(events, Preempted) == ["b"]
    events = with_states(scheduler, lambda: a.is_finished)
    assert names(events, Admitted) == []
    plan = scheduler.plan()
    (event,) = plan.events
    assert isinstance(event, Admitted)
    assert event.request is b
    assert event.restore == Restore(128, 128, 128)
    assert event.state == ("b", 128)


def test_kept_pages_go_before_anybody_is_preempted():
    scheduler = make(num_pages=4, prefix=MEMORY)
    old = ask(scheduler, "old", 257, max_tokens=1)
    run(scheduler, lambda: old.is_finished)
    assert scheduler._pool.num_kept == 2
    a, b = ask(scheduler, "a", 120, max_tokens=100), ask(scheduler, "b", 120, max_tokens=100)
    events = run(scheduler, lambda: a.is_finished and b.is_finished)
    assert names(events, Preempted) == []
    assert len(index_of(scheduler).longest(old.digests, 1000)) == 0


def test_a_page_of_the_prefix_that_is_about_to_be_used_counts_as_taken():
    """Two kept pages of the request itself are no room for its next chunk."""
    scheduler = make(num_pages=4, prefix=MEMORY, step_tokens=512)
    old = ask(scheduler, "old", 257, max_tokens=1)
    with_states(scheduler, lambda: old.is_finished)
    a = ask(scheduler, "a", 200, max_tokens=20)  # two pages, the two kept ones are left
    step(scheduler)
    assert scheduler._pool.num_kept == 2
    ask(scheduler, "b", [*old.prompt_ids[:256], 1], max_tokens=5)
    assert names(step(scheduler)[1], Admitted) == []
    assert index_of(scheduler).longest(old.digests, 1000) != []
    run(scheduler, lambda: a.is_finished)
    assert names(step(scheduler)[1], Admitted) == ["b"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # The last boundary of the 700 is 640; 768 is in the output.
        ({}, {640: (True, False)}),
        ({"state_every": 256}, {256: (True, False), 512: (True, False), 640: (True, False), 768: (True, False)}),
        ({"folder": "f", "policy": "zero"}, {640: (True, False)}),
        ({"folder": "f", "period": 384}, {384: (False, True), 640: (True, False), 768: (False, True)}),
        (
            {"folder": "f", "policy": "full"},
            {**dict.fromkeys(range(128, 800, 128), (False, True)), 640: (True, True)},
        ),
        (
            {"state_every": 512, "folder": "f", "period": 256},
            {256: (False, True), 512: (True, True), 640: (True, False), 768: (False, True)},
        ),
    ],
)
def test_states_are_wanted_where_the_limits_say(options, expected):
    scheduler = make(step_tokens=512, prefix=PrefixLimits(**options))
    a = ask(scheduler, "a", 700, max_tokens=100)
    wanted = {}
    while not a.is_finished:
        for event in step(scheduler)[1]:
            if isinstance(event, KeepState):
                wanted[event.position] = (event.in_memory, event.in_folder)
                assert event.digest == a.digests[event.position // 128 - 1]
                assert a.num_computed == event.position
    assert wanted == expected


def test_a_state_is_kept_at_the_end_of_all_that_was_known_at_admission():
    """So whoever is pre-empted again, or resumed again, need not run its output again."""
    scheduler = make(step_tokens=512, prefix=MEMORY)
    a = ask(scheduler, "a", 200, output_ids=list(range(90)))
    tokens, events = step(scheduler)
    assert tokens == {"a": (0, 256)}
    assert events[-1] == KeepState(a, 0, 256, a.digests[1], True, False)
    assert step(scheduler)[0] == {"a": (256, 34)}


def test_accepted_drafts_may_pass_a_place_where_a_state_is_wanted():
    scheduler = make(draft_tokens=3, prefix=PrefixLimits(state_every=128))
    a = ask(scheduler, "a", 126, max_tokens=20)
    run(scheduler, lambda: a.num_computed == 126)
    (entry,) = scheduler.plan(lambda _: 3).entries
    page = a.pages[0]
    assert scheduler.advance(entry, [1, 2, 3, 4]) == [
        Filled(a, 0, page, a.digests[0]),
        KeepState(a, 0, 128, a.digests[0], True, False),
    ]
    assert a.num_computed == 130


def test_rejected_drafts_fill_no_page():
    scheduler = make(draft_tokens=3, prefix=PrefixLimits(state_every=128))
    a = ask(scheduler, "a", 125, max_tokens=20)
    run(scheduler, lambda: a.num_computed == 125)
    for expected in (126, 127):
        (entry,) = scheduler.plan(lambda _: 3).entries
        assert entry.end > 128
        assert scheduler.advance(entry, [1]) == []
        assert a.num_computed == expected
    (entry,) = scheduler.plan(lambda _: 3).entries
    assert [type(event) for event in scheduler.advance(entry, [1])] == [Filled, KeepState]


def fetching(num_pages: int, fetch, **options) -> Scheduler:
    pool = PagePool(num_pages)
    index = PrefixIndex(pool, state_bytes=10)
    return Scheduler(
        Limits(**options, prefix=MEMORY), pool, index, max_context=1000, window=WINDOW, depth=DEPTH,
        fetch=lambda request: fetch(index, request),
    )  # fmt: skip


def test_what_is_elsewhere_is_fetched_before_a_request_is_admitted():
    def fetch(index: PrefixIndex, request: Request) -> None:
        if request.id == "b":
            assert index.bring(index.digests(request), lambda i, page: True) == 2
            index.keep_state(request.digests[1], "found", 1)

    scheduler = fetching(6, fetch)
    ask(scheduler, "a", 200, max_tokens=5)
    b = ask(scheduler, "b", 300, max_tokens=5)
    plan = scheduler.plan()
    assert plan.events[1:] == (Admitted(b, Restore(256, 256, 256), "found"),)
    assert tokens_of(plan)["b"] == (256, 44)


def test_it_is_fetched_once_for_each_time_a_request_waits():
    fetched = []
    scheduler = fetching(3, lambda index, request: fetched.append(request.id), max_requests=2, step_tokens=64)
    a, b = ask(scheduler, "a", 100, max_tokens=200), ask(scheduler, "b", 90, max_tokens=100)
    ask(scheduler, "c", 5, max_tokens=5)
    run(scheduler, lambda: b.slot is not None)
    assert fetched == ["a", "b"]  # no slot for c yet
    run(scheduler, lambda: b.slot is None)
    assert fetched == ["a", "b"]
    for _ in range(5):
        step(scheduler)
    assert fetched == ["a", "b", "b"]  # pre-empted, and waits for pages
    scheduler.cancel("b")
    ask(scheduler, "b", 90, max_tokens=5)
    run(scheduler, lambda: a.is_finished)
    run(scheduler, lambda: scheduler.is_idle)
    assert fetched == ["a", "b", "b", "c", "b"]
