"""Quantisation-aware training of nano: what rounding to FP4 and FP8 costs, and what training with it wins back.

    plain        trained in bfloat16, validated in bfloat16
    rounded      the same weights, rounded after training as the released model is: experts to FP4, the rest to FP8
    qat          from the same checkpoint on trained with that rounding, for as many steps on the same data, and rounded
    rounded_fp8  as rounded, all linear maps to FP8
    fp8          as qat, in FP8

Each seed trains one base; three continuations of equal length begin at its checkpoint, one plain, one in FP4, one in
FP8, so that they differ in nothing else. A model of the second one's codes alone must give its loss to the bit. The
indexer's recall is the share of the entries that it picks in bfloat16 which it picks with its queries and keys in FP4,
too, at the same inputs. ``make qat-study`` runs three seeds at a time with a thread each, and writes
``bench/results/qat_study.json`` and ``docs/qat.svg``; ``--table`` prints the tables of docs/quantisation.md from it.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from model_cpu import machine

from dsv4.checkpoint.training import list_checkpoints
from dsv4.cli.plot import COLORS, GRID, TEXT, check_plot, new_figure, save_figure
from dsv4.cli.process import keep_freed_memory
from dsv4.config.files import write_then_rename
from dsv4.config.model import RATIO
from dsv4.config.presets import nano
from dsv4.config.recipes import load_recipe
from dsv4.config.train import BatchConfig, Phase, Precision, TrainConfig
from dsv4.data.batch import Batch
from dsv4.data.prepare import prepare
from dsv4.eval.bits import bits_per_byte
from dsv4.model.attention import Indexer
from dsv4.model.precision import Rounding, pack, set_rounding
from dsv4.model.transformer import Transformer
from dsv4.train.loop import Record, Trainer
from dsv4.train.metrics import read
from dsv4.train.setup import set_up

SEEDS = (0, 1, 2)
SEQUENCE = 2048  # of the last phase and of validation: up to 512 entries, of which 64 are picked
LAST = "last"  # the name of the phase that differs
STEPS_SHOWN = 20  # of the base before the switch
NEVER = 10**6  # steps
LOSSES = (
    ("plain", "plain, in bfloat16"),
    ("rounded", "plain, rounded after training"),
    ("qat", "QAT, rounded"),
    ("rounded_fp8", "plain, rounded to FP8 after training"),
    ("fp8", "trained in FP8"),
)
BRANCHES: tuple[tuple[str, Precision], ...] = (("qat", "fp4"), ("fp8", "fp8"))


def recipe(seed: int, precision: Precision, scale: float = 1.0) -> TrainConfig:
    """The demo's model, data and rates on a shorter schedule, in small steps; ``scale`` multiplies every phase."""
    demo = load_recipe("demo")

    def phase(name: str, tokens: int, sequence: int, attention: str, **changes: Any) -> Phase:
        return Phase(name=name, tokens=int(tokens * scale), sequence=sequence, attention=attention, **changes)  # pyright: ignore

    return replace(
        demo,
        seed=seed,
        batch=BatchConfig(start_tokens=2048, tokens=2048, ramp_tokens=0, micro_tokens=2048),
        stability=replace(demo.stability, anticipatory="off", spike_memory=NEVER),  # the switch may look like a spike
        run=replace(
            demo.run, checkpoint_steps=NEVER, keep_checkpoints=10, validation_steps=NEVER, validation_tokens=48 * 1024,
            baseline_order=0, sample_prompt="",
        ),
        phases=(
            phase("dense-512", 120_000, 512, "dense"),
            phase("dense-1k", 40_000, 1024, "dense"),
            phase("indexer-1k", 40_000, 1024, "dense", train="indexer"),
            phase("sparse-2k", 50_000, SEQUENCE, "sparse"),
            phase(LAST, 80_000, SEQUENCE, "sparse", precision=precision),
        ),
    )  # fmt: skip


# ---- one seed, in a process of its own --------------------------------------------------------------------


