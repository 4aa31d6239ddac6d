"""Requests in, tokens out: one step after another over everything that runs.

    model, tokenizer = dsv4.load_model("runs/demo/model"), Tokenizer.from_file("runs/demo/model/tokenizer.json")
    for completion in Engine(model, tokenizer=tokenizer).generate(["def ", "import "], Sampling(max_tokens=50)):
        print(completion.text)

A step is planned (``scheduler``), run (``runner``), sampled (``sample``), logged if there is a log, and told. What a
request gets depends on its prompt, its sampling and its seed; in the invariant mode, to the bit.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, Self, cast

from tokenizers import Tokenizer

from dsv4.config.engine import Limits
from dsv4.config.sampling import Sampling
from dsv4.data.tokenizer import plain_text
from dsv4.engine.build import build_cache, model_key
from dsv4.engine.disk import DiskStore
from dsv4.engine.folder_prefix import FolderPrefix
from dsv4.engine.log import WriteAheadLog
from dsv4.engine.outputs import Completion, Piece
from dsv4.engine.pages import PagePool
from dsv4.engine.prefix import PrefixIndex
from dsv4.engine.request import Request
from dsv4.engine.runner import Runner, State
from dsv4.engine.running import Mask, Running
from dsv4.engine.scheduler import Scheduler
from dsv4.engine.speculation import Drafts
from dsv4.engine.step import Admitted, Entry, Event, Filled, KeepState
from dsv4.engine.text import TextStream
from dsv4.model.transformer import Transformer

MAX_SEED = 2**63 - 1


class Engine:
    """An engine for one model. Not for several threads at once; ``stream`` serves any number of tasks of one loop.

    tokenizer: needed for prompts that are text and for stop strings.
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
        self.scheduler = Scheduler(
            self.limits, self.pool, self.prefix, max_context=self.max_context, window=model.config.attention.window,
            depth=len(cache.layers), fetch=None if self.folder is None else self.folder.fetch,
        )  # fmt: skip
        self.drafts = Drafts(self.runner, self.limits.draft_tokens, exact=self.limits.numerics == "invariant")
        self._running: dict[str, Running] = {}
        self._num_added = 0
        self._log = None if self.limits.log is None else WriteAheadLog(self.limits.log)
        self._ended: dict[str, Completion] = {}
        self._queues: dict[str, asyncio.Queue[Piece | Exception]] = {}
        self._lock = asyncio.Lock()  # between the thread's steps and the loop's calls
        self._driver: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1)

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

        prompt: text, or token ids. salt: prefixes are shared among requests of one salt alone. mask: the tokens
        allowed next, for structured output. Raises ``ValueError`` for what can never run, and says why.
        """
        sampling = Sampling() if sampling is None else sampling
        prompt_ids = self._prompt_ids(prompt)
        self._check(sampling)
        seed = secrets.randbelow(MAX_SEED) if sampling.seed is None else sampling.seed
        if id is None:
            id = f"request-{self._num_added}"
        request = Request(id=id, prompt_ids=prompt_ids, sampling=sampling, seed=seed, salt=salt)
        self._enter(request, mask)
        if self._log is not None:
            self._log.append_request(id, prompt_ids, asdict(sampling), seed)
            self._log.commit()
        return id

    def resume(self) -> list[str]:
        """Add again what the log says was unfinished; return the ids. Their outputs go on where they stopped."""
        if self._log is None:
            raise ValueError("limits.log is None; expected the path of a log to resume from")
        ids = []
        for found in self._log.unfinished:
            if found.id in self._running:
                continue
            sampling = _sampling(found.sampling)
            request = Request(
                id=found.id, prompt_ids=found.prompt_ids, sampling=sampling, seed=found.seed,
                output_ids=list(found.output_ids),
            )  # fmt: skip
            self._enter(request, None)
            ids.append(found.id)
        return ids

    def cancel(self, id: str) -> Piece | None:
        """End a request at any time; None if it has ended already."""
        if self.scheduler.cancel(id) is None:
            return None
        piece = self._end(self._running[id], Piece(id=id, token_ids=(), text=""))
        if self._log is not None:
            self._log.commit()
        return piece

    @property
    def is_idle(self) -> bool:
        return self.scheduler.is_idle

    def completion(self, id: str) -> Completion:
        """What a request that waits or runs has given so far."""
        return self._running[id].completion

    def _enter(self, request: Request, mask: Mask | None) -> None:
        refused = self.scheduler.add(request)
        if refused is not None:
            raise ValueError(f"request {request.id}: {refused.reason}")
        self._num_added += 1
        text = None if self.tokenizer is None else TextStream(self.tokenizer, request.sampling.stop)
        ends = set(request.sampling.stop_token_ids)
        if not request.sampling.ignore_eos:
            ends.add(self.model.config.eos_token_id)
        self._running[request.id] = Running(request, text, mask, frozenset(ends))

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
        """Run one step over everything that can run; return what it gave, in the order of arrival."""
        plan = self.scheduler.plan(self.drafts.count if self.limits.draft_tokens else None)
        self._act(plan.events)
        if not plan.entries:
            return []
        forward = self.runner.run(plan.entries, [self._token_ids(entry) for entry in plan.entries])
        pieces: list[Piece] = []
        events: list[Event] = []
        for entry, logits in zip(plan.entries, forward.logits, strict=True):
            if logits is None:
                events += self.scheduler.advance(entry)
                continue
            running, count = self._running[entry.request.id], entry.num_drafts
            drafts, proposals = self.drafts.tokens(entry.request), self.drafts.proposals(entry.request)
            tokens = running.choose(logits, drafts[:count], proposals[:count])
            piece, is_stopped = running.take(tokens, logits)
            events += self.scheduler.advance(entry, piece.token_ids, is_stopped=is_stopped)
            pieces.append(piece)
        self.drafts.make(plan.entries, forward)  # before states are copied: they hold the MTP block's ring too
        self._act(events)
        return self._tell(pieces)

    def _token_ids(self, entry: Entry) -> list[int]:
        """The tokens of an entry, drafts included."""
        known = entry.request.tokens(entry.begin, entry.end - entry.num_drafts)
        return known + self.drafts.tokens(entry.request)[: entry.num_drafts]

    def _tell(self, pieces: Sequence[Piece]) -> list[Piece]:
        """Log what a step gave, and only then return it; forget the requests that ended."""
        if self._log is not None:
            self._log.append_tokens([(piece.id, token) for piece in pieces for token in piece.token_ids])
        told = []
        for piece in pieces:
            running = self._running[piece.id]
            told.append(self._end(running, piece) if running.request.is_finished else piece)
            if not running.request.is_finished:
                running.completion.add(piece)
        if self._log is not None:
            self._log.commit()
        return told

    def _end(self, running: Running, piece: Piece) -> Piece:
        """Forget a request that has ended with this piece; return the piece with what the end completes."""
        request, last = running.request, running.last(piece)
        running.completion.add(last)
        del self._running[request.id]
        self._ended[request.id] = running.completion
        self.drafts.drop(request)
        if self._log is not None:
            self._log.append_end(request.id, str(request.finish))
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
        except ValueError:
            for id in ids:
                self.cancel(id)
                self.take(id)
            raise
        while any(id in self._running for id in ids):
            self.step()
        return [self.take(id) for id in ids]

    def take(self, id: str) -> Completion:
        """Return the completion of a request that has ended, and forget it."""
        return self._ended.pop(id)

    # ---- streaming ----

    async def stream(
        self, prompt: str | Sequence[int], sampling: Sampling | None = None, *, mask: Mask | None = None
    ) -> AsyncIterator[Piece]:
        """Yield a request's pieces as they come. Leaving the loop early cancels it.

        Steps run in one thread of the engine's own, for all streams together; an error of a step ends all of them.
        """
        queue: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        async with self._lock:
            id = self.add(prompt, sampling, mask=mask)
        self._queues[id] = queue
        if self._driver is None or self._driver.done():
            self._driver = asyncio.create_task(self._drive())
        try:
            while True:
                piece = await queue.get()
                if isinstance(piece, Exception):
                    raise piece
                yield piece
                if piece.finish is not None:
                    return
        finally:
            del self._queues[id]
            async with self._lock:
                self.cancel(id)
                self._ended.pop(id, None)

    async def _drive(self) -> None:
        """Step while anything runs, and hand pieces to their streams."""
        loop = asyncio.get_running_loop()
        while not self.is_idle:
            try:
                async with self._lock:
                    pieces = await loop.run_in_executor(self._thread, self.step)
            except Exception as error:  # every stream learns of it
                for queue in self._queues.values():
                    queue.put_nowait(error)
                return
            for piece in pieces:
                if piece.id in self._queues:
                    self._queues[piece.id].put_nowait(piece)
            await asyncio.sleep(0)

    # ---- the end ----

    def close(self) -> None:
        """Let go of the log and the thread. What runs is not ended: a log has it, to be resumed."""
        self._thread.shutdown()
        if self._log is not None:
            self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _sampling(fields: dict[str, Any]) -> Sampling:
    """The sampling of a log, in which tuples have become lists."""
    bias = tuple((int(i), float(value)) for i, value in fields["logit_bias"])
    stops = {name: tuple(fields[name]) for name in ("stop", "stop_token_ids")}
    return Sampling(**{**fields, "logit_bias": bias, **stops})
