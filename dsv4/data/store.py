"""A token store: documents as token ids on disk, read by mapping them into memory. No torch.

A directory with ``manifest.json``, ``offsets.npy`` and raw shards. A document lies in one shard, so that it is a view
of the file; beginning and end of sentence are not in it. ``dsv4.data.writer`` makes one.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

from dsv4.data.manifest import MANIFEST, Manifest, StoredFile, file_sha256, read_manifest
from dsv4.data.split import SPLITS, Split


@dataclass(frozen=True, eq=False)
class TokenStore:
    """Documents of one split. ``open`` makes one; nothing of it is loaded before it is read."""

    directory: Path
    manifest: Manifest
    offsets: np.ndarray  # [documents + 1] int64, in tokens from the first of the store
    shards: tuple[np.ndarray, ...]  # each [tokens], uint16 or uint32
    first_documents: tuple[int, ...]  # of each shard, and the number of documents last

    @classmethod
    def open(cls, directory: str | os.PathLike[str], split: Split) -> TokenStore:
        """Open the store of a split in a prepared directory.

        Sizes are checked, content is not (``verify`` does that). A file that is missing, of another size or not in
        the manifest, and a manifest that is wrong, is a ``ValueError`` that names it.
        """
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; expected one of {', '.join(SPLITS)}")
        root = Path(directory) / split
        manifest = read_manifest(root)
        for file in manifest.files:
            _check_size(root, file)
        known = {MANIFEST, *(file.name for file in manifest.files)}
        for name in sorted(os.listdir(root)):
            if name not in known:
                raise ValueError(f"token store {root} holds {name}, which its manifest does not name; expected it gone")
        return cls(
            directory=root,
            manifest=manifest,
            offsets=_map_offsets(root, manifest),
            shards=_map_shards(root, manifest),
            first_documents=tuple(accumulate((shard.documents for shard in manifest.shards), initial=0)),
        )

    @property
    def num_documents(self) -> int:
        return self.manifest.documents

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents, beginning and end of sentence not counted."""
        return self.manifest.tokens

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the text of all documents."""
        return self.manifest.text_bytes

    def document(self, index: int) -> np.ndarray:
        """The token ids of a document, [tokens] uint16 or uint32: a read-only view, without bos and eos."""
        if not 0 <= index < self.num_documents:
            raise ValueError(f"document is {index}; expected 0 <= document < {self.num_documents}")
        shard = bisect_right(self.first_documents, index) - 1
        first = self.offsets[self.first_documents[shard]]
        return self.shards[shard][self.offsets[index] - first : self.offsets[index + 1] - first]

    def verify(self) -> None:
        """Hash every file; a ``ValueError`` names the first whose content is not what was written."""
        for file in self.manifest.files:
            found = file_sha256(self.directory / file.name)
            if found != file.sha256:
                raise ValueError(f"{self.directory / file.name} has sha256 {found}; expected {file.sha256}")


def _check_size(root: Path, file: StoredFile) -> None:
    path = root / file.name
    if not path.is_file():
        raise ValueError(f"{path} is missing; expected a file of {file.size_bytes} bytes")
    if path.stat().st_size != file.size_bytes:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; expected {file.size_bytes}")


def _map_shards(root: Path, manifest: Manifest) -> tuple[np.ndarray, ...]:
    dtype = np.dtype(manifest.dtype).newbyteorder("<")
    for shard in manifest.shards:
        if shard.file.size_bytes != shard.tokens * dtype.itemsize:
            raise ValueError(
                f"{root / shard.file.name} has {shard.file.size_bytes} bytes; expected {shard.tokens * dtype.itemsize} "
                f"for {shard.tokens} tokens of {manifest.dtype}"
            )
    # Plain arrays over the maps: slices of np.memmap are several times slower to make.
    return tuple(np.asarray(np.memmap(root / shard.file.name, dtype, mode="r")) for shard in manifest.shards)


def _map_offsets(root: Path, manifest: Manifest) -> np.ndarray:
    path = root / manifest.offsets.name
    try:
        offsets = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}; expected an array of int64") from error
    if offsets.shape != (manifest.documents + 1,) or offsets.dtype != np.dtype("<i8"):
        raise ValueError(
            f"{path} is {list(offsets.shape)} {offsets.dtype}; expected [{manifest.documents + 1}] int64, one more "
            "than the documents"
        )
    if offsets[-1] != manifest.tokens:
        raise ValueError(f"{path} ends at {offsets[-1]}; expected the store's {manifest.tokens} tokens")
    return offsets
