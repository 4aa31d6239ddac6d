"""How fast an engine is, and what it holds: its own steps, timed by a clock that the caller passes in.

Rates keep prompts and decoding apart. A step that runs tokens of a prompt counts for prefill, whatever else is in it. A
step without one counts for decoding, if as many requests decode in it as are to run at once: so the first and the last
ones of a measurement, in which fewer do, make no rate look better or worse than it is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from dsv4.accounting import cache as sizes
from dsv4.config.model import ModelConfig
from dsv4.config.sampling import Sampling
from dsv4.engine.engine import Engine
from dsv4.engine.outputs import Completion, Piece
from dsv4.engine.pages import pages_of
from dsv4.engine.step import Entry
from dsv4.ops.places import PAGE_TOKENS
from dsv4.ops.rows import RowFormat

Clock = Callable[[], float]
"""Seconds, from anywhere."""

SPAN_TOKENS, SPAN_SHARE = 4096, 16  # a prefill rate at a length is that of the last 4096 tokens, or of its 16th part


class Step(NamedTuple):
    """One step of an engine.

    prompt_tokens: tokens of prompts that it ran; repeated_tokens: those of them whose entries had been found, run again
    for the state alone. num_decoding: requests that ran none. output_tokens: what came out.
    """

    seconds: float
    prompt_tokens: int
    repeated_tokens: int
    num_decoding: int
    output_tokens: int


class Meter:
    """An engine whose steps are timed.

    logits: of all tokens that were chosen since it was emptied, [1 + drafts, V] float32 each, if ``keeps_logits``.
    """

    def __init__(self, engine: Engine, clock: Clock, *, keeps_logits: bool = False) -> None:
        self.engine, self.clock = engine, clock
        self.logits: list[np.ndarray] = []
        engine.keeps_logits = keeps_logits

    def step(self) -> tuple[Step, list[Piece]]:
        """Run one step of the engine."""
        begin = self.clock()
        pieces = self.engine.step()
        seconds = self.clock() - begin
        entries, logits = self.engine.last_step
        prompt = [_before(entry, len(entry.request.prompt_ids)) for entry in entries]
        repeated = [_before(entry, entry.request.writes_from) for entry in entries]
        self.logits += [rows for rows in logits if rows is not None]
        output = sum(len(piece.token_ids) for piece in pieces)
        return Step(seconds, sum(prompt), sum(repeated), prompt.count(0), output), pieces


def _before(entry: Entry, position: int) -> int:
    """How many tokens of an entry lie before a position."""
    return max(0, min(entry.end, position) - entry.begin)


# ---- what the cache holds ----


class CacheUse(NamedTuple):
    """Bytes of the cache that hold something: measured on its tensors, and predicted from the config."""

    used_bytes: int
    predicted_bytes: int


def cache_use(engine: Engine) -> CacheUse:
    """What the running requests hold: their pages, and of their slots the rows that are filled.

    The two are equal, unless requests share pages, or have one for drafts that did not hold.
    """
    cache, pool = engine.runner.cache, engine.pool
    lengths = [request.num_computed for request in engine.scheduler.running]
    used = (pool.num_pages - pool.num_free) * cache.page_bytes()
    for layer in cache.layers:
        row = layer.ring[0, 0].nbytes
        used += sum(min(length, layer.ring.shape[1]) * row for length in lengths)
        used += len(lengths) * sum(c.kv[0].nbytes + c.gate[0].nbytes for c in layer.compressors())
    predicted = sum(predicted_bytes(engine.model.config, cache.row_format, n, spare=cache.spare) for n in lengths)
    return CacheUse(used, predicted)


def predicted_bytes(config: ModelConfig, row_format: RowFormat, num_tokens: int, *, spare: int = 0) -> int:
    """Return the bytes that a sequence of ``num_tokens`` fills, from the config alone: whole pages, rows, and tails.

    spare: places that rings and tails have more than their readers need, for drafts.
    """
    entries = sizes.entry_bytes(config, row_format, pages_of(num_tokens) * PAGE_TOKENS)
    num_rings = config.num_layers + len(config.mtp_kinds)
    rows = num_rings * min(num_tokens, config.attention.window + spare) * sizes.row_bytes(config, row_format)
    hca = config.layer_kinds.count("hca") * config.attention.head_dim
    csa = config.layer_kinds.count("csa") * 2 * (config.attention.head_dim + config.indexer.head_dim)
    return entries + rows + sizes.tail_bytes(config) + 2 * sizes.TAIL_BYTES * spare * (hca + csa)


# ---- many requests ----


@dataclass(frozen=True)
class Percentiles:
    """Of a list of times, in seconds."""

    p50: float
    p90: float
    p99: float


def percentiles(values: Sequence[float]) -> Percentiles | None:
    """Return what half, nine tenths and 99 of 100 values are at most, interpolated; None for no values."""
    if not values:
        return None
    return Percentiles(*(float(np.percentile(values, share)) for share in (50, 90, 99)))


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What a run of many requests measured."""

    seconds: float
    total_prompt_tokens: int
    """Run, so without those that were found in the cache."""
    total_output_tokens: int
    prefill_tokens_per_s: float
    """Of the steps with tokens of prompts."""
    decode_tokens_per_s: float | None
    """Of the steps in which all that run at once decode; None if there was no such step."""
    output_tokens_per_s: float
    """Of the whole run."""
    first_token_s: Percentiles | None
    """From when a request was added to its first token."""
    token_s: Percentiles | None
    """Of each request, the time a token takes after the first."""
    pause_s: Percentiles | None
    """Between two pieces of a request: with drafts a piece has several tokens."""
    num_drafted: int
    num_accepted: int
    cache_used_bytes: int
    """When it was most (``cache_use``)."""
    cache_predicted_bytes: int
    """At that moment."""
    cache_allocated_bytes: int
    """The whole cache, full or not."""

    @property
    def acceptance(self) -> float | None:
        """The share of drafts that held."""
        return self.num_accepted / self.num_drafted if self.num_drafted else None


