"""The golden curve: 100 losses of the smallest run, which no change of the code may move without saying so.

The run has a corpus of its own, one thread, float32 and plain torch (the ``portable`` backend: kernels in C are
compiled by each machine's own compiler). On a machine like the one in the manifest the losses are the same to the bit;
on another they are as close as rounding leaves them, which is measured, not guessed: the curve is run again with
parameters nudged by one unit in the last place. ``bench/golden_curve.py`` writes both.
"""

from __future__ import annotations

import platform
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from dsv4.config.toml import to_dict
from dsv4.config.train import BatchConfig, Phase, TrainConfig
from dsv4.data.manifest import file_sha256
from dsv4.ops.backend import BackendChoice
from dsv4.testing.tiny_run import records_of, tiny, tiny_trainer, write_corpus

STEPS = 100
STEP_TOKENS = 96
Curve = dict[str, list[float]]
"""Of every step: ``loss``, nats a token, and ``indexer_kl``, nats a query. The second moves while the first rests."""


def golden(source: Path) -> TrainConfig:
    """A row or two a step: 40 dense steps, 15 of the indexer's warm-up, 25 sparse, 20 in longer rows.

    Routing biases move at the report's speed. At twenty times that, the first token whose choice hangs on the last bit
    moves the choices of many, and two machines soon agree on nothing.
    """
    small = tiny(source)
    return replace(
        small,
        batch=BatchConfig(start_tokens=STEP_TOKENS, tokens=STEP_TOKENS, ramp_tokens=0, micro_tokens=STEP_TOKENS),
        loss=replace(small.loss, bias_speed=0.001),  # as smoke has it, and whatever smoke may have one day
        stability=replace(small.stability, anticipatory="off", spike_memory=STEPS),
        run=replace(small.run, checkpoint_steps=STEPS, validation_steps=STEPS, validation_tokens=2 * STEP_TOKENS),
        phases=(
            Phase(name="dense-48", tokens=40 * STEP_TOKENS, sequence=48, attention="dense"),
            Phase(name="indexer-48", tokens=15 * STEP_TOKENS, sequence=48, attention="dense", train="indexer"),
            Phase(name="sparse-48", tokens=25 * STEP_TOKENS, sequence=48, attention="sparse"),
            Phase(name="sparse-96", tokens=20 * STEP_TOKENS, sequence=96, attention="sparse"),
        ),
    )


def run_curve(folder: Path, *, nudge: int | None = None, backend: BackendChoice = "portable") -> Curve:
    """Train in ``folder``, which must not exist, and return the curve.

    nudge: a seed; each parameter is first moved up or down by one unit in the last place, or left, by chance.
    """
    trainer = tiny_trainer(golden(write_corpus(folder / "texts")), folder / "run")
    trainer.model.backend = backend
    if nudge is not None:
        _nudge(trainer.model, nudge)
    trainer.train()
    steps = records_of(folder / "run", "step")
    return {name: [step[name] for step in steps] for name in ("loss", "indexer_kl")}


def recipe() -> dict[str, object]:
    """What the curve was trained by, as JSON holds it, wherever the corpus lies."""
    return to_dict(golden(Path("texts")))


def data_sha256(folder: Path) -> str:
    """The hash of the tokens of a run in ``folder``."""
    return file_sha256(folder / "run" / "data" / "train" / "tokens-00000.bin")


def machine() -> dict[str, str]:
    """What decides the last bit of a sum: torch, the instructions it uses here, and who made the processor."""
    return {
        "torch": version("torch"),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "processor_vendor": _vendor(),
    }


def distances(curve: Curve, other: Curve) -> dict[str, list[float]]:
    """How far two curves are apart at each step."""
    return {name: [abs(a - b) for a, b in zip(values, other[name], strict=True)] for name, values in curve.items()}


def tolerance(spread: list[float]) -> np.ndarray:
    """The distance allowed at each step, [steps]: 8 times the farthest that nudged runs had come apart by then.

    Another processor rounds every sum of every step otherwise, not the parameters once, and the few nudged runs are
    not the worst; four units in the last place of the loss are added for the first steps.
    """
    return 8 * np.maximum.accumulate(spread) + 4 * 2.0**-21  # losses are between 4 and 8: a unit is 2**-21


@torch.no_grad()
def _nudge(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        direction = torch.randint(-1, 2, parameter.shape, generator=generator).float() * torch.inf
        moved = torch.nextafter(parameter, direction)
        parameter.copy_(torch.where(direction.isnan(), parameter, moved))


def _vendor() -> str:
    """Vendor of the processor, as Linux names it; its architecture elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":")[1].strip() for line in lines if line.startswith(("vendor_id", "CPU implementer"))]
    return names[0] if names else platform.machine()
