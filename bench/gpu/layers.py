"""Whole layers on a GPU: V4's of each kind, V3.2's beside them, and transformers' where it fits.

    python -m bench.gpu.layers [--json FILE] [--plot FILE] [--only flash.csa ...] [--what decode ...]

A training step of a sequence, a prompt in chunks, and a decoding step of a batch whose caches are filled
(``layers_v4``, ``v32``, ``layers_twin``); then, summed over the layers of whole models, time and cache bytes beside the
shares that the report gives (``layers_report``). Times are of the wall, the device waited for. What there is no memory
for is named.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import tyro
from rich.console import Console

from bench.gpu.layers_report import draw, sums
from bench.gpu.layers_twin import Twin, why_none
from bench.gpu.layers_v4 import V4Layer, one_layer
from bench.gpu.measure import free
from bench.gpu.v32 import KINDS, V32Layer, V32Work, Way
from dsv4.accounting.v32 import V32Config
from dsv4.cli.bench_setup import save
from dsv4.cli.plot import check_plot
from dsv4.config.model import RATIO, LayerKind, ModelConfig
from dsv4.config.presets import flash, pro
from dsv4.device import accelerator, best, empty_cache, has_graphs, name_of, peak_memory_bytes, start_peak, wait
from dsv4.ops.backend import Backend, BackendChoice, resolve

RESULTS = Path(__file__).parents[1] / "results"
WARM_UPS = 2  # kernels are compiled in the first call, a graph is captured in the second
ROUNDS = 5  # their median counts
OUT_OF_MEMORY = "out of memory"

Record = dict[str, Any]
Tell = Callable[[list[Record]], None]
console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured, and on what. The defaults are the true sizes, for a GPU of 140 GB.

    only: layers, such as ``flash.csa`` or ``v32.experts``; all if empty. chunk: tokens of a step of a prompt.
    twin_tokens: the lengths for which transformers' layer is tried, in chunks of ``twin_chunks`` if not whole; none for
    never. spend_s: a case is repeated for about so long, and measured once if it takes longer. v32_attention: ways to
    compute V3.2's (``v32.Way``), the fastest of which counts. device: None for the accelerator, or the CPU without one.
    """

    flash: ModelConfig = field(default_factory=flash)
    pro: ModelConfig = field(default_factory=pro)
    v32: V32Config = field(default_factory=V32Config)
    only: tuple[str, ...] = ()
    what: tuple[str, ...] = ("train", "prefill", "decode")
    train_tokens: tuple[int, ...] = (4096, 65536)
    prefill_tokens: tuple[int, ...] = (4096, 65536, 262144, 1048576)
    chunk: int = 8192
    contexts: tuple[int, ...] = (4096, 65536, 1048576)
    batches: tuple[int, ...] = (1, 8, 64)
    twin_tokens: tuple[int, ...] = (4096, 65536)
    twin_chunks: tuple[int, ...] = (8192, 2048)
    spend_s: float = 0.2
    v32_attention: tuple[Way, ...] = ("operation",)
    dtype: torch.dtype = torch.bfloat16
    backend: BackendChoice = "auto"
    device: torch.device | None = None

    def place(self) -> tuple[torch.device, Backend]:
        """Return the device and the backend that it computes with."""
        device = best() if self.device is None else self.device
        return device, resolve(self.backend, device)

    def layers(self) -> list[tuple[str, str]]:
        """Return model and kind of the layers; a ``ValueError`` names those of ``only`` that there are not."""
        all_layers = [(model, kind) for model in ("flash", "pro") for kind in RATIO]
        all_layers += [("v32", kind) for kind in KINDS]
        names = [".".join(one) for one in all_layers]
        if unknown := sorted(set(self.only) - set(names)):
            raise ValueError(f"only has {', '.join(unknown)}; expected layers among {', '.join(names)}")
        if unknown := sorted(set(self.what) - {"train", "prefill", "decode"}):
            raise ValueError(f"what has {', '.join(unknown)}; expected train, prefill or decode")
        return [one for one, name in zip(all_layers, names, strict=True) if not self.only or name in self.only]


TRUE = Plan()


class Work(NamedTuple):
    """One thing to measure. tokens: of the sequence, or of the context of each of ``batch``."""

    what: str
    tokens: int
    batch: int


def measure(plan: Plan, tell: Tell = lambda records: None) -> list[Record]:
    """Measure what a plan says, layer by layer; ``tell`` is given what there is after each measurement.

    A record holds layer, kind, what, tokens, batch, seconds, tokens_per_second (in decoding, of the whole batch),
    end_seconds (of the last chunk of a prompt), chunk, peak_bytes (weights and all), cache_bytes_per_token and
    cache_fixed_bytes (of a sequence, read off its tensors), attention (the way of V3.2's), transformers_seconds and
    transformers_note, and a note; None stands where nothing could be measured, and the note says why.
    """
    records: list[Record] = []
    tell_all = partial(tell, records)
    for model, kind in plan.layers():
        mine = [_blank(model, kind, work) for work in _works(plan, model)]
        records += mine
        _measure_own(plan, model, kind, mine, tell_all)
        free()
        _measure_twin(plan, model, kind, mine, tell_all)
        free()
    return records


