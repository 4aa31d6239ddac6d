"""One request: what was asked, what has come out, and where it stands."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dsv4.config.sampling import Sampling

Finish = Literal["stop", "length", "cancelled", "error", "refused"]


@dataclass(eq=False, kw_only=True)
class Request:
    """A request and its state. What the scheduler keeps, only the scheduler changes."""

    id: str
    prompt_ids: list[int]
    sampling: Sampling
    seed: int
    """What its random numbers depend on: the caller's seed, or one chosen for it."""
    salt: bytes = b""
    """Prefixes are shared only among requests of the same salt: one for each user, to keep users apart."""
    output_ids: list[int] = field(default_factory=list)
    """May hold tokens from the start, for a request that is resumed."""

    # Kept by the scheduler
    arrival: int = -1
    """Its number in the order of arrival."""
    max_tokens: int = 0
    """Tokens of output at most: as asked, or where the context ends."""
    finish: Finish | None = None
    slot: int | None = None
    pages: list[int] = field(default_factory=list)
    """Of tokens 128 i on, in order. The first ``writes_from`` / 128 of them are shared and never written."""
    num_computed: int = 0
    """Tokens run: the next step begins here. What is in the slot is the state after them; their entries are there."""
    writes_from: int = 0
    """Tokens whose entries were found. They may be run again for the state, but their entries are not written."""
    prefill_end: int = 0
    """Tokens known when it was admitted."""
    digests: list[bytes] = field(default_factory=list)
    """Content hashes of its whole pages, as far as they were asked for."""

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def token_ids(self) -> list[int]:
        return self.prompt_ids + self.output_ids

    @property
    def longest(self) -> int:
        """Tokens that are ever run: all but the last one of the output."""
        return len(self.prompt_ids) + self.max_tokens - 1

    @property
    def is_decoding(self) -> bool:
        """Whether one known token is left to run."""
        return self.num_tokens - self.num_computed == 1

    @property
    def is_finished(self) -> bool:
        return self.finish is not None

    def tokens(self, begin: int, end: int) -> list[int]:
        """Return the token ids at positions ``begin`` to ``end`` - 1, without copying the rest."""
        prompt = len(self.prompt_ids)
        if end <= prompt:
            return self.prompt_ids[begin:end]
        return self.prompt_ids[begin:] + self.output_ids[max(0, begin - prompt) : end - prompt]
