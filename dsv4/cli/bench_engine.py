"""``dsv4 bench engine``: tokens per second, times and memory of an engine that serves some requests at once."""

from __future__ import annotations

import itertools
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from dsv4.cli.bench_setup import (
    DEFAULTS,
    ModelName,
    Options,
    check_options,
    describe,
    heading,
    is_preset,
    model_config,
    notes,
    open_model,
    random_prompts,
    resident_bytes,
    save,
)
from dsv4.cli.format import gibibytes
from dsv4.cli.models import RESIDENCE, Residence, find_model, find_tokenizer
from dsv4.config.engine import Limits, Numerics
from dsv4.config.sampling import Sampling
from dsv4.train.words import plural

if TYPE_CHECKING:
    from dsv4.engine.engine import Engine
    from dsv4.model.transformer import Transformer

WARM_UP_TOKENS = 24  # of output of as many requests, before anything is measured: shapes of a step are recorded


@dataclass(frozen=True, kw_only=True)
class Case:
    """One combination of what was asked for."""

    prompt_tokens: int
    output_tokens: int
    concurrency: int
    requests: int
    numerics: Numerics
    draft_tokens: int

    def __str__(self) -> str:
        parts = [f"{self.prompt_tokens:,} + {self.output_tokens:,} x {self.concurrency}"]
        parts += ["invariant"] if self.numerics == "invariant" else []
        parts += [plural(self.draft_tokens, "draft")] if self.draft_tokens else []
        return ", ".join(parts)


def bench_engine(
    model: ModelName = "bench-engine",
    prompt_tokens: tuple[int, ...] = (4096,),
    output_tokens: int = 64,
    concurrency: tuple[int, ...] = (1,),
    requests: int | None = None,
    numerics: tuple[Numerics, ...] = ("fast",),
    draft_tokens: tuple[int, ...] = (0,),
    temperature: float = 0.0,
    text: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    residence: Annotated[Residence, tyro.conf.arg(name="")] = RESIDENCE,
    options: Annotated[Options, tyro.conf.arg(name="")] = DEFAULTS,
) -> None:
    """Measure throughput, times and memory of the engine, in each combination of the lengths and options given.

    Args:
        model: a preset, which gets random weights, or the folder of a run or checkpoint.
        prompt_tokens: tokens of each prompt.
        output_tokens: tokens that each request is given; none ends before.
        concurrency: requests that run at once: when one ends, the next begins.
        requests: all together; as many as run at once if not given.
        numerics: fast, or invariant: the same bits whatever the batch.
        draft_tokens: tokens that the MTP block drafts ahead; measure 0 too, for the speed-up.
        temperature: 0 takes the likeliest token.
        text: prompts are cut from this text, by the model's tokenizer, and are random tokens without it.
    """
    cases = [
        Case(
            prompt_tokens=p, output_tokens=output_tokens, concurrency=c, requests=c if requests is None else requests,
            numerics=n, draft_tokens=d,
        )
        for p, c, n, d in itertools.product(prompt_tokens, concurrency, numerics, draft_tokens)
    ]  # fmt: skip
    _check(cases, options, model, text)
    sampling = Sampling(max_tokens=output_tokens, temperature=temperature, ignore_eos=True, seed=options.seed)
    console = notes()
    with console.status("preparing"):
        transformer = open_model(model, options, residence)
    results = heading("engine", model, transformer, options)
    results |= {
        "weights_are": residence.weights,
        "expert_bytes": residence.expert_bytes,
        "backend": transformer.backend,
    }
    found: list[dict[str, Any]] = []
    results |= {"prompts": "random" if text is None else str(text), "temperature": temperature, "cases": found}
    for case in cases:
        with console.status(f"measuring {case}"):
            prompts = _prompts(case, transformer, model, text, options.seed)
            found.append(asdict(case) | _measure(case, transformer, prompts, sampling, options))
        _compare(found)
        save(options.json, results)
    _print(cases, results)


