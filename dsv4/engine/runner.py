"""The tensor side of a step: plans become one forward over the cache, and states move between slots and elsewhere."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch

from dsv4.device import has_graphs
from dsv4.engine.replay import Replayer
from dsv4.engine.step import Entry
from dsv4.model.cache import Cache
from dsv4.model.transformer import Transformer
from dsv4.native.tape import INT32, Player, as_tensor
from dsv4.ops.backend import resolve
from dsv4.ops.places import Arrangement

MOST_PLAYED = 16  # tokens of a step that a CPU records: more keep the kernels busier than Python
MOST_REPLAYED = 64  # tokens of a step that an accelerator captures
MOST_TAPES = 64

State = list[torch.Tensor]


class Forward(NamedTuple):
    """What a step computed.

    streams: [1, T, N, D] of all tokens, flat. begins: where each entry's tokens begin. logits: of each entry that
    samples, [1 + drafts, V] float32, the rows after its last known token and after each draft; None for others. They
    may be overwritten by the next call of the head, for drafts or in the next step.
    """

    streams: torch.Tensor
    begins: list[int]
    logits: list[np.ndarray | None]


class Span(NamedTuple):
    """Tokens of one sequence that the MTP block runs over: their slot and places, and the token after each."""

    slot: int
    position: int
    begin: int
    next_ids: list[int]


class Runner:
    """A model and its cache."""

    def __init__(self, model: Transformer, cache: Cache) -> None:
        self.model, self.cache = model, cache
        self.device = model.embed.weight.device
        self._listed: list[tuple[list[int], int]] = [([], 0)] * cache.num_slots  # whose pages, how many in the table
        self._most, player = _player(model, self.device)
        self._play = player(self._few, MOST_TAPES)
        self._play_draft = player(self._draft, MOST_TAPES)
        self._play_head = player(self._head, self._most)

    @torch.inference_mode()
    def run(self, entries: Sequence[Entry], token_ids: Sequence[Sequence[int]]) -> Forward:
        """Run the entries of a plan. token_ids: of each entry, drafts included."""
        sequences = []
        for entry in entries:
            slot = self._list_pages(entry)
            sequences.append((slot, entry.begin, entry.num_tokens, entry.request.writes_from))
        flat = [i for ids in token_ids for i in ids]
        shape, numbers = self._arrange(sequences)
        inputs = array(INT32, flat + numbers)
        ends = list(accumulate(entry.num_tokens for entry in entries))
        begins = [end - entry.num_tokens for end, entry in zip(ends, entries, strict=True)]
        counts = [1 + entry.num_drafts if entry.samples else 0 for entry in entries]
        rows = [row for end, count in zip(ends, counts, strict=True) for row in range(end - count, end)]
        if len(flat) <= self._most:
            streams, hidden = self._play(shape, inputs)
            hidden = hidden if len(rows) == len(flat) else hidden[:, rows]
        else:
            streams = self._step(shape, as_tensor(inputs).to(self.device))
            hidden = self.model.hidden(streams[:, rows])
        found, logits = self._logits(hidden) if rows else None, list[np.ndarray | None]()
        for end, count in zip(accumulate(counts), counts, strict=True):
            logits.append(found[end - count : end] if count and found is not None else None)
        return Forward(streams, begins, logits)

    def _step(self, shape: Arrangement, inputs: torch.Tensor) -> torch.Tensor:
        """Return the streams of a step's tokens. inputs: int32, their ids, then the numbers of their places."""
        token_ids, numbers = inputs[: shape.num_tokens], inputs[shape.num_tokens :]
        return self.model.step(token_ids, self.cache, self.cache.places_of(shape, numbers))

    def _few(self, shape: Arrangement, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same for few tokens: also what the head reads of each of them."""
        streams = self._step(shape, inputs)
        return streams, self.model.hidden(streams)

    @torch.inference_mode()
    def draft(self, streams: torch.Tensor, spans: Sequence[Span]) -> tuple[torch.Tensor, np.ndarray]:
        """Run the MTP block over spans of a step's streams; return its streams and logits at the end of each span.

        streams: [1, T, N, D], in which a span's tokens are at ``begin``. Returns [1, spans, N, D] and [spans, V].
        """
        rows = [span.begin + i for span in spans for i in range(len(span.next_ids))]
        shape, numbers = self._arrange([(span.slot, span.position, len(span.next_ids), 0) for span in spans])
        inputs = array(INT32, [i for span in spans for i in span.next_ids] + numbers)
        if len(rows) <= self._most:
            after, hidden = self._play_draft(shape, streams[:, rows], inputs)
        else:
            after, hidden = self._draft(shape, streams[:, rows], as_tensor(inputs).to(self.device))
        ends = (np.cumsum([len(span.next_ids) for span in spans]) - 1).tolist()
        return after[:, ends], self._logits(hidden[:, ends])

    def _draft(
        self, shape: Arrangement, streams: torch.Tensor, inputs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the MTP block's streams, and what the head reads of them. inputs: as those of ``_step``."""
        next_ids, numbers = inputs[: shape.num_tokens], inputs[shape.num_tokens :]
        return self.model.mtp_step(streams, next_ids, self.cache, self.cache.places_of(shape, numbers))

    def _logits(self, hidden: torch.Tensor) -> np.ndarray:
        """hidden: [1, n, D]; returns [n, V] float32."""
        head = self._play_head if hidden.shape[1] <= self._most else self._head
        return head(hidden.shape[1], hidden).cpu().numpy()

    def _head(self, _: int, hidden: torch.Tensor) -> torch.Tensor:
        return self.model.step_logits(hidden[0])

    def _arrange(self, sequences: Sequence[tuple[int, int, int, int]]) -> tuple[Arrangement, list[int]]:
        """Arrange a step, and so that an accelerator needs few graphs, whatever number of blocks its tokens close."""
        few = has_graphs(self.device) and sum(count for *_, count, _ in sequences) <= self._most
        return self.cache.arrange(sequences, fills=few)

    def _list_pages(self, entry: Entry) -> int:
        """Write the pages of an entry's request into the table, as far as they are not there."""
        slot = entry.request.slot
        assert slot is not None, f"request {entry.request.id} has no slot; expected a running one"
        pages, (listed, count) = entry.request.pages, self._listed[slot]
        same = count if pages is listed else 0  # while a request has its slot, its list of pages only grows
        if same < len(pages):
            self.cache.table[slot, same : len(pages)] = torch.tensor(pages[same:], dtype=torch.int32)
            self._listed[slot] = pages, len(pages)
        return slot

    # ---- states and pages ----

    def put_state(self, slot: int, state: State | None) -> None:
        """Put a state into a slot; None empties it."""
        self.cache.load_state(slot, state)

    def state(self, slot: int) -> State:
        """Return a copy of a slot's state."""
        return self.cache.state(slot)

    def state_payload(self, state: State) -> list[np.ndarray]:
        """Return a state as buffers to write."""
        return [part.cpu().contiguous().view(torch.uint8).numpy() for part in state]

    def read_state(self, payload: memoryview) -> State | None:
        """Return the state of written buffers; None if their length is not a state's."""
        parts = self.cache.state_like()
        if len(payload) != sum(part.nbytes for part in parts):
            return None
        begin = 0
        for part in parts:
            flat = torch.frombuffer(payload, dtype=torch.uint8, count=part.nbytes, offset=begin)
            part.view(torch.uint8).copy_(flat.view(part.view(torch.uint8).shape))
            begin += part.nbytes
        return parts

    def page_payload(self, page: int) -> list[np.ndarray]:
        """Return a page's entries as buffers to write."""
        return [part.cpu().numpy() for part in self.cache.page(page)]

    def read_page(self, page: int, payload: memoryview) -> bool:
        """Fill a page with written buffers; False if their length is not a page's."""
        if len(payload) != self.cache.page_bytes():
            return False
        begin = 0
        for part in self.cache.page(page):
            part.copy_(torch.frombuffer(payload, dtype=torch.uint8, count=part.nbytes, offset=begin).view(part.shape))
            begin += part.nbytes
        return True


def _player(model: Transformer, device: torch.device) -> tuple[int, Callable[..., Any]]:
    """Return how many tokens a step may have to be played rather than run, and what plays it.

    Experts that move between files and memory cannot be: where they lie is known in Python alone.
    """
    if model.experts_move:
        return 0, Player
    if has_graphs(device):
        return MOST_REPLAYED, partial(Replayer, device=device)
    return MOST_PLAYED if resolve(model.backend, device) == "native" else 0, Player
