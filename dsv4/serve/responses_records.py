"""Background responses on the disk: one file each, with what was asked and, when it has ended, what came of it."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsv4.checkpoint.manifest import sync
from dsv4.config.files import write_then_rename

ID = re.compile(r"resp_[0-9a-f]{24}")
MAX_FINISHED = 1000

log = logging.getLogger("dsv4.serve")


@dataclass(frozen=True, kw_only=True)
class Record:
    """A background response. key: the name of the API key that may see it. response: None until it has ended."""

    id: str
    key: str
    created: int
    request: dict[str, Any]
    prompt_ids: list[int]
    seed: int
    response: dict[str, Any] | None = None


class Records:
    """The records in a folder, which is made if it is not there; of those that have ended, the newest so many.

    What is asked for by an id that is none of this server's is not there: no other text ever becomes a file's name.
    """

    def __init__(self, folder: Path, max_finished: int = MAX_FINISHED) -> None:
        self._folder, self._max_finished = folder, max_finished
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for leftover in folder.glob(".*.partial"):
            leftover.unlink()

    def write(self, record: Record) -> None:
        """Store a record, in the place of an older one of its id; it survives a power failure after that."""
        text = json.dumps(asdict(record))

        def write(partial: Path) -> None:
            partial.write_text(text, encoding="ascii")
            sync(partial)

        write_then_rename(self._path(record.id), write)
        sync(self._folder)

    def read(self, id: str) -> Record | None:
        """The record of this id, or None."""
        if ID.fullmatch(id) is None:
            return None
        try:
            return Record(**json.loads(self._path(id).read_text(encoding="ascii")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            log.warning("the record of response %s cannot be read (%s): left out", id, error)
            return None

    def unfinished(self) -> Iterator[Record]:
        """Those that have not ended, in the order they came."""
        found = [record for path in self._folder.glob("resp_*.json") if (record := self.read(path.stem)) is not None]
        yield from sorted((one for one in found if one.response is None), key=lambda one: (one.created, one.id))

    def remove(self, id: str) -> None:
        """Forget a record, if it is there."""
        self._path(id).unlink(missing_ok=True)

    def prune(self, running: Set[str]) -> None:
        """Forget those that ended first, beyond so many. running: the ids of those that have not ended."""
        finished = [path for path in self._folder.glob("resp_*.json") if path.stem not in running]
        num_over = len(finished) - self._max_finished
        if num_over > 0:
            for path in sorted(finished, key=_written)[:num_over]:
                path.unlink(missing_ok=True)

    def _path(self, id: str) -> Path:
        assert ID.fullmatch(id), f"the id is {id!r}; expected resp_ and 24 digits"
        return self._folder / f"{id}.json"


def _written(path: Path) -> int:
    """When a file was written; at first of all if it has just been removed."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0
