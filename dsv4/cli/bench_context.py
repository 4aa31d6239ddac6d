"""``dsv4 bench context``: what a token costs as its sequence grows, beside the same shape with dense attention."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from dsv4.cli.bench_setup import (
    DEFAULTS,
    ModelName,
    Options,
    check_options,
    describe,
    heading,
    model_config,
    notes,
    open_model,
    random_model,
    random_prompts,
    resident_bytes,
    save,
)
from dsv4.cli.format import gibibytes, tokens
from dsv4.cli.plot import check_plot
from dsv4.cli.plot_context import draw_context
from dsv4.config.engine import Limits, Numerics, PrefixLimits
from dsv4.config.model import ModelConfig
from dsv4.config.sampling import Sampling

if TYPE_CHECKING:
    from dsv4.engine.engine import Engine
    from dsv4.engine.measure import AtLength
    from dsv4.model.transformer import Transformer

NAMES = {"lengths": "compressed", "dense": "dense twin"}
WARM_UP_TOKENS = 130  # of output: every shape of a step is recorded in them, one ends an entry of an HCA layer
ROUNDS = 5  # of decoding at all lengths in turn
REFERENCE = 16384  # tokens of context that the last length is compared with, if it is measured


def bench_context(
    model: ModelName = "nano-1m",
    lengths: tuple[int, ...] = (4096, 16384, 65536, 262144, 1048576),
    decode_tokens: int = 16,
    dense_limit: int = 16384,
    numerics: Numerics = "fast",
    plot: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    options: Annotated[Options, tyro.conf.arg(name="")] = DEFAULTS,
) -> None:
    """Measure prefill and decoding of one sequence, and what it holds, as it grows to each length.

    The prompt of each length goes on from that of the one before, whose pages and state are kept. The dense twin has
    the same sizes and random weights, and every layer attends to all tokens: windows as long as its longest length.

    Args:
        model: a preset, which gets random weights, or the folder of a run or checkpoint.
        lengths: tokens of the sequence; decoding ends at the length.
        decode_tokens: tokens to decode at each length.
        dense_limit: measure the dense twin at the lengths up to this one, and nowhere else; 0 for no twin.
        numerics: fast, or invariant: the same bits whatever the chunks.
        plot: also draw the results into this .svg or .png file.
    """
    lengths = tuple(sorted(set(lengths)))
    config = model_config(model)
    _check(lengths, decode_tokens, options, config)
    if plot is not None:
        check_plot(plot)
    dense_lengths = tuple(length for length in lengths if length <= dense_limit)
    with notes().status("preparing"):
        transformer = open_model(model, options)
    results: dict[str, Any] = heading("context", model, transformer, options)
    results |= {"numerics": numerics, "decode_tokens": decode_tokens, "lengths": [], "dense": []}
    _measure(transformer, lengths, "lengths", results, options)
    del transformer
    if dense_lengths:
        twin = random_model(dense_twin(config, dense_lengths[-1]), options)
        _measure(twin, dense_lengths, "dense", results, options)
    _print(results)
    if plot is not None:
        draw_context(results, plot)


def dense_twin(config: ModelConfig, window: int) -> ModelConfig:
    """Return the same shape with dense attention up to ``window`` tokens: window layers alone, of that length."""
    return replace(
        config,
        layer_kinds=("window",) * config.num_layers,
        attention=replace(config.attention, window=window),
        max_context=window,
    )


def _check(lengths: tuple[int, ...], decode_tokens: int, options: Options, config: ModelConfig) -> None:
    if not lengths:
        raise ValueError("--lengths is empty; expected at least one length")
    values = {"decode-tokens": decode_tokens}
    check_options(options, at_least_one=values, config=config, longest=lengths[-1])
    if lengths[0] < decode_tokens + 2:
        raise ValueError(
            f"--lengths has {lengths[0]}; expected at least {decode_tokens + 2}: a prompt, the token it gives, and the "
            f"{decode_tokens} of --decode-tokens"
        )


def _measure(
    transformer: Transformer, lengths: tuple[int, ...], name: str, results: dict[str, Any], options: Options
) -> None:
    """Measure in an engine of its own, and add to the results of that name what each length gives, as it comes."""
    from dsv4.engine.measure import Meter, decode_again, run_lengths

    token_ids = random_prompts(transformer.config, 1, lengths[-1], options.seed)[0]
    warm = random_prompts(transformer.config, 1, min(lengths[0] - 2, options.step_tokens), options.seed + 1)
    warm_tokens = min(WARM_UP_TOKENS, lengths[-1] - len(warm[0]))
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=20), TextColumn("{task.completed:,} tokens"),
        TimeElapsedColumn(), console=notes(), transient=True, redirect_stdout=False,
    )  # fmt: skip
    with _engine(transformer, lengths, results["numerics"], options) as engine, progress:
        engine.generate(warm, Sampling(max_tokens=warm_tokens, temperature=0.0, ignore_eos=True, seed=0))
        task = progress.add_task(NAMES[name], total=lengths[-1])
        meter = Meter(engine, time.perf_counter)
        for at in run_lengths(
            meter, token_ids, lengths, decode_tokens=results["decode_tokens"],
            resident=resident_bytes, tell=lambda position: progress.update(task, completed=position),
        ):  # fmt: skip
            results[name].append(asdict(at))
            save(options.json, results)
            progress.console.print(f"{NAMES[name]} {_line(at)}")
        again = decode_again(meter, token_ids, lengths, decode_tokens=results["decode_tokens"], rounds=ROUNDS)
    for at, rates in zip(results[name], again, strict=True):
        at["decode_tokens_per_s"], at["decode_rounds"] = statistics.median(rates), rates
    save(options.json, results)


def _engine(transformer: Transformer, lengths: tuple[int, ...], numerics: Numerics, options: Options) -> Engine:
    """Return an engine for one sequence, that keeps its pages and the states at the ends of prompts."""
    from dsv4.accounting.cache import page_bytes, state_bytes
    from dsv4.engine.build import cache_format
    from dsv4.engine.engine import Engine
    from dsv4.engine.pages import pages_of

    limits = Limits(
        max_requests=1, step_tokens=options.step_tokens, max_context=lengths[-1], cache_format=options.cache_format,
        numerics=numerics,
    )  # fmt: skip
    config, row_format = transformer.config, cache_format(transformer, limits)
    num_bytes = max(1, pages_of(lengths[-1]) * page_bytes(config, row_format))
    states = max(PrefixLimits.state_bytes, (len(lengths) + 2) * state_bytes(config, row_format))
    return Engine(transformer, replace(limits, cache_bytes=num_bytes, prefix=PrefixLimits(state_bytes=states)))


def _line(at: AtLength) -> str:
    return (
        f"at {tokens(at.length)}: prompt {at.prompt_tokens_per_s:,.0f} tokens/s, at its end "
        f"{at.prefill_tokens_per_s:,.0f}, decode "
        f"{at.decode_tokens_per_s:,.1f} tokens/s, cache {gibibytes(at.cache_used_bytes)}"
    )


def _print(results: dict[str, Any]) -> None:
    console = Console(highlight=False)
    console.print(describe(results), soft_wrap=True, markup=False)
    for name, title in NAMES.items():
        if results[name]:
            console.print(_table(title, results[name]))
    last, first = results["lengths"][-1], _reference(results["lengths"])
    if last is not first:
        prompt, end = (last[name] / first[name] for name in ("prompt_tokens_per_s", "prefill_tokens_per_s"))
        decode = statistics.median(a / b for a, b in zip(last["decode_rounds"], first["decode_rounds"], strict=True))
        console.print(
            f"at {tokens(last['length'])}, of the rates at {tokens(first['length'])}: the whole prompt {prompt:.2f}, "
            f"its end {end:.2f}, decode {decode:.2f} (median of {ROUNDS} rounds over all lengths)"
        )


def _table(title: str, found: list[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in (
        "context", "prompt,\ntokens/s", "its end,\ntokens/s", "decode,\ntokens/s", "cache used,\nbytes",
        "predicted,\nbytes", "process\nholds",
    ):  # fmt: skip
        table.add_column(name, justify="right", no_wrap=True)
    for at in found:
        table.add_row(
            tokens(at["length"]),
            f"{at['prompt_tokens_per_s']:,.0f}",
            f"{at['prefill_tokens_per_s']:,.0f}",
            f"{at['decode_tokens_per_s']:,.1f}",
            f"{at['cache_used_bytes']:,}",
            f"{at['cache_predicted_bytes']:,}",
            gibibytes(at["resident_bytes"]),
        )
    return table


def _reference(found: list[dict[str, Any]]) -> dict[str, Any]:
    return next((at for at in found if at["length"] == REFERENCE), found[0])