def _works(plan: Plan, model: str) -> Iterator[Work]:
    if "train" in plan.what and model != "v32":
        yield from (Work("train", tokens, 1) for tokens in plan.train_tokens)
    if "prefill" in plan.what:
        yield from (Work("prefill", tokens, 1) for tokens in plan.prefill_tokens)
    if "decode" in plan.what:
        yield from (Work("decode", context, batch) for context in plan.contexts for batch in plan.batches)


def _blank(model: str, kind: str, work: Work) -> Record:
    fields = (
        "seconds", "tokens_per_second", "end_seconds", "chunk", "peak_bytes", "cache_bytes_per_token",
        "cache_fixed_bytes", "attention", "transformers_seconds", "note",
    )  # fmt: skip
    later = {"transformers_note": "not measured"}
    return {"layer": model, "kind": kind, **work._asdict()} | dict.fromkeys(fields) | later


# ---- a layer of ours ----


def _measure_own(plan: Plan, model: str, kind: str, records: list[Record], tell: Callable[[], None]) -> None:
    device, _ = plan.place()
    made: list[V4Layer | V32Work] = []
    note = _attempt(lambda: made.append(_layer(plan, model, kind)))
    for record in records:
        empty_cache()
        start_peak(device)
        record["note"] = note or _attempt(partial(_measure_one, plan, made[0], record, device))
        if record["note"] is None:
            record["peak_bytes"] = peak_memory_bytes(device)
        tell()


def _attempt(work: Callable[[], object]) -> str | None:
    """Do it, or say that there is no memory for it."""
    try:
        work()
    except torch.OutOfMemoryError:
        note = OUT_OF_MEMORY
    else:
        return None
    free()  # what the failed work held, now that its frames are gone
    return note


def _layer(plan: Plan, model: str, kind: str) -> V4Layer | V32Work:
    device, backend = plan.place()
    torch.manual_seed(0)
    if model == "v32":
        return V32Work(V32Layer(plan.v32, kind, dtype=plan.dtype, device=device, backend=backend))
    return V4Layer(_config(plan, model), _kind(kind), dtype=plan.dtype, device=device, backend=backend)


def _config(plan: Plan, model: str) -> ModelConfig:
    return plan.flash if model == "flash" else plan.pro


def _kind(name: str) -> LayerKind:
    return next(kind for kind in RATIO if kind == name)


def _measure_one(plan: Plan, layer: V4Layer | V32Work, record: Record, device: torch.device) -> None:
    """Fill in a record, with the fastest way to compute V3.2's attention."""
    if isinstance(layer, V4Layer):
        _time(plan, layer, record, device)
        return
    found = []
    for way in plan.v32_attention:
        layer.layer.attention = way
        found.append(record | {"attention": way})
        _time(plan, layer, found[-1], device)
    record |= min(found, key=lambda one: one["seconds"])


def _time(plan: Plan, layer: V4Layer | V32Work, record: Record, device: torch.device) -> None:
    tokens, batch = record["tokens"], record["batch"]
    if record["what"] == "train":
        assert isinstance(layer, V4Layer)
        seconds = timed(layer.train(tokens), device, plan.spend_s)
    elif record["what"] == "prefill":
        chunk = min(plan.chunk, tokens)
        run, weight = layer.prefill(tokens, chunk)
        seconds, end = timed_chunks(run, range(0, tokens, chunk), device, plan.spend_s)
        record |= weight | {"chunk": chunk, "end_seconds": end}
    else:
        run, weight = layer.decode(tokens, batch)
        seconds = timed(run, device, plan.spend_s)
        record |= weight
    record["seconds"] = seconds
    record["tokens_per_second"] = (batch if record["what"] == "decode" else tokens) / seconds


def timed(run: Callable[[], object], device: torch.device, spend_s: float) -> float:
    """Return how long a call takes, many of a short one being given to the device at once; the median of rounds."""
    for _ in range(WARM_UPS):
        run()
    once = _of_calls(run, 1, device)
    if once > spend_s:
        return once
    calls = max(1, round(spend_s / ROUNDS / max(once, 1e-6)))
    return median(_of_calls(run, calls, device) / calls for _ in range(ROUNDS))


def timed_chunks(
    run: Callable[[int], object], begins: Sequence[int], device: torch.device, spend_s: float
) -> tuple[float, float]:
    """Return how long a prompt takes, and how long its last chunk. First and last chunk have run once before."""
    run(begins[0])
    run(begins[-1])
    times: list[tuple[float, float]] = []
    while not times or (len(times) < ROUNDS and sum(whole for whole, _ in times) < spend_s):
        wait(device)
        begun = time.perf_counter()
        for begin in begins[:-1]:
            run(begin)
        wait(device)
        before_last = time.perf_counter()
        run(begins[-1])
        wait(device)
        ended = time.perf_counter()
        times.append((ended - begun, ended - before_last))
    return median(whole for whole, _ in times), median(last for _, last in times)


