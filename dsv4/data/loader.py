"""From a token store to batches, endlessly, in an order that a few numbers can resume.

Each epoch visits the documents in a random order of its own. A document is augmented, gets bos in front and eos
behind, and waits in the packer's buffer until rows have taken it. Order and augmentation are functions of (seed,
epoch, document): the state is a place in that order, and which tokens of which documents wait. So batches may be
asked for ahead of time, and the state from before be kept.

Memory: the order takes 8 bytes a document (24 while the next is drawn), 8 GB for a billion; the buffer takes 4
bytes a token of the documents in it. Beyond that, give each of several loaders a part of the corpus.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice, takewhile
from typing import Any, Protocol

import numpy as np

from dsv4.data.augment import augment, splits_of
from dsv4.data.batch import Batch, IsTarget, batch_of
from dsv4.data.pack import Packer, Piece
from dsv4.data.special import SpecialTokens

VALIDATION_BUFFER = 256  # documents among which validation rows are packed
VALIDATION_SEED = 0  # of the order of validation documents: a sample, where the store's order would be a corner


class Store(Protocol):
    """Documents as token ids, without bos and eos."""

    @property
    def num_documents(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    def document(self, index: int, /) -> np.ndarray: ...


class Loader:
    """Endless batches of a store's documents, shuffled, augmented and packed.

    token_bytes: [V] integers, UTF-8 bytes of each token, special tokens none. splits: tokens that may be split, with
    their parts. pack_buffer: documents in the packer's buffer. is_target: which tokens of a piece are predicted; None
    for all. is_shuffled: False keeps the store's order in every epoch. Padding is eos, as in the released tokenizer.
    Raises ``ValueError`` when the store is empty.
    """

    def __init__(
        self,
        store: Store,
        special: SpecialTokens,
        token_bytes: np.ndarray,
        splits: Mapping[int, tuple[int, ...]],
        *,
        seed: int,
        fim_rate: float,
        split_rate: float,
        pack_buffer: int,
        is_target: IsTarget | None = None,
        is_shuffled: bool = True,
    ) -> None:
        _refuse_empty(store)
        self._store = store
        self._special = special
        self._token_bytes = token_bytes
        self._splits = splits_of(splits, len(token_bytes))
        self._seed = seed
        self._fim_rate = fim_rate
        self._split_rate = split_rate
        self._is_target, self._is_shuffled = is_target, is_shuffled
        self._packer = Packer(self._pieces(), pack_buffer)
        self._begin_epoch(0)

    def next_batch(self, num_rows: int, sequence: int) -> Batch:
        """Return the next ``num_rows`` rows of ``sequence`` tokens; both may change from call to call."""
        rows = [self._packer.row(sequence) for _ in range(num_rows)]
        return batch_of(
            rows, sequence, padding_token=self._special.eos, token_bytes=self._token_bytes, is_target=self._is_target
        )

    def state(self) -> dict[str, Any]:
        """Return what the next batches depend on, beside the arguments of the constructor; for JSON.

        epoch; position: documents of its order that have been taken; buffer: [epoch, document, begin, end] of each
        piece that waits, counted in tokens of the augmented document. Some 25 bytes a piece, and cheap.
        """
        buffer = [[piece.epoch, piece.document, piece.begin, piece.end] for piece in self._packer.pieces]
        return {"epoch": self._epoch, "position": self._position, "buffer": buffer}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken: the very next token follows.

        Raises ``ValueError``, and changes nothing, when the documents that waited are not those of this loader.
        """
        buffer = [self._resumed(*place) for place in state["buffer"]]
        self._begin_epoch(state["epoch"])
        self._position = state["position"]
        self._packer.replace(buffer)

    def _pieces(self) -> Iterator[Piece]:
        while True:
            while self._position < self._store.num_documents:
                document = int(self._order[self._position])
                self._position += 1
                yield self._piece(self._epoch, document)
            self._begin_epoch(self._epoch + 1)

    def _begin_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._position = 0
        count = self._store.num_documents
        self._order = order(count, self._seed, epoch) if self._is_shuffled else np.arange(count)

    def _piece(self, epoch: int, document: int) -> Piece:
        tokens = augment(
            self._store.document(document).astype(np.int32),
            self._splits,
            self._special,
            fim_rate=self._fim_rate,
            split_rate=self._split_rate,
            seed=self._seed,
            epoch=epoch,
            document=document,
        )
        return Piece(epoch, document, 0, _delimited(tokens, self._special))

    def _resumed(self, epoch: int, document: int, begin: int, end: int) -> Piece:
        num_documents = self._store.num_documents
        if document >= num_documents:
            raise ValueError(f"the state waits for document {document}; expected one of the store's {num_documents}")
        piece = self._piece(epoch, document)
        if piece.end != end:
            raise ValueError(
                f"the state says that document {document} has {end} tokens, and it has {piece.end}; expected the "
                "corpus, seed and rates that the state was taken with"
            )
        return piece.rest(begin)


def order(num_documents: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of documents of an epoch: a permutation, [num_documents] int64."""
    # The last word of the counter keeps these draws apart from those of documents.
    return np.random.Philox(key=(seed, epoch), counter=(0, 0, 0, 1)).random_raw(num_documents).argsort(kind="stable")


def validation_batches(
    store: Store,
    special: SpecialTokens,
    token_bytes: np.ndarray,
    *,
    num_rows: int,
    sequence: int,
    num_tokens: int,
    is_target: IsTarget | None = None,
) -> Iterator[Batch]:
    """Yield the first ``num_tokens`` tokens of a fixed random order of the store, unaugmented, packed as in training.

    bos and eos count; a store that has fewer gives all it has. The text is the same whatever num_rows and sequence
    are, only its cuts are not. The last batch may have fewer rows, and its last row more padding.
    Raises ``ValueError`` when the store is empty.
    """
    _refuse_empty(store)
    packer = Packer(_first(store, special, num_tokens), VALIDATION_BUFFER)
    rows = takewhile(len, iter(lambda: packer.row(sequence), None))
    while some := list(islice(rows, num_rows)):
        yield batch_of(some, sequence, padding_token=special.eos, token_bytes=token_bytes, is_target=is_target)


def _first(store: Store, special: SpecialTokens, num_tokens: int) -> Iterator[Piece]:
    for document in order(store.num_documents, VALIDATION_SEED, epoch=0):
        tokens = _delimited(store.document(int(document)).astype(np.int32), special)[:num_tokens]
        yield Piece(0, int(document), 0, tokens)
        num_tokens -= len(tokens)
        if num_tokens == 0:
            return


def check_corpus(store: Store, sequence: int, batch_tokens: int) -> None:
    """Raise ``ValueError`` when a store, bos and eos counted, has fewer tokens than one batch.

    A batch is ``batch_tokens`` in rows of ``sequence``, and at least a row.
    """
    available, expected = store.num_tokens + 2 * store.num_documents, max(batch_tokens, sequence)
    if available < expected:
        raise ValueError(
            f"the corpus has {available} tokens in {store.num_documents} documents; expected at least one batch: "
            f"{expected} tokens, {expected // sequence} rows of {sequence}"
        )


def _refuse_empty(store: Store) -> None:
    if store.num_documents == 0:
        raise ValueError("the store has 0 documents; expected at least 1")


def _delimited(tokens: np.ndarray, special: SpecialTokens) -> np.ndarray:
    marks = np.array([[special.bos], [special.eos]], dtype=tokens.dtype)
    return np.concatenate([marks[0], tokens, marks[1]])
