"""Drafts of the MTP block: made after each step for every decoding request, judged by the model in the next one.

The block runs over the tokens that a step settled, each with the token after it, and gives a first draft. Further ones
are chained: its own streams stand in for the model's, and the draft for the next token. Its ring needs no rollback:
what a chain wrote lies at positions that are written again before they are read (``Cache``).

Exact drafts are guesses at the very token that plain decoding takes, made with its random number, and are kept where
they are right. Others are drawn by numbers of their own and judged by rejection sampling, which keeps more of them and
the distribution, but not the tokens of a seed. Greedy drafts are always exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dsv4.engine.request import Request
from dsv4.engine.runner import Forward, Runner, Span
from dsv4.engine.sample import choose, distribution, next_token, uniform
from dsv4.engine.step import Entry


class Drafts:
    """The drafts of all requests, up to ``depth`` of each. exact: those of sampled requests too."""

    def __init__(self, runner: Runner, depth: int, *, exact: bool) -> None:
        self.runner, self.depth, self.exact = runner, depth, exact
        self._tokens: dict[str, list[int]] = {}
        self._proposals: dict[str, list[np.ndarray]] = {}

    def tokens(self, request: Request) -> list[int]:
        """The drafts that follow a request's last token."""
        return self._tokens.get(request.id, [])

    def proposals(self, request: Request) -> list[np.ndarray]:
        """The distributions its drafts were drawn from, [V] float64 each; none for exact drafts."""
        return self._proposals.get(request.id, [])

    def count(self, request: Request) -> int:
        return len(self.tokens(request))

    def drop(self, request: Request) -> None:
        self._tokens.pop(request.id, None)
        self._proposals.pop(request.id, None)

    def make(self, entries: Sequence[Entry], forward: Forward) -> None:
        """Run the MTP block over what a step settled, and draft for those who decode."""
        if not self.depth:
            return
        spans, requests = [], []
        for entry, begin in zip(entries, forward.begins, strict=True):
            request = entry.request
            self.drop(request)
            count = request.num_computed - entry.begin
            if request.slot is None or count < 1:
                continue  # it ended, or lost its slot
            next_ids = request.tokens(entry.begin + 1, entry.begin + 1 + count)
            spans.append(Span(request.slot, entry.begin, begin, next_ids))
            requests.append(request)
        streams = forward.streams
        for depth in range(self.depth):
            if not spans:
                return
            streams, logits = self.runner.draft(streams, spans)
            kept = [i for i, request in enumerate(requests) if request.is_decoding]
            for i in kept:
                self._draft(requests[i], depth, logits[i])
            spans = [
                Span(spans[i].slot, requests[i].num_computed + depth, row, [self._tokens[requests[i].id][-1]])
                for row, i in enumerate(kept)
            ]
            streams, requests = streams[:, kept], [requests[i] for i in kept]

    def _draft(self, request: Request, depth: int, logits: np.ndarray) -> None:
        """Draft one token from the block's logits by the request's own sampling, without penalties, bias and mask."""
        sampling = replace(
            request.sampling, presence_penalty=0.0, frequency_penalty=0.0, repetition_penalty=1.0, logit_bias=()
        )
        position = len(request.output_ids) + depth
        if self.exact or sampling.temperature == 0:
            token = next_token(logits, sampling, seed=request.seed, position=position, name=request.id)
        else:
            proposal = distribution(logits, sampling, name=request.id)
            token = choose(proposal, uniform(request.seed, position, "draft"))
            self._proposals.setdefault(request.id, []).append(proposal)
        self._tokens.setdefault(request.id, []).append(token)
