"""Generated conversations as token ids, for a store. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from typing import NamedTuple

from tokenizers import Tokenizer

from dsv4.config.train import DataConfig
from dsv4.data.conversations.generate import VERSION, Conversation, conversation
from dsv4.data.prompt import PromptTokenizer
from dsv4.data.split import SPLITS, Split
from dsv4.text.encode import Prompt, encode
from dsv4.text.passages import OWN

AT_ONCE = 256  # conversations in memory


class Encoded(NamedTuple):
    """A document: its side, its ids without bos and eos, the UTF-8 bytes of its text."""

    split: Split
    token_ids: list[int]
    num_bytes: int


def rendered(made: Conversation, passages=OWN) -> Prompt:
    """The whole conversation as a model sees it, from bos to the eos of its last answer."""
    return encode(made.messages, thinking=made.thinking, effort=made.effort, passages=passages)


def encode_conversations(
    config: DataConfig, tokenizer: Tokenizer, on_duplicate: Callable[[str], None]
) -> Iterator[list[Encoded]]:
    """Yield ``config.num_conversations`` for training, and as many more as the share of held-out facts says.

    Equal ones count once; ``on_duplicate`` is called with the others.
    """
    prompts = PromptTokenizer(tokenizer)
    for split, count in num_conversations(config).items():
        seen: set[bytes] = set()
        batch: list[Encoded] = []
        for index in range(count):
            prompt = rendered(conversation(split, index, config.validation_fraction))
            digest = hashlib.sha256(prompt.text.encode()).digest()
            if digest in seen:
                on_duplicate(f"{split}:{index}")
                continue
            seen.add(digest)
            num_bytes = sum(len(part.encode()) for part in prompt.parts if isinstance(part, str))
            batch.append(Encoded(split, prompts.ids(prompt)[1:-1], num_bytes))
            if len(batch) == AT_ONCE:
                yield batch
                batch = []
        yield batch


def num_conversations(config: DataConfig) -> dict[Split, int]:
    """How many each side has, at least one."""
    held_out = max(1, round(config.num_conversations * config.validation_fraction))
    return dict(zip(SPLITS, (config.num_conversations, held_out), strict=True))


def recipe_sha256(config: DataConfig) -> str:
    """Hash of all that decides the conversations: another hash means others."""
    return hashlib.sha256(json.dumps([VERSION, config.num_conversations]).encode()).hexdigest()
