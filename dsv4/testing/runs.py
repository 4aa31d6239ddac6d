"""Run folders as training leaves them, without the training: plausible numbers, the same every time."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from pathlib import Path

from dsv4.config.train import TrainConfig
from dsv4.train.metrics import MetricsLog
from dsv4.train.schedule import Plan, Position, after, plan

SAMPLES = {
    "def main(": "self, path):\n    with open(path) as file:\n        return file.read()\n\n\ndef _parse(",
    "import ": "os\nimport sys\nimport types\n\n__all__ = ['Error', 'open']\n\n",
}


def write_run(
    folder: Path,
    config: TrainConfig,
    *,
    max_steps: int = 10**9,
    spike_step: int | None = None,
    num_layers: int = 7,
    validate: bool = True,
    measure_indexer: bool = True,
) -> None:
    """Write ``config.json`` and ``metrics.jsonl`` of a run of ``config``, to its end or for ``max_steps`` steps.

    spike_step: its loss spikes; the run goes back to the last checkpoint and routes by the past for a while.
    """
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2))
    writer = _Writer(folder, config, num_layers, validate, measure_indexer)
    position, checkpoint = Position(), Position()
    writer.start(position)
    while (now := plan(config, position)) is not None and position.step < max_steps:
        if now.is_first:
            writer.phase(now, position)
        if now.step == spike_step:
            spike_step = None
            writer.spike(now.step, checkpoint.step)
            position = checkpoint
            continue
        position = after(position, now)
        writer.step(now, position)
        if validate and (now.is_last or now.step % config.run.validation_steps == 0):
            writer.validation(now, position)
        if now.is_last or now.step % config.run.checkpoint_steps == 0:
            checkpoint = position
            writer.append(kind="checkpoint", step=now.step, tokens=position.tokens, path=f"step-{now.step:08d}")
    if now is None:
        writer.end(position)


class _Writer:
    def __init__(
        self, folder: Path, config: TrainConfig, num_layers: int, validate: bool, measure_indexer: bool
    ) -> None:
        self.log = MetricsLog(folder / "metrics.jsonl")
        self.config, self.num_layers, self.validates = config, num_layers, validate
        self.measure_indexer = measure_indexer
        self.random = random.Random(config.seed)
        self.anticipatory_until = 0
        self.indexer_steps = 0
        self.seconds = 0.0

    def append(self, **record: object) -> None:
        self.log.append(record)

    def start(self, position: Position) -> None:
        self.append(
            kind="start", step=position.step, tokens=position.tokens, time="2026-11-24T09:00:00+00:00",
            model=self.config.model, parameters_total=11_658_499, parameters_activated=5_141_203,
            matmul_flops=1.62e11, torch="2.13.0", threads=2,
        )  # fmt: skip
        if self.validates:
            self.append(kind="baseline", name="byte 5-gram", bits_per_byte=2.214)

    def phase(self, now: Plan, position: Position) -> None:
        phase = now.phase
        self.append(
            kind="phase", step=position.step, tokens=position.tokens, phase=phase.name, sequence=phase.sequence,
            attention=phase.attention, train=phase.train,
        )  # fmt: skip

    def spike(self, step: int, back_to: int) -> None:
        self.append(kind="spike", step=step, loss=6.1, expected=4.9, deviation=0.06)
        self.append(kind="rollback", step=back_to, from_step=step)
        self.append(kind="anticipatory", step=back_to, on=True)
        self.anticipatory_until = back_to + self.config.stability.active_steps

    def step(self, now: Plan, position: Position) -> None:
        warm_up = now.phase.train == "indexer"
        measured = self.measure_indexer and (warm_up or now.phase.attention == "sparse")
        self.indexer_steps += measured
        learnt = 1 - math.exp(-self.indexer_steps / 5)
        loss = self._loss(position)
        seconds = now.tokens / 11_000 * (1 + now.phase.sequence / 16_384) * self._noise(0.04)
        self.seconds += seconds
        self.append(
            kind="step", step=now.step, tokens=position.tokens, phase=now.phase.name,
            loss=loss + self.random.gauss(0, 0.035),
            mtp_loss=None if warm_up else loss + 0.6,
            **({"distill_kl": None if warm_up else loss - 3} if self.config.distill.teacher else {}),
            balance_loss=1.02,
            indexer_kl=1.9 * (1 - 0.8 * learnt) if measured else None,
            indexer_captured=0.86 * learnt * self._noise(0.01) if measured else None,
            indexer_recall=0.35 + 0.53 * learnt * self._noise(0.01) if measured else None,
            lr=now.lr, mtp_weight=now.mtp_weight,
            grad_norm=0.0 if warm_up else (0.4 + 3 / (1 + now.step / 4)) * self._noise(0.15),
            indexer_grad_norm=0.09 * self._noise(0.2) if measured else None,
            expert_load=[
                1.15 + layer % 3 * 0.1 + (1 + 0.4 * layer) * math.exp(-now.step / 25) * self._noise(0.1)
                for layer in range(max(0, self.num_layers - warm_up))  # the last is the MTP block's
            ],
            seconds=seconds, tokens_per_second=now.tokens / seconds,
            flops_utilisation=0.41 * self._noise(0.04), memory_bytes=int(1.1e9 + 4e4 * now.phase.sequence),
            packing_utilisation=0.985, batch_tokens=now.tokens, anticipatory=now.step <= self.anticipatory_until,
        )  # fmt: skip

    def validation(self, now: Plan, position: Position) -> None:
        bits = self._loss(position) / math.log(2) / 2.9
        self.append(
            kind="validation", step=now.step, tokens=position.tokens, phase=now.phase.name,
            loss=self._loss(position), bits_per_byte=bits, attention=now.phase.attention,
        )  # fmt: skip
        for prompt, text in SAMPLES.items():
            self.append(kind="sample", step=now.step, prompt=prompt, text=text)

    def end(self, position: Position) -> None:
        bits = self._loss(position) / math.log(2) / 2.9
        self.append(kind="end", step=position.step, tokens=position.tokens, seconds=self.seconds, bits_per_byte=bits)

    def _loss(self, position: Position) -> float:
        """Nats at this place, noise apart."""
        total = sum(phase.tokens for phase in self.config.phases)
        return 3.3 + 5.0 / (1 + 25 * position.main_tokens / total)

    def _noise(self, deviation: float) -> float:
        return math.exp(self.random.gauss(0, deviation))
