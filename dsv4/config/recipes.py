"""The training runs this package knows by name, and reading others from files.

A recipe is a plain function that returns a whole ``TrainConfig``; a variant is a ``replace`` of another. What each
number is and who published it stands at its field in ``dsv4.config.train``; comments here say what is our choice
where the report (DeepSeek-V4, section 4.2) gives none.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from dsv4.config.fit import check_against_model
from dsv4.config.toml import from_dict, read_toml, to_dict
from dsv4.config.train import (
    BatchConfig,
    DataConfig,
    LossConfig,
    OptimizerConfig,
    Phase,
    RunConfig,
    StabilityConfig,
    TrainConfig,
)

__all__ = ["RECIPES", "check_against_model", "from_dict", "load_recipe", "load_run_config", "to_dict"]

K, M = 1024, 1024 * 1024  # tokens of a row
MILLION, BILLION, TRILLION = 10**6, 10**9, 10**12  # tokens of a phase


def load_recipe(source: str | Path) -> TrainConfig:
    """Return the built-in recipe of this name, or read a .toml file.

    Raises one ValueError that lists everything wrong with the file. Paths inside it are relative to the working
    directory.
    """
    path = Path(source)
    if path.suffix != ".toml" and len(path.parts) == 1:
        return _named("recipe", str(source))
    if path.suffix != ".toml":
        raise ValueError(f"recipe is {str(source)!r}; expected one of {', '.join(RECIPES)} or a .toml file")
    if not path.is_file():
        raise ValueError(f"recipe file is {path}; expected a file that exists")
    return read_toml(path, lambda name: _named("base", name))


def load_run_config(run: Path) -> TrainConfig:
    """Read the recipe that a run's folder was made with, from its ``config.json``."""
    path = run / "config.json"
    if not path.is_file():
        raise ValueError(f"run is {run}, which has no config.json; expected the folder of a run")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8 or not JSON
        raise ValueError(f"{path}: expected JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: the file holds a {type(data).__name__}; expected a JSON object")
    try:
        return from_dict(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def flash() -> TrainConfig:
    """The pre-training of DeepSeek-V4-Flash: 32T tokens."""
    return TrainConfig(
        model="flash",
        seed=0,
        activations="bfloat16",
        data=DataConfig(
            source="corpus",  # the report's 32T tokens are not public: a folder of one's own
            text_field="text",
            bad_files="skip",
            tokenizer="deepseek-v4",
            validation_fraction=1e-5,
            fim_rate=0.1,
            split_rate=0.1,
            pack_buffer=4096,
        ),
        optimizer=OptimizerConfig(
            peak_lr=2.7e-4,
            end_lr=2.7e-5,
            warmup_steps=2000,
            decay_fraction=0.2,
            muon_momentum=0.95,
            muon_update_rms=0.18,
            muon_per_head=False,
            muon_dtype="bfloat16",
            adam_betas=(0.9, 0.95),
            adam_eps=1e-20,
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        batch=BatchConfig(
            start_tokens=12 * M,  # where V3 started (3072 rows of 4K), and as long a ramp as V3's
            tokens=72 * M,  # 75.5M
            ramp_tokens=469 * BILLION,
            micro_tokens=M,
        ),
        loss=LossConfig(
            mtp_weight=0.3,
            mtp_weight_decay=0.1,
            balance_weight=1e-4,
            bias_speed=0.001,
            indexer_weight=1.0,
            indexer_lr=1e-3,
        ),
        stability=StabilityConfig(
            anticipatory="auto",
            stale_steps=8,
            active_steps=200,
            spike_deviations=6.0,
            spike_memory=100,
            max_rollbacks=20,
        ),
        run=RunConfig(
            checkpoint_steps=500,
            keep_checkpoints=3,
            validation_steps=1000,
            validation_tokens=64 * M,
            sample_queries=4096,
        ),
        # Published: the lengths and their order, dense attention for the first 1T tokens, sparse from 64K on after a
        # short warm-up of the indexer, 32T in all. Ours: how the 1T divides into 4K and 16K, the warm-up's length
        # (V3.2's), that the last 1T is the one at 1M, and that its last tenth is trained in FP4.
        phases=(
            Phase(name="dense-4k", tokens=900 * BILLION, sequence=4 * K, attention="dense"),
            Phase(name="dense-16k", tokens=100 * BILLION, sequence=16 * K, attention="dense"),
            Phase(name="indexer-64k", tokens=2100 * MILLION, sequence=64 * K, attention="dense", train="indexer"),
            Phase(name="sparse-64k", tokens=29_997_900 * MILLION, sequence=64 * K, attention="sparse"),
            Phase(name="sparse-1m", tokens=900 * BILLION, sequence=M, attention="sparse"),
            Phase(name="fp4-1m", tokens=100 * BILLION, sequence=M, attention="sparse", precision="fp4"),
        ),
    )


def pro() -> TrainConfig:
    """The pre-training of DeepSeek-V4-Pro: 33T tokens."""
    small = flash()
    return replace(
        small,
        model="pro",
        optimizer=replace(small.optimizer, peak_lr=2.0e-4, end_lr=2.0e-5),
        batch=replace(small.batch, tokens=90 * M),  # 94.4M
        # The report: as Flash, with a longer dense stage. Ours: twice as long.
        phases=(
            Phase(name="dense-4k", tokens=1800 * BILLION, sequence=4 * K, attention="dense"),
            Phase(name="dense-16k", tokens=200 * BILLION, sequence=16 * K, attention="dense"),
            Phase(name="indexer-64k", tokens=2100 * MILLION, sequence=64 * K, attention="dense", train="indexer"),
            Phase(name="sparse-64k", tokens=29_997_900 * MILLION, sequence=64 * K, attention="sparse"),
            Phase(name="sparse-1m", tokens=900 * BILLION, sequence=M, attention="sparse"),
            Phase(name="fp4-1m", tokens=100 * BILLION, sequence=M, attention="sparse", precision="fp4"),
        ),
    )


def mini() -> TrainConfig:
    """2.5B tokens of one's own text into the 250M model, on one GPU in some hours. The numbers changed are ours."""
    large = flash()
    return replace(
        large,
        model="mini",
        data=replace(large.data, bad_files="error", tokenizer="train", validation_fraction=0.002, pack_buffer=1024),
        optimizer=replace(large.optimizer, peak_lr=1e-3, end_lr=1e-4, warmup_steps=200),
        batch=BatchConfig(start_tokens=128 * K, tokens=512 * K, ramp_tokens=250 * MILLION, micro_tokens=64 * K),
        stability=replace(large.stability, stale_steps=4, active_steps=100, max_rollbacks=10),
        run=RunConfig(
            checkpoint_steps=200, keep_checkpoints=3, validation_steps=200, validation_tokens=2 * M, sample_queries=1024
        ),
        phases=(
            Phase(name="dense-4k", tokens=1000 * MILLION, sequence=4 * K, attention="dense"),
            Phase(name="dense-16k", tokens=200 * MILLION, sequence=16 * K, attention="dense"),
            Phase(name="indexer-16k", tokens=50 * MILLION, sequence=16 * K, attention="dense", train="indexer"),
            Phase(name="sparse-16k", tokens=1000 * MILLION, sequence=16 * K, attention="sparse"),
            Phase(name="sparse-64k", tokens=200 * MILLION, sequence=64 * K, attention="sparse"),
            Phase(name="fp4-64k", tokens=50 * MILLION, sequence=64 * K, attention="sparse", precision="fp4"),
        ),
    )


def mini_demo() -> TrainConfig:
    """0.1B tokens of this machine's Python library, over and over, into the 250M model. Our numbers.

    Twenty minutes on one large GPU at 0.1M tokens a second, a guess: no GPU has run it yet.
    """
    large = mini()
    return replace(
        large,
        data=replace(large.data, source="stdlib", bad_files="skip", validation_fraction=0.05),
        optimizer=replace(large.optimizer, warmup_steps=20),
        batch=BatchConfig(start_tokens=64 * K, tokens=256 * K, ramp_tokens=10 * MILLION, micro_tokens=64 * K),
        loss=replace(large.loss, bias_speed=0.005, indexer_lr=2e-3),
        stability=replace(large.stability, active_steps=20),
        run=replace(
            large.run, checkpoint_steps=100, validation_steps=25, validation_tokens=256 * K, baseline_order=5,
            sample_prompt="def ",
        ),
        phases=(
            Phase(name="dense-4k", tokens=45 * MILLION, sequence=4 * K, attention="dense"),
            Phase(name="indexer-4k", tokens=5 * MILLION, sequence=4 * K, attention="dense", train="indexer"),
            Phase(name="sparse-4k", tokens=35 * MILLION, sequence=4 * K, attention="sparse"),
            Phase(name="sparse-16k", tokens=10 * MILLION, sequence=16 * K, attention="sparse"),
            Phase(name="fp4-16k", tokens=5 * MILLION, sequence=16 * K, attention="sparse", precision="fp4"),
        ),
    )  # fmt: skip


def demo() -> TrainConfig:
    """0.6M tokens of this machine's Python library into the 10M model: five minutes on two CPU cores. Our numbers.

    In so few steps routing biases must move faster than the report's, to balance at all, and the indexer must learn
    faster than V3.2's.
    """
    large = mini()
    return replace(
        large,
        model="nano",
        data=replace(large.data, source="stdlib", bad_files="skip", validation_fraction=0.05, pack_buffer=256),
        optimizer=replace(large.optimizer, peak_lr=6e-3, end_lr=6e-4, warmup_steps=8, decay_fraction=0.6),
        batch=BatchConfig(start_tokens=2 * K, tokens=4 * K, ramp_tokens=160_000, micro_tokens=4 * K),
        loss=replace(large.loss, bias_speed=0.02, indexer_lr=6e-3),
        stability=replace(large.stability, stale_steps=2, active_steps=10, spike_memory=20, max_rollbacks=3),
        run=RunConfig(
            checkpoint_steps=50, keep_checkpoints=2, validation_steps=50, validation_tokens=32 * K, sample_queries=16,
            baseline_order=5, sample_prompt="def ",
        ),
        phases=(
            Phase(name="dense-512", tokens=220_000, sequence=512, attention="dense"),
            Phase(name="dense-1k", tokens=80_000, sequence=K, attention="dense"),
            Phase(name="indexer-1k", tokens=60_000, sequence=K, attention="dense", train="indexer"),
            Phase(name="sparse-1k", tokens=140_000, sequence=K, attention="sparse"),
            Phase(name="sparse-2k", tokens=70_000, sequence=2 * K, attention="sparse"),
            Phase(name="sparse-4k", tokens=40_000, sequence=4 * K, attention="sparse"),
            Phase(name="fp4-4k", tokens=40_000, sequence=4 * K, attention="sparse", precision="fp4"),
        ),
    )  # fmt: skip


def chat() -> TrainConfig:
    """Conversations for the model of ``demo``: arithmetic, tools, JSON. Minutes on two CPU cores. Our numbers.

    It starts from a model whose indexer knows its entries, so that there is one phase, sparse from its first step.
    """
    base = demo()
    return replace(
        base,
        init="runs/demo/model",
        data=replace(
            base.data, source="conversations", tokenizer="init", num_conversations=18_000, validation_fraction=0.1,
            fim_rate=0.0, split_rate=0.0,
        ),
        optimizer=replace(base.optimizer, peak_lr=8e-3, end_lr=4e-4, decay_fraction=0.8),
        stability=replace(base.stability, spike_deviations=20.0),  # kinds of conversations differ more than texts do
        batch=BatchConfig(start_tokens=2 * K, tokens=2 * K, ramp_tokens=0, micro_tokens=2 * K),
        run=RunConfig(
            checkpoint_steps=50, keep_checkpoints=2, validation_steps=100, validation_tokens=16 * K, sample_queries=16
        ),
        phases=(Phase(name="chat-1k", tokens=1_600_000, sequence=K, attention="sparse"),),
    )  # fmt: skip


def smoke() -> TrainConfig:
    """The whole schedule in seconds on a CPU, for tests: every phase and a phase change of every kind. Our numbers."""
    large = demo()
    return replace(
        large,
        model="smoke",
        activations="float32",
        optimizer=replace(large.optimizer, warmup_steps=4, muon_dtype="float32"),
        loss=replace(large.loss, bias_speed=0.001, indexer_lr=1e-3),
        batch=BatchConfig(start_tokens=512, tokens=1024, ramp_tokens=4 * K, micro_tokens=512),
        stability=replace(large.stability, stale_steps=1, active_steps=4, spike_memory=8),
        run=RunConfig(
            checkpoint_steps=8, keep_checkpoints=2, validation_steps=8, validation_tokens=2 * K, sample_queries=4
        ),
        phases=(
            Phase(name="dense-64", tokens=12 * K, sequence=64, attention="dense"),
            Phase(name="indexer-64", tokens=4 * K, sequence=64, attention="dense", train="indexer"),
            Phase(name="sparse-64", tokens=8 * K, sequence=64, attention="sparse"),
            Phase(name="sparse-256", tokens=8 * K, sequence=256, attention="sparse"),
        ),
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "smoke": smoke,
    "demo": demo,
    "chat": chat,
    "mini": mini,
    "mini-demo": mini_demo,
    "flash": flash,
    "pro": pro,
}


def _named(what: str, name: object) -> TrainConfig:
    """Return a built-in recipe; the error calls the name ``what`` and suggests the nearest known one."""
    if isinstance(name, str) and name in RECIPES:
        return RECIPES[name]()
    near = difflib.get_close_matches(str(name), RECIPES, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"{what} is {name!r}; expected one of {', '.join(RECIPES)}{hint}")
