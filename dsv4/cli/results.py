"""What came of many prompts, as JSON lines: on stdout, or in a file written beside and renamed.

Each line of a file is on the disk as soon as its prompt has ended, in ``.NAME.partial``; when all have ended, they are
put in order under the file's name. So a run that is resumed from its log goes on with the file too.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import IO, Any

from dsv4.config.files import write_then_rename

Result = dict[str, Any]
"""With ``id``, and whatever is said of it."""


class Results:
    """The lines of some prompts. On stdout they come in order: a line waits for those before it."""

    def __init__(self, path: Path | None, ids: list[str], *, goes_on: bool = False) -> None:
        """Begin; goes_on: after the lines of a partial file, if there is one, but for those of ``ids``."""
        self.path = path
        self._waiting = list(ids)
        self._found: dict[str, Result] = {}
        self._file: IO[str] | None = None
        if path is not None:
            before = [r for r in read_partial(path) if r["id"] not in ids] if goes_on else []
            write_then_rename(partial_of(path), lambda new: _write(new, before))
            self._found = {result["id"]: result for result in before}
            self._file = partial_of(path).open("a", encoding="utf-8")

    def add(self, result: Result) -> list[str]:
        """Take the line of one more prompt; return the ids of the lines that are written now."""
        self._found[result["id"]] = result
        if self._file is not None:
            self._file.write(_line(result))
            self._file.flush()
            os.fsync(self._file.fileno())
            return [result["id"]]
        written = []
        while self._waiting and self._waiting[0] in self._found:
            written.append(self._waiting.pop(0))
            sys.stdout.write(_line(self._found.pop(written[-1])))
            sys.stdout.flush()
        return written

    def finish(self) -> None:
        """Put the lines of a file in order, and the file in its place."""
        if self.path is None:
            return
        write_then_rename(self.path, lambda new: _write(new, sorted(self._found.values(), key=_order)))
        self.close()
        partial_of(self.path).unlink()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def partial_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def read_partial(path: Path) -> list[Result]:
    """Read the partial file of ``path``, without a last line that is not whole; nothing if there is none."""
    partial = partial_of(path)
    if not partial.is_file():
        return []
    results = []
    for line in partial.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):
            results.append(json.loads(line))
    return results


def _write(path: Path, results: list[Result]) -> None:
    path.write_text("".join(map(_line, results)), encoding="utf-8")


def _line(result: Result) -> str:
    return json.dumps(result, ensure_ascii=False) + "\n"


def _order(result: Result) -> int:
    """By the number at the end of its id, as those of a file have; others stay as they came."""
    number = re.search(r"\d+$", result["id"])
    return int(number[0]) if number else 0
