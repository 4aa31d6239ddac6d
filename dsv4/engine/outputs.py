"""What an engine gives back: pieces while a request runs, and the whole when it has ended."""

from __future__ import annotations

from dataclasses import dataclass, field

from dsv4.engine.request import Finish
from dsv4.engine.sample import LogProbabilities


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one step added to a request. The last piece of a request has ``finish``.

    token_ids: those that belong to the output; text: what they complete, without what a stop string may begin with;
    logprobs: one for each token, if they were asked for.
    """

    id: str
    token_ids: tuple[int, ...]
    text: str
    finish: Finish | None = None
    logprobs: tuple[LogProbabilities, ...] = ()


@dataclass(kw_only=True)
class Completion:
    """A finished request.

    text: of the output, without its end; empty for an engine without a tokenizer. finish: ``stop``: the model's end, a
    stop token or a stop string; ``length``: max_tokens or the end of the context; ``cancelled``. num_cached: tokens of
    the prompt whose entries were found. num_drafted, num_accepted: drafts tried, and those that held.
    """

    id: str
    prompt_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish: Finish | None = None
    logprobs: list[LogProbabilities] = field(default_factory=list)
    num_cached: int = 0
    num_drafted: int = 0
    num_accepted: int = 0

    def add(self, piece: Piece) -> None:
        """Add what a step gave."""
        self.token_ids += piece.token_ids
        self.text += piece.text
        self.logprobs += piece.logprobs
        self.finish = piece.finish