@dataclass(kw_only=True)
class _Times:
    """When a request was added, when its pieces came, and how many tokens they had together."""

    added: float
    pieces: list[float] = field(default_factory=list)
    num_tokens: int = 0


def run_requests(meter: Meter, prompts: Sequence[Sequence[int]], sampling: Sampling, *, concurrency: int) -> Speed:
    """Run prompts to their ends, ``concurrency`` of them at once: when one ends the next is added."""
    engine, clock = meter.engine, meter.clock
    waiting, running, ended = deque(prompts), {}, []
    steps: list[Step] = []
    use = CacheUse(0, 0)
    completions: list[Completion] = []
    begin = clock()
    while waiting or running:
        while waiting and len(running) < concurrency:
            added = clock()
            running[engine.add(waiting.popleft(), sampling)] = _Times(added=added)
        step, pieces = meter.step()
        now = clock()
        steps.append(step)
        use = max(use, cache_use(engine))
        for piece in pieces:
            times = running[piece.id]
            times.pieces.append(now)
            times.num_tokens += len(piece.token_ids)
            if piece.finish is not None:
                ended.append(running.pop(piece.id))
                completions.append(engine.take(piece.id))
    return _speed(steps, ended, completions, concurrency, clock() - begin, use, engine.runner.cache.num_bytes())


def _speed(
    steps: list[Step],
    ended: list[_Times],
    completions: list[Completion],
    concurrency: int,
    seconds: float,
    use: CacheUse,
    allocated: int,
) -> Speed:
    prefill = [step for step in steps if step.prompt_tokens]
    decode = [step for step in steps if not step.prompt_tokens and step.num_decoding == concurrency]
    outputs = sum(times.num_tokens for times in ended)
    return Speed(
        seconds=seconds,
        total_prompt_tokens=sum(step.prompt_tokens for step in steps),
        total_output_tokens=outputs,
        prefill_tokens_per_s=sum(s.prompt_tokens for s in prefill) / sum(s.seconds for s in prefill),
        decode_tokens_per_s=_rate(decode),
        output_tokens_per_s=outputs / seconds,
        first_token_s=percentiles([times.pieces[0] - times.added for times in ended]),
        token_s=percentiles(
            [(t.pieces[-1] - t.pieces[0]) / (t.num_tokens - 1) for t in ended if t.num_tokens > 1 and len(t.pieces) > 1]
        ),
        pause_s=percentiles([b - a for t in ended for a, b in zip(t.pieces, t.pieces[1:], strict=False)]),
        num_drafted=sum(completion.num_drafted for completion in completions),
        num_accepted=sum(completion.num_accepted for completion in completions),
        cache_used_bytes=use.used_bytes,
        cache_predicted_bytes=use.predicted_bytes,
        cache_allocated_bytes=allocated,
    )


def _rate(steps: Sequence[Step]) -> float | None:
    """Tokens of output per second of some steps; None for no steps."""
    return sum(step.output_tokens for step in steps) / sum(step.seconds for step in steps) if steps else None