def _of_calls(run: Callable[[], object], calls: int, device: torch.device) -> float:
    wait(device)
    begun = time.perf_counter()
    for _ in range(calls):
        run()
    wait(device)
    return time.perf_counter() - begun


# ---- transformers' layer ----


def _measure_twin(plan: Plan, model: str, kind: str, records: list[Record], tell: Callable[[], None]) -> None:
    """Fill in transformers' times, or why there are none."""
    none = "a layer of V3.2" if model == "v32" else "not tried" if not plan.twin_tokens else why_none()
    tried = [r for r in records if none is None and r["tokens"] in plan.twin_tokens and r["batch"] == 1]
    for record in records:
        record["transformers_note"] = none or f"tried for one sequence of {' and '.join(map(str, plan.twin_tokens))}"
    if not tried:
        return
    device, _ = plan.place()
    made: list[Twin] = []
    config = one_layer(_config(plan, model), _kind(kind))
    note = _attempt(lambda: made.append(Twin(config, dtype=plan.dtype, device=device)))
    for record in tried:
        record["transformers_note"] = note or _twin_note(plan, made[0], record, device)
        tell()


def _twin_note(plan: Plan, twin: Twin, record: Record, device: torch.device) -> str | None:
    """Measure a record's twin, a prompt whole or in the largest chunks that fit; return what there is to say of it."""
    tokens = record["tokens"]
    chunks = () if record["what"] == "train" else tuple(c for c in plan.twin_chunks if c < tokens)
    for chunk in (tokens, *chunks):
        empty_cache()
        if _attempt(partial(_measure_theirs, plan, twin, record, chunk, device)) is None:
            return None if chunk == tokens else f"in chunks of {chunk:,}"
    return OUT_OF_MEMORY


def _measure_theirs(plan: Plan, twin: Twin, record: Record, chunk: int, device: torch.device) -> None:
    tokens = record["tokens"]
    if record["what"] == "train":
        run = twin.train(tokens)
    elif record["what"] == "prefill":
        run = twin.prefill(tokens, chunk)
    else:
        run = twin.decode(twin.prefill(tokens, chunk)())
    record["transformers_seconds"] = timed(run, device, plan.spend_s)


# ---- the command ----


def main(
    json: Path = RESULTS / "gpu_layers.json",
    plot: Path = RESULTS / "gpu_layers.svg",
    only: tuple[str, ...] = (),
    what: tuple[str, ...] = TRUE.what,
    backend: BackendChoice = "auto",
    v32_attention: tuple[Way, ...] = TRUE.v32_attention,
    twins: bool = True,
) -> None:
    """Measure layers at their true sizes, print and keep what was found.

    Args:
        json: where the figures are kept, anew after each of them.
        plot: where their picture is kept.
        only: layers, such as flash.csa or v32.experts; all if not given.
        what: train, prefill, decode.
        backend: unproved takes all Triton kernels.
        v32_attention: how V3.2's is computed, by the operation, by torch, or both, of which the faster counts.
        twins: also transformers' layer.
    """
    twin_tokens = TRUE.twin_tokens if twins else ()
    plan = replace(
        TRUE, only=only, what=what, backend=backend, v32_attention=v32_attention, twin_tokens=twin_tokens
    )  # fmt: skip
    if plan.device is None and accelerator() is None:
        sys.exit("no accelerator here; expected one: these layers have up to 51 GB of weights")
    device, resolved = plan.place()
    check_plot(plot)
    heading = {
        "command": "python -m bench.gpu.layers", "device": name_of(device), "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "torch": torch.__version__, "backend": resolved, "dtype": str(plan.dtype).removeprefix("torch."),
        "graphs": has_graphs(device),
    }  # fmt: skip

    def keep(records: list[Record]) -> None:
        save(json, heading | {"records": records, "sums": sums(records, plan.flash, plan.pro, plan.v32)})

    records = measure(plan, tell=keep)
    keep(records)
    for record in records:
        console.print(line(record))
    draw(records, plot)
    console.print(f"{sum(r['seconds'] is not None for r in records)} of {len(records)} measured; {json} and {plot}")


def line(record: Record) -> str:
    """One record in words."""
    name = "{layer}.{kind} {what} {tokens:,} x {batch}".format(**record)
    if record["seconds"] is None:
        return f"{name}: {record['note']}"
    said = f"{name}: {1e3 * record['seconds']:,.3f} ms, {record['peak_bytes'] / 1e9:.1f} GB"
    if record["transformers_seconds"] is not None:
        said += f", transformers {record['transformers_seconds'] / record['seconds']:.1f} times that"
    return said + (f" ({record['transformers_note']})" if record["transformers_note"] else "")


if __name__ == "__main__":
    tyro.cli(main)
