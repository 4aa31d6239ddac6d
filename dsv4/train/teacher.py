"""A teacher beside the student: checked before any work is done, loaded as it is stored, frozen (report 5.1.2, 5.2.2).

Its weights in codes stay codes and it rounds as released, as the report's teachers do (5.2.1); numbers are held, and
computed with, in the student's activation dtype. It attends as it does when it writes, whatever the student's phase is.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn

from dsv4.checkpoint.load import load_model
from dsv4.checkpoint.source import open_source
from dsv4.config.model import ModelConfig
from dsv4.config.train import TrainConfig
from dsv4.data.batch import Batch
from dsv4.data.prepare import TOKENIZER
from dsv4.data.tokenizer import load_tokenizer
from dsv4.model.transformer import Transformer
from dsv4.ops.backend import resolve
from dsv4.ops.vocabulary_kl import vocabulary_kl


def check_teacher(config: TrainConfig, student: ModelConfig, tokenizer: Tokenizer) -> None:
    """Raise ``ValueError`` unless the recipe's teacher is a whole model that can teach this student.

    tokenizer: the student's. A teacher reads the same ids, predicts the same ids, and reads rows as long.
    """
    directory = Path(config.distill.teacher)
    if not directory.is_dir():
        raise ValueError(
            f"distill.teacher is {directory}, which is no folder; expected a model's, with config.json, safetensors "
            f"files and {TOKENIZER}"
        )
    if not (directory / "config.json").is_file() or (directory / "model" / "config.json").is_file():
        inside = directory / "model"
        hint = f"; did you mean {inside}?" if (inside / "config.json").is_file() else ""
        raise ValueError(f"distill.teacher is {directory}, which holds no model; expected the folder of one{hint}")
    if not (directory / TOKENIZER).is_file():
        raise ValueError(f"distill.teacher is {directory}, which has no {TOKENIZER}; expected the one of its ids")
    teacher = open_source(directory).config
    problems = []
    if teacher.vocab_size != student.vocab_size:
        problems.append(
            f"distill.teacher is {directory}, with a vocabulary of {teacher.vocab_size}; expected the student's "
            f"{student.vocab_size}"
        )
    longest = max(phase.sequence for phase in config.phases)
    if teacher.max_context < longest:
        problems.append(
            f"distill.teacher is {directory}, with a max_context of {teacher.max_context}; expected at least the "
            f"{longest} tokens of the longest row"
        )
    if not problems:
        problems += _tokenizer_problems(directory, tokenizer)
    if problems:
        raise ValueError("\n".join(problems))


def load_teacher(config: TrainConfig) -> Transformer:
    """Load the recipe's teacher, frozen, without its MTP block, which nobody asks."""
    directory = config.distill.teacher
    has_codes = open_source(directory).config.storage in ("fp4", "fp8")
    teacher = load_model(directory, "released" if has_codes else config.activations)
    teacher.mtp = nn.ModuleList()
    return teacher.requires_grad_(False)


def mean_kl(
    student: Transformer, hidden: torch.Tensor, teacher: Transformer, batch: Batch, token_weights: torch.Tensor
) -> torch.Tensor:
    """The weighted sum of the reverse KL of the student's next tokens to the teacher's, over the whole vocabulary.

    hidden: [B, T, D], what the student's head reads; token_weights: [B, T] float32.
    """
    backend = resolve(student.backend, hidden.device)
    with torch.no_grad():
        streams, _ = teacher.run(batch.token_ids, segment_ids=batch.segment_ids)
        taught = teacher.hidden(streams)  # [B, T, E]
        teacher_head = teacher.head.matrix(taught.dtype, backend)
    loss, _ = vocabulary_kl(
        hidden.flatten(0, 1),
        student.head.matrix(hidden.dtype, backend),
        taught.flatten(0, 1),
        teacher_head,
        token_weights.flatten(),
        backend=backend,
    )
    return loss


def _tokenizer_problems(directory: Path, tokenizer: Tokenizer) -> list[str]:
    """Name the first id that stands for another token with the teacher."""
    theirs = {index: token for token, index in load_tokenizer(str(directory / TOKENIZER)).get_vocab().items()}
    ours = {index: token for token, index in tokenizer.get_vocab().items()}
    for index in sorted(theirs.keys() | ours.keys()):
        if theirs.get(index) != ours.get(index):
            return [
                f"distill.teacher is {directory}, whose {TOKENIZER} has {theirs.get(index)!r} at id {index}; expected "
                f"the student's {ours.get(index)!r}: data.tokenizer = {str(directory / TOKENIZER)!r} gives it the "
                "teacher's"
            ]
    return []
