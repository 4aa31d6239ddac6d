"""From a source to what training reads: a tokenizer and a token store for each split, in one directory. No torch.

Two passes over the source, each of one batch of documents at a time: one to train the tokenizer on the training
split, one to encode. What is there already is kept if it was made from the same things, and made again otherwise.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from tokenizers import Tokenizer

from dsv4.config.model import ModelConfig
from dsv4.config.train import TRAIN, DataConfig
from dsv4.data.conversations.rendered import Encoded, encode_conversations, recipe_sha256
from dsv4.data.manifest import MANIFEST, OFFSETS, Manifest, file_sha256
from dsv4.data.sources import Document, documents, listing_sha256
from dsv4.data.split import SPLITS, Split, split_documents
from dsv4.data.store import TokenStore
from dsv4.data.tokenizer import check_tokenizer, load_tokenizer, num_ids, plain_text, train_tokenizer
from dsv4.data.writer import TokenWriter

TOKENIZER = "tokenizer.json"
RECORD = "prepared.json"  # written last: what the directory was made from, and what was left out
OURS = (TOKENIZER, RECORD, *(f"{split}/{name}" for split in SPLITS for name in (MANIFEST, OFFSETS, "tokens-*.bin")))

VERSION = 1  # of this code: a change that gives other tokens for the same text raises it
BATCH_CHARACTERS = 2**22  # encoded at a time, on all cores; the library needs about a hundred bytes a token
NAMES_KEPT = 20  # of texts that were skipped

Progress = Callable[[str, int], None]
"""Called with what is being done ("tokenizer" or "encode") and the number of documents so far."""


@dataclass(frozen=True, kw_only=True)
class SplitSize:
    """documents: after deduplication. tokens: without bos and eos. text_bytes: in UTF-8."""

    documents: int
    tokens: int
    text_bytes: int


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What is in the directory, and what of the source is not. ``TokenStore.open(directory, split)`` reads it."""

    tokenizer: Path  # its tokenizer.json
    train: SplitSize
    validation: SplitSize
    duplicates: int  # documents left out because an equal one came before
    skipped: int  # texts left out because they are binary or not UTF-8
    skipped_names: tuple[str, ...]  # of the first 20


@dataclass
class _LeftOut:
    duplicates: int = 0
    skipped: int = 0
    skipped_names: list[str] = field(default_factory=list)

    def duplicate(self, _: str) -> None:
        self.duplicates += 1

    def skip(self, name: str) -> None:
        self.skipped += 1
        if len(self.skipped_names) < NAMES_KEPT:
            self.skipped_names.append(name)


def prepare(
    config: DataConfig, model: ModelConfig, directory: str | os.PathLike[str], *, progress: Progress | None = None
) -> Prepared:
    """Write tokenizer.json and the stores of both splits to ``directory``; do nothing if they are there already.

    They are there if the directory was made from the same options, vocabulary and source files (names, sizes, times)
    and is whole. The directory appears complete or not at all, and one that holds other files is refused.
    Raises ``ValueError`` for a bad source, tokenizer or vocabulary, and if a split would have no document.
    """
    target = Path(directory).resolve()
    if not target.parent.is_dir():
        raise ValueError(f"directory is {target}, but {target.parent} does not exist; expected an existing parent")
    given = None if config.tokenizer == TRAIN else load_tokenizer(config.tokenizer)
    if given is not None:
        check_tokenizer(given, model)
    fingerprint = _fingerprint(config, model, given)
    held = _held(target, fingerprint)
    if held is not None:
        return held
    _refuse_foreign(target)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir()
    try:
        _make(config, model, given, partial, fingerprint, progress or _silent)
        if target.exists():
            shutil.rmtree(target)  # cut short here, it is not whole, and is made again
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    made = _held(target, fingerprint)
    assert made is not None, f"{target} was just written and cannot be read"
    return made


def _silent(_: str, __: int) -> None:
    pass


def _fingerprint(config: DataConfig, model: ModelConfig, given: Tokenizer | None) -> str:
    """Hash of everything the tokens depend on. Options of packing and of the loader are not among it."""
    parts = {
        "version": VERSION,
        "files": recipe_sha256(config) if config.has_conversations else listing_sha256(config),
        "text_field": config.text_field,
        "bad_files": config.bad_files,
        "validation_fraction": config.validation_fraction,
        "tokenizer": TRAIN if given is None else hashlib.sha256(given.to_str().encode()).hexdigest(),
        "vocab_size": model.vocab_size,
        "bos_token_id": model.bos_token_id,
        "eos_token_id": model.eos_token_id,
    }
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _held(target: Path, fingerprint: str) -> Prepared | None:
    """What the directory holds, or None if it was made from something else or is not whole."""
    try:
        record = json.loads((target / RECORD).read_text())
        stores = {split: TokenStore.open(target, split) for split in SPLITS}
        made_by = {store.manifest.tokenizer_sha256 for store in stores.values()}
        if record["fingerprint"] != fingerprint or made_by != {file_sha256(target / TOKENIZER)}:
            return None
        return Prepared(
            tokenizer=target / TOKENIZER,
            train=_size(stores["train"].manifest),
            validation=_size(stores["validation"].manifest),
            duplicates=record["duplicates"],
            skipped=record["skipped"],
            skipped_names=tuple(record["skipped_names"]),
        )
    except (OSError, ValueError, KeyError, TypeError):  # missing, cut short or spoiled
        return None


