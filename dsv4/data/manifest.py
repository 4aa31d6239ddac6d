"""What a token store holds: every file with its size and hash, and the counts. Read strictly, written as JSON."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from dsv4.config.reader import Reader

MANIFEST = "manifest.json"
OFFSETS = "offsets.npy"
FORMAT = 1

TokenDtype = Literal["uint16", "uint32"]


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """A file of the store. size_bytes: its length. sha256: of its content, in hexadecimal."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Whole documents, one after the other, as raw little-endian token ids."""

    file: StoredFile
    documents: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The whole store."""

    dtype: TokenDtype
    tokenizer_sha256: str  # of the tokenizer.json that made the tokens
    documents: int
    tokens: int
    text_bytes: int  # UTF-8 bytes of the documents
    offsets: StoredFile  # [documents + 1] int64: where each document begins, in tokens from the first of the store
    shards: tuple[Shard, ...]

    @property
    def files(self) -> tuple[StoredFile, ...]:
        return (self.offsets, *(shard.file for shard in self.shards))


def shard_name(index: int) -> str:
    return f"tokens-{index:05d}.bin"


def file_sha256(path: Path) -> str:
    """The hash of a file's content, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(manifest: Manifest, directory: Path) -> None:
    """Write it into the directory of the store."""
    text = json.dumps({"format": FORMAT, **asdict(manifest)}, indent=2)
    (directory / MANIFEST).write_text(text + "\n")


def read_manifest(directory: Path) -> Manifest:
    """Read it back. A ``ValueError`` names the file and lists whatever is wrong with it."""
    path = directory / MANIFEST
    if not path.is_file():
        raise ValueError(f"token store {directory} has no {MANIFEST}; expected one")
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} is a {type(data).__name__}; expected an object")
    reader = Reader(data)
    reader.check_names(("format", *Manifest.__dataclass_fields__))
    reader.constant("format", FORMAT)
    return reader.finish(str(path), _manifest(reader))


def _manifest(reader: Reader) -> Manifest | None:
    dtype = reader.string("dtype")
    if dtype not in (None, *get_args(TokenDtype)):
        reader.problem("dtype", " or ".join(get_args(TokenDtype)))
    offsets = _file(reader, "offsets", OFFSETS)
    shards = [_shard(reader, entry, index) for index, entry in enumerate(reader.sequence("shards") or ())]
    manifest = reader.build(
        Manifest,
        dtype=dtype,
        tokenizer_sha256=reader.string("tokenizer_sha256"),
        **{name: reader.integer(name) for name in ("documents", "tokens", "text_bytes")},
        offsets=offsets,
        shards=None if None in shards else tuple(shards),
    )
    if manifest is not None:
        for name in ("documents", "tokens"):
            total = sum(getattr(shard, name) for shard in manifest.shards)
            if getattr(manifest, name) != total:
                reader.problem(name, f"{total}, the sum over the shards")
    return manifest


def _shard(reader: Reader, entry: object, index: int) -> Shard | None:
    inner = Reader(entry if isinstance(entry, dict) else {}, prefix=f"shards[{index}].")
    inner.check_names(tuple(Shard.__dataclass_fields__))
    file = _file(inner, "file", shard_name(index))
    shard = inner.build(Shard, file=file, documents=inner.integer("documents"), tokens=inner.integer("tokens"))
    reader.absorb(inner)
    return shard


def _file(reader: Reader, field: str, name: str) -> StoredFile | None:
    """A file under the one name it may have, so that a manifest cannot lead out of its directory."""
    inner = reader.nested(field)
    if inner is None:
        return None
    inner.check_names(tuple(StoredFile.__dataclass_fields__))
    inner.constant("name", name)
    file = inner.build(
        StoredFile, name=inner.string("name"), size_bytes=inner.integer("size_bytes"), sha256=inner.string("sha256")
    )
    reader.absorb(inner)
    return file
