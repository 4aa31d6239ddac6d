"""The queue of anticipatory routing, with steps and choices that are only numbers."""

import json
from dataclasses import replace

import pytest
import torch

from dsv4.config.recipes import smoke
from dsv4.train.anticipatory import Anticipation, Work
from dsv4.train.schedule import Plan, Position

PHASE = smoke().phases[0]
LAYERS = 3
AGES = [0, 1, 3]


class Run:
    """Takes steps. A choice is two micro-batches of layers that say who was chosen for, when, and where."""

    def __init__(self, stale_steps, last_step=10**6):
        self.anticipation = Anticipation(stale_steps)
        self.last_step = last_step
        self.done = self.fetched = 0
        self.chosen: list[tuple[int, int]] = []  # for which step, before which

    def fetch(self):
        if self.fetched == self.last_step:
            return None
        before = self.fetched
        self.fetched += 1
        now = Plan(
            step=self.fetched, phase=PHASE, is_first=before == 0, is_last=False, rows=4, micro_rows=2, lr=1.0,
            mtp_weight=0.3,
        )  # fmt: skip
        batches = [f"batch {self.fetched}.{micro}" for micro in range(2)]
        return Work(plan=now, position=Position(step=before), loader_state={"at": before}, batches=batches)

    def choose(self, work):
        self.chosen.append((work.plan.step, self.done + 1))
        return [
            [torch.tensor([[work.plan.step, self.done + 1, micro, layer]]) for layer in range(LAYERS)]
            for micro in range(2)
        ]

    def step(self):
        """Take a step; return the age of its routing, None if it has none."""
        work = self.anticipation.next(self.done + 1, self.fetch, self.choose)
        if work is None:
            return "over"
        self.done += 1
        assert work.plan.step == self.done
        assert work.batches == [f"batch {self.done}.0", f"batch {self.done}.1"]
        assert work.position == Position(step=self.done - 1)
        assert work.loader_state == {"at": self.done - 1}
        if work.routing is None:
            return None
        for micro, routing in enumerate(work.routing):
            assert len(routing) == LAYERS
            for layer, chosen in enumerate(routing):
                assert chosen.tolist() == [[self.done, work.chosen_at, micro, layer]]
        assert len(work.routing) == 2
        assert work.age == self.done - work.chosen_at
        return work.age

    def steps(self, count):
        return [self.step() for _ in range(count)]

    def resumed(self):
        """Another run that stands where this one does, by what a checkpoint holds."""
        state = json.loads(json.dumps(self.anticipation.state()))
        tensors = {name: tensor.clone() for name, tensor in self.anticipation.tensors().items()}
        waiting = self.anticipation.waiting
        other = Run(self.anticipation.stale_steps, self.last_step)
        other.done = self.done
        other.fetched = waiting[0].loader_state["at"] if waiting else self.fetched
        other.anticipation.load(state, tensors, other.fetch)
        return other


def ages(stale_steps, count):
    return [min(stale_steps, i) for i in range(count)]


# On and off


def test_off_it_fetches_one_step_at_a_time_and_chooses_nothing():
    run = Run(3)
    for step in (1, 2, 3):
        assert run.step() is None
        assert run.fetched == step
    assert run.chosen == []


@pytest.mark.parametrize("stale_steps", AGES)
def test_ages_grow_to_the_delay_and_stay_there(stale_steps):
    run = Run(stale_steps)
    run.steps(2)
    run.anticipation.activate(3, 8)
    for i, age in enumerate(ages(stale_steps, 8)):
        assert run.step() == age
        assert run.fetched == 3 + i + stale_steps
    at_once = [(3 + i, 3) for i in range(stale_steps + 1)]
    assert run.chosen == at_once + [(3 + stale_steps + i, 3 + i) for i in range(1, 8)]  # each once, in order


@pytest.mark.parametrize("stale_steps", AGES)
def test_switched_off_what_waits_is_trained_on_in_order_and_its_choices_forgotten(stale_steps):
    run = Run(stale_steps)
    run.anticipation.activate(1, 5)
    run.steps(5)
    chosen = len(run.chosen)
    for i in range(stale_steps):
        assert run.fetched == 5 + stale_steps
        assert len(run.anticipation.waiting) == stale_steps - i
        assert run.step() is None
    assert not run.anticipation.waiting
    assert run.steps(3) == [None] * 3
    assert run.fetched == run.done == 8 + stale_steps
    assert len(run.chosen) == chosen


@pytest.mark.parametrize("stale_steps", AGES)
@pytest.mark.parametrize("pause", range(5))
def test_switched_on_again_all_choices_are_made_by_the_parameters_of_now(stale_steps, pause):
    """Whether the queue is empty by then or not."""
    run = Run(stale_steps)
    run.anticipation.activate(1, 4)
    run.steps(4)
    assert run.steps(pause) == [None] * pause
    run.anticipation.activate(5 + pause, 6)
    assert run.steps(8) == [*ages(stale_steps, 6), None, None]


