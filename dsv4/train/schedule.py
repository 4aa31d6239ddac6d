"""What every step does, from the recipe and the position alone (report 4.2.2). No torch.

A run is a walk of ``Position``s: the plan of a step (its phase, rows, learning rate, weights) is a function of where
the run stands, and so is the next position. Steps can therefore be planned ahead, as anticipatory routing needs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from dsv4.config.train import Phase, TrainConfig


@dataclass(frozen=True, kw_only=True)
class Position:
    """Steps and tokens done: in all, in main training (indexer warm-ups excluded), and in the current phase."""

    step: int = 0
    tokens: int = 0
    main_steps: int = 0
    main_tokens: int = 0
    phase: int = 0
    phase_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One step: ``step`` is the number it will have, counted from 1.

    rows: of ``phase.sequence`` tokens each; micro_rows: of one forward and backward pass.
    """

    step: int
    phase: Phase
    is_first: bool  # of its phase
    is_last: bool
    rows: int
    micro_rows: int
    lr: float
    mtp_weight: float

    @property
    def tokens(self) -> int:
        return self.rows * self.phase.sequence

    @property
    def is_dense(self) -> bool:
        return self.phase.attention == "dense"

    def micro_batches(self) -> list[int]:
        """Rows of each pass, the last one possibly smaller."""
        whole, rest = divmod(self.rows, self.micro_rows)
        return [self.micro_rows] * whole + ([rest] if rest else [])


def plan(config: TrainConfig, position: Position) -> Plan | None:
    """Plan the step after ``position``; None when the run is over."""
    if position.phase >= len(config.phases):
        return None
    phase = config.phases[position.phase]
    batch = batch_tokens(config, position.main_tokens)
    rows = max(1, round(batch / phase.sequence))
    is_main = phase.train == "all"
    return Plan(
        step=position.step + 1,
        phase=phase,
        is_first=position.phase_tokens == 0,
        is_last=position.phase_tokens + rows * phase.sequence >= phase.tokens,
        rows=rows,
        micro_rows=min(rows, max(1, config.batch.micro_tokens // phase.sequence)),
        lr=learning_rate(config, position.main_steps, position.main_tokens) if is_main else config.loss.indexer_lr,
        mtp_weight=mtp_weight(config, position.main_tokens) if is_main else 0.0,
    )


def after(position: Position, done: Plan) -> Position:
    """Return the position once a planned step is done."""
    is_main = done.phase.train == "all"
    moved = replace(
        position,
        step=done.step,
        tokens=position.tokens + done.tokens,
        main_steps=position.main_steps + is_main,
        main_tokens=position.main_tokens + done.tokens * is_main,
        phase_tokens=position.phase_tokens + done.tokens,
    )
    return replace(moved, phase=moved.phase + 1, phase_tokens=0) if done.is_last else moved


def total_tokens(config: TrainConfig) -> int:
    """Tokens of the whole run, as its phases state them."""
    return sum(phase.tokens for phase in config.phases)


def batch_tokens(config: TrainConfig, main_tokens: int) -> float:
    """Tokens of a step: from the first batch to the full one, linearly over the ramp."""
    batch = config.batch
    share = 1.0 if batch.ramp_tokens == 0 else min(1.0, main_tokens / batch.ramp_tokens)
    return batch.start_tokens + (batch.tokens - batch.start_tokens) * share


def learning_rate(config: TrainConfig, main_steps: int, main_tokens: int) -> float:
    """Linear warm-up in steps, constant, half a cosine in tokens at the end. Warm-ups of the indexer do not count."""
    o = config.optimizer
    if main_steps < o.warmup_steps:
        return o.peak_lr * (main_steps + 1) / o.warmup_steps
    fallen = _decay_progress(config, main_tokens)
    return o.end_lr + (o.peak_lr - o.end_lr) * 0.5 * (1 + math.cos(math.pi * fallen))


def mtp_weight(config: TrainConfig, main_tokens: int) -> float:
    """The MTP loss's weight: lower from the start of the learning rate's decay."""
    loss = config.loss
    return loss.mtp_weight_decay if _decay_progress(config, main_tokens) > 0 else loss.mtp_weight


def _decay_progress(config: TrainConfig, main_tokens: int) -> float:
    """How far the cosine has fallen: 0 before it begins, 1 at the end."""
    total = sum(phase.tokens for phase in config.phases if phase.train == "all")
    start = total * (1 - config.optimizer.decay_fraction)
    done = min(main_tokens, total)  # the last step of a phase may go over its tokens
    return 0.0 if done <= start else (done - start) / (total - start)
