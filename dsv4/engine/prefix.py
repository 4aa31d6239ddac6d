"""Which prefixes are in memory: pages by the content of all tokens up to their end, and states at such places.

The digest of page i is a hash of the digest of page i - 1 and the page's tokens, so equal digests mean equal tokens
from the start on. The first page starts from a root, in which the model and the salt of a user go: what one model or
user has computed is nothing to another.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import NamedTuple

from dsv4.config.model import RATIO
from dsv4.engine.pages import PagePool
from dsv4.engine.request import Request
from dsv4.ops.places import PAGE_TOKENS

DIGEST_BYTES = 32
OVERLAP_TOKENS = 2 * RATIO["csa"]  # tokens of a CSA compressor's tail

_TOKENS = struct.Struct(f"<{PAGE_TOKENS}i")


def root_digest(model_key: bytes, salt: bytes) -> bytes:
    """Return what the digest of a first page continues. model_key: digest of all that decides what entries are."""
    model = blake2b(model_key, digest_size=DIGEST_BYTES).digest()  # of a fixed length, so that no two pairs are alike
    return blake2b(model + salt, digest_size=DIGEST_BYTES).digest()


def page_digest(previous: bytes, token_ids: Sequence[int]) -> bytes:
    """Return the digest of a page of PAGE_TOKENS tokens after the page, or root, of digest ``previous``."""
    return blake2b(previous + _TOKENS.pack(*token_ids), digest_size=DIGEST_BYTES).digest()


class Restore(NamedTuple):
    """How the state after the first ``writes_from`` tokens of a known prefix comes about.

    Put the state of boundary ``from_boundary`` into the slot, an empty one (rings of zeros) if that is 0. Run the
    tokens from ``recompute_from`` on. Entries before ``writes_from`` are in shared pages: those of tokens that are
    run again are not written, and could not be, for the first of them lack the window before them.
    """

    from_boundary: int
    recompute_from: int
    writes_from: int


def restore_plan(hit: int, boundaries: Iterable[int], *, window: int, depth: int) -> Restore:
    """Plan to go on after the ``hit`` tokens of known pages, from a state or from none, whichever runs fewer tokens.

    boundaries: those with a state; later ones than ``hit`` are left out, 0 needs none. depth: layers, MTP blocks
    included. What restores the folder's three policies is the same plan: they differ in the boundaries they kept.
    """
    nearest = max((b for b in boundaries if b <= hit), default=0)
    start = fresh_start(hit, window=window, depth=depth)
    if nearest >= start:
        return Restore(nearest, nearest, hit)
    return Restore(0, start, hit)


def fresh_start(hit: int, *, window: int, depth: int) -> int:
    """Return the last page boundary from which, with empty rings but all entries, the state at ``hit`` comes out right.

    Layer 0 makes a token's row from the token alone: right from the start s on. What it puts out is right once a whole
    window is, from s + W - 1 on, so layer l's rows are right from s + l (W - 1) on. The ring at ``hit`` needs the last
    W - 1 of every layer, a CSA tail the last 8 (an HCA block is complete at a page boundary). An MTP block reads what
    the last layer puts out: it is one layer more.
    """
    reach = (depth - 1) * (window - 1) + max(window - 1, OVERLAP_TOKENS)
    return max(0, hit - reach) // PAGE_TOKENS * PAGE_TOKENS


@dataclass
class _Known:
    page: int
    previous: bytes | None
    following: set[bytes] = field(default_factory=set)


class _State(NamedTuple):
    state: object
    num_bytes: int


class PrefixIndex:
    """The known pages of a pool, each with all pages before it, and states at the ends of some.

    A page stays known while it is used or kept; when the pool gives it away, it is forgotten with all that follow it.
    States take at most ``state_bytes``; the one unused for longest goes first.
    """

    def __init__(self, pool: PagePool, *, state_bytes: int, model_key: bytes = b"") -> None:
        self._pool = pool
        self._model_key = model_key
        self._max_state_bytes = state_bytes
        self._known: dict[bytes, _Known] = {}
        self._digests: dict[int, bytes] = {}  # of known pages
        self._states: OrderedDict[bytes, _State] = OrderedDict()
        self.state_bytes = 0
        """Bytes of the states held."""
        pool.forget = self.drop

    @property
    def num_pages(self) -> int:
        return len(self._known)

    @property
    def num_states(self) -> int:
        return len(self._states)

    def digests(self, request: Request) -> list[bytes]:
        """Return the digests of a request's whole pages, its known tokens to run or run already. It keeps them."""
        chain = request.digests
        for index in range(len(chain), request.num_tokens // PAGE_TOKENS):
            previous = chain[-1] if chain else root_digest(self._model_key, request.salt)
            chain.append(page_digest(previous, request.tokens(index * PAGE_TOKENS, (index + 1) * PAGE_TOKENS)))
        return chain

    # Pages

    def remember(self, page: int, digest: bytes, previous: bytes | None) -> bool:
        """Make a used page known by its digest, after the page of digest ``previous`` (None: it is a first page).

        Returns False, and the page stays a page like any other, if another page is known by this digest, or the one
        before it is not known.
        """
        if digest in self._known or (previous is not None and previous not in self._known):
            return False
        assert page not in self._digests, f"page {page} is known by another digest; expected a page of one content"
        self._pool.mark(page)
        self._known[digest] = _Known(page, previous)
        self._digests[page] = digest
        if previous is not None:
            self._known[previous].following.add(digest)
        return True

    def longest(self, digests: Sequence[bytes], num_tokens: int) -> list[int]:
        """Return the known pages a sequence of ``num_tokens`` begins with; at least one token is left to compute."""
        return self._begin(digests[: (num_tokens - 1) // PAGE_TOKENS])

    def bring(self, digests: Sequence[bytes], fill: Callable[[int, int], bool]) -> int:
        """Fill pages with what is known elsewhere of a sequence, as far as that goes; returns how many are known then.

        digests: of pages 0, 1, and so on. fill: called with the index of each page that is not known here, and the
        page to write to; False for no more. Room is made of other kept pages, never of this sequence's own.
        """
        pages = self._begin(digests)
        for page in pages:
            self._pool.share(page)
        try:
            for index in range(len(pages), len(digests)):
                taken = self._pool.take(1)
                if taken is None:
                    break
                pages += taken
                if not fill(index, taken[0]):
                    break
                self.remember(taken[0], digests[index], digests[index - 1] if index else None)
        finally:
            self._pool.release_all(pages)
        return len(self._begin(digests))

    def _begin(self, digests: Sequence[bytes]) -> list[int]:
        pages = []
        for digest in digests:
            if digest not in self._known:
                break
            pages.append(self._known[digest].page)
        return pages

    def drop(self, page: int) -> None:
        """Forget a page, all that follow it, and their states."""
        known = self._known[self._digests[page]]
        if known.previous is not None:
            self._known[known.previous].following.discard(self._digests[page])
        todo = [self._digests[page]]
        while todo:
            digest = todo.pop()
            gone = self._known.pop(digest)
            del self._digests[gone.page]
            self._drop_state(digest)
            self._pool.unmark(gone.page)
            todo += gone.following

    # States

    def keep_state(self, digest: bytes, state: object, num_bytes: int) -> bool:
        """Keep the state after the page of this digest; False if it is too large, or the page is not known."""
        if num_bytes > self._max_state_bytes or digest not in self._known:
            return False
        self._drop_state(digest)
        self._states[digest] = _State(state, num_bytes)
        self.state_bytes += num_bytes
        while self.state_bytes > self._max_state_bytes:
            self._drop_state(next(iter(self._states)))
        return True

    def state(self, digest: bytes) -> object | None:
        """Return the state after the page of this digest, or None. This is a use of it."""
        if digest not in self._states:
            return None
        self._states.move_to_end(digest)
        return self._states[digest].state

    def boundaries(self, digests: Sequence[bytes]) -> list[int]:
        """Return the positions with a state, of a sequence of these pages, in order."""
        return [(i + 1) * PAGE_TOKENS for i, digest in enumerate(digests) if digest in self._states]

    def _drop_state(self, digest: bytes) -> None:
        gone = self._states.pop(digest, None)
        self.state_bytes -= gone.num_bytes if gone else 0

    def assert_consistent(self) -> None:
        """Known pages are marked in the pool and linked both ways, and states are theirs, within the budget."""
        pages = {known.page: digest for digest, known in self._known.items()}
        assert pages == self._digests, f"pages by digest are {pages}; expected {self._digests}"
        for page in range(self._pool.num_pages):
            marked = self._pool.is_marked(page)
            assert marked == (page in pages), f"page {page}: marked is {marked}; expected {page in pages}"
        for digest, known in self._known.items():
            if known.previous is not None:
                before = self._known.get(known.previous)
                assert before is not None, f"page {known.page} is known without the one before it"
                assert digest in before.following, f"page {before.page} does not lead to page {known.page}"
            strangers = known.following - set(self._known)
            assert not strangers, f"page {known.page} leads to {strangers}; expected known pages"
        assert set(self._states) <= set(self._known), "a state belongs to a page that is not known"
        held = sum(s.num_bytes for s in self._states.values())
        assert held == self.state_bytes <= self._max_state_bytes, f"states take {held}; expected {self.state_bytes}"
