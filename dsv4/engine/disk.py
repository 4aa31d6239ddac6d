"""Prefixes on the disk: one file per (content hash, kind), found again after a restart and shared by processes.

Whatever is not exactly what its name promises is a miss and a warning, never an exception and never a wrong answer.
The bytes of a file are in ``dsv4.engine.prefix_file``, the limit on all of them in ``dsv4.engine.folder``, and which
of them are kept in ``dsv4.engine.uses``.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Literal, TypeVar, get_args

from dsv4.engine.folder import Folder
from dsv4.engine.prefix_file import (
    MOST_DIGEST_BYTES,
    Buffer,
    Header,
    WrongFileError,
    as_views,
    check_owner,
    open_file,
    read_header,
    read_payload,
    write_file,
)

Kind = Literal["entries", "state"]
T = TypeVar("T")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What one store did since it was opened, and what there is in its folder. Bytes are of whole files."""

    bytes_written: int = 0
    bytes_read: int = 0
    hits: int = 0
    misses: int = 0
    wrong_files: int = 0
    """Files met that are not what their names promise, or cannot be read."""
    evicted: int = 0
    declined: int = 0
    """Files not written, because there is no room for them beside what is worth more."""
    failed: int = 0
    """Files not written, because the disk is full or the folder cannot be written."""
    num_files: int = 0
    """In the folder now, of all keys."""
    bytes_held: int = 0
    """In the folder now, of all keys, files being written included."""


class DiskStore:
    """A folder of cached prefixes of one model, tokenizer and cache format, holding at most ``max_bytes``.

    key: digest of all that gives payloads their meaning. Stores of several keys may share a folder and its limit.
    With ``fsync`` a file that was put survives a power failure; without, it may be a miss afterwards. A store belongs
    to one thread at a time.
    """

    def __init__(self, folder: Path | str, key: bytes, max_bytes: int, *, fsync: bool = False) -> None:
        _check_digest("key", key)
        if max_bytes < 1:
            raise ValueError(f"max_bytes is {max_bytes}; expected at least 1")
        self._key = bytes(key)
        self._max_bytes = max_bytes
        self._counts = Statistics()
        self._is_failing = self._is_told_too_large = False
        self._folder = Folder(Path(folder), max_bytes, fsync=fsync)

    def put(self, content_hash: bytes, kind: Kind, payload: Sequence[Buffer], depth_tokens: int) -> bool:
        """Write the buffers, one after the other, unless they are there; return whether they are there now.

        content_hash: digest of all tokens before ``depth_tokens``. That they are there counts as a use of them. On a
        full disk the answer is False, with a warning at the first of several failures, and nothing partial is left.
        """
        name = self._name(content_hash, kind)
        if depth_tokens < 0:
            raise ValueError(f"depth_tokens is {depth_tokens}; expected 0 or more")
        views = as_views(payload)
        header = Header(
            key=self._key,
            content_hash=bytes(content_hash),
            kind=kind,
            depth_tokens=depth_tokens,
            payload_bytes=sum(view.nbytes for view in views),
        )
        self._folder.uses.clock += 1
        if self._use_existing(name, header):
            return True
        if header.file_bytes > self._max_bytes:
            self._decline_too_large(name, header)
            return False
        try:
            is_written = self._write(name, header, views)
        except OSError as error:
            self._count(failed=1)
            if not self._is_failing:
                _logger.warning("prefix is not cached: %s: %s", self._folder.path / name, error)
            self._is_failing = True
            return False
        self._is_failing = False
        return is_written

    def get(self, content_hash: bytes, kind: Kind) -> memoryview | None:
        """Return a payload in memory of its own, writable, every byte verified; None if it is not there."""
        name = self._name(content_hash, kind)
        self._folder.uses.clock += 1

        def read(descriptor: int, header: Header, checksum: bytes) -> memoryview:
            payload = read_payload(descriptor, header, checksum)
            self._folder.add_hit(name, descriptor, header.depth_tokens)
            self._count(hits=1, bytes_read=header.file_bytes)
            return payload

        payload = self._look_up(name, content_hash, kind, read)
        if payload is None:
            self._count(misses=1)
        return payload

    def contains(self, content_hash: bytes, kind: Kind) -> bool:
        """Whether a file of the right header and length is there. No use of it; its payload is not read."""
        return bool(self._look_up(self._name(content_hash, kind), content_hash, kind, lambda *_: True))

    def statistics(self) -> Statistics:
        """What was counted, and a look at every file of the folder."""
        files, total = self._folder.scan()
        return replace(self._counts, evicted=self._folder.num_evicted, num_files=len(files), bytes_held=total)

    def _look_up(self, name: str, content_hash: bytes, kind: Kind, read: Callable[[int, Header, bytes], T]) -> T | None:
        """Call ``read`` with an open file, its header and checksum. None and a warning if it cannot be used."""
        try:
            descriptor = open_file(self._folder.path / name)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn(name, error)
            return None
        try:
            header, checksum = read_header(descriptor)
            check_owner(header, self._key, content_hash, kind)
            return read(descriptor, header, checksum)
        except (WrongFileError, OSError) as error:
            self._warn(name, error)
            # Other errors, such as of permission, say nothing about the file.
            if error.is_damaged if isinstance(error, WrongFileError) else error.errno == errno.EIO:
                self._folder.remove(name, descriptor)
            return None
        finally:
            os.close(descriptor)

    def _warn(self, name: str, error: WrongFileError | OSError) -> None:
        self._count(wrong_files=1)
        _logger.warning("cached prefix is not used: %s: %s", self._folder.path / name, error)

    def _use_existing(self, name: str, expected: Header) -> bool:
        """Whether the same is there already; if so, this is a use of it. What is wrong will be replaced."""
        try:
            descriptor = open_file(self._folder.path / name)
        except OSError:
            return False
        try:
            header, _ = read_header(descriptor)
            if header != expected:
                return False
            self._folder.add_hit(name, descriptor, header.depth_tokens)
            return True
        except (WrongFileError, OSError):
            return False
        finally:
            os.close(descriptor)

    def _write(self, name: str, header: Header, views: list[memoryview]) -> bool:
        with self._folder.new_file(name, header.file_bytes, header.depth_tokens) as descriptor:
            if descriptor is None:
                self._count(declined=1)
                return False
            write_file(descriptor, header, views)
        self._count(bytes_written=header.file_bytes)
        return True

    def _decline_too_large(self, name: str, header: Header) -> None:
        self._count(declined=1)
        if not self._is_told_too_large:
            what = "prefix is not cached: %s would have %d bytes; expected at most max_bytes = %d"
            _logger.warning(what, self._folder.path / name, header.file_bytes, self._max_bytes)
        self._is_told_too_large = True

    def _name(self, content_hash: bytes, kind: Kind) -> str:
        """Name a file. With the key in it, a file of another model is not even looked at."""
        _check_digest("content_hash", content_hash)
        if kind not in get_args(Kind):
            raise ValueError(f"kind is {kind!r}; expected one of {get_args(Kind)}")
        return f"{sha256(self._key).hexdigest()[:16]}-{kind}-{content_hash.hex()}.prefix"

    def _count(self, **more: int) -> None:
        self._counts = replace(self._counts, **{name: getattr(self._counts, name) + n for name, n in more.items()})


def _check_digest(name: str, value: bytes) -> None:
    if not 1 <= len(value) <= MOST_DIGEST_BYTES:
        raise ValueError(f"{name} has {len(value)} bytes; expected 1 to {MOST_DIGEST_BYTES}")
