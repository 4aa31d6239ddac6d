"""From a recipe to the parts of a run: every check first, then data, tokenizer, model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from dsv4.checkpoint.load import load_model
from dsv4.config.files import write_then_rename
from dsv4.config.fit import check_against_model
from dsv4.config.load import load_config
from dsv4.config.model import ModelConfig
from dsv4.config.toml import to_dict
from dsv4.config.train import INIT, DataConfig, TrainConfig
from dsv4.data.augment import split_table
from dsv4.data.batch import Batch
from dsv4.data.conversations.answers import Answers
from dsv4.data.loader import Loader, check_corpus, validation_batches
from dsv4.data.prepare import TOKENIZER, prepare
from dsv4.data.special import SpecialTokens
from dsv4.data.split import SPLITS
from dsv4.data.store import TokenStore
from dsv4.data.tokenizer import check_tokenizer, load_tokenizer, token_bytes
from dsv4.model.init import initialize_
from dsv4.model.transformer import Transformer
from dsv4.ops.backend import resolve
from dsv4.train.loop import Parts
from dsv4.train.teacher import check_teacher, load_teacher

VALIDATION_ROWS_TOKENS = 8192  # tokens of one validation batch, at least a row


def set_up(
    config: TrainConfig,
    run: Path,
    *,
    device: torch.device,
    resume: bool = False,
    progress: Callable[[str, int], None] | None = None,
) -> Parts:
    """Check everything, prepare the data in ``run``/data, and build loader and model.

    Raises ``ValueError`` for whatever would stop the run later. The folder may hold the data of an earlier set-up of
    the same recipe, which is used again. resume: the run goes on with the data it has, whatever became of the source.
    """
    model_config = load_config(config.model)
    check_against_model(config, model_config)
    resolve(config.backend, device)
    is_new = not resume
    if is_new and config.init:
        check_init(Path(config.init), model_config)
    data = run / "data"
    if config.distill.teacher:
        check_teacher(config, model_config, load_tokenizer(_tokenizer(config, data, is_new=is_new)))
    run.mkdir(parents=True, exist_ok=True)
    if is_new:
        prepare(_data_config(config), model_config, data, progress=progress)
    tokenizer = load_tokenizer(str(data / TOKENIZER))
    check_tokenizer(tokenizer, model_config)
    stores = {split: TokenStore.open(data, split) for split in SPLITS}
    longest = max(phase.sequence for phase in config.phases)
    check_corpus(stores["train"], longest, config.batch.tokens)
    special, sizes = SpecialTokens.of(tokenizer), token_bytes(tokenizer)
    is_target = Answers.of(tokenizer).written if config.data.has_conversations else None
    loader = Loader(
        stores["train"], special, sizes, split_table(tokenizer),
        seed=config.seed, fim_rate=config.data.fim_rate, split_rate=config.data.split_rate,
        pack_buffer=config.data.pack_buffer, is_target=is_target, is_shuffled=not config.data.has_conversations,
    )  # fmt: skip

    @cache
    def validation(sequence: int) -> list[Batch]:
        rows = max(1, VALIDATION_ROWS_TOKENS // sequence)
        tokens = config.run.validation_tokens
        batches = validation_batches(
            stores["validation"], special, sizes, num_rows=rows, sequence=sequence, num_tokens=tokens,
            is_target=is_target,
        )  # fmt: skip
        return list(batches)

    write_then_rename(run / "config.json", lambda path: _write(path, config))
    return Parts(
        config=config,
        model=build_model(config, model_config, is_new=is_new).to(device),
        teacher=load_teacher(config).to(device) if config.distill.teacher else None,
        loader=loader,
        validation=validation,
        store=stores["train"],
        tokenizer=tokenizer,
        run=run,
    )


def build_model(config: TrainConfig, model_config: ModelConfig, *, is_new: bool = True) -> Transformer:
    """Return a model of float32 masters whose activations have the recipe's dtype.

    Its weights are random or, where the recipe says so and the run is new, those of the model it starts from.
    """
    model = Transformer(model_config, activation_dtype=getattr(torch, config.activations), backend=config.backend)
    initialize_(model, config.seed)
    if is_new and config.init:
        model.load_state_dict(load_model(config.init, "float32").state_dict())
    return model.train()


def check_init(directory: Path, model: ModelConfig) -> None:
    """Raise ``ValueError`` unless the model in ``directory`` is one of this config; how it is stored may differ."""
    found = load_config(directory)
    if replace(found, storage=model.storage) != model:
        differing = [name for name, value in vars(model).items() if name != "storage" and vars(found)[name] != value]
        raise ValueError(
            f"init is {directory}, a model that differs from the recipe's in {', '.join(differing)}; expected one of "
            "the recipe's config"
        )


def _data_config(config: TrainConfig) -> DataConfig:
    """Where texts come from, with the tokenizer of the model that the run starts from if that is the one."""
    if config.data.tokenizer != INIT:
        return config.data
    return replace(config.data, tokenizer=str(Path(config.init) / TOKENIZER))


def _tokenizer(config: TrainConfig, data: Path, *, is_new: bool) -> str:
    """Where the tokenizer of a run with a teacher is before its data are made, or once they are."""
    return _data_config(config).tokenizer if is_new else str(data / TOKENIZER)


def _write(path: Path, config: TrainConfig) -> None:
    path.write_text(json.dumps(to_dict(config), indent=2) + "\n", encoding="utf-8")


def finish(parts: Parts, save: Callable[[Transformer, Path], None]) -> Path:
    """Write the finished model with its tokenizer as ``run``/model, replacing that of an earlier finish."""
    target, partial, old = (parts.run / name for name in ("model", ".model.partial", ".model.old"))
    for leftover in (partial, old):  # of a finish that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    save(parts.model, partial)
    shutil.copyfile(parts.run / "data" / TOKENIZER, partial / TOKENIZER)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    return target
