"""What a recipe asks of its model: refuse a schedule that the model cannot run, or that would teach it nothing."""

from __future__ import annotations

from dataclasses import replace

from dsv4.config.model import RATIO, ModelConfig
from dsv4.config.train import BatchConfig, Phase, TrainConfig


def check_against_model(config: TrainConfig, model: ModelConfig) -> None:
    """Raise one ValueError, a line per problem, unless ``model`` can be trained by ``config``."""
    problems = []
    for phase in config.phases:
        problems += (
            _sequence_problems(phase, model) + _indexer_problems(phase, model) + _precision_problems(phase, model)
        )
    problems += _batch_problems(config.batch, config.phases)
    if not model.mtp_kinds:
        for name in ("mtp_weight", "mtp_weight_decay"):
            if getattr(config.loss, name) > 0:
                problems.append(f"loss.{name} is {getattr(config.loss, name)}; expected 0: the model has no MTP block")
    if problems:
        raise ValueError("\n".join(problems))


def _sequence_problems(phase: Phase, model: ModelConfig) -> list[str]:
    window = model.attention.window
    if phase.sequence > model.max_context:
        return [_sequence(phase, f"at most the model's max_context = {model.max_context}")]
    if phase.sequence <= window:
        return [_sequence(phase, f"more than the model's window = {window}: within it nothing else is attended to")]
    return []


def _indexer_problems(phase: Phase, model: ModelConfig) -> list[str]:
    """A warm-up or a choice needs an indexer, and a choice needs more entries than are picked."""
    uses = "train is 'indexer'" if phase.train == "indexer" else "attention is 'sparse'"
    if phase.train == "all" and phase.attention == "dense":
        return []
    if "csa" not in model.layer_kinds:
        return [f"phase {phase.name}: {uses}; expected neither: the model has no CSA layer, so no indexer"]
    ratio, top_k = RATIO["csa"], model.indexer.top_k
    if phase.attention == "sparse" and phase.sequence <= ratio * top_k:
        expected = f"more than {ratio} x {top_k} = {ratio * top_k} in a sparse phase"
        return [
            _sequence(phase, f"{expected}: up to there top_k = {top_k} picks every entry, which is dense attention")
        ]
    return []


def _precision_problems(phase: Phase, model: ModelConfig) -> list[str]:
    """Codes of FP4 need whole groups."""
    if phase.precision != "fp4":
        return []
    try:
        replace(model, storage="fp4")
    except ValueError as error:
        return [f"phase {phase.name}: precision is 'fp4', and {line}" for line in str(error).splitlines()]
    return []


def _batch_problems(batch: BatchConfig, phases: tuple[Phase, ...]) -> list[str]:
    """Batches are whole rows; of a fraction of one there would be silently fewer tokens than asked for."""
    problems = []
    for index, phase in enumerate(phases):
        for name in ("micro_tokens", "tokens", *(["start_tokens"] if index == 0 else [])):
            if getattr(batch, name) % phase.sequence:
                problems.append(
                    f"batch.{name} is {getattr(batch, name)}; expected a multiple of the {phase.sequence} tokens of a "
                    f"row of phase {phase.name}"
                )
    return problems


def _sequence(phase: Phase, expected: str) -> str:
    return f"phase {phase.name}: sequence is {phase.sequence}; expected {expected}"
