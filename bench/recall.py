"""Recall over distance: names told with a value in noise, asked for up to 8192 tokens later.

A row holds pairs of tokens, name and value, and at some distances from them a question, one token for each name;
everything else is noise. The only targets are the values after questions, and the row never shows them there, so that
each pair can be asked for many times. Names of a row are distinct, their values random: nothing but recall answers.
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
from collections.abc import Sequence
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
BOS, EOS = range(2)
NOISE, NAMES, QUESTIONS, VALUES = range(4, 68), range(68, 100), range(100, 132), range(132, 164)
VOCABULARY = 164
SHORTEST = 32  # of the distances trained on: as far as the window
SLOT = 4  # tokens that a pair has for itself
TOKENS_A_PAIR = 16  # with its questions, at least
SHARE_ASKED = 0.5  # of the places for questions, those that are tried
EVALUATION_ROWS = 32
EVALUATION_SEQUENCE = 8704


def rows(num_rows: int, sequence: int, seed: int, distances: Sequence[int] = ()) -> tuple[Batch, np.ndarray]:
    """Rows of pairs, and the distance that each target lies back, [B, T], 0 where there is none.

    Without ``distances`` any one is drawn, the short as often as the long (log-uniform): a model that trained on a few
    would learn to look that far back, and not to look for the name.
    """
    generator = np.random.default_rng(seed)
    ids = generator.choice(NOISE, (num_rows, sequence))
    targets = np.full((num_rows, sequence), -1)
    lies_back = np.zeros((num_rows, sequence), dtype=np.int64)
    longest = sequence - 3 * SLOT
    num_pairs = min(len(NAMES), sequence // TOKENS_A_PAIR)
    num_asked = int(SHARE_ASKED * (sequence - num_pairs * SLOT) / num_pairs)

    def some(count: int) -> np.ndarray:
        if distances:
            return generator.choice([d for d in distances if d <= longest], count)
        return np.exp(generator.uniform(np.log(SHORTEST), np.log(longest), count)).astype(int)

    for row in range(num_rows):
        is_free = np.ones(sequence, dtype=bool)
        is_free[0] = False
        for name in generator.permutation(len(NAMES))[:num_pairs].tolist():
            first, *others = some(num_asked).tolist()
            begins = np.arange(SLOT, sequence - first - 1)  # the name's place; its value follows
            begins = begins[
                is_free[begins] & is_free[begins + 1] & is_free[begins + first] & (begins % SLOT < SLOT - 1)
            ]
            if not len(begins):
                continue
            at, value = int(generator.choice(begins)), int(generator.choice(VALUES))
            ids[row, at : at + 2] = (NAMES[name], value)
            is_free[at : at + 2] = False
            for distance in (first, *others):
                asked = at + distance
                if asked < sequence and is_free[asked]:
                    is_free[asked] = False
                    ids[row, asked], targets[row, asked], lies_back[row, asked] = QUESTIONS[name], value, distance
    ids[:, 0] = BOS
    batch = Batch(
        token_ids=torch.from_numpy(ids), segment_ids=torch.zeros(num_rows, sequence, dtype=torch.int64),
        targets=torch.from_numpy(targets), num_bytes=0,
    )  # fmt: skip
    return batch, lies_back


def model_config(has_entries: bool) -> ModelConfig:
    """Two layers of width 64: two of CSA; or two windows."""
    small = nano()
    return replace(
        small,
        vocab_size=VOCABULARY,
        hidden_size=64,
        initializer_range=0.12,  # a matrix of 64 inputs then keeps the size of what it maps
        layer_kinds=("csa" if has_entries else "window",) * 2,
        mtp_kinds=(),
        attention=replace(
            small.attention, num_heads=2, head_dim=64, rotary_dims=8, q_rank=64, o_groups=1, o_rank=64, window=32
        ),
        indexer=replace(small.indexer, num_heads=4, head_dim=32, top_k=32),
        moe=replace(small.moe, num_experts=2, experts_per_token=1, expert_dim=64, num_hash_layers=0),
        max_context=16384,
    )


def recipe(model: Path, scale: float) -> TrainConfig:
    """Rows that grow from 128 to 8704 tokens; ``scale`` multiplies the tokens of every phase."""
    demo = load_recipe("demo")

    def phase(name: str, tokens: int, sequence: int, attention: str, train: str = "all") -> Phase:
        return Phase(name=name, tokens=int(tokens * scale), sequence=sequence, attention=attention, train=train)  # pyright: ignore

    return replace(
        demo,
        model=str(model),
        batch=BatchConfig(start_tokens=2048, tokens=2048, ramp_tokens=0, micro_tokens=EVALUATION_SEQUENCE),
        optimizer=replace(demo.optimizer, peak_lr=0.006, end_lr=0.0006, warmup_steps=20, decay_fraction=0.3),
        loss=replace(demo.loss, mtp_weight=0.0, mtp_weight_decay=0.0),
        phases=(
            phase("dense-128", 600_000, 128, "dense"),
            phase("dense-512", 600_000, 512, "dense"),
            phase("dense-2k", 600_000, 2048, "dense"),
            phase("indexer-2k", 300_000, 2048, "dense", "indexer"),
            phase("sparse-2k", 300_000, 2048, "sparse"),
            phase("sparse-4k", 500_000, 4608, "sparse"),
            phase("sparse-8k", 800_000, EVALUATION_SEQUENCE, "sparse"),
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
        batch, distances = rows(1, EVALUATION_SEQUENCE, 10**9 + row, DISTANCES)
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
        if now.step % 50 == 0 or now.is_last:
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
    names = {"sparse": "two CSA layers", "window": "two window layers"}
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
