"""The write-ahead log: every generated token is on the disk before it is shown, so that a killed engine can go on.

    0000001a 5f7d2a10 [["log", {"format": 1}]]
    0000004b 8a0c41f7 [["request", "a", [5, 17], {"temperature": 0.7}, 11, []], ["tokens", [["a", 3]]]]
    00000020 3c9a7d10 [["tokens", [["a", 9], ["b", 4]]]]
    00000016 51b06e22 [["end", "a", "stop"]]

A line is what one commit wrote: length and CRC-32 of its JSON in hexadecimal, and the JSON, in ASCII, so that a line
break is at the end only. A kill or a power failure can spoil the last line alone, and then its commit has not
returned: it is dropped. A bad line with anything after it is damage, and refused.
"""

from __future__ import annotations

import fcntl
import glob
import json
import logging
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dsv4.checkpoint.manifest import sync
from dsv4.config.files import write_then_rename

Event = list[Any]

_VERSION: list[Event] = [["log", {"format": 1}]]
_START = re.compile(rb"([0-9a-f]{8}) ([0-9a-f]{8}) ")
_LONG_BYTES = 2**23  # from here on the log is rewritten while in use, each time it has doubled: 0.2 s for 8 MiB

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LoggedRequest:
    """An unfinished request as it was last committed; of ``sampling``, tuples have become lists."""

    id: str
    prompt_ids: list[int]
    sampling: dict[str, Any]
    seed: int
    output_ids: list[int]


def recover(path: Path | str) -> list[LoggedRequest]:
    """Read the unfinished requests of a log, in the order they came; none if there is no file. Changes nothing.

    Raises ``ValueError`` for a file that is no log, and with the offset for one damaged before its last line.
    """
    path = Path(path)
    if not path.exists():
        return []
    if not path.is_file():
        raise ValueError(f"log {path} is no file; expected a log, or a place for a new one")
    requests: dict[str, LoggedRequest] = {}
    for offset, commit in _commits(path, path.read_bytes()):
        try:
            for event in commit:
                _apply(event, requests)
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError(f"log {path} has a commit at byte {offset} that makes no sense ({error!r})") from error
    return list(requests.values())


class WriteAheadLog:
    """A log to write, opened by one object of one process at a time; a second one is a ``ValueError``.

    Opening reduces it to its unfinished requests: they are in ``unfinished``, and stay open under their ids.
    ``append_...`` collects, ``commit`` writes, and ``close`` drops what was not committed.
    """

    def __init__(self, path: Path | str) -> None:
        self._path = Path(path)
        if not self._path.parent.is_dir():
            raise ValueError(f"folder of log is {self._path.parent}; expected an existing folder")
        self._descriptor: int | None = None
        self._num_bytes = self._rewrite_bytes = 0
        self._pending: list[Event] = []
        self._lock = _own(self._path)
        try:
            for leftover in self._path.parent.glob(f".{glob.escape(self._path.name)}.*.partial"):
                leftover.unlink()
            self.unfinished = recover(self._path)
            self._ids = {request.id for request in self.unfinished}
            self._rewrite(self.unfinished)
        except BaseException:
            self.close()
            raise

    def append_request(self, id: str, prompt_ids: Sequence[int], sampling: Mapping[str, Any], seed: int) -> None:
        """Add a request. sampling: what JSON gives back unchanged, but for tuples."""
        self._check_open()
        if id in self._ids:
            raise ValueError(f"request id is {id!r}; expected one that is not in the log, unfinished")
        self._pending.append(["request", id, [int(i) for i in prompt_ids], _plain(sampling), int(seed), []])
        self._ids.add(id)

    def append_tokens(self, tokens: Iterable[tuple[str, int]]) -> None:
        """Add the tokens of one step, each with its request's id. Several of one request are in their order."""
        self._check_open()
        pairs = [[id, int(token)] for id, token in tokens]
        for id, _ in pairs:
            self._check_known(id)
        if pairs:
            self._pending.append(["tokens", pairs])

    def append_end(self, id: str, reason: str) -> None:
        """End a request: it will not be resumed."""
        self._check_open()
        self._check_known(id)
        self._pending.append(["end", id, reason])
        self._ids.remove(id)

    def commit(self) -> None:
        """Return once all that was appended is on the disk. Call it once a step, before anything of it is shown.

        A disk that is full, or broken, is an ``OSError`` with the log's name. The log is then as it was after the
        last commit, and the next one tries again with all that was appended since.
        """
        descriptor = self._check_open()
        if not self._pending:
            return
        line = _line(self._pending)
        try:
            _write_durably(descriptor, line)
        except OSError as error:
            self._take_back(descriptor)
            raise self._error(error, "it is as after the last commit") from error
        self._num_bytes += len(line)
        self._pending.clear()
        if self._num_bytes > self._rewrite_bytes:
            self._rewrite_in_use()

    def close(self) -> None:
        """Let go of the log; what was not committed is not in it."""
        for descriptor in (self._descriptor, self._lock):
            if descriptor is not None:
                os.close(descriptor)
        self._descriptor = self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take_back(self, descriptor: int) -> None:
        """Cut off what a failed commit wrote. Where that fails too, nothing may be written after it any more."""
        try:
            os.ftruncate(descriptor, self._num_bytes)
        except OSError:
            self.close()

    def _rewrite_in_use(self) -> None:
        """Forget finished requests. If there is no room for that, the log just stays long."""
        try:
            self._rewrite(recover(self._path))
        except OSError as error:
            if self._descriptor is None:
                raise
            _logger.warning("%s", error)
            self._rewrite_bytes = 2 * self._num_bytes

    def _rewrite(self, requests: list[LoggedRequest]) -> None:
        """Put a log of these requests alone in the place of this one."""
        lines = [_line(_VERSION)]
        lines += [_line([["request", r.id, r.prompt_ids, r.sampling, r.seed, r.output_ids]]) for r in requests]
        opened: list[int] = []

        def write(partial: Path) -> None:
            opened.append(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666))
            _write_durably(opened[0], b"".join(lines))

        try:
            write_then_rename(self._path, write)
        except OSError as error:
            for descriptor in opened:
                os.close(descriptor)
            raise self._error(error, "it is as before, not shortened") from error
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = opened[0]
        self._num_bytes = sum(map(len, lines))
        self._rewrite_bytes = max(_LONG_BYTES, 2 * self._num_bytes)
        try:
            sync(self._path.parent)
        except OSError as error:
            self.close()  # a power failure might bring back the old file, without what would be committed from now on
            raise self._error(error, "it is closed") from error

    def _error(self, error: OSError, outcome: str) -> OSError:
        return OSError(error.errno, f"the log cannot be written ({error.strerror}); {outcome}", str(self._path))

    def _check_open(self) -> int:
        if self._descriptor is None:
            raise ValueError(f"log {self._path} is closed; expected an open one")
        return self._descriptor

    def _check_known(self, id: str) -> None:
        if id not in self._ids:
            raise ValueError(f"request id is {id!r}; expected one that is in the log, unfinished")


