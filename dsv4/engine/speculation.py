"""Drafts of the MTP block: made after each step for every decoding request, judged by the model in the next one.

The block runs over the tokens that a step settled, each with the token after it, and gives a first draft. Further ones
are chained: its own streams stand in for the model's, and the draft for the next token. Its ring needs no rollback:
what a chain wrote lies at positions that are written again before they are read (``Cache``).

Exact drafts are guesses at the very token that plain decoding takes, made with its random number, and are kept where
they are right. Others are drawn by numbers of their own and judged by rejection sampling, which keeps more of them and
the distribution, but not the tokens of a seed. Greedy drafts are always exact.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from dsv4.engine.request import Request
from dsv4.engine.runner import Forward, Runner, Span
from dsv4.engine.sample import NoTokenError, choose, distribution, next_token, uniform
from dsv4.engine.step import Entry


class Drafts:
    """The drafts of all requests, up to ``depth`` of each. exact: those of sampled requests too.

    reach: rows of the block's ring. What a step settled before its last so many tokens leaves nothing there.
    """

    def __init__(self, runner: Runner, depth: int, *, exact: bool) -> None:
        self.runner, self.depth, self.exact = runner, depth, exact
        self.reach = runner.model.config.attention.window + depth
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

    def make(
        self, entries: Sequence[Entry], slots: Sequence[int | None], forward: Forward, kept: Collection[str]
    ) -> None:
        """Run the MTP block over what a step settled, and draft for those who decode.

        slots: of each entry, when it ran. kept: ids of requests whose state is wanted though they may have ended.
        """
        if not self.depth:
            return
        spans, requests = [], []
        for entry, slot, begin in zip(entries, slots, forward.begins, strict=True):
            request, now = entry.request, entry.request.num_computed
            self.drop(request)
            if now == entry.begin or (request.is_finished and request.id not in kept):
                continue
            assert slot is not None, f"request {request.id} had no slot; expected a running one"
            first = max(entry.begin, now - self.reach)
            spans.append(Span(slot, first, begin + first - entry.begin, request.tokens(first + 1, now + 1)))
            requests.append(request)
        streams = forward.streams
        for depth in range(self.depth):
            if not spans:
                return
            streams, logits = self.runner.draft(streams, spans)
            drafted = [i for i, request in enumerate(requests) if self._draft(request, depth, logits[i])]
            spans = [
                Span(spans[i].slot, requests[i].num_computed + depth, row, [self._tokens[requests[i].id][-1]])
                for row, i in enumerate(drafted)
            ]
            streams, requests = streams[:, drafted], [requests[i] for i in drafted]

    def _draft(self, request: Request, depth: int, logits: np.ndarray) -> bool:
        """Draft one token for a request that decodes, from the block's logits, [V]; return whether there is one.

        It is chosen by the request's own sampling, without penalties, bias and mask.
        """
        if request.is_finished or not request.is_decoding:
            return False
        sampling = replace(
            request.sampling, presence_penalty=0.0, frequency_penalty=0.0, repetition_penalty=1.0, logit_bias=()
        )
        position = len(request.output_ids) + depth
        try:
            if self.exact or sampling.temperature == 0:
                token = next_token(logits, sampling, seed=request.seed, position=position, name=request.id)
            else:
                proposal = distribution(logits, sampling, name=request.id)
                token = choose(proposal, uniform(request.seed, position, "draft"))
                self._proposals.setdefault(request.id, []).append(proposal)
        except NoTokenError:  # no guess: what follows is for the model's own logits to say
            return False
        self._tokens.setdefault(request.id, []).append(token)
        return True
