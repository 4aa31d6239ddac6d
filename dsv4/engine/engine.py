"""Requests in, tokens out: one step after another over everything that runs.

    model, tokenizer = dsv4.load_model("runs/demo/model"), Tokenizer.from_file("runs/demo/model/tokenizer.json")
    for completion in Engine(model, tokenizer=tokenizer).generate(["def ", "import "], Sampling(max_tokens=50)):
        print(completion.text)

A step is planned (``scheduler``), run (``runner``), sampled (``sample``), logged if there is a log, and told. What a
request gets depends on its prompt, its sampling and its seed; in the invariant mode, to the bit.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Self, TypeVar, cast

import numpy as np
from tokenizers import Tokenizer

from dsv4.config.engine import Limits
from dsv4.config.sampling import Sampling
from dsv4.data.tokenizer import plain_text
from dsv4.engine.build import build_cache, model_key
from dsv4.engine.disk import DiskStore
from dsv4.engine.folder_prefix import FolderPrefix
from dsv4.engine.journal import Found, Journal
from dsv4.engine.outputs import Completion, Piece, Ran
from dsv4.engine.pages import PagePool
from dsv4.engine.prefix import PrefixIndex
from dsv4.engine.request import Request
from dsv4.engine.runner import Runner, State
from dsv4.engine.running import Mask, Running
from dsv4.engine.sample import LogProbabilities, NoTokenError
from dsv4.engine.scheduler import Scheduler
from dsv4.engine.speculation import Drafts
from dsv4.engine.step import Admitted, Entry, Event, Filled, KeepState
from dsv4.engine.streams import Streams
from dsv4.engine.text import TextStream
from dsv4.model.transformer import Transformer

MAX_SEED = 2**63 - 1
Result = TypeVar("Result")


class Engine:
    """An engine for one model. Not for several threads at once; ``stream`` serves any number of tasks of one loop.

    tokenizer: needed for prompts that are text and for stop strings. last_step: what it ran, for who measures it, with
    a copy of the logits if ``keeps_logits`` is set.
    """

    def __init__(self, model: Transformer, limits: Limits | None = None, *, tokenizer: Tokenizer | None = None) -> None:
        self.limits = Limits() if limits is None else limits
        self.model, self.tokenizer = model, tokenizer
        self.max_context = min(model.config.max_context, self.limits.max_context or model.config.max_context)
        cache = build_cache(model, self.limits, self.max_context)
        self.runner = Runner(model, cache)
        self.pool = PagePool(cache.num_pages)
        p, key = self.limits.prefix, b""
        if p.folder is not None:
            key = model_key(model, tokenizer, cache)
        self.prefix = PrefixIndex(self.pool, state_bytes=p.state_bytes, model_key=key) if p.memory else None
        self.folder: FolderPrefix | None = None
        if p.folder is not None and self.prefix is not None:
            store = DiskStore(p.folder, key, p.folder_bytes)
            self.folder = FolderPrefix(store, self.prefix, self.runner)
        self.last_step, self.keeps_logits = Ran(), False
        self.scheduler = Scheduler(
            self.limits, self.pool, self.prefix, max_context=self.max_context, window=model.config.attention.window,
            depth=len(model.layers) + (self.limits.draft_tokens > 0),  # the MTP block's rows are read for drafts alone
            fetch=None if self.folder is None else self.folder.fetch,
        )  # fmt: skip
        self.drafts = Drafts(self.runner, self.limits.draft_tokens, exact=self.limits.numerics == "invariant")
        self._running: dict[str, Running] = {}
        self._num_named = 0
        self._journal = Journal(self.limits.log)
        self._untold: list[Piece] = []  # of a step whose tokens could not be logged
        self._ended: dict[str, Completion] = {}
        self._streams = Streams(self)

    # ---- requests ----

    def add(
        self,
        prompt: str | Sequence[int],
        sampling: Sampling | None = None,
        *,
        id: str | None = None,
        salt: bytes = b"",
        mask: Mask | None = None,
    ) -> str:
        """Add a request; return its id.

        prompt: text, or token ids. id: of no request that waits, runs, or was not taken; None: the next free one.
        salt: prefixes are shared among requests of one salt alone. mask: the tokens allowed next, for structured
        output. Raises ``ValueError`` for what can never run, and says why.
        """
        sampling = Sampling() if sampling is None else sampling
        prompt_ids = self._prompt_ids(prompt)
        self._check(sampling)
        seed = secrets.randbelow(MAX_SEED) if sampling.seed is None else sampling.seed
        id = self._free_id() if id is None else id
        if self._is_known(id):
            raise ValueError(f"request id is {id!r}; expected one of no other request that was not taken")
        request = Request(id=id, prompt_ids=prompt_ids, sampling=sampling, seed=seed, salt=salt)
        if reason := self._enter(request, mask):
            raise ValueError(f"request {id}: {reason}")
        self._journal.add(request, has_mask=mask is not None)
        try:
            self._journal.commit()
        except OSError:
            self.drop(id)
            raise
        return id

    def resume(self, masks: Mapping[str, Mask] | None = None) -> list[str]:
        """Take over the requests of the log that nobody has taken; return their ids, in the order they came.

        The outputs of those that had not ended go on where they stopped. The others can be taken at once; so can what
        does not fit into the limits of now, which ends with an error that says why. masks: by id, of all requests that
        had one and have not ended.
        """
        if self.limits.log is None:
            raise ValueError("limits.log is None; expected the path of a log to resume from")
        masks = {} if masks is None else masks
        found = self._journal.found
        open_ids = [one.request.id for one in found if one.has_mask and not one.request.is_finished]
        lacking = [id for id in open_ids if id not in masks]
        if lacking:
            raise ValueError(f"masks has none for {lacking}; expected one for each request that was added with one")
        ids = []
        while found:
            self._take_over(found[0], masks.get(found[0].request.id))
            ids.append(found.pop(0).request.id)
        return ids

    def cancel(self, id: str) -> Piece | None:
        """End a request at any time, and return its last piece; None if it has ended already."""
        piece = self._cancel(id)
        if piece is not None:
            self._streams.put(piece)
            self._journal.commit()
        return piece

    @property
    def is_idle(self) -> bool:
        return self.scheduler.is_idle and not self._untold

    def completion(self, id: str) -> Completion:
        """What a request that was not taken has given so far."""
        return self._ended[id] if id in self._ended else self._running[id].completion

    def take(self, id: str) -> Completion:
        """Return the completion of a request that has ended, and forget it.

        A log forgets it with the next step, or when the engine is closed: who first stores what ``completion`` says
        finds it again if there is a kill in between.
        """
        completion = self._ended.pop(id)
        self._journal.take(id)
        return completion

    def drop(self, id: str) -> None:
        """Forget a request, whether it has ended or not; the log, with the next step or when the engine is closed."""
        self._cancel(id)
        if id in self._ended:
            self.take(id)

    def _cancel(self, id: str) -> Piece | None:
        if self.scheduler.cancel(id) is None:
            return None
        self._untold = [piece for piece in self._untold if piece.id != id]
        return self._end(self._running[id], Piece(id=id, token_ids=(), text=""))

    def _enter(self, request: Request, mask: Mask | None, logprobs: Sequence[LogProbabilities] = ()) -> str:
        """Let a request wait; if it can never run, return why instead."""
        refused = self.scheduler.add(request)
        if refused is not None:
            return refused.reason
        self._running[request.id] = self._new_running(request, mask, logprobs)
        return ""

    def _new_running(self, request: Request, mask: Mask | None, logprobs: Sequence[LogProbabilities]) -> Running:
        text = None if self.tokenizer is None else TextStream(self.tokenizer, request.sampling.stop)
        ends = set(request.sampling.stop_token_ids)
        if not request.sampling.ignore_eos:
            ends.add(self.model.config.eos_token_id)
        return Running(request, text, mask, frozenset(ends), logprobs)

    def _take_over(self, found: Found, mask: Mask | None) -> None:
        """Go on with a request of the log, or have what came of it."""
        request, error = found.request, found.error
        nothing = Piece(id=request.id, token_ids=(), text="")
        if not request.is_finished:
            reason = self._enter(request, mask, found.logprobs)
            if not reason:
                return
            request.finish, error = "error", NoTokenError(f"request {request.id}: {reason}")
            self._journal.end(replace(nothing, finish="error", error=error))
        running = self._new_running(request, None, found.logprobs)
        running.error = error
        running.completion.add(running.last(nothing))
        self._ended[request.id] = running.completion

    def _is_known(self, id: str) -> bool:
        return id in self._running or id in self._ended or id in self._journal

    def _free_id(self) -> str:
        while self._is_known(f"request-{self._num_named}"):
            self._num_named += 1
        self._num_named += 1
        return f"request-{self._num_named - 1}"

    def _prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        config = self.model.config
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("prompt is text, but the engine has no tokenizer; expected token ids")
            return [config.bos_token_id, *plain_text(self.tokenizer).encode(prompt).ids]
        wrong = next((i for i in prompt if not 0 <= i < config.vocab_size), None)
        if wrong is not None:
            raise ValueError(f"prompt holds {wrong}; expected 0 <= id < vocab_size = {config.vocab_size}")
        return [int(i) for i in prompt]

    def _check(self, sampling: Sampling) -> None:
        size = self.model.config.vocab_size
        for name, ids in (
            ("logit_bias", [i for i, _ in sampling.logit_bias]),
            ("stop_token_ids", sampling.stop_token_ids),
        ):
            wrong = next((i for i in ids if i >= size), None)
            if wrong is not None:
                raise ValueError(f"sampling.{name} holds {wrong}; expected ids below vocab_size = {size}")
        if sampling.stop and self.tokenizer is None:
            raise ValueError(f"sampling.stop is {sampling.stop!r}, but the engine has no tokenizer; expected none")

    # ---- a step ----

    def step(self) -> list[Piece]:
        """Run one step over everything that can run; return what it gave, in the order of arrival.

        If that cannot be logged, an ``OSError`` says so, and the next call tries again and returns it.
        """
        self.last_step = Ran()
        if self._untold:
            return self._tell()
        plan = self.scheduler.plan(self.drafts.count if self.limits.draft_tokens else None)
        self._act(plan.events)
        if not plan.entries:
            return []
        slots = [entry.request.slot for entry in plan.entries]
        forward = self.runner.run(plan.entries, [self._token_ids(entry) for entry in plan.entries])
        kept = [None if rows is None else rows.copy() for rows in forward.logits] if self.keeps_logits else []
        self.last_step = Ran(plan.entries, tuple(kept))
        pieces: list[Piece] = []
        events: list[Event] = []
        for entry, logits in zip(plan.entries, forward.logits, strict=True):
            if logits is None:
                events += self.scheduler.advance(entry)
            else:
                pieces.append(self._settle(entry, logits, events))
        # Before states are copied: they hold the MTP block's ring too, also of requests that have ended.
        wanted = {event.request.id for event in events if isinstance(event, KeepState)}
        self.drafts.make(plan.entries, slots, forward, wanted)
        self._act(events)
        self._conclude(pieces)
        return self._tell()

    def _settle(self, entry: Entry, logits: np.ndarray, events: list[Event]) -> Piece:
        """Choose an entry's tokens, [1 + drafts, V], and advance it; add what became of it to the events."""
        request, running = entry.request, self._running[entry.request.id]
        drafts, proposals = self.drafts.tokens(request), self.drafts.proposals(request)
        tokens = running.choose(logits, drafts[: entry.num_drafts], proposals[: entry.num_drafts])
        piece, is_stopped = running.take(tokens, logits)
        if piece.token_ids:
            events += self.scheduler.advance(entry, piece.token_ids, is_stopped=is_stopped)
        if running.error is not None and not request.is_finished:
            events.append(self.scheduler.fail(request.id))
        return piece

    def _token_ids(self, entry: Entry) -> list[int]:
        """The tokens of an entry, drafts included."""
        known = entry.request.tokens(entry.begin, entry.end - entry.num_drafts)
        return known + self.drafts.tokens(entry.request)[: entry.num_drafts]

    def _conclude(self, pieces: Sequence[Piece]) -> None:
        """Add what a step gave to the requests and, not yet committed, to the log."""
        self._journal.add_tokens(pieces)
        for piece in pieces:
            running = self._running[piece.id]
            if running.request.is_finished:
                piece = self._end(running, piece)
            else:
                running.completion.add(piece)
            self._untold.append(piece)

    def _tell(self) -> list[Piece]:
        """Commit what was given, and only then return it."""
        self._journal.commit()
        told, self._untold = self._untold, []
        return told

    def _end(self, running: Running, piece: Piece) -> Piece:
        """Forget a request that has ended with this piece; return the piece with what the end completes."""
        request, last = running.request, running.last(piece)
        running.completion.add(last)
        del self._running[request.id]
        self._ended[request.id] = running.completion
        self.drafts.drop(request)
        self._journal.end(last)
        return last

    def _act(self, events: Sequence[Event]) -> None:
        """Do what the scheduler's events ask for, in order."""
        for event in events:
            if isinstance(event, Admitted):
                slot = event.request.slot
                assert slot is not None, f"request {event.request.id} has no slot; expected an admitted one"
                self.runner.put_state(slot, cast("State | None", event.state))
                self._running[event.request.id].completion.num_cached = event.restore.writes_from
            elif isinstance(event, Filled) and self.folder is not None:
                self.folder.put_page(event)
            elif isinstance(event, KeepState):
                self._keep(event)

    def _keep(self, keep: KeepState) -> None:
        """Copy the state of a slot to where it is wanted."""
        state = self.runner.state(keep.slot)
        if keep.in_memory and self.prefix is not None:
            self.prefix.keep_state(keep.digest, state, sum(part.nbytes for part in state))
        if keep.in_folder and self.folder is not None:
            self.folder.put_state(keep, state)

    # ---- many requests, to their ends ----

    def generate(
        self, prompts: Sequence[str | Sequence[int]], sampling: Sampling | Sequence[Sampling] | None = None
    ) -> list[Completion]:
        """Run prompts to their ends, in one batch as far as it fits; return their completions in order.

        sampling: one for all, or one for each.
        """
        each = list(sampling) if isinstance(sampling, Sequence) else [sampling] * len(prompts)
        if len(each) != len(prompts):
            raise ValueError(f"sampling has {len(each)} entries; expected one, or the {len(prompts)} of prompts")
        ids: list[str] = []
        try:
            for prompt, one in zip(prompts, each, strict=True):
                ids.append(self.add(prompt, one))
        except (ValueError, OSError):
            for id in ids:
                self.drop(id)
            raise
        while self._untold or any(id in self._running for id in ids):
            self.step()
        return [self.take(id) for id in ids]

    # ---- streaming ----

    def stream(
        self,
        prompt: str | Sequence[int],
        sampling: Sampling | None = None,
        *,
        salt: bytes = b"",
        mask: Mask | None = None,
    ) -> AsyncGenerator[Piece, None]:
        """Yield a request's pieces as they come. Leaving the loop early cancels it.

        Steps run in one thread of the engine's own, for all streams together. If they stop, whatever the reason, every
        stream raises a ``StepError`` with that as its cause.
        """
        return self._streams.run(lambda: self.add(prompt, sampling, salt=salt, mask=mask))

    def follow(self, add: Callable[[], str]) -> AsyncGenerator[Piece, None]:
        """Yield the further pieces of a request that outlives its reader, for one that was resumed.

        add: is called between two steps, and returns the request's id. Leaving the loop early changes nothing: the
        request goes on, and when it has ended it waits to be taken.
        """
        return self._streams.run(add, is_kept=True)

    async def between(self, call: Callable[[], Result]) -> Result:
        """Return what ``call`` returns, between two steps: where streams run, ``cancel`` and ``take`` need it."""
        return await self._streams.between(call)

    # ---- the end ----

    def close(self) -> None:
        """Let go of the log and the thread. What runs is not ended: a log has it, to be resumed."""
        self._streams.close()
        self._journal.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
