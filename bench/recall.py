"""Recall over distance: pairs of key and value planted in noise, asked for 64 to 8192 tokens later.

A row holds triples STORE key value, each followed, one of the distances later, by ASK key value; everything else is
noise. The only target is the value after an asked key. Keys of a row are distinct, so that nothing but recall answers.
The sparse model learns on rows that grow, through the phases of the schedule: dense, warm-up of the indexer, sparse.
The other model is the same with windows alone, in the same budget of tokens. ``make recall`` runs both, draws accuracy
by distance, and writes ``bench/results/recall.json`` and ``docs/recall.svg``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import torch
from model_cpu import machine

from dsv4.cli.process import keep_freed_memory
from dsv4.config.load import save_config
from dsv4.config.model import ModelConfig
from dsv4.config.presets import nano
from dsv4.config.recipes import load_recipe
from dsv4.config.train import BatchConfig, Phase, TrainConfig
from dsv4.data.batch import Batch
from dsv4.model.transformer import Transformer
from dsv4.optim.optimizer import Optimizer
from dsv4.train.anticipatory import Work
from dsv4.train.schedule import Plan, Position, after, plan, total_tokens
from dsv4.train.setup import build_model
from dsv4.train.step import train_step

DISTANCES = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
BOS, EOS, STORE, ASK = range(4)
NOISE, KEYS, VALUES = range(4, 68), range(68, 580), range(580, 644)
VOCABULARY = 644
SLOT = 4  # a triple has this much room: one token of noise is left between neighbours at least
EVALUATION_ROWS = 8
EVALUATION_SEQUENCE = 8704


def rows(num_rows: int, sequence: int, seed: int) -> tuple[Batch, np.ndarray]:
    """Rows of planted pairs, and the distance that each target lies back, [B, T], 0 where there is none."""
    generator = np.random.default_rng(seed)
    ids = generator.choice(NOISE, (num_rows, sequence))
    targets = np.full((num_rows, sequence), -1)
    distances = np.zeros((num_rows, sequence), dtype=np.int64)
    possible = [d for d in DISTANCES if d + 2 * SLOT < sequence]
    for row in range(num_rows):
        is_free = np.ones(sequence // SLOT, dtype=bool)
        keys = generator.permutation(KEYS)[: sequence // (3 * SLOT)]
        for key in keys:
            distance = int(generator.choice(possible))
            slots = np.flatnonzero(is_free[: -distance // SLOT - 1] & is_free[distance // SLOT : -1])
            if not len(slots):
                continue
            slot, value = int(generator.choice(slots)), int(generator.choice(VALUES))
            offset = int(generator.integers(2))  # not always at the start of a compressed block
            for mark, at in ((STORE, slot * SLOT + offset), (ASK, slot * SLOT + offset + distance)):
                ids[row, at : at + 3] = (mark, key, value)
            asked = slot * SLOT + offset + distance + 1
            targets[row, asked], distances[row, asked] = value, distance
            is_free[[slot, slot + distance // SLOT]] = False
    ids[:, 0] = BOS
    batch = Batch(
        token_ids=torch.from_numpy(ids), segment_ids=torch.zeros(num_rows, sequence, dtype=torch.int64),
        targets=torch.from_numpy(targets), num_bytes=0,
    )  # fmt: skip
    return batch, distances


def model_config(has_entries: bool) -> ModelConfig:
    """Three layers of width 128: window, CSA, CSA; or three windows."""
    small = nano()
    return replace(
        small,
        vocab_size=VOCABULARY,
        hidden_size=128,
        layer_kinds=("window", "csa", "csa") if has_entries else ("window",) * 3,
        mtp_kinds=(),
        attention=replace(
            small.attention, num_heads=4, head_dim=64, rotary_dims=16, q_rank=64, o_groups=2, o_rank=64, window=32
        ),
        indexer=replace(small.indexer, num_heads=8, head_dim=32, top_k=32),
        moe=replace(small.moe, num_experts=4, expert_dim=128, num_hash_layers=0),
        max_context=16384,
    )


def recipe(model: Path, scale: float) -> TrainConfig:
    """Rows that grow from 512 to 8704 tokens; ``scale`` multiplies the tokens of every phase."""
    demo = load_recipe("demo")

    def phase(name: str, tokens: int, sequence: int, attention: str, train: str = "all") -> Phase:
        return Phase(name=name, tokens=int(tokens * scale), sequence=sequence, attention=attention, train=train)  # pyright: ignore

    return replace(
        demo,
        model=str(model),
        batch=BatchConfig(start_tokens=8192, tokens=8192, ramp_tokens=0, micro_tokens=EVALUATION_SEQUENCE),
        optimizer=replace(demo.optimizer, warmup_steps=20, decay_fraction=0.3),
        loss=replace(demo.loss, mtp_weight=0.0, mtp_weight_decay=0.0),
        phases=(
            phase("dense-512", 1_500_000, 512, "dense"),
            phase("dense-1k", 400_000, 1024, "dense"),
            phase("indexer-1k", 150_000, 1024, "dense", "indexer"),
            phase("sparse-1k", 300_000, 1024, "sparse"),
            phase("sparse-4k", 400_000, 4608, "sparse"),
            phase("sparse-8k", 500_000, EVALUATION_SEQUENCE, "sparse"),
        ),
    )


def as_windows(config: TrainConfig) -> TrainConfig:
    """The same rows without an indexer: its warm-up becomes ordinary training, so that the budget is the same."""
    return replace(config, phases=tuple(replace(p, attention="dense", train="all") for p in config.phases))


@torch.no_grad()
def accuracy(model: Transformer, dense: bool) -> dict[int, float]:
    """Share of right answers by distance, on rows never trained on."""
    right: dict[int, list[bool]] = {distance: [] for distance in DISTANCES}
    for row in range(EVALUATION_ROWS):
        batch, distances = rows(1, EVALUATION_SEQUENCE, seed=10**9 + row)
        streams, _ = model.run(batch.token_ids, segment_ids=batch.segment_ids, dense=dense)
        asked = batch.targets[0] >= 0
        answers = model.logits(model.hidden(streams)[0, asked]).argmax(dim=-1)
        hits = (answers == batch.targets[0, asked]).tolist()
        for distance, hit in zip(distances[0][asked.numpy()].tolist(), hits, strict=True):
            right[distance].append(hit)
    return {distance: sum(hits) / len(hits) for distance, hits in right.items()}


def run(kind: str, seed: int, scale: float, directory: Path) -> dict:
    """Train one model; return its accuracy by distance."""
    torch.set_num_threads(1)
    keep_freed_memory()
    directory.mkdir(parents=True, exist_ok=True)
    model_path = directory / f"{kind}.json"
    save_config(model_config(kind == "sparse"), model_path)
    config = recipe(model_path, scale)
    config = replace(config if kind == "sparse" else as_windows(config), seed=seed)
    model = build_model(config, model_config(kind == "sparse"))
    optimizer, position, begin = Optimizer(model, config.optimizer), Position(), time.perf_counter()
    while (now := plan(config, position)) is not None:
        batches = [rows(n, now.phase.sequence, seed * 10**6 + now.step)[0] for n in now.micro_batches()]
        result = train_step(
            model, optimizer, config, Work(plan=now, position=position, loader_state={}, batches=batches)
        )
        result.apply()
        position = after(position, now)
        if now.step % 20 == 0 or now.is_last:
            tell(kind, now, position, result.record(), time.perf_counter() - begin, config)
    return {"kind": kind, "seed": seed, "tokens": position.tokens, "seconds": time.perf_counter() - begin,
            "accuracy": accuracy(model, dense=kind != "sparse")}  # fmt: skip


def tell(kind: str, now: Plan, position: Position, record: dict, seconds: float, config: TrainConfig) -> None:
    share = position.tokens / total_tokens(config)
    line = f"{kind:7} {now.phase.name:11} {share:4.0%}  loss {record['loss']:.3f}  {seconds:.0f} s"
    if record["indexer_captured"] is not None:
        line += f"  captured {record['indexer_captured']:.2f}"
    print(line, file=sys.stderr, flush=True)


def draw(report: dict, path: Path) -> None:
    """Accuracy by distance, one line a model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    names = {"sparse": "window, CSA, CSA", "window": "windows alone"}
    for colour, kind in zip(("#0072b2", "#d55e00"), names, strict=True):
        for found in [r for r in report["runs"] if r["kind"] == kind]:
            values = [found["accuracy"][str(d)] for d in DISTANCES]
            axes.plot(DISTANCES, values, color=colour, marker="o", label=names[kind])
            axes.annotate(names[kind], (DISTANCES[-1], values[-1]), xytext=(-8, 8), textcoords="offset points",
                          color=colour, ha="right")  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(DISTANCES, [str(d) for d in DISTANCES])
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("distance of the pair, tokens")
    axes.set_ylabel("right answers")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--plot", type=Path, help="draw them here")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="of the tokens of every phase")
    parser.add_argument("--directory", type=Path, default=Path("runs/recall"))
    parser.add_argument("--run", choices=("sparse", "window"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(run(arguments.run, arguments.seed, arguments.scale, arguments.directory)))
        return
    shared = ["--seed", str(arguments.seed), "--scale", str(arguments.scale), "--directory", str(arguments.directory)]
    processes = [
        subprocess.Popen([sys.executable, __file__, "--run", kind, *shared], stdout=subprocess.PIPE, text=True)
        for kind in ("sparse", "window")
    ]
    found = [json.loads(process.communicate()[0]) for process in processes]
    report = {"machine": machine(), "date": date.today().isoformat(), "runs": found}
    for result in found:
        print(result["kind"], {d: round(a, 3) for d, a in result["accuracy"].items()})
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    if arguments.plot:
        draw(report, arguments.plot)


if __name__ == "__main__":
    main()