def _own(path: Path) -> int:
    """Lock a log through a file beside it, which stays: the log itself is replaced now and then."""
    lock = os.open(path.with_name(f"{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.pread(lock, 20, 0).decode("ascii", "replace")
        os.close(lock)
        raise ValueError(f"log {path} is in use by process {owner}; expected one process at a time") from error
    with suppress(OSError):  # on a full disk, a refusal will not name the process
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
    return lock


def _line(events: list[Event]) -> bytes:
    text = json.dumps(events).encode("ascii")
    return b"%08x %08x %b\n" % (len(text), zlib.crc32(text), text)


def _write_durably(descriptor: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]
    os.fsync(descriptor)


def _commits(path: Path, data: bytes) -> Iterator[tuple[int, list[Event]]]:
    """Give the offset and the events of each line but the first; leave out a last one that is not whole."""
    offset = 0
    while offset < len(data):
        text, end = _text(data, offset)
        is_ended = data[end : end + 1] == b"\n"
        if text is None or (not is_ended and end + 1 >= len(data)):
            _check_torn(path, data, offset)
            return
        if not is_ended:
            raise ValueError(f"log {path} is damaged at byte {end}; expected a line break. {_ADVICE}")
        if offset > 0:
            yield offset, json.loads(text)
        elif json.loads(text) != _VERSION:
            raise ValueError(f"log {path} begins with {text[:60].decode()}; expected {json.dumps(_VERSION)}")
        offset = end + 1


_ADVICE = "Move it away to start with an empty log"


def _text(data: bytes, offset: int) -> tuple[bytes | None, int]:
    """The JSON of the line at ``offset`` and where it ends; None if it is not what was written."""
    start = _START.match(data, offset)
    if start is None:
        return None, offset
    text = data[start.end() : start.end() + int(start[1], 16)]
    return text if zlib.crc32(text) == int(start[2], 16) else None, start.end() + len(text)


def _check_torn(path: Path, data: bytes, offset: int) -> None:
    """Refuse a bad line that cannot be a commit that was not finished."""
    if offset == 0:  # the first line was whole when the file got its name
        raise ValueError(f"{path} begins with {data[:30]!r}; expected a log, which begins with {_line(_VERSION)!r}")
    end = data.find(b"\n", offset)
    if 0 <= end < len(data) - 1:
        raise ValueError(f"log {path} is damaged at byte {offset}; only its last line may be unfinished. {_ADVICE}")
    _logger.warning("log %s ends with %d bytes of an unfinished commit: dropped", path, len(data) - offset)


def _apply(event: Event, requests: dict[str, LoggedRequest]) -> None:
    match event:
        case ["request", id, prompt_ids, sampling, seed, output_ids]:
            requests[id] = LoggedRequest(
                id=id, prompt_ids=prompt_ids, sampling=sampling, seed=seed, output_ids=output_ids
            )
        case ["tokens", pairs]:
            for id, token in pairs:
                requests[id].output_ids.append(token)
        case ["end", id, _]:
            del requests[id]
        case _:
            raise ValueError(event)


def _plain(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Make lists of tuples; refuse what would come back from JSON as something else."""
    plain = _with_lists(sampling)
    try:
        is_same = json.loads(json.dumps(plain, allow_nan=False)) == plain
    except (TypeError, ValueError):
        is_same = False
    if not is_same:
        raise ValueError(f"sampling is {sampling!r:.200}; expected what JSON gives back unchanged")
    return plain


def _with_lists(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _with_lists(inner) for key, inner in value.items()}
    return [_with_lists(inner) for inner in value] if isinstance(value, list | tuple) else value
