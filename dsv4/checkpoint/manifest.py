"""The manifest of a training checkpoint: size and SHA-256 of every file, so that what is read is what was written.

{"format": 1, "step": 120, "files": {"state.json": {"bytes": 612, "sha256": "9f86..."}, ...}}
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

MANIFEST = "manifest.json"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What a file must be: its length, and the SHA-256 of its bytes in hexadecimal."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The step a checkpoint was written after, and its files by their path inside it, with forward slashes."""

    step: int
    files: dict[str, Entry]


def write_manifest(folder: Path, step: int) -> None:
    """List every file below ``folder`` in its manifest, and return once all of it is on the disk."""
    files = {path.relative_to(folder).as_posix(): _seal(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    listed = {name: {"bytes": entry.num_bytes, "sha256": entry.sha256} for name, entry in files.items()}
    text = json.dumps({"format": FORMAT, "step": step, "files": listed}, indent=2) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    sync(folder / MANIFEST)
    for inner in sorted(path for path in folder.rglob("*") if path.is_dir()):
        sync(inner)
    sync(folder)


def read_manifest(folder: Path) -> Manifest:
    """Read a checkpoint's manifest. Raises ``ValueError`` when it is missing, damaged or of another format."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"folder {folder} has no {MANIFEST}; expected a checkpoint that a training run wrote")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        version = data["format"]
        if version == FORMAT:
            files = {
                str(name): Entry(num_bytes=int(entry["bytes"]), sha256=str(entry["sha256"]))
                for name, entry in data["files"].items()
            }
            return Manifest(step=int(data["step"]), files=files)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); expected JSON with format, step and files") from error
    raise ValueError(f"{path} has format {version!r}; expected {FORMAT}")


def wrong_sizes(folder: Path, manifest: Manifest) -> dict[str, str]:
    """Say of each file that is missing or of another length than the manifest has it, what is wrong."""
    problems = {}
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file():
            problems[name] = f"{name} is missing; expected a file of {entry.num_bytes} bytes"
        elif path.stat().st_size != entry.num_bytes:
            problems[name] = f"{name} has {path.stat().st_size} bytes; expected {entry.num_bytes}"
    return problems


def wrong_files(folder: Path, manifest: Manifest) -> list[str]:
    """Say of each file that is not what the manifest has it to be, what is wrong. Reads every byte once."""
    problems = wrong_sizes(folder, manifest)
    for name, entry in manifest.files.items():
        if name not in problems and (found := _digest(folder / name)) != entry.sha256:
            problems[name] = f"{name} has sha256 {found}; expected {entry.sha256}"
    return list(problems.values())


def sync(path: Path) -> None:
    """Return once a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _seal(path: Path) -> Entry:
    sync(path)
    return Entry(num_bytes=path.stat().st_size, sha256=_digest(path))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