def run(seed: int, scale: float, directory: Path) -> dict[str, Any]:
    """Train the base and the continuations of a seed; return losses, the curve about the switch, and recalls."""
    torch.set_num_threads(1)
    keep_freed_memory()
    folders = {name: directory / f"{name}-{seed}" for name in ("plain", *(name for name, _ in BRANCHES))}
    for old in folders.values():
        shutil.rmtree(old, ignore_errors=True)
    plain_run = folders["plain"]
    shutil.copytree(directory / "data", plain_run / "data")
    plain = trainer(recipe(seed, "plain", scale), plain_run, resume=False)
    plain.train()
    (switch,) = [r["step"] for r in read(plain_run / "metrics.jsonl") if r["kind"] == "phase" and r["phase"] == LAST]

    branches = {}
    for name, precision in BRANCHES:
        shutil.copytree(plain_run, folders[name])
        branch = trainer(recipe(seed, precision, scale), folders[name], resume=True)
        (base,) = [c.path for c in list_checkpoints(branch.checkpoints) if c.step == switch]
        branch.resume(base)
        branch.train()
        branches[name] = branch.model

    validation = plain.parts.validation(SEQUENCE)
    return {
        "seed": seed,
        "steps": plain.position.step,
        "tokens": plain.position.tokens,
        "steps_after_switch": plain.position.step - switch,
        "base": last_of(plain_run, "validation", switch),
        **losses(plain.model, branches["qat"], branches["fp8"], validation),
        "curve": {
            name: [[r["step"] - switch, r["loss"]] for r in steps_of(folder) if r["step"] > switch - STEPS_SHOWN]
            for name, folder in folders.items()
        },
        "seconds_per_step": {
            name: mean(r["seconds"] for r in steps_of(folder) if r["step"] > switch) for name, folder in folders.items()
        },
        "recall": {"plain": recall(plain.model, validation), "qat": recall(branches["qat"], validation)},
    }


def trainer(config: TrainConfig, folder: Path, *, resume: bool) -> Trainer:
    parts = set_up(config, folder, device=torch.device("cpu"), resume=resume)
    name = folder.name

    def tell(record: Record) -> None:
        if record["kind"] == "step" and record["step"] % 20 == 0:
            line = f"{name:8} {record['phase']:11} step {record['step']}  loss {record['loss']:.3f}"
            print(line, f" {record['seconds']:.1f} s a step", file=sys.stderr, flush=True)

    return Trainer(parts, clock=time.perf_counter, today=date.today().isoformat(), tell=tell)


def steps_of(folder: Path) -> list[Record]:
    return [r for r in read(folder / "metrics.jsonl") if r["kind"] == "step"]


def last_of(folder: Path, kind: str, step: int) -> dict[str, float]:
    (found,) = [r for r in read(folder / "metrics.jsonl") if r["kind"] == kind and r["step"] == step]
    return {name: found[name] for name in ("loss", "bits_per_byte")}


def losses(
    plain: Transformer, qat: Transformer, fp8: Transformer, validation: Sequence[Batch]
) -> dict[str, dict[str, float]]:
    """Validate the models with and without rounding, and the codes of the second one, which must change no bit."""

    def loss(model: Transformer) -> dict[str, float]:
        found, bits = bits_per_byte(model, validation, dense=False)
        return {"loss": found, "bits_per_byte": bits}

    packed = pack(copy.deepcopy(qat))
    result = {}
    cases: tuple[tuple[str, Transformer, Rounding], ...] = (
        ("plain", plain, "none"), ("rounded", plain, "fp4"), ("qat_unrounded", qat, "none"), ("qat", qat, "fp4"),
        ("rounded_fp8", plain, "fp8"), ("fp8_unrounded", fp8, "none"), ("fp8", fp8, "fp8"),
    )  # fmt: skip
    for name, model, rounding in cases:
        set_rounding(model, rounding)
        result[name] = loss(model)
    of_codes = loss(packed)
    assert of_codes == result["qat"], f"the loss of the codes is {of_codes}; expected {result['qat']}, to the bit"
    with torch.no_grad():
        batch = validation[0]
        streams = [m.run(batch.token_ids, segment_ids=batch.segment_ids)[0] for m in (qat, packed)]
    assert torch.equal(*streams), "the codes give other activations; expected the same bits"
    return result


