"""Whatever happens, nothing leaks, nobody starves, and the output is that of each request alone."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest

from dsv4.config.engine import Limits, PrefixLimits
from dsv4.config.sampling import Sampling
from dsv4.engine.pages import PagePool
from dsv4.engine.prefix import PrefixIndex, fresh_start
from dsv4.engine.request import Request
from dsv4.engine.scheduler import Scheduler
from dsv4.engine.step import Admitted, Entry, Event, Filled, Finished, KeepState, Preempted, StepPlan
from dsv4.testing.schedules import DEPTH

WORLD_WINDOW = 70  # 207 tokens back, to a page boundary before the last


@dataclass
class World:
    """An engine of integers: an entry is a hash of all tokens up to it, and so is a state.

    It checks that what is read is what the tokens say, that nothing shared is written, and that tokens come out as in
    a run without batch, chunks, pages, prefixes, drafts or pre-emption.
    """

    rng: random.Random
    scheduler: Scheduler
    pool: PagePool
    index: PrefixIndex | None
    entries: dict[int, list[int | None]] = field(default_factory=dict)  # by page
    slots: dict[int, tuple[int, int, bool]] = field(default_factory=dict)  # hash, position, is the state right
    traces: dict[str, list[int]] = field(default_factory=dict)  # by request: the hash after each number of tokens
    folder: dict[bytes, tuple[list[int | None], int | None]] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def trace(self, request: Request) -> list[int]:
        trace = self.traces.setdefault(request.id, [0])
        for token in request.tokens(len(trace) - 1, request.num_tokens):
            trace.append(hash((trace[-1], token)))
        return trace

    def fetch(self, request: Request) -> None:
        assert self.index is not None
        chain = self.index.digests(request)[: (request.num_tokens - 1) // 128]

        def fill(i: int, page: int) -> bool:
            if chain[i] not in self.folder:
                return False
            self.entries[page] = list(self.folder[chain[i]][0])
            self.counts["brought"] += 1
            return True

        num_known = self.index.bring(chain, fill)
        for digest in chain[:num_known]:
            if digest in self.folder and self.folder[digest][1] is not None:
                self.index.keep_state(digest, self.folder[digest][1], 3)

    def step(self) -> None:
        before = {r.id: r.num_computed for r in self.scheduler.running}
        plan = self.scheduler.plan(lambda _: self.rng.randrange(self.scheduler._limits.draft_tokens + 1))
        self.check_plan(plan)
        for event in plan.events:
            self.act(event)
        runs = [(entry, *self.run(entry)) for entry in plan.entries]
        if runs and self.rng.random() < 0.03:
            self.cancel(self.rng.choice(runs)[0].request)
        for entry, ids, is_stopped in runs:
            events = self.scheduler.advance(entry, ids, is_stopped=is_stopped)
            assert entry.request.is_finished or entry.request.num_computed > before.get(entry.request.id, -1)
            for event in events:
                self.act(event)
        self.check()

    def check_plan(self, plan: StepPlan) -> None:
        scheduler = self.scheduler
        assert plan.num_tokens <= scheduler._limits.step_tokens
        assert all(entry.num_tokens > 0 for entry in plan.entries)
        assert len({entry.request.id for entry in plan.entries}) == len(plan.entries)
        assert {entry.request.id for entry in plan.entries} <= {r.id for r in scheduler.running}
        kinds = {type(event) for event in plan.events}
        assert kinds <= {Admitted, Preempted}
        assert len(kinds) <= 1  # nobody is admitted where another makes way
        planned = {entry.request.id for entry in plan.entries}
        if scheduler.running:
            assert scheduler.running[0].id in planned  # the oldest always moves on
        for request in scheduler.running:
            if request.id not in planned:
                self.counts["still"] += request.is_decoding
                assert self.pool.num_free == 0
        order = [r.arrival for r in (*scheduler.running, *scheduler.waiting)]
        assert order == sorted(order)
        for event in plan.events:
            self.counts[type(event).__name__] += 1

    def act(self, event: Event) -> None:
        match event:
            case Admitted(request, restore, state):
                trace = self.trace(request)
                assert restore.writes_from == request.writes_from < request.num_tokens
                if restore.from_boundary:
                    assert restore.recompute_from == restore.from_boundary <= restore.writes_from
                    assert state == trace[restore.from_boundary]
                    self.counts["restored"] += 1
                else:
                    assert state is None
                    assert restore.recompute_from <= fresh_start(restore.writes_from, window=WORLD_WINDOW, depth=DEPTH)
                    self.counts["recomputed"] += restore.writes_from > 0
                assert request.slot is not None
                start = restore.recompute_from
                is_right = restore.from_boundary > 0 or start == 0
                self.slots[request.slot] = (trace[start], start, is_right)
            case KeepState(request, slot, position, digest, in_memory, in_folder):
                state = self.trace(request)[position]
                assert 0 <= request.num_computed - position <= self.scheduler._limits.draft_tokens
                assert self.slots[slot][1:] == (request.num_computed, True) or request.is_finished
                assert self.slots[slot][2]
                assert self.index is not None
                if in_memory:
                    self.index.keep_state(digest, state, self.rng.randrange(1, 5))
                if in_folder and digest in self.folder:
                    self.folder[digest] = (self.folder[digest][0], state)
            case Filled(request, index, page, digest):
                assert request.is_finished or request.pages[index] == page
                assert self.entries[page] == self.trace(request)[128 * index + 1 : 128 * (index + 1) + 1]
                if self.scheduler._limits.prefix.folder:
                    self.folder[digest] = (list(self.entries[page]), None)
            case Preempted(request, _) | Finished(request, _):
                assert request.slot is None
                assert request.pages == []

    def run(self, entry: Entry) -> tuple[list[int], bool]:
        """Run an entry; returns the tokens it gives and whether the output ends with them."""
        request, begin = entry.request, entry.begin
        trace = self.trace(request)
        assert request.slot is not None
        state, position, is_right = self.slots[request.slot]
        assert (state, position) == (trace[begin], begin)
        assert begin == request.num_computed
        self.check_read(request, max(begin, request.writes_from))
        known = entry.end - entry.num_drafts
        assert known <= request.num_tokens
        assert entry.end <= request.writes_from or begin >= request.writes_from
        drafts, ids = self.draft(trace[known], entry.num_drafts) if entry.samples else ([], [])
        path = list(trace[begin : known + 1])
        for draft in drafts:
            path.append(hash((path[-1], draft)))
        for i, value in enumerate(path[1:]):
            if begin + i >= request.writes_from:
                assert is_right or begin >= request.writes_from
                self.write(request.pages[(begin + i) // 128], (begin + i) % 128, value)
        done = known + max(0, len(ids) - 1)
        self.slots[request.slot] = (path[done - begin], done, is_right or done >= request.writes_from)
        room = request.max_tokens - len(request.output_ids)
        assert len(ids) <= room
        stop = next((i for i, token in enumerate(ids) if is_stop(token)), None)
        return (ids, False) if stop is None else (ids[: stop + 1], True)

    def draft(self, state: int, num_drafts: int) -> tuple[list[int], list[int]]:
        """Guess tokens, some wrong; returns them, and those that come of it."""
        drafts, ids, token = [], [], next_token(state)
        ids.append(token)
        for _ in range(num_drafts):
            guess = token if self.rng.random() < 0.7 else 999
            drafts.append(guess)
            if len(ids) == len(drafts) and guess == token:
                state = hash((state, token))
                token = next_token(state)
                ids.append(token)
        return drafts, ids

    def write(self, page: int, place: int, value: int) -> None:
        assert self.pool.users(page) == 1
        assert not self.pool.is_marked(page)
        self.entries.setdefault(page, [None] * 128)[place] = value

    def check_read(self, request: Request, num_tokens: int) -> None:
        trace = self.trace(request)
        for i in range(-(-num_tokens // 128)):
            n = min(128, num_tokens - 128 * i)
            assert self.entries[request.pages[i]][:n] == trace[128 * i + 1 : 128 * i + 1 + n]

    def check(self) -> None:
        self.pool.assert_consistent()
        if self.index is not None:
            self.index.assert_consistent()
        running = self.scheduler.running
        used = Counter(page for request in running for page in request.pages)
        assert [self.pool.users(page) for page in range(self.pool.num_pages)] == [
            used[page] for page in range(self.pool.num_pages)
        ]
        slots = [request.slot for request in running]
        assert len(set(slots)) == len(slots) <= self.scheduler._limits.max_requests
        assert all(slot in range(self.scheduler._limits.max_requests) for slot in slots)
        for request in self.scheduler.waiting:
            assert (request.slot, request.pages, request.num_computed) == (None, [], 0)
        for request in running:
            assert request.num_computed <= request.num_tokens - 1 or request.is_finished
            assert len(request.pages) * 128 >= request.num_computed

    def cancel(self, request: Request) -> None:
        event = self.scheduler.cancel(request.id)
        assert isinstance(event, Finished)
        self.counts["cancelled"] += 1

    def add(self, name: str, documents: list[list[int]]) -> None:
        rng = self.rng
        ids = list(rng.choice(documents)[: rng.randrange(700)])
        if self.requests and rng.random() < 0.3:
            ids = self.requests[rng.randrange(len(self.requests))].token_ids  # the conversation goes on
        ids += [rng.randrange(900) for _ in range(rng.choice([0, 1, 5, 150]))]
        request = Request(
            id=name,
            prompt_ids=ids,
            sampling=Sampling(max_tokens=rng.choice([1, 2, 30, 200])),
            seed=0,
            salt=rng.choice([b"", b"", b"user"]),
        )
        if self.scheduler.add(request) is None:
            self.requests.append(request)
        else:
            assert request.finish == "refused"
            self.counts["refused"] += 1


def next_token(state: int) -> int:
    return state % 900


def is_stop(token: int) -> bool:
    return token % 97 == 0


def plain_output(request: Request) -> list[int]:
    """What comes out of a request that runs alone, a token at a time."""
    state = 0
    for token in request.prompt_ids:
        state = hash((state, token))
    output = []
    while len(output) < request.max_tokens:
        output.append(next_token(state))
        if is_stop(output[-1]):
            break
        state = hash((state, output[-1]))
    return output


WORLDS = {
    "roomy": ({"num_pages": 60, "max_requests": 6, "step_tokens": 300}, {}),
    "tight": ({"num_pages": 9, "max_requests": 5, "step_tokens": 90}, {}),
    "tiny": ({"num_pages": 3, "max_requests": 4, "step_tokens": 50}, {}),
    "drafts": ({"num_pages": 12, "max_requests": 4, "step_tokens": 120, "draft_tokens": 3}, {}),
    "states": ({"num_pages": 14, "max_requests": 4, "step_tokens": 250, "draft_tokens": 2}, {"state_every": 128}),
    "few states": ({"num_pages": 20, "max_requests": 4, "step_tokens": 250}, {"state_bytes": 5}),
    "folder": ({"num_pages": 10, "max_requests": 4, "step_tokens": 150}, {"folder": "f", "period": 256}),
    "full folder": ({"num_pages": 12, "max_requests": 3, "step_tokens": 300}, {"folder": "f", "policy": "full"}),
    "zero folder": ({"num_pages": 12, "max_requests": 3, "step_tokens": 99}, {"folder": "f", "policy": "zero"}),
    "nothing known": ({"num_pages": 8, "max_requests": 4, "step_tokens": 64, "draft_tokens": 4}, {"memory": False}),
    "least tokens": ({"num_pages": 9, "max_requests": 3, "step_tokens": 3}, {}),
}
STEPS = 2000


def new_world(name: str) -> World:
    options, prefix = WORLDS[name]
    options = dict(options)
    pool = PagePool(options.pop("num_pages"))
    limits = Limits(
        **options, prefix=PrefixLimits(**{"state_bytes": 30, **prefix} if "memory" not in prefix else prefix)
    )
    index = PrefixIndex(pool, state_bytes=limits.prefix.state_bytes) if limits.prefix.memory else None
    world: World
    scheduler = Scheduler(
        limits, pool, index, max_context=800, window=WORLD_WINDOW, depth=DEPTH,
        fetch=(lambda request: world.fetch(request)) if limits.prefix.folder else None,
    )  # fmt: skip
    world = World(random.Random(name), scheduler, pool, index)
    return world


@pytest.mark.parametrize("name", WORLDS)
def test_nothing_leaks_and_nobody_starves_whatever_happens(name):
    world = new_world(name)
    rng, scheduler = world.rng, world.scheduler
    documents = [[rng.randrange(900) for _ in range(700)] for _ in range(3)]
    for i in range(STEPS):
        if rng.random() < (0.5 if i // 200 % 2 else 0.05) and len(scheduler.waiting) < 20:
            world.add(f"r{i}", documents)
        if scheduler.waiting and rng.random() < 0.02:
            world.cancel(rng.choice([*scheduler.running, *scheduler.waiting]))
        if world.folder and rng.random() < 0.05:
            del world.folder[rng.choice(list(world.folder))]
        world.step()
    # The oldest moves on by a token a step at least, and a request that is the oldest stays until it is done.
    left = sum(r.longest + 128 * DEPTH for r in (*scheduler.running, *scheduler.waiting))
    for _ in range(left):
        if scheduler.is_idle:
            break
        world.step()
    assert scheduler.is_idle
    world.check()
    assert world.pool.num_free == world.pool.num_pages
    for request in world.requests:
        expected = plain_output(request)
        if request.finish == "cancelled":
            assert request.output_ids == expected[: len(request.output_ids)]
        else:
            assert request.output_ids == expected
            assert request.finish == ("stop" if is_stop(expected[-1]) else "length")
    assert world.pool.take(world.pool.num_pages) is not None
    assert world.pool.num_kept == 0
    check_happened(name, world.counts)


def check_happened(name: str, counts: Counter[str]) -> None:
    """What a world is for has happened in it."""
    assert counts["Admitted"] > 30
    assert counts["cancelled"] > 5
    if name in ("tight", "tiny", "drafts", "states", "nothing known"):
        assert counts["Preempted"] > 5
    if name in ("tight", "states", "nothing known"):
        assert counts["still"] > 5
    if name not in ("nothing known", "tiny", "least tokens"):
        assert counts["restored"] > 5
        assert counts["recomputed"] > 5 or name == "full folder"
    if "folder" in name:
        assert counts["brought"] > 5
