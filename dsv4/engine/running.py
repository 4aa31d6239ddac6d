"""What an engine keeps of a request beside the request: its text, its mask, and what it has given so far."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from dsv4.engine.outputs import Completion, Piece
from dsv4.engine.request import Request
from dsv4.engine.sample import LogProbabilities, Seen, distribution, log_probabilities, needs_seen, next_token
from dsv4.engine.speculate import match, verify
from dsv4.engine.text import TextStream

Mask = Callable[[Sequence[int]], "np.ndarray | None"]
"""Called with a request's output so far: the tokens allowed next, [V] bool, or None for all."""


class Running:
    """A request that waits or runs. text: None for an engine without a tokenizer. ends: tokens that end the output."""

    def __init__(self, request: Request, text: TextStream | None, mask: Mask | None, ends: frozenset[int]) -> None:
        self.request, self.completion = request, Completion(id=request.id, prompt_ids=request.prompt_ids)
        self._text, self._mask, self._ends = text, mask, ends
        self._seen: Seen | None = None
        if request.output_ids:  # resumed
            self.completion.token_ids += request.output_ids
            self.completion.text += "" if text is None else text.push(request.output_ids).text

    def choose(self, logits: np.ndarray, drafts: Sequence[int], proposals: Sequence[np.ndarray]) -> list[int]:
        """Return the drafts that hold, and one token more. logits: [1 + drafts, V]."""
        request = self.request
        if needs_seen(request.sampling) and self._seen is None:
            self._seen = Seen(logits.shape[1], request.prompt_ids, request.output_ids)
        if proposals:
            place = len(request.output_ids)
            tokens = verify(self._targets(logits, drafts), drafts, proposals, seed=request.seed, position=place)
            if self._seen is not None:
                self._seen.add(tokens[-1])
        else:
            tokens = match(self._plain(logits), drafts)
        self.completion.num_drafted += len(drafts)
        self.completion.num_accepted += len(tokens) - 1
        return tokens

    def _plain(self, logits: np.ndarray) -> Iterator[int]:
        """The tokens of plain decoding after the last known token, and after each draft."""
        request, output = self.request, list(self.request.output_ids)
        for row in logits:
            token = next_token(
                row, request.sampling, seed=request.seed, position=len(output), seen=self._seen,
                mask=self._allowed(output), name=request.id,
            )  # fmt: skip
            if self._seen is not None:
                self._seen.add(token)
            output.append(token)
            yield token

    def _targets(self, logits: np.ndarray, drafts: Sequence[int]) -> Iterator[np.ndarray]:
        """The distributions after the last known token, and after each draft once it holds."""
        request, output = self.request, list(self.request.output_ids)
        for row, draft in zip(logits, [*drafts, None], strict=True):
            yield distribution(row, request.sampling, seen=self._seen, mask=self._allowed(output), name=request.id)
            if draft is not None:
                output.append(draft)
                if self._seen is not None:
                    self._seen.add(draft)

    def _allowed(self, output: Sequence[int]) -> np.ndarray | None:
        return None if self._mask is None else self._mask(output)

    def take(self, tokens: Sequence[int], logits: np.ndarray) -> tuple[Piece, bool]:
        """Cut chosen tokens where the output ends; return them with their text, and whether they end by a stop."""
        request, sampling = self.request, self.request.sampling
        tokens = tokens[: request.max_tokens - len(request.output_ids)]
        end = next((i for i, token in enumerate(tokens) if token in self._ends), None)
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
        return Piece(
            id=piece.id, token_ids=piece.token_ids, text=piece.text + held, logprobs=piece.logprobs,
            finish=self.request.finish,
        )  # fmt: skip
