"""Which pages are in use, by how many, and which are free.

A page is free, used, or kept. Used: one or more requests count on it. Kept: nobody does, but it holds the entries of a
known prefix; it is used again by whoever shares it, or given away when no free page is left.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from dsv4.ops.places import PAGE_TOKENS


def pages_of(num_tokens: int) -> int:
    """Return how many pages so many tokens of one sequence take."""
    return -(-num_tokens // PAGE_TOKENS)


class PagePool:
    """All pages, 0 to ``num_pages`` - 1.

    Of the kept pages, the one released first is given away first. Release a sequence with ``release_all``: it begins
    with the last page, so that no page is kept longer than those before it, without which it is of no use.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages is {num_pages}; expected at least 1")
        self.num_pages = num_pages
        self.forget: Callable[[int], None] | None = None
        """Called with a kept page that is given away; the prefix index sets it. It has to unmark the page."""
        self._counts = [0] * num_pages
        self._free = list(range(num_pages))[::-1]
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._marked: set[int] = set()

    @property
    def num_free(self) -> int:
        """Pages that ``take`` can give: free and kept ones."""
        return len(self._free) + len(self._kept)

    @property
    def num_kept(self) -> int:
        return len(self._kept)

    def users(self, page: int) -> int:
        return self._counts[page]

    def is_marked(self, page: int) -> bool:
        return page in self._marked

    def is_kept(self, page: int) -> bool:
        return page in self._kept

    def take(self, n: int) -> list[int] | None:
        """Return n pages, each with one user, or None, and nothing is changed, if there are not so many."""
        if n < 0:
            raise ValueError(f"n is {n}; expected 0 or more")
        if n > self.num_free:
            return None
        while len(self._free) < n:
            page = next(iter(self._kept))
            assert self.forget is not None, f"page {page} is kept; expected an index that forgets it"
            self.forget(page)
            assert page not in self._marked, f"page {page} is still marked; expected the index to have forgotten it"
        pages = [self._free.pop() for _ in range(n)]
        for page in pages:
            self._counts[page] = 1
        return pages

    def share(self, page: int) -> None:
        """Add a user to a page that is used or kept."""
        assert self._counts[page] or page in self._kept, f"page {page} is free; expected a used or kept one"
        self._kept.pop(page, None)
        self._counts[page] += 1

    def release(self, page: int) -> None:
        """Take a user away. Without any, a marked page is kept, the newest of them; another is free."""
        assert self._counts[page], f"page {page} has no user; expected one to release it"
        self._counts[page] -= 1
        if self._counts[page]:
            return
        if page in self._marked:
            self._kept[page] = None
        else:
            self._free.append(page)

    def release_all(self, pages: Sequence[int]) -> None:
        """Release the pages of a sequence, the last one first."""
        for page in reversed(pages):
            self.release(page)

    def mark(self, page: int) -> None:
        """Keep a used page, from when it has no user any more."""
        assert self._counts[page], f"page {page} has no user; expected a used one"
        self._marked.add(page)

    def unmark(self, page: int) -> None:
        """Do not keep a page, or no longer."""
        self._marked.discard(page)
        if page in self._kept:
            del self._kept[page]
            self._free.append(page)

    def assert_consistent(self) -> None:
        """Every page is free, kept or used, in one place, with a count that says so."""
        used = {page for page, count in enumerate(self._counts) if count}
        assert min(self._counts) >= 0, f"counts are {self._counts}; expected none below 0"
        together = sorted([*self._free, *self._kept, *used])
        assert together == list(range(self.num_pages)), f"free, kept and used pages are {together}; expected each once"
        assert set(self._kept) <= self._marked, f"kept pages are {list(self._kept)}; expected only marked ones"
        assert self._marked <= used | set(self._kept), f"marked pages are {self._marked}; expected none that is free"