@pytest.mark.parametrize("stale_steps", AGES)
@pytest.mark.parametrize("done", [0, 1, 2, 5])
def test_switched_on_while_it_is_on_it_stays_on_for_longer(stale_steps, done):
    run = Run(stale_steps)
    run.anticipation.activate(1, 6)
    run.steps(done)
    run.anticipation.activate(done + 1, 6)
    assert run.steps(8) == [*ages(stale_steps, done + 6)[done:], None, None]


# The end of a run


@pytest.mark.parametrize("stale_steps", AGES)
@pytest.mark.parametrize("last_step", [1, 2, 9])
def test_the_run_ends_after_its_last_step_while_on(stale_steps, last_step):
    run = Run(stale_steps, last_step)
    run.anticipation.activate(1, 100)
    assert run.steps(last_step + 2) == [*ages(stale_steps, last_step), "over", "over"]
    assert len(run.chosen) == last_step


def test_the_run_ends_after_its_last_step_while_off():
    run = Run(3, last_step=7)
    run.anticipation.activate(1, 3)
    assert run.steps(9) == [0, 1, 2, None, None, None, None, "over", "over"]


# What a checkpoint holds


@pytest.mark.parametrize("stale_steps", AGES)
@pytest.mark.parametrize("done", range(14))
def test_a_state_goes_on_where_it_was(stale_steps, done):
    """Before, while and after it is on, while the queue empties, and at the end."""
    run = Run(stale_steps, last_step=12)
    run.anticipation.activate(3, 5)
    run.steps(done)
    other = run.resumed()
    assert len(other.anticipation.waiting) == len(run.anticipation.waiting)
    known = len(run.chosen)
    assert run.steps(14 - done) == other.steps(14 - done)
    assert other.fetched == run.fetched
    assert other.chosen == run.chosen[known:]


@pytest.mark.parametrize("routed", [[], [0], [0, 1], [1], [0, 2], [0, 1, 2]])
def test_a_half_filled_queue_keeps_who_has_a_choice(routed):
    """Some wait without a choice: as after a switch, before the next step."""
    run = Run(3)
    run.anticipation.activate(1, 9)
    run.steps(4)
    for i in {0, 1, 2} - set(routed):
        run.anticipation.waiting[i] = replace(run.anticipation.waiting[i], routing=None)
    other = run.resumed()
    for ours, theirs in zip(run.anticipation.waiting, other.anticipation.waiting, strict=True):
        assert theirs.plan == ours.plan
        assert (theirs.routing is None) == (ours.routing is None)
        if ours.routing is not None:
            assert theirs.chosen_at == ours.chosen_at
            for a, b in zip(ours.routing, theirs.routing, strict=True):
                assert [x.tolist() for x in a] == [x.tolist() for x in b]


def test_switched_on_between_a_checkpoint_and_the_next_step():
    """A loss spikes: the run goes back to a checkpoint that was on itself, or was emptying its queue."""
    for done, wanted in ((4, [3, 3, 3, 3, 3, None]), (5, [3, 3, 3, 3, 3, None]), (7, [0, 1, 2, 3, 3, None])):
        run = Run(3)
        run.anticipation.activate(1, 6)
        run.steps(done)
        other = run.resumed()
        other.anticipation.activate(done + 1, 5)
        again = other.resumed()  # and that is saved at once
        assert other.steps(6) == wanted
        assert again.steps(6) == wanted


# A queue that is broken


def test_a_choice_of_another_age_is_caught():
    run = Run(2)
    run.anticipation.activate(1, 9)
    run.steps(4)
    wrong = run.anticipation.waiting[0]
    run.anticipation.waiting[0] = replace(wrong, chosen_at=wrong.chosen_at - 1)
    with pytest.raises(AssertionError, match="the routing of step 5 is 3 steps old; expected 2"):
        run.step()


def test_a_choice_that_came_too_late_is_caught():
    run = Run(2)
    run.anticipation.activate(1, 9)
    run.steps(4)
    wrong = run.anticipation.waiting[1]
    run.anticipation.waiting[1] = replace(wrong, routing=None)  # chosen for at step 5 instead of 4
    assert run.step() == 2
    with pytest.raises(AssertionError, match="the routing of step 6 is 1 steps old; expected 2"):
        run.step()


def test_a_step_left_out_is_caught():
    run = Run(2)
    run.anticipation.activate(1, 9)
    run.steps(3)
    with pytest.raises(AssertionError, match="step 5 was given the work of step 4"):
        run.anticipation.next(5, run.fetch, run.choose)