def _check(cases: list[Case], options: Options, model: str, text: Path | None) -> None:
    values: dict[str, int] = {}
    for case in cases:
        for name in ("prompt_tokens", "output_tokens", "concurrency", "requests"):
            values[name.replace("_", "-")] = min(getattr(case, name), values.get(name, 1))
    longest = max(case.prompt_tokens + case.output_tokens for case in cases)
    check_options(options, at_least_one=values, config=model_config(model), longest=longest)
    if text is not None and is_preset(model):
        raise ValueError(f"--text is {text} with the preset {model}; expected a model that has a tokenizer")
    if text is not None and not text.is_file():
        raise ValueError(f"--text is {text}; expected a file that exists")
    for case in cases:
        if case.requests < case.concurrency:
            raise ValueError(
                f"--requests is {case.requests}; expected at least --concurrency = {case.concurrency}: fewer never run "
                "so many at once"
            )
        _limits(case, options)


def _prompts(case: Case, transformer: Transformer, model: str, text: Path | None, seed: int) -> list[list[int]]:
    """The prompts of a case: cut from a text at even distances, or random."""
    if text is None:
        return random_prompts(transformer.config, case.requests, case.prompt_tokens, seed)
    from dsv4.data.tokenizer import check_tokenizer, load_tokenizer, plain_text

    tokenizer = load_tokenizer(str(find_tokenizer(find_model(Path(model)))))
    check_tokenizer(tokenizer, transformer.config)
    ids = plain_text(tokenizer).encode(text.read_text(encoding="utf-8")).ids
    count = case.prompt_tokens - 1  # one is the beginning of a text
    spare = len(ids) - count
    if spare < case.requests:
        raise ValueError(
            f"--text is {text}, which has {len(ids)} tokens; expected at least {count + case.requests} for "
            f"{case.requests} prompts of {case.prompt_tokens}"
        )
    begins = [i * spare // case.requests for i in range(case.requests)]
    return [[transformer.config.bos_token_id, *ids[begin : begin + count]] for begin in begins]


def _measure(
    case: Case, transformer: Transformer, prompts: list[list[int]], sampling: Sampling, options: Options
) -> dict[str, Any]:
    """Run a case in an engine of its own, warm it up before, and return what came out."""
    from dsv4.device import peak_memory_bytes
    from dsv4.engine.measure import Meter, run_requests

    with _make_engine(transformer, case, options) as engine:
        num_tokens, few = min(case.prompt_tokens, options.step_tokens), min(case.output_tokens, WARM_UP_TOKENS)
        warm = random_prompts(transformer.config, case.concurrency, num_tokens, options.seed + 1)
        engine.generate(warm, Sampling(max_tokens=few, temperature=sampling.temperature, ignore_eos=True, seed=0))
        meter, pool = Meter(engine, time.perf_counter), transformer.expert_pool
        before = None if pool is None else pool.counts
        speed = run_requests(meter, prompts, sampling, concurrency=case.concurrency)
    found = asdict(speed) | {"acceptance": speed.acceptance, "resident_memory_bytes": resident_bytes()}
    found["peak_memory_bytes"] = peak_memory_bytes(transformer.embed.weight.device)
    if pool is not None and before is not None:
        counts, num_tokens = pool.counts.since(before), speed.total_prompt_tokens + speed.total_output_tokens
        found |= {"expert_pool_bytes": pool.memory.nbytes, "expert_bytes_per_token": counts.bytes_read / num_tokens}
        found |= {"expert_hits": counts.hits, "expert_misses": counts.misses, "expert_bytes_read": counts.bytes_read}
    return found


def _limits(case: Case, options: Options) -> Limits:
    return Limits(
        max_requests=case.concurrency, step_tokens=options.step_tokens,
        max_context=case.prompt_tokens + case.output_tokens, cache_format=options.cache_format, numerics=case.numerics,
        draft_tokens=case.draft_tokens,
    )  # fmt: skip


def _make_engine(transformer: Transformer, case: Case, options: Options) -> Engine:
    """Return an engine whose cache is just large enough for a case."""
    from dsv4.accounting.cache import page_bytes
    from dsv4.engine.build import cache_format
    from dsv4.engine.engine import Engine
    from dsv4.engine.pages import pages_of

    limits = _limits(case, options)
    num_pages = case.concurrency * pages_of(case.prompt_tokens + case.output_tokens)
    size = page_bytes(transformer.config, cache_format(transformer, limits))
    return Engine(transformer, replace(limits, cache_bytes=max(1, num_pages * size)))


def _compare(found: list[dict[str, Any]]) -> None:
    """Say of each case with drafts how much faster it decodes than the same one without, if that was measured."""
    plain = {_key(case): case for case in found if not case["draft_tokens"]}
    for case in found:
        base = plain.get(_key(case)) if case["draft_tokens"] else None
        rates = (case["decode_tokens_per_s"], base["decode_tokens_per_s"] if base else None)
        case["decode_speed_up"] = rates[0] / rates[1] if rates[0] and rates[1] else None


def _key(case: dict[str, Any]) -> tuple[object, ...]:
    return tuple(case[name] for name in ("prompt_tokens", "output_tokens", "concurrency", "requests", "numerics"))


def _print(cases: list[Case], results: dict[str, Any]) -> None:
    console = Console(highlight=False)
    console.print(describe(results), soft_wrap=True, markup=False)
    has_pool = any("expert_hits" in case for case in results["cases"])
    for title, columns in (TABLES | EXPERT_TABLE if has_pool else TABLES).items():
        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("prompt + output\nx at once")
        for name in columns:
            table.add_column(name, justify="right", no_wrap=True)
        for case, found in zip(cases, results["cases"], strict=True):
            table.add_row(str(case), *(cell(found) for cell in columns.values()))
        console.print(table)


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


def _times(value: dict[str, float] | None, scale: float, digits: int) -> str:
    return "-" if value is None else " ".join(f"{value[p] * scale:,.{digits}f}" for p in ("p50", "p90", "p99"))


def _share(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


TABLES = {
    "Tokens per second": {
        "prefill": lambda c: _rate(c["prefill_tokens_per_s"]),
        "decode": lambda c: _rate(c["decode_tokens_per_s"]),
        "output, of\nthe whole run": lambda c: _rate(c["output_tokens_per_s"]),
        "drafts\nthat held": lambda c: _share(c["acceptance"], ".1%"),
        "decode, times\nthat without": lambda c: _share(c["decode_speed_up"], ".2f"),
    },
    "Times: half, 90 % and 99 % are at most": {
        "to the first\ntoken, s": lambda c: _times(c["first_token_s"], 1, 3),
        "of a token\nafter it, ms": lambda c: _times(c["token_s"], 1e3, 1),
        "between two\npieces, ms": lambda c: _times(c["pause_s"], 1e3, 1),
    },
    "Memory": {
        "cache used,\nbytes": lambda c: f"{c['cache_used_bytes']:,}",
        "predicted,\nbytes": lambda c: f"{c['cache_predicted_bytes']:,}",
        "cache\nallocated": lambda c: gibibytes(c["cache_allocated_bytes"]),
        "process,\nnow": lambda c: gibibytes(c["resident_memory_bytes"]),
        "process, at\nmost so far": lambda c: gibibytes(c["peak_memory_bytes"]),
    },
}

EXPERT_TABLE = {
    "Experts, a layer and step at a time": {
        "found in\nthe pool": lambda c: f"{c['expert_hits']:,}",
        "read": lambda c: f"{c['expert_misses']:,}",
        "read,\nbytes a token": lambda c: f"{c['expert_bytes_per_token']:,.0f}",
        "pool": lambda c: gibibytes(c["expert_pool_bytes"]),
    }
}
