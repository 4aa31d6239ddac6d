"""Prefixes of other runs: pages and states between the cache and a folder."""

from __future__ import annotations

from dsv4.engine.disk import DiskStore
from dsv4.engine.prefix import PrefixIndex
from dsv4.engine.request import Request
from dsv4.engine.runner import Runner, State
from dsv4.engine.step import Filled, KeepState
from dsv4.ops.places import PAGE_TOKENS


class FolderPrefix:
    """Writes what requests compute, and brings what they begin with into the prefix index."""

    def __init__(self, store: DiskStore, prefix: PrefixIndex, runner: Runner) -> None:
        self.store, self.prefix, self.runner = store, prefix, runner

    def put_page(self, filled: Filled) -> None:
        """Write a page's entries."""
        depth = (filled.index + 1) * PAGE_TOKENS
        self.store.put(filled.digest, "entries", self.runner.page_payload(filled.page), depth)

    def put_state(self, keep: KeepState, state: State) -> None:
        """Write the state at a page boundary."""
        self.store.put(keep.digest, "state", self.runner.state_payload(state), keep.position)

    def fetch(self, request: Request) -> None:
        """Bring the pages a request begins with, and the last state among them, from the folder into memory."""
        digests = self.prefix.digests(request)[: (request.num_tokens - 1) // PAGE_TOKENS]

        def fill(index: int, page: int) -> bool:
            payload = self.store.get(digests[index], "entries")
            return payload is not None and self.runner.read_page(page, payload)

        num_known = self.prefix.bring(digests, fill)
        for index in reversed(range(num_known)):
            if self.prefix.state(digests[index]) is not None:
                return
            payload = self.store.get(digests[index], "state") if self.store.contains(digests[index], "state") else None
            state = None if payload is None else self.runner.read_state(payload)
            if state is not None:
                self.prefix.keep_state(digests[index], state, sum(part.nbytes for part in state))
                return
