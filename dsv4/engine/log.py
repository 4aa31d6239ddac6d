"""The write-ahead log: every generated token is on the disk before it is shown, so that a killed engine can go on.

    00000019 5f7d2a10 [["log", {"format": 2}]]
    000000b2 8a0c41f7 [["request", {"id": "a", "prompt_ids": [5, 17], "seed": 11, ...}], ["tokens", [["a", 3]]]]
    00000039 3c9a7d10 [["tokens", [["a", 9], ["b", 4, [-1.5, [[4, -1.5]]]]]]]
    0000001f 51b06e22 [["end", "a", "stop", null]]
    00000010 0c6a51d9 [["taken", "a"]]

A line is what one commit wrote: length and CRC-32 of its JSON in hexadecimal, and the JSON, in ASCII, so that a line
break is at the end only. A kill or a power failure can spoil the last line alone, and then its commit has not
returned: it is dropped. A bad line with anything after it is damage, and refused.

A token has its log-probabilities beside it if they were asked for. A request stays in the log when it has ended, until
its caller has taken it: who is killed between the two finds it again.
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
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dsv4.checkpoint.manifest import sync
from dsv4.config.files import write_then_rename

Event = list[Any]

_VERSION: list[Event] = [["log", {"format": 2}]]
_START = re.compile(rb"([0-9a-f]{8}) ([0-9a-f]{8}) ")
_LONG_BYTES = 2**23  # from here on the log is rewritten while in use, each time it has doubled: 0.2 s for 8 MiB

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LoggedRequest:
    """A request that nobody has taken, as it was last committed; of ``sampling``, tuples have become lists."""

    id: str
    prompt_ids: list[int]
    sampling: dict[str, Any]
    seed: int
    salt: str = ""
    """In hexadecimal."""
    has_mask: bool = False
    """Whether a mask, which no log can hold, decides about its tokens."""
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    """Of each token [its own, [[id, that of one of the likeliest], ...]]; none if they were not asked for."""
    finish: str | None = None
    """How it ended; None if it has not."""
    error: str | None = None
    """What it ended with, if by an error."""


def recover(path: Path | str) -> list[LoggedRequest]:
    """Read the requests of a log that nobody has taken, in the order they came; none if there is no file.

    Those whose ``finish`` is None are to be gone on with; the others are whole. Changes nothing.

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

    Opening reduces it to the requests that nobody has taken: they are in ``found``, and their ids are theirs.
    ``append_...`` collects, ``commit`` writes.
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
            self.found = recover(self._path)
            self._running = {request.id for request in self.found if request.finish is None}
            self._ended = {request.id for request in self.found} - self._running
            self._rewrite(self.found)
        except BaseException:
            self._let_go()
            raise

    def __contains__(self, id: str) -> bool:
        """Whether there is a request of this id that nobody has taken."""
        return id in self._running or id in self._ended

    def append_request(
        self,
        id: str,
        prompt_ids: Sequence[int],
        sampling: Mapping[str, Any],
        seed: int,
        *,
        salt: str = "",
        has_mask: bool = False,
    ) -> None:
        """Add a request. sampling: what JSON gives back unchanged, but for tuples. salt: in hexadecimal."""
        self._check_open()
        if id in self:
            raise ValueError(f"request id is {id!r}; expected one that is not in the log, or was taken")
        request = LoggedRequest(
            id=id, prompt_ids=[int(i) for i in prompt_ids], sampling=_plain(sampling), seed=int(seed), salt=salt,
            has_mask=has_mask,
        )  # fmt: skip
        self._pending.append(["request", vars(request)])
        self._running.add(id)

    def append_tokens(self, tokens: Iterable[tuple[Any, ...]]) -> None:
        """Add the tokens of one step: (request's id, token), or (id, token, log-probabilities).

        Several of one request are in their order.
        """
        self._check_open()
        listed = [[id, int(token), *logprobs] for id, token, *logprobs in tokens]
        for id, *_ in listed:
            self._check_running(id)
        if listed:
            self._pending.append(["tokens", listed])

    def append_end(self, id: str, finish: str, error: str | None = None) -> None:
        """End a request: it will not be gone on with."""
        self._check_open()
        self._check_running(id)
        self._pending.append(["end", id, finish, error])
        self._running.remove(id)
        self._ended.add(id)

    def append_taken(self, id: str) -> None:
        """Forget a request that has ended: its caller has what came of it."""
        self._check_open()
        if id not in self._ended:
            raise ValueError(f"request id is {id!r}; expected one that has ended and was not taken")
        self._pending.append(["taken", id])
        self._ended.remove(id)

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
        """Let go of the log. Ends without tokens are committed; all else that was not is not in it."""
        if self._descriptor is not None and all(event[0] in ("end", "taken") for event in self._pending):
            try:
                self.commit()
            except OSError as error:  # they will be found once more
                _logger.warning("%s", error)
        self._let_go()

    def _let_go(self) -> None:
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
            self._let_go()

    def _rewrite_in_use(self) -> None:
        """Forget requests that were taken. If there is no room for that, the log just stays long."""
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
        lines += [_line([["request", vars(request)]]) for request in requests]
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
            self._let_go()  # a power failure might bring back the old file, without what would be committed from now on
            raise self._error(error, "it is closed") from error

    def _error(self, error: OSError, outcome: str) -> OSError:
        return OSError(error.errno, f"the log cannot be written ({error.strerror}); {outcome}", str(self._path))

    def _check_open(self) -> int:
        if self._descriptor is None:
            raise ValueError(f"log {self._path} is closed; expected an open one")
        return self._descriptor

    def _check_running(self, id: str) -> None:
        if id not in self._running:
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
        case ["request", fields]:
            requests[fields["id"]] = LoggedRequest(**fields)
        case ["tokens", listed]:
            for id, token, *logprobs in listed:
                requests[id].output_ids.append(token)
                requests[id].logprobs.extend(logprobs)
        case ["end", id, finish, error]:
            requests[id] = replace(requests[id], finish=finish, error=error)
        case ["taken", id]:
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
