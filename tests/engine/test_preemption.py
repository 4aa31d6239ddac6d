"""Who makes way, and who stands still, when there are no more pages."""

from __future__ import annotations

from dsv4.engine.step import Admitted, Preempted
from dsv4.testing.schedules import advance, ask, make, names, run, step, tokens_of


def test_the_youngest_makes_way_and_goes_on_later():
    scheduler = make(num_pages=3)
    a, b = ask(scheduler, "a", 100, max_tokens=200), ask(scheduler, "b", 90, max_tokens=100)
    run(scheduler, lambda: a.num_computed == 256)
    output, slot = list(b.output_ids), b.slot
    assert (b.num_computed, len(b.pages), len(output)) == (128, 1, 39)
    ask(scheduler, "c", 5)
    plan = scheduler.plan()
    assert plan.events == (Preempted(b, slot),)
    assert tokens_of(plan) == {"a": (256, 1)}
    assert (b.slot, b.pages, b.num_computed, b.output_ids, b.finish) == (None, [], 0, output, None)
    assert [r.id for r in scheduler.waiting] == ["b", "c"]
    advance(scheduler, plan)
    assert names(run(scheduler, lambda: a.is_finished), Admitted) == []
    tokens, events = step(scheduler)
    assert names(events, Admitted) == ["b", "c"]
    assert tokens == {"b": (0, 59), "c": (0, 5)}
    run(scheduler, lambda: b.is_finished)
    assert b.output_ids[:39] == output
    assert len(b.output_ids) == 100


def test_who_decodes_goes_before_all_who_are_younger():
    scheduler = make(num_pages=4, max_requests=3, step_tokens=200)
    oldest = ask(scheduler, "oldest", 10, max_tokens=100)
    middle, young = ask(scheduler, "middle", 50, max_tokens=200), ask(scheduler, "young", 100, max_tokens=100)
    run(scheduler, lambda: middle.num_computed == 128)
    assert (len(young.pages), scheduler._pool.num_free) == (2, 0)  # it has taken the last one
    tokens, events = step(scheduler)
    assert names(events, Preempted) == ["young"]
    assert tokens == {"oldest": (88, 1), "middle": (128, 1)}
    assert not oldest.is_finished


def test_the_youngest_itself_stands_still_until_there_is_a_page():
    scheduler = make(num_pages=3, max_requests=3)
    a, b = ask(scheduler, "a", 200, max_tokens=40), ask(scheduler, "b", 120, max_tokens=100)
    run(scheduler, lambda: b.num_computed == 128)
    for _ in range(10):
        assert list(step(scheduler)[0]) == ["a"]
    assert (b.slot is not None, b.num_computed, scheduler._pool.num_free) == (True, 128, 0)
    run(scheduler, lambda: a.is_finished)
    assert step(scheduler)[0] == {"b": (128, 1)}


def test_a_prompt_takes_what_is_there_and_stops_nobody():
    scheduler = make(num_pages=8, max_requests=3, step_tokens=300)
    oldest = ask(scheduler, "oldest", 200, max_tokens=50)
    step(scheduler)
    prompt = ask(scheduler, "prompt", 800, max_tokens=1)
    step(scheduler)
    young = ask(scheduler, "young", 100, max_tokens=25)
    events = run(scheduler, lambda: scheduler._pool.num_free == 0)
    assert names(events, Admitted) == ["young"]
    assert prompt.num_computed == 5 * 128
    while not young.is_finished:
        tokens, events = step(scheduler)
        assert set(tokens) == {"oldest", "young"}
        assert names(events, Preempted) == []
    assert not oldest.is_finished
    assert step(scheduler)[0]["prompt"] == (5 * 128, 128)
    assert names(run(scheduler, lambda: scheduler.is_idle), Preempted) == []


def test_the_oldest_prompt_goes_on_when_nothing_else_is_left():
    scheduler = make(num_pages=4, max_requests=2, step_tokens=64)
    prompt = ask(scheduler, "prompt", 500, max_tokens=1)
    for _ in range(3):
        step(scheduler)
    young = ask(scheduler, "young", 10, max_tokens=200)
    events = run(scheduler, lambda: prompt.is_finished)
    assert names(events, Preempted) == ["young"]
    run(scheduler, lambda: young.is_finished)
    assert len(young.output_ids) == 200


def test_a_step_already_planned_is_taken_back_for_the_oldest():
    """The youngest, decoding, is planned before the oldest prompt asks for a page."""
    scheduler = make(num_pages=3, max_requests=2, step_tokens=63)
    prompt = ask(scheduler, "prompt", 300, max_tokens=1)
    step(scheduler)
    young = ask(scheduler, "young", 1, max_tokens=200)
    events = []
    while prompt.num_computed < 256:
        events += step(scheduler)[1]
    assert names(events, Preempted) == []
    assert young.is_decoding
    plan = scheduler.plan()
    assert names(plan.events, Preempted) == ["young"]
    assert list(tokens_of(plan)) == ["prompt"]
