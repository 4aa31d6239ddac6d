"""What an engine keeps of a request beside the request: its text, its mask, and what it has given so far."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from dsv4.engine.outputs import Completion, Piece
from dsv4.engine.request import Request
from dsv4.engine.sample import (
    LogProbabilities,
    NoTokenError,
    Seen,
    distribution,
    log_probabilities,
    needs_seen,
    next_token,
)
from dsv4.engine.speculate import match, verify
from dsv4.engine.text import TextStream

Mask = Callable[[Sequence[int]], "np.ndarray | None"]
"""Called with a request's output so far: the tokens allowed next, [V] bool, or None for all.

With drafts, also with outputs that hold drafts past the end. What it raises ends its own request, and no other.
"""


class Running:
    """A request that waits or runs. text: None for an engine without a tokenizer. ends: tokens that end the output.

    logprobs: of the output that a resumed request begins with. error: why there is no token after those chosen last.
    """

    def __init__(
        self,
        request: Request,
        text: TextStream | None,
        mask: Mask | None,
        ends: frozenset[int],
        logprobs: Sequence[LogProbabilities] = (),
    ) -> None:
        self.request, self.completion = request, Completion(id=request.id, prompt_ids=request.prompt_ids)
        self.error: NoTokenError | None = None
        self._text, self._mask, self._ends = text, mask, ends
        self._seen: Seen | None = None
        if request.output_ids:  # resumed
            end = self._end(request.output_ids)
            begun = "" if text is None else text.push(request.output_ids[:end]).text
            self.completion.add(
                Piece(id=request.id, token_ids=tuple(request.output_ids), text=begun, logprobs=tuple(logprobs))
            )

    def choose(self, logits: np.ndarray, drafts: Sequence[int], proposals: Sequence[np.ndarray]) -> list[int]:
        """Return the drafts that hold, and one token more if there is one. logits: [1 + drafts, V]."""
        request = self.request
        if needs_seen(request.sampling) and self._seen is None:
            self._seen = Seen(logits.shape[1], request.prompt_ids, request.output_ids)
        place, output = len(request.output_ids), list(request.output_ids)  # the second grows by the drafts that hold
        try:
            if proposals:
                targets = self._targets(logits, drafts, output)
                tokens = verify(targets, drafts, proposals, seed=request.seed, position=place)
                if self._seen is not None:
                    self._seen.add(tokens[-1])
            else:
                tokens = match(self._plain(logits, output), drafts)
        except NoTokenError as error:  # kept for who asked; it is told where the output goes no further
            self.error, tokens = error, output[place:]
        self.completion.num_drafted += len(drafts)
        self.completion.num_accepted += len(tokens) - (self.error is None)
        return tokens

    def _plain(self, logits: np.ndarray, output: list[int]) -> Iterator[int]:
        """The tokens of plain decoding after the last known token, and after each draft once it holds."""
        request = self.request
        for row in logits:
            token = next_token(
                row, request.sampling, seed=request.seed, position=len(output), seen=self._seen,
                mask=self._allowed(output), name=request.id,
            )  # fmt: skip
            if self._seen is not None:
                self._seen.add(token)
            yield token
            output.append(token)

    def _targets(self, logits: np.ndarray, drafts: Sequence[int], output: list[int]) -> Iterator[np.ndarray]:
        """The distributions after the last known token, and after each draft once it holds."""
        request = self.request
        for row, draft in zip(logits, [*drafts, None], strict=True):
            yield distribution(row, request.sampling, seen=self._seen, mask=self._allowed(output), name=request.id)
            if draft is not None:
                output.append(draft)
                if self._seen is not None:
                    self._seen.add(draft)

    def _allowed(self, output: Sequence[int]) -> np.ndarray | None:
        """What the mask says. Its own errors and answers that are none become the request's error."""
        if self._mask is None:
            return None
        name = self.request.id
        try:
            mask = self._mask(output)
        except Exception as error:  # a caller's code may raise anything, and it is passed on as a cause
            raise NoTokenError(f"request {name}: its mask raised {error!r}") from error
        if mask is not None and not (isinstance(mask, np.ndarray) and mask.dtype == bool):
            found = f"an array of {mask.dtype}" if isinstance(mask, np.ndarray) else repr(mask)[:80]
            raise NoTokenError(f"request {name}: its mask gave {found}; expected an array of bool, or None")
        return mask

    def take(self, tokens: Sequence[int], logits: np.ndarray) -> tuple[Piece, bool]:
        """Cut chosen tokens where the output ends; return them with their text, and whether they end by a stop."""
        request, sampling = self.request, self.request.sampling
        tokens = tokens[: request.max_tokens - len(request.output_ids)]
        end = self._end(tokens)
        is_stopped, text = end is not None, ""
        if end is not None:
            tokens = tokens[: end + 1]
        if self._text is not None:
            found = self._text.push(tokens[:end])  # an end has no text
            text = found.text
            if found.stop is not None:
                tokens, is_stopped = tokens[: found.num_tokens], True
        logprobs: list[LogProbabilities] = []
        if sampling.logprobs is not None:
            logprobs = [log_probabilities(row, t, sampling.logprobs) for row, t in zip(logits, tokens, strict=False)]
        return Piece(id=request.id, token_ids=tuple(tokens), text=text, logprobs=tuple(logprobs)), is_stopped

    def last(self, piece: Piece) -> Piece:
        """Return the last piece of an ended request: with the text that was held back, and how it ended."""
        held = "" if self._text is None else self._text.finish().text
        finish = self.request.finish
        error = self.error if finish == "error" else None  # else the end came before a draft that had no successor
        return replace(piece, text=piece.text + held, finish=finish, error=error)

    def _end(self, tokens: Sequence[int]) -> int | None:
        """Where the first token is that ends the output."""
        return next((i for i, token in enumerate(tokens) if token in self._ends), None)
