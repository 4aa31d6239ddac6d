"""Which files of the prefix cache to keep: the short, often used prefixes.

    score = (accesses since the last use + depth_tokens / 32) / (1 + hits)

and the highest goes first. Age is counted in accesses, so an idle night changes nothing. A page is worth nothing
without those before it, so within one prefix the end must go first; but a restore reads it from its start, at most
two files per 128 tokens, which leaves the start the older. The depth outweighs that twice over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

_TOKENS_PER_ACCESS = 32
_MOST_HITS = 64  # more count as this many, so that a former favourite can go


@dataclass
class _Use:
    last: int
    mtime_ns: int
    hits: int = 0
    depth_tokens: float | None = None


class Uses:
    """When each file was last used, how often, and how deep its prefix is.

    Only the order of uses outlives the process, in the files' modification times; by them it also learns what other
    processes use.
    """

    def __init__(self, mtimes_ns: Mapping[str, int]) -> None:
        ordered = sorted(mtimes_ns.items(), key=lambda item: (item[1], item[0]))
        self.clock = len(ordered)
        """Accesses so far; those before this process as if each file had had one."""
        self._uses = {name: _Use(last, mtime_ns) for last, (name, mtime_ns) in enumerate(ordered, start=1)}

    def add_new(self, name: str, mtime_ns: int, depth_tokens: int) -> None:
        self._uses[name] = _Use(self.clock, mtime_ns, 0, depth_tokens)

    def add_hit(self, name: str, mtime_ns: int, depth_tokens: int) -> None:
        hits = self._uses[name].hits if name in self._uses else 0
        self._uses[name] = _Use(self.clock, mtime_ns, hits + 1, depth_tokens)

    def refresh(self, mtimes_ns: Mapping[str, int], depth: Callable[[str], float]) -> None:
        """Learn which files there are by now; those that others wrote or used meanwhile were so just now."""
        uses = {}
        for name, mtime_ns in mtimes_ns.items():
            use = self._uses.get(name) or _Use(self.clock, mtime_ns)
            if use.mtime_ns != mtime_ns:
                use = _Use(self.clock, mtime_ns, use.hits + 1, use.depth_tokens)
            if use.depth_tokens is None:
                use.depth_tokens = depth(name)
            uses[name] = use
        self._uses = uses

    def score(self, name: str) -> float:
        """How little a file is worth. Only after ``refresh``."""
        use = self._uses[name]
        return (self.clock - use.last + (use.depth_tokens or 0) / _TOKENS_PER_ACCESS) / (1 + min(use.hits, _MOST_HITS))

    def new_score(self, depth_tokens: int) -> float:
        """The same for a file that would be written now."""
        return depth_tokens / _TOKENS_PER_ACCESS
