"""A whole training run in seconds: a small corpus, the same on every machine, and the smoke recipe made smaller."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from dsv4.checkpoint.training import STATE, list_checkpoints
from dsv4.config.recipes import smoke
from dsv4.config.toml import to_dict
from dsv4.config.train import BatchConfig, Phase, RunConfig, TrainConfig
from dsv4.train.loop import Record, Trainer
from dsv4.train.metrics import read
from dsv4.train.setup import set_up

WORDS = (
    "and as assert break class continue def del elif else except false finally for from if import in is lambda none "
    "not or pass raise return true try while with yield size name path value index count first last left right"
)
DOCUMENTS, LINES = 60, 12  # about 5000 tokens of a vocabulary of 512: a run sees more than one epoch

MEASURED = ("seconds", "tokens_per_second", "flops_utilisation", "memory_bytes")  # differ from one run to the next


def write_corpus(folder: Path, *, seed: int = 0) -> Path:
    """Write a folder of small texts that look like code, none like another; return the folder."""
    folder.mkdir(parents=True)
    draw = random.Random(seed).random  # the one method whose sequence Python promises to keep
    for i in range(DOCUMENTS):
        (folder / f"{i:02d}.txt").write_text("".join(_lines(draw)), encoding="utf-8", newline="\n")
    return folder


def tiny(source: Path) -> TrainConfig:
    """Every kind of phase and of phase change in 17 steps of up to 384 tokens; nothing is taken for a spike."""
    large = smoke()
    return replace(
        large,
        data=replace(large.data, source=str(source), validation_fraction=0.1, pack_buffer=8),
        batch=BatchConfig(start_tokens=192, tokens=384, ramp_tokens=960, micro_tokens=192),
        stability=replace(large.stability, spike_memory=50),
        run=RunConfig(
            checkpoint_steps=4, keep_checkpoints=50, validation_steps=6, validation_tokens=500, sample_queries=4
        ),
        phases=(
            Phase(name="dense-48", tokens=1700, sequence=48, attention="dense"),  # steps 1 to 6
            Phase(name="indexer-64", tokens=1000, sequence=64, attention="dense", train="indexer"),  # 7 to 9
            Phase(name="sparse-64", tokens=1500, sequence=64, attention="sparse"),  # 10 to 13
            Phase(name="sparse-96", tokens=1500, sequence=96, attention="sparse"),  # 14 to 17
        ),
    )


def shortest(source: Path) -> TrainConfig:
    """Five steps: a dense one, two of the indexer's warm-up, two sparse ones; a checkpoint after each."""
    config = tiny(source)
    return replace(
        config,
        batch=replace(config.batch, start_tokens=192, tokens=192, ramp_tokens=0),
        run=replace(config.run, checkpoint_steps=1, validation_steps=4, validation_tokens=200, sample_prompt="def "),
        phases=(
            Phase(name="dense-48", tokens=192, sequence=48, attention="dense"),
            Phase(name="indexer-64", tokens=384, sequence=64, attention="dense", train="indexer"),
            Phase(name="sparse-96", tokens=384, sequence=96, attention="sparse"),
        ),
    )


def write_recipe(path: Path, config: TrainConfig) -> Path:
    """Write a recipe as TOML, for the command line; return the file."""
    fields = to_dict(config)
    tables = {name: value for name, value in fields.items() if isinstance(value, dict)}
    lines = [f"{name} = {json.dumps(fields[name])}" for name in ("model", "seed", "activations")]
    for name, table in tables.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    for phase in config.phases:
        lines += ["[[phases]]", *(f"{key} = {json.dumps(value)}" for key, value in vars(phase).items())]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def tiny_trainer(config: TrainConfig, run: Path, tell: Callable[[Record], None] = lambda record: None) -> Trainer:
    """Set up a run, new or to be resumed, on the CPU. Its clock ticks once a look."""
    resume = bool(list_checkpoints(run / "checkpoints"))
    parts = set_up(config, run, device=torch.device("cpu"), resume=resume)
    ticks = iter(range(10**9))
    return Trainer(parts, clock=lambda: float(next(ticks)), today="2026-11-24T09:00:00+00:00", tell=tell)


def records_of(run: Path, *kinds: str) -> list[Record]:
    """The records of a run that two equal runs share, without what is measured; of some kinds, or all.

    ``start`` is left out: a run that was resumed has one more.
    """
    found = [record for record in read(run / "metrics.jsonl") if record["kind"] != "start"]
    return [
        {name: value for name, value in record.items() if name not in MEASURED}
        for record in found
        if not kinds or record["kind"] in kinds
    ]


def files_of(folder: Path) -> dict[Path, bytes]:
    """Every file below a folder, by its path in it."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def contents(checkpoint: Path) -> dict[str, object]:
    """All that two equal checkpoints share, by file: bytes, and the state without its seconds."""
    files = {path.as_posix(): data for path, data in files_of(checkpoint).items()}
    state = json.loads(files.pop(STATE))
    del state["seconds"], files["manifest.json"]  # the manifest has the state's hash
    return {**files, STATE: state}


def _lines(draw: Callable[[], float]) -> Iterator[str]:
    known = WORDS.split()
    for _ in range(1 + int(2 * LINES * draw())):
        indent = "    " * int(3 * draw())
        words = (known[int(len(known) * draw() * draw())] for _ in range(1 + int(8 * draw())))
        yield f"{indent}{' '.join(words)}{int(100 * draw())}:\n"
