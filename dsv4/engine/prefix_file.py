"""One file of the prefix cache on the disk: a header that says what it is, then the payload.

    offset  bytes  little endian
         0      8  magic
         8      4  format version
        12     65  key (its length in the first byte): the model, tokenizer and cache format it was made by
        77     65  content hash, likewise
       142     16  kind, likewise
       158      8  depth of the prefix in tokens
       166      8  payload bytes
       174     32  SHA-256 of the payload
       206     32  SHA-256 of the 206 bytes before
       238     18  zeros
       256         payload

SHA-256, because processors compute it (1.7 GB/s on one core of ours; BLAKE2 0.8) and no damage passes it. A file is
read into memory, not mapped: the bytes that were verified are the bytes returned, whatever happens to it later.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

FORMAT = 1
HEADER_BYTES = 256
MOST_DIGEST_BYTES = 64

_MAGIC = b"\x89dsv4kv\n"
_HEADER = struct.Struct("<8sI65p65p16pQQ32s")
_BUFFERS_PER_CALL = 256  # systems allow 1024

Buffer = bytes | bytearray | memoryview | np.ndarray


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a file is: all but the checksums."""

    key: bytes
    content_hash: bytes
    kind: str
    depth_tokens: int
    payload_bytes: int

    @property
    def file_bytes(self) -> int:
        return HEADER_BYTES + self.payload_bytes


class WrongFileError(Exception):
    """A file is not what it was opened as. ``is_damaged``: nor is it an intact file of something else."""

    def __init__(self, reason: str, *, is_damaged: bool = True) -> None:
        super().__init__(reason)
        self.is_damaged = is_damaged


def as_views(payload: Sequence[Buffer]) -> list[memoryview]:
    """View each buffer as bytes, without a copy; leave out empty ones. Raises ``ValueError`` for one with gaps."""
    views = []
    for index, part in enumerate(payload):
        view = part.data if isinstance(part, np.ndarray) else memoryview(part)
        if not view.c_contiguous:
            raise ValueError(f"payload[{index}] has strides {view.strides}; expected a contiguous buffer")
        if view.nbytes:
            views.append(view.cast("B"))
    return views


def open_file(path: Path) -> int:
    """Open a file for reading, not through a link; a pipe of that name does not block."""
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)


def write_file(descriptor: int, header: Header, views: Sequence[memoryview]) -> None:
    """Write header and payload, each view as it is."""
    digest = sha256()
    for view in views:
        digest.update(view)
    fields = (header.key, header.content_hash, header.kind.encode(), header.depth_tokens, header.payload_bytes)
    start = _HEADER.pack(_MAGIC, FORMAT, *fields, digest.digest())
    left = [memoryview((start + sha256(start).digest()).ljust(HEADER_BYTES, b"\0")), *views]
    while left:
        num_bytes = os.writev(descriptor, left[:_BUFFERS_PER_CALL])
        while left and num_bytes >= left[0].nbytes:
            num_bytes -= left.pop(0).nbytes
        if num_bytes:
            left[0] = left[0][num_bytes:]


def read_header(descriptor: int) -> tuple[Header, bytes]:
    """Read the header of an open file of this version, and the checksum its payload must have."""
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        raise WrongFileError("it is no file", is_damaged=False)
    text = os.pread(descriptor, HEADER_BYTES, 0)
    if len(text) < HEADER_BYTES:
        raise WrongFileError(f"it has {found.st_size} bytes; expected a header of {HEADER_BYTES}")
    start = text[: _HEADER.size]
    magic, version, key, content_hash, kind, depth_tokens, payload_bytes, checksum = _HEADER.unpack(start)
    if magic != _MAGIC:
        raise WrongFileError(f"it begins with {magic!r}; expected {_MAGIC!r}")
    if version != FORMAT:  # another version may have another header
        raise WrongFileError(f"its format version is {version}; expected {FORMAT}", is_damaged=False)
    if text[_HEADER.size :] != sha256(start).digest().ljust(HEADER_BYTES - _HEADER.size, b"\0"):
        raise WrongFileError("its header does not have the checksum that is written there")
    if found.st_size != HEADER_BYTES + payload_bytes:
        raise WrongFileError(f"it has {found.st_size} bytes; expected {HEADER_BYTES + payload_bytes}")
    header = Header(
        key=key,
        content_hash=content_hash,
        kind=kind.decode(),
        depth_tokens=depth_tokens,
        payload_bytes=payload_bytes,
    )
    return header, checksum


def check_owner(header: Header, key: bytes, content_hash: bytes, kind: str) -> None:
    """Refuse a file of other content, or made by another model, tokenizer or cache format."""
    problems = []
    if header.key != key:
        problems.append(f"its key is {header.key.hex()}; expected {key.hex()}")
    if header.content_hash != content_hash:
        problems.append(f"its content hash is {header.content_hash.hex()}; expected {content_hash.hex()}")
    if header.kind != kind:
        problems.append(f"its kind is {header.kind}; expected {kind}")
    if problems:
        raise WrongFileError("; ".join(problems), is_damaged=False)


def read_payload(descriptor: int, header: Header, checksum: bytes) -> memoryview:
    """Read the payload into new memory, and verify it."""
    payload = np.empty(header.payload_bytes, np.uint8).data  # not zeroed first, and writable
    num_read = 0
    while num_read < len(payload):
        num_bytes = os.preadv(descriptor, [payload[num_read:]], HEADER_BYTES + num_read)
        if num_bytes == 0:
            raise WrongFileError(f"its payload ends after {num_read} bytes; expected {len(payload)}")
        num_read += num_bytes
    if sha256(payload).digest() != checksum:
        raise WrongFileError("its payload does not have the checksum in its header")
    return payload
