"""The folder of the prefix cache: a limit on its bytes that holds for all processes using it together.

A file is written beside its place and renamed. ``.lock`` holds the bytes of all files, partial ones included, and who
makes, renames or removes one holds its lock meanwhile; readers take no lock. A writer keeps its partial file locked
too: what is left of a killed one is known by that, not by the process number in its name, which another may have now.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

from dsv4.checkpoint.manifest import sync
from dsv4.engine.prefix_file import WrongFileError, open_file, read_header
from dsv4.engine.uses import Uses

LOCK = ".lock"

_NAME = re.compile(r"[0-9a-f]{16}-[a-z]+-[0-9a-f]+\.prefix")
_PARTIAL = re.compile(rf"\.{_NAME.pattern}\.\d+\.\d+\.partial")
_TOTAL_BYTES = 8
_SPARE = 16  # an eviction makes this fraction of the limit free, so that not every new file looks at all others

Files = dict[str, os.stat_result]


class Folder:
    """Files by name, at most ``max_bytes`` of them. Names are KEY-KIND-HASH.prefix, all others are left alone."""

    def __init__(self, path: Path, max_bytes: int, *, fsync: bool) -> None:
        self.path = path
        self.num_evicted = 0
        self._max_bytes = max_bytes
        self._fsync = fsync
        self._last_declined: tuple[float, int] | None = None
        try:
            path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise ValueError(f"folder is {path}; expected a folder, or a place for a new one") from error
        with self._lock() as lock:
            self._remove_leftovers()
            files, total = self.scan()
            self.uses = Uses({name: found.st_mtime_ns for name, found in files.items()})
            _set_total(lock, total)
            if total > max_bytes:
                self._shrink(lock)

    def scan(self) -> tuple[Files, int]:
        """List the files; add up their bytes and those of the partial ones."""
        files, total = {}, 0
        for name in os.listdir(self.path):
            is_whole = bool(_NAME.fullmatch(name))
            if not is_whole and not _PARTIAL.fullmatch(name):
                continue
            try:
                found = (self.path / name).lstat()
            except FileNotFoundError:  # removed meanwhile
                continue
            if stat.S_ISREG(found.st_mode):
                total += found.st_size
                if is_whole:
                    files[name] = found
        return files, total

    @contextlib.contextmanager
    def new_file(self, name: str, num_bytes: int, depth_tokens: int) -> Iterator[int | None]:
        """Give a partial file to write, which gets its name at the end; None if there is no room.

        After an error nothing of it is left. It takes the place of a file of that name.
        """
        # The thread's number is there for two stores of one process.
        partial = self.path / f".{name}.{os.getpid()}.{threading.get_native_id()}.partial"
        descriptor = self._reserve(partial, num_bytes, depth_tokens)
        if descriptor is None:
            yield None
            return
        try:
            yield descriptor
            if self._fsync:
                os.fsync(descriptor)
            mtime_ns = os.fstat(descriptor).st_mtime_ns
            self._publish(partial, self.path / name)
            self.uses.add_new(name, mtime_ns, depth_tokens)
        finally:
            try:
                self._discard(partial)
            finally:
                os.close(descriptor)

    def remove(self, name: str, descriptor: int) -> None:
        """Remove the file that ``descriptor`` has open, unless another has taken its place or it cannot be removed."""
        with contextlib.suppress(OSError), self._lock() as lock:
            if os.path.samestat(os.fstat(descriptor), (self.path / name).lstat()):
                (self.path / name).unlink()
                _set_total(lock, self.scan()[1])  # it may have been counted with another length

    def add_hit(self, name: str, descriptor: int, depth_tokens: int) -> None:
        """Note a use, and leave it in the file's modification time for later runs and other processes."""
        with contextlib.suppress(OSError):  # a file of another user
            os.utime(descriptor)
        self.uses.add_hit(name, os.fstat(descriptor).st_mtime_ns, depth_tokens)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[int]:
        """Hold the folder's lock, against other processes and other stores of this one; give its open file."""
        descriptor = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_size != _TOTAL_BYTES:  # new
                os.ftruncate(descriptor, _TOTAL_BYTES)
                _set_total(descriptor, self.scan()[1])
            yield descriptor
        finally:
            os.close(descriptor)

    # Writing

    def _reserve(self, partial: Path, num_bytes: int, depth_tokens: int) -> int | None:
        """Open a partial file, locked and counted with its final length, once there is room for it; else None."""
        with self._lock() as lock:
            if not self._make_room(lock, num_bytes, depth_tokens):
                return None
            total = _total(lock)
            _set_total(lock, total + num_bytes)  # first: a kill may leave it too high, which a scan corrects
            try:
                return _open_partial(partial, num_bytes)
            except OSError:
                _set_total(lock, total)
                raise

    def _publish(self, partial: Path, path: Path) -> None:
        with self._lock() as lock:
            num_bytes = partial.lstat().st_size
            replaced_bytes = path.lstat().st_size if os.path.lexists(path) else None
            partial.replace(path)
            if replaced_bytes == num_bytes:
                _set_total(lock, _total(lock) - num_bytes)
            elif replaced_bytes is not None:  # it may have been counted with another length
                _set_total(lock, self.scan()[1])
        if self._fsync:
            sync(self.path)

    def _discard(self, partial: Path) -> None:
        """Remove a partial file that did not become a whole one."""
        if partial.exists():
            with self._lock() as lock:
                num_bytes = partial.lstat().st_size
                partial.unlink()
                _set_total(lock, _total(lock) - num_bytes)

    def _remove_leftovers(self) -> None:
        """Remove the partial files that no live process has locked."""
        for name in filter(_PARTIAL.fullmatch, os.listdir(self.path)):
            with contextlib.suppress(OSError):  # its writer lives, or is another user's
                descriptor = open_file(self.path / name)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    (self.path / name).unlink()
                finally:
                    os.close(descriptor)

    # Room

    def _make_room(self, lock: int, num_bytes: int, depth_tokens: int) -> bool:
        """Whether there is room for a new file, after removing files worth less than it, and no others."""
        if _total(lock) + num_bytes <= self._max_bytes:
            return True
        score = self.uses.new_score(depth_tokens)
        # A score grows by at most one per access: what was refused to one file is refused to a worse one.
        request = (score - self.uses.clock, num_bytes)
        if self._last_declined and all(mine >= last for mine, last in zip(request, self._last_declined, strict=True)):
            return False
        files, total = self._shrink(lock)
        goal = max(self._max_bytes - self._max_bytes // _SPARE, num_bytes)
        chosen = self._worst(files, total + num_bytes - goal, score)
        is_room = total + num_bytes - sum(files[name].st_size for name in chosen) <= self._max_bytes
        self._last_declined = None if is_room else request
        if is_room:
            self._evict(lock, files, total, chosen)
        return is_room

    def _shrink(self, lock: int) -> tuple[Files, int]:
        """List the files, after removing what is over the limit: it was higher, or is for another process."""
        files, total = self.scan()
        self.uses.refresh({name: found.st_mtime_ns for name, found in files.items()}, self._depth)
        total = self._evict(lock, files, total, self._worst(files, total - self._max_bytes, -1))
        return files, total

    def _worst(self, files: Files, num_bytes: int, score: float) -> list[str]:
        """Choose the files of least worth that have ``num_bytes`` together, of those that score above ``score``."""
        chosen = []
        for name in sorted(files, key=self.uses.score, reverse=True):
            if num_bytes <= 0 or self.uses.score(name) <= score:
                break
            chosen.append(name)
            num_bytes -= files[name].st_size
        return chosen

    def _evict(self, lock: int, files: Files, total: int, names: list[str]) -> int:
        """Remove files, from the list too; return the bytes that are left."""
        for name in names:
            (self.path / name).unlink(missing_ok=True)
            total -= files.pop(name).st_size
        _set_total(lock, total)
        self.num_evicted += len(names)
        return total

    def _depth(self, name: str) -> float:
        """The depth in a file's header; infinite, so that it goes first, if there is none to be read."""
        try:
            descriptor = open_file(self.path / name)
        except OSError:
            return float("inf")
        try:
            return read_header(descriptor)[0].depth_tokens
        except (WrongFileError, OSError):
            return float("inf")
        finally:
            os.close(descriptor)


def _open_partial(path: Path, num_bytes: int) -> int:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, num_bytes)
    except OSError:
        os.close(descriptor)
        path.unlink()
        raise
    return descriptor


def _total(lock: int) -> int:
    return int.from_bytes(os.pread(lock, _TOTAL_BYTES, 0), "little")


def _set_total(lock: int, num_bytes: int) -> None:
    os.pwrite(lock, max(num_bytes, 0).to_bytes(_TOTAL_BYTES, "little"), 0)
