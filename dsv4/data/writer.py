"""Write a token store document by document: what is in memory is one document, and 8 bytes of each before it."""

from __future__ import annotations

import hashlib
from array import array
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np

from dsv4.data.manifest import OFFSETS, Manifest, Shard, StoredFile, TokenDtype, file_sha256, shard_name, write_manifest

SHARD_TOKENS = 2**27  # 256 MiB of uint16


def token_dtype(vocab_size: int) -> TokenDtype:
    """The smallest dtype that holds every id."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


class TokenWriter:
    """Appends documents to a store in an existing, empty directory; ``finish`` writes offsets and manifest.

    A shard holds at most ``shard_tokens`` tokens, or one document that is longer. Until ``finish`` there is no
    manifest, so that half a store is not taken for one. A context manager: leaving it closes the shard in work.
    """

    def __init__(
        self, directory: Path, *, vocab_size: int, tokenizer_sha256: str, shard_tokens: int = SHARD_TOKENS
    ) -> None:
        self.directory = directory
        self.dtype: TokenDtype = token_dtype(vocab_size)
        self.tokenizer_sha256 = tokenizer_sha256
        self.shard_tokens = shard_tokens
        self.offsets = array("q", [0])
        self.text_bytes = 0
        self.shards: list[Shard] = []
        self._open: _OpenShard | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._open is not None:
            self._open.file.close()

    def append(self, token_ids: np.ndarray | list[int], num_bytes: int) -> None:
        """Write a document of at least one token, the ids of a text of ``num_bytes`` UTF-8 bytes."""
        if self._open is not None and self._open.tokens + len(token_ids) > self.shard_tokens:
            self._finish_shard()
        if self._open is None:
            self._open = _OpenShard(self.directory, shard_name(len(self.shards)))
        self._open.write(np.asarray(token_ids, np.dtype(self.dtype).newbyteorder("<")))
        self.offsets.append(self.offsets[-1] + len(token_ids))
        self.text_bytes += num_bytes

    def finish(self) -> Manifest:
        """Finish the store and return what it holds."""
        self._finish_shard()
        path = self.directory / OFFSETS
        np.save(path, np.asarray(self.offsets, "<i8"), allow_pickle=False)
        manifest = Manifest(
            dtype=self.dtype,
            tokenizer_sha256=self.tokenizer_sha256,
            documents=len(self.offsets) - 1,
            tokens=self.offsets[-1],
            text_bytes=self.text_bytes,
            offsets=StoredFile(name=OFFSETS, size_bytes=path.stat().st_size, sha256=file_sha256(path)),
            shards=tuple(self.shards),
        )
        write_manifest(manifest, self.directory)
        return manifest

    def _finish_shard(self) -> None:
        if self._open is not None:
            self.shards.append(self._open.finish())
            self._open = None


class _OpenShard:
    """A shard being written, with the hash of what was written so far."""

    def __init__(self, directory: Path, name: str) -> None:
        self.name = name
        self.file: BinaryIO = (directory / name).open("xb")
        self.digest = hashlib.sha256()
        self.documents = self.tokens = self.size_bytes = 0

    def write(self, token_ids: np.ndarray) -> None:
        raw = token_ids.tobytes()
        self.file.write(raw)
        self.digest.update(raw)
        self.documents += 1
        self.tokens += len(token_ids)
        self.size_bytes += len(raw)

    def finish(self) -> Shard:
        self.file.close()
        file = StoredFile(name=self.name, size_bytes=self.size_bytes, sha256=self.digest.hexdigest())
        return Shard(file=file, documents=self.documents, tokens=self.tokens)
