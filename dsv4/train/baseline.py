"""What a model of bytes alone needs for the same validation text: the line a language model must be under."""

from __future__ import annotations

from collections.abc import Iterator

from tokenizers import Tokenizer

from dsv4.data.batch import PADDING, Batch
from dsv4.data.store import TokenStore
from dsv4.eval.ngram import bits_per_byte

DOCUMENTS_AT_ONCE = 1000


def ngram_bits(store: TokenStore, validation: list[Batch], tokenizer: Tokenizer, order: int) -> float:
    """Bits per byte of a byte n-gram counted on all of ``store``, on the text of the validation batches."""
    return bits_per_byte(_documents(store, tokenizer), _pieces(validation, tokenizer), order)


def _documents(store: TokenStore, tokenizer: Tokenizer) -> Iterator[bytes]:
    for first in range(0, store.num_documents, DOCUMENTS_AT_ONCE):
        last = min(first + DOCUMENTS_AT_ONCE, store.num_documents)
        for text in tokenizer.decode_batch([store.document(i).tolist() for i in range(first, last)]):
            yield text.encode()


def _pieces(batches: list[Batch], tokenizer: Tokenizer) -> Iterator[bytes]:
    """The documents of packed rows, or their pieces, without special tokens."""
    for batch in batches:
        for tokens, segments in zip(batch.token_ids.tolist(), batch.segment_ids.tolist(), strict=True):
            pieces: dict[int, list[int]] = {}
            for token, segment in zip(tokens, segments, strict=True):
                if segment != PADDING:
                    pieces.setdefault(segment, []).append(token)
            for text in tokenizer.decode_batch(list(pieces.values())):
                if text:
                    yield text.encode()
