"""Which documents count, and on which side: duplicates out, the rest split, both by hash of the text (report 4.1).

The side of a text depends on the text alone. So it stays when other documents come and go, when files are renamed,
and from one seed to the next, and two runs over the same pile are validated on the same text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, get_args

from dsv4.data.sources import Document

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = get_args(Split)


def _ignore(_: str) -> None:
    pass


def split_documents(
    found: Iterable[Document], validation_fraction: float, on_duplicate: Callable[[str], None] = _ignore
) -> Iterator[tuple[Split, Document]]:
    """Yield each document with its side, the first of equal texts only; ``on_duplicate`` is called with the others.

    Remembers 32 bytes a document, not the text.
    """
    seen: set[bytes] = set()
    for document in found:
        digest = hashlib.sha256(document.text.encode()).digest()
        if digest in seen:
            on_duplicate(document.name)
            continue
        seen.add(digest)
        yield _side(digest, validation_fraction), document


def _side(digest: bytes, validation_fraction: float) -> Split:
    """The first 64 bits of the hash, as a number in [0, 1), against the fraction."""
    share = int.from_bytes(digest[:8], "big") / 2**64
    return "validation" if share < validation_fraction else "train"
