"""What measured layers say of whole models: sums beside the report's shares, and a picture of time against context.

The report compares FLOPs of one token, and cache, at a million tokens: V4-Pro has 27 % and 10 % of V3.2's, V4-Flash
10 % and 7 %. Here three measured shares stand beside them: of a decoding step, at each batch; of a token at the end of
a prompt, where products bound the time, so that this is the FLOPs as time; and of the cache as its tensors hold it.
Embedding, head and MTP block are left out of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.gpu.v32 import layers_of
from dsv4.accounting import flops, v32
from dsv4.accounting.cache import entry_bytes
from dsv4.accounting.cost import total_flops, total_fp8_equivalent
from dsv4.accounting.v32 import V32Config
from dsv4.cli.format import tokens
from dsv4.cli.plot import COLORS, GRID, TEXT, check_plot, new_figure, save_figure
from dsv4.config import presets
from dsv4.config.files import write_then_rename
from dsv4.config.model import ModelConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Record = dict[str, Any]
REPORT = {"flops": {"pro": 0.27, "flash": 0.10}, "cache": {"pro": 0.10, "flash": 0.07}}
MODELS = ("pro", "flash", "v32")
NAMES = {"pro": "V4-Pro", "flash": "V4-Flash", "v32": "V3.2"}
STYLES = {"window": ":", "csa": "-", "hca": "--", "experts": "-", "dense": ":"}


def sums(records: Sequence[Record], flash: ModelConfig, pro: ModelConfig, old: V32Config) -> dict[str, Any]:
    """Sum measured layers to whole models at the longest context that each kind of work was measured at.

    A model of which a layer is missing has None, and so have its shares. ``pro`` and ``flash`` of a comparison are
    shares of V3.2's; counted are those of the accounting for the models of the report: ``flops`` in FP8-equivalents,
    ``flops_alike`` with all products alike, as here, and ``cache`` of V3.2's published rows.
    """
    counts = {
        "pro": {kind: pro.layer_kinds.count(kind) for kind in pro.layer_kinds},
        "flash": {kind: flash.layer_kinds.count(kind) for kind in flash.layer_kinds},
        "v32": layers_of(old),
    }
    decode = [r for r in records if r["what"] == "decode"]
    prefill = [r for r in records if r["what"] == "prefill"]
    longest = max((r["tokens"] for r in decode), default=0)
    prompt = max((r["tokens"] for r in prefill), default=0)
    of_longest = [r for r in (*decode, *prefill) if r["tokens"] == max(longest, prompt) and r["batch"] == 1]
    stored = _compare(counts, of_longest, lambda r: r["cache_bytes_per_token"])
    published = v32.kv_bytes_per_token(old)
    return {
        "decode_step_seconds": [
            {"context": longest, "batch": batch}
            | _compare(counts, [r for r in decode if (r["tokens"], r["batch"]) == (longest, batch)], _seconds)
            for batch in sorted({r["batch"] for r in decode})
        ],
        "end_of_prompt_token_seconds": {"context": prompt}
        | _compare(counts, [r for r in prefill if r["tokens"] == prompt], _end_token_seconds),
        "cache_bytes_per_token": stored,
        "cache_of_published_v32": {"v32_total": published}
        | {model: _share(stored[f"{model}_total"], published) for model in ("pro", "flash")},
        "report": REPORT,
        "counted": _counted(),
    }


def _seconds(record: Record) -> float | None:
    return record["seconds"]


def _end_token_seconds(record: Record) -> float | None:
    """Of a token of the last chunk, which may be shorter than the others."""
    if record["end_seconds"] is None:
        return None
    return record["end_seconds"] / (record["tokens"] % record["chunk"] or record["chunk"])


def _compare(counts: dict[str, dict[str, int]], records: Sequence[Record], value: Any) -> dict[str, float | None]:
    """Return the totals of the models, and the shares of V3.2's."""
    found: dict[tuple[str, str], float | None] = {(r["layer"], r["kind"]): value(r) for r in records}
    totals: dict[str, float | None] = {}
    for model in MODELS:
        parts = [(number, found.get((model, kind))) for kind, number in counts[model].items()]
        known = [number * part for number, part in parts if part is not None]
        totals[model] = sum(known) if len(known) == len(parts) else None
    shares = {model: _share(totals[model], totals["v32"]) for model in ("pro", "flash")}
    return {f"{model}_total": total for model, total in totals.items()} | shares


def _share(total: float | None, base: float | None) -> float | None:
    return None if total is None or base is None else total / base


@cache
def _counted() -> dict[str, dict[str, float]]:
    """The accounting's shares of the true models at a million tokens."""
    context, old = 2**20, V32Config()
    base = v32.decode(old, context)
    found: dict[str, dict[str, float]] = {"flops": {}, "flops_alike": {}, "cache": {}}
    for name, config in (("pro", presets.pro()), ("flash", presets.flash())):
        (costs,) = flops.decode_each(config, (context,))
        found["flops"][name] = total_fp8_equivalent(costs) / total_fp8_equivalent(base)
        found["flops_alike"][name] = total_flops(costs) / total_flops(base)
        stored = entry_bytes(config, "packed", context)
        found["cache"][name] = stored / (context * v32.kv_bytes_per_token(old))
    return found


# ---- the picture ----


def draw(records: Sequence[Record], path: Path) -> None:
    """Draw time against context on logarithmic axes, a line for each layer: prompts, and decoding in two batches."""
    check_plot(path)
    batches = sorted({r["batch"] for r in records if r["what"] == "decode"})
    panels = [("A prompt", "prefill", 1)] + [
        (f"A decoding step of {'one token' if batch == 1 else f'{batch} tokens'}", "decode", batch)
        for batch in dict.fromkeys(batches[:1] + batches[-1:])
    ]
    figure = new_figure()
    figure.set_size_inches(4.6 * len(panels), 4.6)
    for axes, (title, what, batch) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _panel(axes, title, [r for r in records if (r["what"], r["batch"]) == (what, batch)])
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if labels:
        figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9, labelcolor=TEXT)
    write_then_rename(path, lambda partial: save_figure(figure, partial, path.suffix.removeprefix(".")))


def _panel(axes: Axes, title: str, records: Sequence[Record]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for model, kind in dict.fromkeys((r["layer"], r["kind"]) for r in records):
        own = [r for r in records if (r["layer"], r["kind"]) == (model, kind) and r["seconds"] is not None]
        at, ms = [r["tokens"] for r in own], [1e3 * r["seconds"] for r in own]
        color, style = COLORS[NAMES[model]], STYLES[kind]
        axes.plot(at, ms, color=color, linestyle=style, linewidth=1.8, marker="o", label=f"{NAMES[model]} {kind}")
    marks = sorted({r["tokens"] for r in records})
    axes.set_xticks(marks, [tokens(mark) for mark in marks])
    axes.minorticks_off()
    axes.set_title(title, loc="left", color=TEXT, fontsize=12, fontweight="bold", pad=22)
    axes.text(0, 1.03, "milliseconds of one layer", transform=axes.transAxes, color=TEXT, fontsize=9)
    axes.set_xlabel("tokens of context", color=TEXT, fontsize=9)
    axes.tick_params(colors=TEXT, labelsize=9, length=0, pad=6)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(TEXT)
