"""What changes a document before it is packed (report 4.1): token splitting and fill-in-the-middle.

Fill-in-the-middle (V3 2.1, rate 0.1) moves a part of a document to its end, in the order prefix, suffix, middle:

    fim_begin prefix fim_hole suffix fim_end middle

It is done to whole documents, so that bos stands before fim_begin and eos ends the middle; a document longer than a
row is cut like any other. V3 does not say where the cuts are: here at two different borders between tokens, every
pair equally likely, so that prefix and suffix may be empty and the middle is not (ours).

Token splitting (V2, V3) is against the token boundary bias: a tokenizer with tokens like ".\\n" never shows a model
what follows a lone ".", which is how a prompt may well end. Of such tokens a random share is replaced by the two
tokens it was merged from. V3 gives no share; and no definition, ours is in ``split_table``.

Everything drawn is a function of (seed, epoch, document) alone, so that no state of a generator needs saving.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from dsv4.data.special import SpecialTokens

_FIM_DRAWS = 3  # whether, and the two borders


def uniform(seed: int, epoch: int, document: int, count: int) -> np.ndarray:
    """Return the first ``count`` of a document's own random numbers, [count] float64 in [0, 1).

    From the raw words of a counter-based generator, which numpy promises to keep as they are.
    """
    words = np.random.Philox(key=(seed, epoch), counter=(0, 0, document, 0)).random_raw(count)
    return (words >> np.uint64(11)) * 2.0**-53


def augment(
    tokens: np.ndarray,
    splits: Splits,
    special: SpecialTokens,
    *,
    fim_rate: float,
    split_rate: float,
    seed: int,
    epoch: int,
    document: int,
) -> np.ndarray:
    """Return a document, [n] integers, n at least 1, as this epoch shows it: [m], same dtype, no bos or eos."""
    candidates = np.flatnonzero(splits.num_parts[tokens] > 1) if split_rate > 0 else tokens[:0]
    draws = uniform(seed, epoch, document, _FIM_DRAWS + len(candidates))
    tokens = split(tokens, splits, candidates[draws[_FIM_DRAWS:] < split_rate])
    if draws[0] >= fim_rate:
        return tokens
    return fill_in_the_middle(tokens, special, *borders(len(tokens), draws[1], draws[2]))


def borders(num_tokens: int, first: float, second: float) -> tuple[int, int]:
    """Turn two numbers in [0, 1) into begin < end of a middle: two of num_tokens + 1 borders, each pair as likely."""
    one, other = int(first * (num_tokens + 1)), int(second * num_tokens)
    other += other >= one
    return min(one, other), max(one, other)


def fill_in_the_middle(tokens: np.ndarray, special: SpecialTokens, begin: int, end: int) -> np.ndarray:
    """Move tokens[begin:end] behind the rest, with the three marks: [n] integers to [n + 3]."""
    marks = np.array([[special.fim_begin], [special.fim_hole], [special.fim_end]], dtype=tokens.dtype)
    return np.concatenate([marks[0], tokens[:begin], marks[1], tokens[end:], marks[2], tokens[begin:end]])


@dataclass(frozen=True, eq=False)
class Splits:
    """A split table as arrays: token t is made of parts[first[t] : first[t] + num_parts[t]].

    num_parts, first: [V] int64; num_parts is 1 for tokens that stay whole. parts: [sum of parts] integers.
    """

    num_parts: np.ndarray
    first: np.ndarray
    parts: np.ndarray


def splits_of(table: Mapping[int, tuple[int, ...]], vocab_size: int) -> Splits:
    """Turn a split table into arrays over a vocabulary."""
    num_parts = np.ones(vocab_size, dtype=np.int64)
    first = np.zeros(vocab_size, dtype=np.int64)
    parts: list[int] = []
    for token, its_parts in table.items():
        num_parts[token], first[token] = len(its_parts), len(parts)
        parts += its_parts
    return Splits(num_parts, first, np.array(parts, dtype=np.int64))


def split(tokens: np.ndarray, splits: Splits, where: np.ndarray) -> np.ndarray:
    """Replace the tokens at the indices ``where`` [k], all of them splittable, by their parts; keeps the dtype."""
    if len(where) == 0:
        return tokens
    count = np.ones(len(tokens), dtype=np.int64)
    count[where] = splits.num_parts[tokens[where]]
    shift = np.cumsum(count) - count  # [n]: where each token's parts begin in the result
    result = np.repeat(tokens, count)
    count = count[where]
    inside = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)  # 0 1 0 1 2 ..: which part
    part = np.repeat(splits.first[tokens[where]], count) + inside
    result[np.repeat(shift[where], count) + inside] = splits.parts[part]
    return result


def split_table(tokenizer: Tokenizer) -> dict[int, tuple[int, ...]]:
    """Return the tokens that may be split, each with the two tokens of the merge that first made it.

    Those are the tokens of a BPE whose text holds a line break and a punctuation mark or symbol (Unicode categories
    P and S, which pre-tokenizers group alike).
    """
    model = json.loads(tokenizer.to_str())["model"]
    vocab: dict[str, int] = model["vocab"]
    made_of: dict[int, tuple[int, ...]] = {}
    for left, right in model["merges"]:
        made_of.setdefault(vocab[left + right], (vocab[left], vocab[right]))
    texts = tokenizer.decode_batch([[token] for token in made_of], skip_special_tokens=False)
    return {token: parts for (token, parts), text in zip(made_of.items(), texts, strict=True) if _is_splittable(text)}


def _is_splittable(text: str) -> bool:
    # U+FFFD is a symbol too, but here it stands for the bytes of half a character.
    marks = (char for char in text if char != "\ufffd" and unicodedata.category(char)[0] in "PS")
    return ("\n" in text or "\r" in text) and any(marks)
