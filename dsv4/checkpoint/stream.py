"""Write a checkpoint tensor by tensor, so that it may be larger than memory, and go on where an earlier write stopped.

    .NAME.partial/              beside NAME until all is written
        model-00001-of-...      whole shards; the one being written has a hidden name
        progress.json           what is being written, and size and SHA-256 of each whole shard

{"format": 1, "key": "...", "config": {...}, "shards": {"model-00001-of-...": {"bytes": 612, "sha256": "9f86..."}}}

Index and config come last, the config last of all, and then the folder gets its name: what has the name was whole when
it got it, and what lacks a config is read by nobody.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby, zip_longest
from pathlib import Path, PurePosixPath

import torch

from dsv4.accounting.tensors import TensorSpec, inventory, num_shards, shard_name, total_bytes
from dsv4.checkpoint.manifest import Entry, sync
from dsv4.checkpoint.save import INDEX
from dsv4.config.files import write_then_rename
from dsv4.config.load import save_config, to_released
from dsv4.config.model import ModelConfig

Make = Callable[[Sequence[TensorSpec]], Iterator[tuple[TensorSpec, torch.Tensor]]]
"""Gives the tensors of a shard, one after another, in the order they are asked for."""
Tell = Callable[[int, int], None]
"""Is told how many bytes of tensors are written, and how many there will be."""

CONFIG = "config.json"
PROGRESS = "progress.json"
FORMAT = 1

_DTYPES = {
    "BF16": (torch.bfloat16,),
    "F32": (torch.float32,),
    "F8_E4M3": (torch.float8_e4m3fn, torch.uint8),
    "F8_E8M0": (torch.float8_e8m0fnu, torch.uint8),
    "I64": (torch.int64,),
    "I8": (torch.int8, torch.uint8),
}
_ALIGNMENT = 8  # of the first tensor in a file


def write_stream(
    directory: str | os.PathLike[str],
    config: ModelConfig,
    make: Make,
    *,
    key: str,
    files: Mapping[str, bytes],
    tell: Tell = lambda done, total: None,
) -> None:
    """Write a checkpoint of ``config``, stored as its ``storage`` says, to ``directory``, new or empty.

    make: is called with the specs of one file at a time, and gives each with its tensor: contiguous or not, on any
    device, in the stored shape and dtype, where uint8 stands for every dtype of 8 bits. files: what else belongs to
    the checkpoint, by its path inside it. key: says what the tensors are made from and how.

    After an error or a kill, a call with the same key and config keeps the whole files, whose bytes it compares to
    their checksums, and asks ``make`` for the others alone; with another key or config it starts again. The same
    tensors give the same bytes. Raises ``ValueError``, before anything is written, for a directory that is in use,
    and for a tensor that is not what its spec says. A full disk is an ``OSError`` that names the file.
    """
    target = check_target(directory)
    specs = inventory(config)
    total = num_shards(config)
    shards = {shard_name(n, total): list(members) for n, members in groupby(specs, key=lambda spec: spec.shard)}
    _check_names(files, shards)
    with _partial(target) as partial:
        progress = _Progress(partial, key, config)
        whole: set[str] = set()
        done, all_bytes = 0, total_bytes(specs)
        for name in progress.keep_whole(shards):
            whole.add(name)
            done += total_bytes(shards[name])
            tell(done, all_bytes)
        for name, members in shards.items():
            if name in whole:
                continue
            for count in _write_shard(partial / name, members, make, progress):
                done += count
                tell(done, all_bytes)
        for name, content in files.items():
            _write_file(partial / name, content)
        weight_map = {spec.name: name for name, members in shards.items() for spec in members}
        index = {"metadata": {"total_size": all_bytes}, "weight_map": weight_map}
        _write_file(partial / INDEX, (json.dumps(index, indent=2) + "\n").encode())
        with _naming(partial / CONFIG):
            save_config(config, partial / CONFIG)
            sync(partial / CONFIG)
        progress.path.unlink()
        for folder in (*(path for path in sorted(partial.rglob("*")) if path.is_dir()), partial):
            sync(folder)
        partial.replace(target)
    sync(target.parent)


def check_target(directory: str | os.PathLike[str]) -> Path:
    """Return the whole path of a directory to be written; a ``ValueError`` if it is in use or could get no name."""
    target = Path(directory).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"directory is {target}, which exists and is not empty; expected a new or empty one")
    if not target.parent.is_dir():
        raise ValueError(f"directory is {target}, but {target.parent} does not exist; expected an existing parent")
    if os.path.ismount(target):  # what is written beside it cannot be renamed to it
        raise ValueError(f"directory is {target}, where a disk is mounted; expected a directory inside it")
    return target


class _Progress:
    """What is being written, and which files are whole. ``path``: where that is kept."""

    def __init__(self, partial: Path, key: str, config: ModelConfig) -> None:
        self.path = partial / PROGRESS
        self._record = {"format": FORMAT, "key": key, "config": to_released(config)}
        self._shards: dict[str, Entry] = {}

    def keep_whole(self, shards: Mapping[str, object]) -> Iterator[str]:
        """Yield the names of the whole files of the same record, and then remove all others."""
        partial = self.path.parent
        for name, entry in self._read().items():
            if name in shards and _is(partial / name, entry):
                self._shards[name] = entry
                yield name
        for path in partial.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in self._shards:
                path.unlink()
        self._write()

    def add(self, name: str, entry: Entry) -> None:
        """Note that a file is whole."""
        self._shards[name] = entry
        self._write()

    def _read(self) -> dict[str, Entry]:
        """The files noted earlier for the same record; none if there is no such note, or it cannot be read."""
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            if {name: data[name] for name in self._record} != self._record:
                return {}
            return {
                str(name): Entry(num_bytes=int(entry["bytes"]), sha256=str(entry["sha256"]))
                for name, entry in data["shards"].items()
            }
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return {}  # of a write that was cut off, or of another program: nothing that can be built upon

    def _write(self) -> None:
        shards = {name: {"bytes": entry.num_bytes, "sha256": entry.sha256} for name, entry in self._shards.items()}
        _write_file(self.path, (json.dumps(self._record | {"shards": shards}, indent=2) + "\n").encode())


@contextmanager
def _partial(target: Path) -> Iterator[Path]:
    """The folder beside ``target`` for what is not whole, locked: one process at a time writes to it."""
    partial = target.with_name(f".{target.name}.partial")
    partial.mkdir(exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{partial} is being written by another process; expected one at a time") from error
        yield partial
    finally:
        os.close(descriptor)


def _write_shard(path: Path, specs: Sequence[TensorSpec], make: Make, progress: _Progress) -> Iterator[int]:
    """Write one file under a hidden name, rename it and note it; yield the bytes of each tensor that is written."""
    hidden = path.with_name(f".{path.name}.partial")
    digest = hashlib.sha256()
    try:
        with _naming(path), hidden.open("wb") as file:
            header = _header(specs)
            file.write(header)
            digest.update(header)
            for spec, given in zip_longest(specs, make(specs)):
                data = _bytes(spec, given)
                file.write(data)
                digest.update(data)
                yield len(data)
            size = file.tell()
            file.flush()
            os.fsync(file.fileno())
        hidden.replace(path)
    finally:
        hidden.unlink(missing_ok=True)
    sync(path.parent)
    progress.add(path.name, Entry(num_bytes=size, sha256=digest.hexdigest()))


def _header(specs: Sequence[TensorSpec]) -> bytes:
    """What a safetensors file begins with: the header's length, and where each tensor lies behind it."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in specs:
        begin, end = end, end + spec.num_bytes
        entries[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _bytes(spec: TensorSpec | None, given: tuple[TensorSpec, torch.Tensor] | None) -> memoryview:
    """The bytes of what was made, which must be what was asked for."""
    if spec is None or given is None or given[0] != spec:
        wanted = "no more tensors in its file" if spec is None else spec.name
        raise ValueError(f"make gives {'nothing' if given is None else given[0].name}; expected {wanted}")
    tensor = given[1].detach()
    if tuple(tensor.shape) != spec.shape:
        raise ValueError(f"{spec.name} is made with shape {list(tensor.shape)}; expected {list(spec.shape)}")
    if tensor.dtype not in _DTYPES[spec.dtype]:
        wanted = " or ".join(map(str, _DTYPES[spec.dtype]))
        raise ValueError(f"{spec.name} is made with dtype {tensor.dtype}; expected {wanted}")
    return tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def _check_names(files: Mapping[str, bytes], shards: Mapping[str, object]) -> None:
    """Refuse a path that leaves the directory or is that of another file."""
    for name in files:
        path = PurePosixPath(name)
        is_inside = path.parts and not path.is_absolute() and ".." not in path.parts and str(path) == name
        if not is_inside or name in (INDEX, CONFIG, PROGRESS) or name in shards:
            raise ValueError(f"files holds {name!r}; expected paths inside the directory, of no file of the model")


def _write_file(path: Path, content: bytes) -> None:
    with _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_then_rename(path, lambda hidden: _write_synced(hidden, content))


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _is(path: Path, entry: Entry) -> bool:
    """Whether a file has this length and these bytes."""
    if not path.is_file() or path.stat().st_size != entry.num_bytes:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == entry.sha256


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Say of a full disk which file it had no room for; what the system says names none when bytes are written."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        message = "the disk is full; expected room for the rest. What is whole is kept: make room and write again"
        raise OSError(error.errno, message, str(path)) from error
