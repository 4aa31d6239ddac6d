"""A pile of text, document by document: the standard library, a folder, JSONL or Parquet (report 4.1). No torch.

The same pile gives the same documents in the same order: files are sorted by name, and nothing else decides.
"""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from dsv4.config.train import DataConfig
from dsv4.data.formats import texts

STDLIB = "stdlib"
NOT_LIBRARY = ("site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "turtledemo")
"""Folders of the standard library that hold other people's packages, tests or programs."""


class Document(NamedTuple):
    """name: the file's path below the source, with ``:row`` in JSONL and Parquet. text: not empty, valid UTF-8."""

    name: str
    text: str


class SourceFile(NamedTuple):
    """A file of the source. name: its path below the source, with slashes."""

    name: str
    path: Path


def _ignore(_: str) -> None:
    pass


def documents(config: DataConfig, on_skip: Callable[[str], None] = _ignore) -> Iterator[Document]:
    """Yield the documents of ``config.source``, one at a time, sorted by file.

    A file is a document, whatever its suffix; in .jsonl a line is one, in .parquet a row. Hidden and empty files and
    empty texts are passed over. A text that is binary (has a NUL byte) or not UTF-8 is a ``ValueError`` that names
    it or, where ``config.bad_files`` is "skip", left out, and ``on_skip`` is called with its name.
    Raises ``ValueError`` at once if there is no file, at a line or row that cannot be read, and at the end if there
    was no document.
    """
    return _read(source_files(config), config, on_skip)


def source_files(config: DataConfig) -> list[SourceFile]:
    """The files of ``config.source``, sorted by name; a ``ValueError`` if there are none."""
    if config.source == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        files = [file for file in _walk(root, NOT_LIBRARY) if file.path.suffix == ".py"]
        expected = f"Python files in {root}"
    elif Path(config.source).is_dir():
        files = _walk(Path(config.source), ())
        expected = "files in it that are neither hidden nor empty"
    else:
        files = [_single(Path(config.source))]
        expected = "a file"
    if not files:
        raise ValueError(f"data.source is {config.source}, which holds no file to read; expected {expected}")
    return files


def listing_sha256(config: DataConfig) -> str:
    """Hash of the names, sizes and times of change of the source's files: another hash means another pile."""
    digest = hashlib.sha256()
    for name, path in source_files(config):
        status = path.stat()
        digest.update(json.dumps([name, status.st_size, status.st_mtime_ns]).encode())
    return digest.hexdigest()


def _single(path: Path) -> SourceFile:
    if not path.is_file():
        raise ValueError(f"data.source is {path}, which does not exist; expected {STDLIB}, a folder or a file")
    if path.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"data.source is {path}; expected {STDLIB}, a folder, a .jsonl or a .parquet file")
    return SourceFile(path.name, path)


def _walk(root: Path, left_out: tuple[str, ...]) -> list[SourceFile]:
    """Files below ``root``, sorted, without hidden and empty ones; folders named in ``left_out`` are not entered."""
    paths: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in left_out]
        paths += [Path(folder, name) for name in names if not name.startswith(".")]
    kept = [path for path in paths if path.is_file() and path.stat().st_size > 0]
    return sorted(SourceFile(path.relative_to(root).as_posix(), path) for path in kept)


def _read(files: list[SourceFile], config: DataConfig, on_skip: Callable[[str], None]) -> Iterator[Document]:
    is_empty = True
    for file in files:
        for place, text in texts(file.path, config.text_field):
            fault = _fault(text)
            if fault and config.bad_files == "error":
                raise ValueError(f'{file.path}{place} {fault}; expected UTF-8 text, or data.bad_files = "skip"')
            if fault:
                on_skip(file.name + place)
            elif text:
                is_empty = False
                yield Document(file.name + place, text)
    if is_empty:
        raise ValueError(f"data.source is {config.source}, which holds no usable document; expected at least one")


def _fault(text: str) -> str | None:
    """What keeps a text from being used, if anything."""
    if "\0" in text:
        return "is binary (it has a NUL byte)"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"is not UTF-8 (after {error.start} characters)"
    return None