@torch.no_grad()
def recall(model: Transformer, validation: Sequence[Batch]) -> dict[str, Any]:
    """Hold the picks of each CSA layer's indexer in FP4 against those in bfloat16, on the same inputs.

    Averaged over the queries of real tokens that see more entries than are picked. ``chance`` is what a random choice
    would reach, ``visible`` how many entries such a query sees.
    """
    set_rounding(model, "none")
    indexers = [(name, module) for name, module in model.named_modules() if isinstance(module, Indexer)]
    inputs: dict[Indexer, tuple[Any, ...]] = {}

    def keep(module: Any, given: tuple[Any, ...]) -> None:
        inputs[module] = given

    hooks = [indexer.register_forward_pre_hook(keep) for _, indexer in indexers]
    kept = {name: 0.0 for name, _ in indexers}
    num_queries, visible, chance = 0, 0.0, 0.0
    for batch in validation:
        model.run(batch.token_ids, segment_ids=batch.segment_ids)
        blocks = inputs[indexers[0][1]][2].rows.blocks[RATIO["csa"]]  # of the call, which all layers share
        sees = blocks.end - blocks.begin  # [B, T]
        counts = (sees > model.config.indexer.top_k) & (batch.targets >= 0)
        shares = model.config.indexer.top_k / sees[counts]  # [n]
        num_queries += len(shares)
        visible += float(sees[counts].sum())
        chance += float(shares.sum())
        for name, indexer in indexers:
            x, q_low, call, *_ = inputs[indexer]
            in_bfloat16, in_fp4 = (
                picked_by(indexer, x, q_low, replace(call, rounds=rounds)) for rounds in (False, True)
            )
            kept[name] += float((in_bfloat16 & in_fp4)[counts].sum()) / indexer.top_k
    for hook in hooks:
        hook.remove()
    if not num_queries:
        raise ValueError("no query sees more entries than are picked; expected longer documents")
    return {
        "layers": {name.removesuffix(".attn.indexer"): share / num_queries for name, share in kept.items()},
        "mean": mean(kept.values()) / num_queries,
        "queries": num_queries,
        "visible": visible / num_queries,
        "chance": chance / num_queries,
    }


def picked_by(indexer: Indexer, x: torch.Tensor, q_low: torch.Tensor, call: Any) -> torch.Tensor:
    """Return which entries each query picks, [B, T, C] bool."""
    projection = indexer.forward(x, q_low, call, None, slice(None))  # which calls no hook
    picked = indexer.select(projection, call)  # [B, T, P], -1 after the last
    has = torch.zeros(*picked.shape[:2], projection.k.shape[1] + 1, dtype=torch.bool)
    return has.scatter_(2, picked + 1, True)[..., 1:]


# ---- all of them ------------------------------------------------------------------------------------------


def compare(directory: Path, seeds: Sequence[int], scale: float) -> list[dict[str, Any]]:
    """Run every seed, all at once, on data that is prepared once."""
    directory.mkdir(parents=True, exist_ok=True)
    prepare(recipe(0, "plain").data, nano(), directory / "data")
    shared = ["--scale", str(scale), "--directory", str(directory)]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--run", str(seed), *shared], stdout=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for seed in seeds
    ]  # fmt: skip
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError("a run ended; its error is above")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def table(report: dict[str, Any]) -> str:
    """The results as Markdown: mean and standard deviation over seeds."""
    runs = report["runs"]
    lines = ["| model | bits per byte | above plain | nats a token |", "|---|---:|---:|---:|"]
    for key, name in LOSSES:
        above = [r[key]["bits_per_byte"] - r["plain"]["bits_per_byte"] for r in runs]
        cells = [
            spread([r[key]["bits_per_byte"] for r in runs], 4), "-" if key == "plain" else spread(above, 4),
            spread([r[key]["loss"] for r in runs], 4),
        ]  # fmt: skip
        lines.append(f"| {name} | {' | '.join(cells)} |")
    layers = list(runs[0]["recall"]["plain"]["layers"])
    lines += ["", f"| indexer of | {' | '.join(layers)} | mean |", "|---|" + "---:|" * (len(layers) + 1)]
    for key in ("plain", "qat"):
        found = [r["recall"][key] for r in runs]
        shares = [[100 * f["layers"][layer] for f in found] for layer in layers] + [[100 * f["mean"] for f in found]]
        name = "plain" if key == "plain" else "QAT"
        lines.append(f"| {name} | {' | '.join(f'{spread(values, 1)} %' for values in shares)} |")
    lines += ["", "| at the switch, nats a token | |", "|---|---:|"]
    lines += [f"| {what} | {value} |" for what, value in at_switch(runs).items()]
    return "\n".join(lines)