def _size(manifest: Manifest) -> SplitSize:
    return SplitSize(documents=manifest.documents, tokens=manifest.tokens, text_bytes=manifest.text_bytes)


def _refuse_foreign(target: Path) -> None:
    """Do not replace a directory that holds something which is not ours to delete."""
    if target.exists() and not target.is_dir():
        raise ValueError(f"directory is {target}, which is a file; expected a directory or nothing")
    for path in sorted(target.rglob("*")):
        name = path.relative_to(target).as_posix()
        if not (name in SPLITS or any(fnmatch(name, ours) for ours in OURS)):
            raise ValueError(f"directory is {target}, which holds {name}; expected only prepared data, or nothing")


def _make(
    config: DataConfig,
    model: ModelConfig,
    given: Tokenizer | None,
    directory: Path,
    fingerprint: str,
    progress: Progress,
) -> None:
    tokenizer = given
    if tokenizer is None:
        tokenizer = train_tokenizer(_train_texts(config, progress), model.vocab_size)
        check_tokenizer(tokenizer, model)
    tokenizer.save(str(directory / TOKENIZER))
    left_out = _LeftOut()
    if config.has_conversations:
        encoded = encode_conversations(config, tokenizer, left_out.duplicate)
    else:
        encoded = _encoded(_kept(config, left_out), tokenizer)
    _write(encoded, tokenizer, directory, progress)
    record = {
        "fingerprint": fingerprint,
        "duplicates": left_out.duplicates,
        "skipped": left_out.skipped,
        "skipped_names": left_out.skipped_names,
    }
    (directory / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def _kept(config: DataConfig, left_out: _LeftOut) -> Iterator[tuple[Split, Document]]:
    """Every document that counts, with its side; a ``ValueError`` at the end if a side had none."""
    counts = dict.fromkeys(SPLITS, 0)
    found = documents(config, left_out.skip)
    for split, document in split_documents(found, config.validation_fraction, left_out.duplicate):
        counts[split] += 1
        yield split, document
    for split, count in counts.items():
        if count == 0:
            raise ValueError(
                f"data.source {config.source} is too small: of its {sum(counts.values())} documents, none falls in the "
                f"{split} split at data.validation_fraction = {config.validation_fraction}; expected at least one"
            )


def _train_texts(config: DataConfig, progress: Progress) -> Iterator[str]:
    for count, (split, document) in enumerate(_kept(config, _LeftOut()), 1):
        progress("tokenizer", count)
        if split == "train":
            yield document.text


def _encoded(kept: Iterable[tuple[Split, Document]], tokenizer: Tokenizer) -> Iterator[list[Encoded]]:
    """Texts to ids, in lists of about ``BATCH_CHARACTERS``."""
    plain = plain_text(tokenizer)
    for batch in _batches(kept):
        encodings = plain.encode_batch_fast([document.text for _, document in batch])
        yield [
            Encoded(split, encoding.ids, len(document.text.encode()))
            for (split, document), encoding in zip(batch, encodings, strict=True)
        ]


def _write(encoded: Iterable[list[Encoded]], tokenizer: Tokenizer, directory: Path, progress: Progress) -> None:
    """Write the store of each split. Documents keep the order of the source."""
    for split in SPLITS:
        (directory / split).mkdir()
    vocab_size, sha256 = num_ids(tokenizer), file_sha256(directory / TOKENIZER)
    with (
        TokenWriter(directory / "train", vocab_size=vocab_size, tokenizer_sha256=sha256) as train,
        TokenWriter(directory / "validation", vocab_size=vocab_size, tokenizer_sha256=sha256) as validation,
    ):
        writers: dict[Split, TokenWriter] = {"train": train, "validation": validation}
        count = 0
        for batch in encoded:
            for split, token_ids, num_bytes in batch:
                writers[split].append(token_ids, num_bytes)
            count += len(batch)
            progress("encode", count)
        train.finish()
        validation.finish()


def _batches(kept: Iterable[tuple[Split, Document]]) -> Iterator[list[tuple[Split, Document]]]:
    """Documents in lists of about ``BATCH_CHARACTERS``."""
    batch: list[tuple[Split, Document]] = []
    size = 0
    for split, document in kept:
        batch.append((split, document))
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
