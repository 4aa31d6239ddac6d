"""Who runs in the next step, which tokens, on which pages. Bookkeeping alone: no tensor, no clock.

Order. Requests are admitted in the order of arrival, and none overtakes: whoever runs came before all who wait.

Tokens of a step. Every decoding request gets its one token, and its drafts, first; ``Limits`` sees to it that they
always fit. What is left is for prompts: half of it for the oldest one, the other half in equal parts for the others,
and what somebody does not need goes to the next. So a prompt behind n others gets at least 1 / 2n of it, and a token.

Pages. They are taken as a sequence grows: by decoding requests first, then by prompts, each as far as there are any.
Kept prefixes go first. If not even one token of a decoding request fits, the youngest running request is pre-empted,
unless it is this one itself: then it stands still. A prompt stands still too, so as not to stop who decodes, unless it
is the oldest of all. The oldest is never pre-empted and always moves on, so everybody's turn comes. Who was pre-empted
keeps its output and is the first to wait; it finds its own pages again if nobody needed them.

Admission. A slot is free, and after this step's pages of all there is one left for each who runs and will need another:
nobody is admitted only to be pre-empted at once. When nobody runs, the first one always fits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from dsv4.config.engine import Limits
from dsv4.engine.pages import PagePool, pages_of
from dsv4.engine.prefix import PrefixIndex, Restore, restore_plan
from dsv4.engine.request import Finish, Request
from dsv4.engine.step import Admitted, Entry, Event, Filled, Finished, KeepState, Preempted, Refused, StepPlan
from dsv4.ops.places import PAGE_TOKENS


class Scheduler:
    """Requests that wait and run.

    prefix: None to share nothing. max_context: tokens of a sequence at most. window, depth: of the states
    (``restore_plan``). fetch: called with a request that is next to be admitted, once for each time it waits; it may
    bring pages and a state from elsewhere into the prefix index.
    """

    def __init__(
        self,
        limits: Limits,
        pool: PagePool,
        prefix: PrefixIndex | None,
        *,
        max_context: int,
        window: int,
        depth: int,
        fetch: Callable[[Request], None] | None = None,
    ) -> None:
        if limits.prefix.memory != (prefix is not None):
            expected = "an index" if limits.prefix.memory else "None"
            raise ValueError(f"prefix is {prefix}; expected {expected}: limits.prefix.memory is {limits.prefix.memory}")
        if fetch is not None and prefix is None:
            raise ValueError("fetch is given without prefix; expected an index to fetch into")
        self.running: list[Request] = []  # both in order of arrival
        self.waiting: deque[Request] = deque()
        self._limits, self._pool, self._prefix = limits, pool, prefix
        self._max_context, self._window, self._depth = max_context, window, depth
        self._fetch = fetch
        self._fetched: set[str] = set()
        self._requests: dict[str, Request] = {}  # those that wait or run
        self._free_slots = list(range(limits.max_requests))[::-1]
        self._num_arrived = 0
        self._folder_every = 0
        if limits.prefix.folder is not None:
            p = limits.prefix
            self._folder_every = {"full": PAGE_TOKENS, "periodic": p.period, "zero": 0}[p.policy]

    @property
    def is_idle(self) -> bool:
        return not self.running and not self.waiting

    def add(self, request: Request) -> Refused | None:
        """Let a request wait, or refuse it if it can never run."""
        if request.id in self._requests:
            raise ValueError(f"request id is {request.id!r}, which is waiting or running; expected another")
        room = self._max_context - len(request.prompt_ids)
        request.max_tokens = min(request.sampling.max_tokens, room)
        request.arrival = self._num_arrived
        self._num_arrived += 1
        if reason := self._reason_against(request, room):
            request.finish = "refused"
            return Refused(request, reason)
        self._requests[request.id] = request
        self.waiting.append(request)
        return None

    def cancel(self, request_id: str) -> Finished | None:
        """End a request, at any time; None if none of this id waits or runs. A step under way may still be advanced."""
        request = self._requests.get(request_id)
        return None if request is None else self._finish(request, "cancelled")

    def fail(self, request_id: str) -> Finished:
        """End a request that gets no next token: after its entry is advanced, or instead if the entry gave none."""
        return self._finish(self._requests[request_id], "error")

    def plan(self, num_drafts: Callable[[Request], int] | None = None) -> StepPlan:
        """Plan the next step, once every entry of the last one is advanced.

        num_drafts: how many tokens are drafted for a decoding request, at most ``limits.draft_tokens``. An entry may
        take fewer of them, the first ones.
        """
        drafts = {r.id: self._num_drafts(r, num_drafts) for r in self.running if r.is_decoding}
        events = self._admit(drafts)
        wanted = self._tokens(self.running, drafts)
        entries: dict[str, Entry] = {}
        # Decoding requests first, each kind in order of arrival.
        for request in sorted(self.running, key=lambda r: not r.is_decoding):
            if request.slot is not None:  # not pre-empted for one before it
                count = self._secure(request, wanted[request.id], entries, events)
                num_drafted = max(0, count - 1) if request.is_decoding else 0
                if count:
                    entries[request.id] = Entry(request, request.num_computed, count, num_drafted)
        return StepPlan(tuple(entries.values()), tuple(events))

    def advance(self, entry: Entry, token_ids: Sequence[int] = (), *, is_stopped: bool = False) -> list[Event]:
        """Take note that an entry was run. token_ids: what came of it, if it ``samples``: accepted drafts and one more.

        is_stopped: the output ends with the last of them; what follows it is left out. Returns what became of it.
        """
        request = entry.request
        if request.is_finished:  # cancelled while the step ran
            return []
        least, most = (1, 1 + entry.num_drafts) if entry.samples else (0, 0)
        if not least <= len(token_ids) <= most:
            raise ValueError(f"token_ids has {len(token_ids)} tokens; expected {least} to {most}")
        if is_stopped and not entry.samples:
            raise ValueError("is_stopped is True for tokens before the last known one; expected False")
        before = request.num_computed
        request.num_computed = entry.end - entry.num_drafts + max(0, len(token_ids) - 1)
        request.output_ids.extend(token_ids)
        events = self._passed(request, before)
        if is_stopped:
            events.append(self._finish(request, "stop"))
        elif len(request.output_ids) == request.max_tokens:
            events.append(self._finish(request, "length"))
        return events

    # Requests

    def _reason_against(self, request: Request, room: int) -> str:
        if not request.prompt_ids:
            return "the prompt is empty; expected at least one token"
        if room < 1:
            return (
                f"the prompt has {len(request.prompt_ids)} tokens; expected fewer than the context of "
                f"{self._max_context}, so that one can follow"
            )
        needed = pages_of(request.longest)
        if needed > self._pool.num_pages:
            return (
                f"the prompt's {len(request.prompt_ids)} tokens and max_tokens = {request.max_tokens} need {needed} "
                f"pages; expected at most the cache's {self._pool.num_pages}"
            )
        if len(request.output_ids) >= request.max_tokens:
            done = len(request.output_ids)
            return f"the output has {done} tokens already; expected fewer than max_tokens = {request.max_tokens}"
        return ""

    def _finish(self, request: Request, finish: Finish) -> Finished:
        slot = request.slot
        if slot is None:
            self.waiting.remove(request)
        else:
            self._leave(request)
        self._fetched.discard(request.id)
        del self._requests[request.id]
        request.finish = finish
        return Finished(request, slot)

    def _leave(self, request: Request) -> None:
        """Take slot and pages from a running request."""
        assert request.slot is not None, f"request {request.id} has no slot; expected a running one"
        self.running.remove(request)
        self._free_slots.append(request.slot)
        self._pool.release_all(request.pages)
        request.slot, request.pages = None, []

    def _preempt(self, request: Request) -> Preempted:
        slot = request.slot
        assert slot is not None, f"request {request.id} has no slot; expected a running one"
        self._leave(request)
        request.num_computed = request.writes_from = 0
        self._fetched.discard(request.id)
        self.waiting.appendleft(request)
        return Preempted(request, slot)

    # Tokens

    def _num_drafts(self, request: Request, num_drafts: Callable[[Request], int] | None) -> int:
        asked = 0 if num_drafts is None else num_drafts(request)
        if not 0 <= asked <= self._limits.draft_tokens:
            raise ValueError(f"num_drafts is {asked}; expected 0 to limits.draft_tokens = {self._limits.draft_tokens}")
        return min(asked, request.max_tokens - len(request.output_ids) - 1)  # one follows the drafts

    def _tokens(self, requests: Sequence[Request], drafts: dict[str, int]) -> dict[str, int]:
        """Divide the tokens of a step among these requests, by id."""
        tokens = {r.id: 1 + drafts.get(r.id, 0) for r in requests if r.is_decoding}
        prompts = [r for r in requests if not r.is_decoding]
        needs = [self._chunk_end(r) - r.num_computed for r in prompts]
        shares = divide(needs, self._limits.step_tokens - sum(tokens.values()))
        return tokens | {r.id: share for r, share in zip(prompts, shares, strict=True)}

    def _chunk_end(self, request: Request) -> int:
        """The furthest a prompt may go in one step: its end, or the first place where a state is to be kept."""
        now, end = request.num_computed, request.num_tokens
        if self._prefix is None:
            return end
        if now < request.writes_from:
            return request.writes_from
        ends = [_last_boundary(request), *((now // every + 1) * every for every in self._every() if every)]
        return min([end, *(e for e in ends if e > now)])

    def _every(self) -> tuple[int, int]:
        """Tokens between states in memory and in the folder, 0 for none."""
        return self._limits.prefix.state_every, self._folder_every

    # Pages

    def _secure(self, request: Request, count: int, entries: dict[str, Entry], events: list[Event]) -> int:
        """Take pages for the next ``count`` tokens of a request; returns how many of the tokens have a page now."""
        may_preempt = request.is_decoding or request is self.running[0]
        while True:
            lacking = pages_of(request.num_computed + count) - len(request.pages)
            taken = self._pool.take(min(max(0, lacking), self._pool.num_free))
            assert taken is not None, "the pool gave no pages; expected as many as are free"
            request.pages += taken
            fitting = min(count, len(request.pages) * PAGE_TOKENS - request.num_computed)
            victim = self.running[-1]
            if fitting or not count or not may_preempt or victim is request:
                return fitting
            events.append(self._preempt(victim))
            entries.pop(victim.id, None)

    # Admission

    def _admit(self, drafts: dict[str, int]) -> list[Event]:
        events: list[Event] = []
        while self.waiting and self._free_slots:
            request = self.waiting[0]
            pages, restore = self._look_up(request)
            request.num_computed, request.writes_from = restore.recompute_from, restore.writes_from
            request.pages, request.prefill_end = pages, request.num_tokens
            if not self._fits(request, drafts):
                request.pages, request.num_computed, request.writes_from = [], 0, 0
                break
            state = None
            if restore.from_boundary:
                assert self._prefix is not None
                state = self._prefix.state(request.digests[restore.from_boundary // PAGE_TOKENS - 1])
            for page in pages:
                self._pool.share(page)
            request.slot = self._free_slots.pop()
            self.running.append(self.waiting.popleft())
            events.append(Admitted(request, restore, state))
        return events

    def _look_up(self, request: Request) -> tuple[list[int], Restore]:
        """Find the known pages that a request begins with, and how its state after them comes about."""
        if self._prefix is None:
            return [], Restore(0, 0, 0)
        if self._fetch is not None and request.id not in self._fetched:
            self._fetched.add(request.id)
            self._fetch(request)
        digests = self._prefix.digests(request)
        pages = self._prefix.longest(digests, request.num_tokens)
        boundaries = self._prefix.boundaries(digests[: len(pages)])
        hit = len(pages) * PAGE_TOKENS
        return pages, restore_plan(hit, boundaries, window=self._window, depth=self._depth)

    def _fits(self, request: Request, drafts: dict[str, int]) -> bool:
        """Whether the next step has pages for a request beside all that run, and one page more for each of these."""
        together = [*self.running, request]
        tokens = self._tokens(together, drafts)
        needed = sum(self._pool.is_kept(page) for page in request.pages)
        for other in together:
            after = max(len(other.pages), pages_of(other.num_computed + tokens[other.id]))
            grows = other is not request and after < pages_of(other.longest)
            needed += after - len(other.pages) + grows
        return needed <= self._pool.num_free

    # What is known of a request's tokens

    def _passed(self, request: Request, before: int) -> list[Event]:
        """Remember the pages that were filled since ``before``, and say where states are wanted."""
        events: list[Event] = []
        if self._prefix is None:
            return events
        digests = self._prefix.digests(request)
        for index in range(before // PAGE_TOKENS, request.num_computed // PAGE_TOKENS):
            position = (index + 1) * PAGE_TOKENS
            if position < request.writes_from:
                continue
            page, digest = request.pages[index], digests[index]
            if position > request.writes_from:
                self._prefix.remember(page, digest, digests[index - 1] if index else None)
                events.append(Filled(request, index, page, digest))
            every, folder_every = self._every()
            in_memory = position in (request.writes_from, _last_boundary(request)) or _is_multiple(position, every)
            in_folder = _is_multiple(position, folder_every)
            if in_memory or in_folder:
                assert request.slot is not None, f"request {request.id} has no slot; expected a running one"
                events.append(KeepState(request, request.slot, position, digest, in_memory, in_folder))
        return events


def divide(needs: Sequence[int], budget: int) -> list[int]:
    """Divide a budget of tokens among prompts that need so many, oldest first.

    The oldest has a claim to half of it, the others to equal parts of the rest; what one does not need goes to others.
    Nobody gets nothing where there is a token for each.
    """
    given = [0] * len(needs)
    if not needs:
        return given
    others = sorted(range(1, len(needs)), key=lambda i: needs[i])
    left = max(budget // 2, min(len(others), budget - 1))  # a token for each, if there are so many
    for k, i in enumerate(others):
        given[i] = min(needs[i], left // (len(others) - k))
        left -= given[i]
    for i in range(len(needs)):
        given[i] += min(needs[i] - given[i], budget - sum(given))
    return given


def _last_boundary(request: Request) -> int:
    """The last page boundary of the tokens known at admission that leaves one to compute."""
    return (request.prefill_end - 1) // PAGE_TOKENS * PAGE_TOKENS


def _is_multiple(position: int, every: int) -> bool:
    return every > 0 and position % every == 0