def at_switch(runs: Sequence[dict[str, Any]]) -> dict[str, str]:
    """How much larger the loss is with rounding on the very same batch and weights, beside what batches scatter."""
    found, scatter = {}, []
    for key, name in (("qat", "FP4"), ("fp8", "FP8")):
        first, later = [], []
        for r in runs:
            plain, rounded = (dict(r["curve"][curve]) for curve in ("plain", key))
            steps = sorted(step for step in plain if step > 0)
            first.append(rounded[1] - plain[1])
            later.append(mean(rounded[s] - plain[s] for s in steps[-10:]))
        found[f"first step in {name}, above the same step without"] = spread(first, 4)
        found[f"last ten steps in {name}, above the same steps without"] = spread(later, 4)
    for r in runs:
        scatter.append(stdev(loss for step, loss in r["curve"]["plain"] if -10 < step <= 0))
    found["standard deviation of the ten steps before the switch"] = f"{min(scatter):.2f} to {max(scatter):.2f}"
    return found


def spread(values: Sequence[float], digits: int) -> str:
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"


def draw(report: dict[str, Any], path: Path) -> None:
    """Points of the losses, the curve about the switch, and points of the recall; a line or colour for each seed."""
    figure = new_figure()
    left, middle, right = figure.subplots(1, 3)
    colors = list(COLORS.values())
    names = ["plain,\nbfloat16", "plain,\nrounded", "QAT,\nrounded", "plain,\nin FP8", "trained\nin FP8"]
    for r, color in zip(report["runs"], colors, strict=False):
        label = f"seed {r['seed']}"
        points(left, names, [r[key]["bits_per_byte"] for key, _ in LOSSES], color, label)
        points(right, ["plain", "QAT"], [100 * r["recall"][key]["mean"] for key in ("plain", "qat")], color, label)
        plain, qat = (dict(r["curve"][name]) for name in ("plain", "qat"))
        steps = sorted(step for step in plain if step > 0)
        middle.plot(steps, [qat[s] - plain[s] for s in steps], color=color, linewidth=2.2, label=label)
    middle.axhline(0, color=TEXT, linewidth=0.8)
    middle.set_xlabel("steps after the switch", color=TEXT, fontsize=9)
    chance = 100 * mean(r["recall"]["plain"]["chance"] for r in report["runs"])
    right.axhline(chance, color=TEXT, linewidth=0.8, linestyle="--")
    right.annotate("a random choice", (0, chance), xytext=(0, 4), textcoords="offset points", color=TEXT, fontsize=9)
    right.set_ylim(0, 100)
    left.legend(frameon=False, fontsize=9, labelcolor=TEXT)
    for axes, title, unit in (
        (left, "Validation loss", "bits per byte"),
        (middle, "Training loss, FP4 above plain", "nats a token, same batch"),
        (right, "Recall of the FP4 indexer", "per cent of the picks in bfloat16"),
    ):
        axes.set_title(title, loc="left", color=TEXT, fontsize=12, fontweight="bold", pad=22)
        axes.text(0, 1.03, unit, transform=axes.transAxes, color=TEXT, fontsize=9)
        axes.tick_params(colors=TEXT, labelsize=9, length=0, pad=6)
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(TEXT)
    write_then_rename(path, lambda partial: save_figure(figure, partial, path.suffix.removeprefix(".")))


def points(axes: Any, names: list[str], values: list[float], color: str, label: str) -> None:
    axes.plot(range(len(names)), values, color=color, linewidth=1.2, marker="o", label=label)
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.4, len(names) - 0.6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here, or read them with --table")
    parser.add_argument("--plot", type=Path, help="draw them here")
    parser.add_argument("--table", action="store_true", help="print (and draw) the results that are there")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--scale", type=float, default=1.0, help="of the tokens of every phase")
    parser.add_argument("--directory", type=Path, default=Path("runs/qat"))
    parser.add_argument("--run", type=int, metavar="SEED", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run is not None:
        print(json.dumps(run(arguments.run, arguments.scale, arguments.directory)))
        return
    if arguments.plot:
        check_plot(arguments.plot)
    if arguments.table:
        report = json.loads(arguments.json.read_text(encoding="utf-8"))
    else:
        begin = time.perf_counter()
        runs = compare(arguments.directory, arguments.seeds, arguments.scale)
        seconds = round(time.perf_counter() - begin)
        report = {"machine": machine(), "date": date.today().isoformat(), "seconds": seconds, "runs": runs}
        if arguments.json:
            arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(report))
    if arguments.plot:
        draw(report, arguments.plot)


if __name__ == "__main__":
    main()