# ---- one request, in an engine without others ----


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One request: when its first token came, what it ran, and what came out. logits: if the meter keeps them."""

    first_token_s: float
    token_ids: list[int]
    logits: list[np.ndarray]
    num_found: int
    """Tokens of the prompt whose entries were found."""
    num_repeated: int
    """Of them, tokens that were run again for the state."""


def run_one(meter: Meter, prompt_ids: Sequence[int], sampling: Sampling) -> Answer:
    """Run one prompt to its end."""
    meter.logits.clear()
    begin, first, num_repeated = meter.clock(), None, 0
    id = meter.engine.add(prompt_ids, sampling)
    while not meter.engine.is_idle:
        step, pieces = meter.step()
        num_repeated += step.repeated_tokens
        if first is None and pieces:
            first = meter.clock()
    completion = meter.engine.take(id)
    assert first is not None, "the request ended without a token; expected one"
    return Answer(
        first_token_s=first - begin, token_ids=completion.token_ids, logits=list(meter.logits),
        num_found=completion.num_cached, num_repeated=num_repeated,
    )  # fmt: skip


def same_bits(a: Answer, b: Answer) -> bool:
    """Whether two answers have the same tokens, and the same logits to the bit."""
    return a.token_ids == b.token_ids and [x.tobytes() for x in a.logits] == [x.tobytes() for x in b.logits]


# ---- one sequence, longer and longer ----


@dataclass(frozen=True, kw_only=True)
class AtLength:
    """What tokens cost just before a sequence has ``length`` tokens."""

    length: int
    prefill_tokens_per_s: float
    prefill_tokens: int
    """Over which it is measured: whole steps, at least SPAN_TOKENS and a share of 1 / SPAN_SHARE of the length."""
    prompt_tokens_per_s: float
    """Of the whole prompt up to here: its tokens over the seconds they took."""
    decode_tokens_per_s: float
    cache_used_bytes: int
    cache_predicted_bytes: int
    resident_bytes: int
    """Of the process, which has the whole cache from the start."""


def run_lengths(
    meter: Meter,
    token_ids: Sequence[int],
    lengths: Sequence[int],
    *,
    decode_tokens: int,
    resident: Callable[[], int],
    tell: Callable[[int], None] = lambda position: None,
) -> Iterator[AtLength]:
    """Measure at each of some lengths, ascending, and yield what was found there.

    Each length has a request of its own, whose prompt is so much of ``token_ids`` that the one token that the prompt
    gives and ``decode_tokens`` after it end at the length. It finds the pages and the state of the one before, so only
    what is new is run, and decoding is a fork: the next prompt goes on from the prompt. For an engine of one slot that
    keeps prefixes in memory, a state for each length. tell: called after each step with the tokens run.
    """
    sampling = Sampling(max_tokens=1 + decode_tokens, temperature=0.0, ignore_eos=True, seed=0)
    before: list[Step] = []  # of the prompt, for the lengths that were
    for length in lengths:
        prompt = token_ids[: length - sampling.max_tokens]
        id = meter.engine.add(prompt, sampling)
        prefill: list[Step] = []
        decode: list[Step] = []
        use, held = CacheUse(0, 0), 0
        while not meter.engine.is_idle:
            step, _ = meter.step()
            (prefill if step.prompt_tokens else decode).append(step)
            for request in meter.engine.scheduler.running:
                if len(request.output_ids) == decode_tokens:
                    use, held = cache_use(meter.engine), resident()
                tell(request.num_computed)
        meter.engine.take(id)
        rate = _rate(decode)
        assert rate is not None, "no step decoded; expected decode_tokens of at least 1"
        last = _last(prefill, max(SPAN_TOKENS, length // SPAN_SHARE))
        num_tokens = sum(step.prompt_tokens for step in last)
        before += prefill
        yield AtLength(
            length=length,
            prefill_tokens_per_s=num_tokens / sum(step.seconds for step in last),
            prefill_tokens=num_tokens,
            prompt_tokens_per_s=sum(step.prompt_tokens for step in before) / sum(step.seconds for step in before),
            decode_tokens_per_s=rate,
            cache_used_bytes=use.used_bytes,
            cache_predicted_bytes=use.predicted_bytes,
            resident_bytes=held,
        )


def decode_again(
    meter: Meter, token_ids: Sequence[int], lengths: Sequence[int], *, decode_tokens: int, rounds: int
) -> list[list[float]]:
    """Decode at all lengths in turn, ``rounds`` times, after ``run_lengths`` of the same engine.

    Returns tokens per second, [lengths][rounds]: what the machine does meanwhile is shared by all lengths of a round.
    """
    sampling = Sampling(max_tokens=1 + decode_tokens, temperature=0.0, ignore_eos=True, seed=0)
    rates: list[list[float]] = [[] for _ in lengths]
    for _ in range(rounds):
        for found, length in zip(rates, lengths, strict=True):
            id = meter.engine.add(token_ids[: length - sampling.max_tokens], sampling)
            steps: list[Step] = []
            while not meter.engine.is_idle:
                steps.append(meter.step()[0])
            meter.engine.take(id)
            rate = _rate([step for step in steps if not step.prompt_tokens])
            assert rate is not None, "no step decoded; expected decode_tokens of at least 1"
            found.append(rate)
    return rates


def _last(steps: list[Step], num_tokens: int) -> list[Step]:
    """The last steps that have so many tokens of prompts together, or all."""
    begin, counted = len(steps), 0
    while begin and counted < num_tokens:
        begin -= 1
        counted += steps[begin].prompt_tokens
    return steps[begin:]
