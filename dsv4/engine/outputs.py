"""What an engine gives back: pieces while a request runs, the whole when it has ended, and what a step ran."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from dsv4.engine.request import Finish
from dsv4.engine.sample import LogProbabilities, NoTokenError
from dsv4.engine.step import Entry


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one step added to a request. The last piece of a request has ``finish``.

    token_ids: those that belong to the output; text: what they complete, without what a stop string may begin with;
    logprobs: one for each token, if they were asked for; error: why there is no next token, if ``finish`` is ``error``.
    """

    id: str
    token_ids: tuple[int, ...]
    text: str
    finish: Finish | None = None
    logprobs: tuple[LogProbabilities, ...] = ()
    error: NoTokenError | None = None


@dataclass(kw_only=True)
class Completion:
    """A finished request.

    text: of the output, without its end; empty for an engine without a tokenizer. finish: ``stop``: the model's end, a
    stop token or a stop string; ``length``: max_tokens or the end of the context; ``cancelled``; ``error``: no token
    can follow, for the reason in ``error``, whose cause is what the request's mask raised, if it raised. num_cached:
    tokens of the prompt whose entries were found. num_drafted, num_accepted: drafts tried, and those that held. Of a
    request that was resumed, these three count from there.
    """

    id: str
    prompt_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish: Finish | None = None
    error: NoTokenError | None = None
    logprobs: list[LogProbabilities] = field(default_factory=list)
    num_cached: int = 0
    num_drafted: int = 0
    num_accepted: int = 0

    def add(self, piece: Piece) -> None:
        """Add what a step gave."""
        self.token_ids += piece.token_ids
        self.text += piece.text
        self.logprobs += piece.logprobs
        self.finish, self.error = piece.finish, piece.error


class Ran(NamedTuple):
    """What a step ran: its entries.

    logits: if they are kept, of each entry that gave tokens [1 + drafts, V] float32, of others None.
    """

    entries: tuple[Entry, ...] = ()
    logits: tuple[np.ndarray | None, ...] = ()
