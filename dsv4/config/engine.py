"""What an engine may use: requests at once, tokens a step, memory, and what it keeps of prefixes. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal, get_args

from dsv4.config.checks import below, not_flag, not_one_of, not_path, outside_whole, refuse
from dsv4.config.model import RATIO

EngineCacheFormat = Literal["float32", "bfloat16", "packed", "packed-fp8", "auto"]
Numerics = Literal["fast", "invariant"]
WindowPolicy = Literal["full", "periodic", "zero"]

PAGE = RATIO["hca"]  # tokens; states are kept where every layer's blocks end
MAX_DRAFT_TOKENS = 4


@dataclass(frozen=True, kw_only=True)
class PrefixLimits:
    """Beginnings of sequences that are kept, so that the next request that begins alike need not compute them.

    Compressed entries stay in their pages. A state, the window part and the tails, is kept only at some places:
    elsewhere it is computed again from the tokens before.
    """

    memory: bool = True
    """Keep pages in memory after their request ends, for as long as no other request needs the room."""
    state_every: int = 0
    """Keep a state in memory every so many tokens too, not only at the ends of prompts; 0: only there."""
    state_bytes: int = 2**28
    """Memory for states, of all prefixes together; the one unused for longest goes first."""
    folder: str | None = None
    """Keep prefixes in this folder too, for other runs."""
    folder_bytes: int = 2**34
    """Room in the folder."""
    policy: WindowPolicy = "periodic"
    """Where the folder gets a state (report 3.6): ``full``: at every page, ``periodic``: every ``period`` tokens,
    ``zero``: nowhere."""
    period: int = 8192
    """Tokens between the states of ``periodic``."""

    def __post_init__(self) -> None:
        problems = not_flag("limits.prefix.memory", self.memory)
        problems += _not_pages("limits.prefix.state_every", self.state_every, 0)
        problems += below("limits.prefix.state_bytes", self.state_bytes, 1)
        problems += not_path("limits.prefix.folder", self.folder)
        problems += below("limits.prefix.folder_bytes", self.folder_bytes, 1)
        problems += not_one_of("limits.prefix.policy", self.policy, get_args(WindowPolicy))
        problems += _not_pages("limits.prefix.period", self.period, PAGE)
        refuse(problems or self._without_effect())

    def _without_effect(self) -> list[str]:
        """Options that were changed though another one switches them off."""
        problems = []
        if not self.memory:
            problems += self._changed("memory = False", "state_every", "state_bytes", "folder")
        if self.folder is None:
            problems += self._changed("folder = None", "folder_bytes", "policy", "period")
        elif self.policy != "periodic":
            problems += self._changed(f"policy = {self.policy!r}", "period")
        return problems

    def _changed(self, because: str, *names: str) -> list[str]:
        values = {f.name: (getattr(self, f.name), f.default) for f in fields(self) if f.name in names}
        return [
            f"limits.prefix.{name} is {value!r} with {because}; expected {default!r}: it would have no effect"
            for name, (value, default) in values.items()
            if value != default
        ]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Options of an engine."""

    max_requests: int = 8
    """Requests that run at once: slots. More wait."""
    step_tokens: int = 2048
    """Tokens of a step at most, of all requests together."""
    max_context: int | None = None
    """Tokens of a request at most, prompt and output; None: as many as the model takes."""
    cache_bytes: int = 2**30
    """Memory for pages of compressed entries, of all requests and kept prefixes together."""
    cache_format: EngineCacheFormat = "auto"
    """How cached rows are stored; ``auto``: in the dtype of activations."""
    numerics: Numerics = "fast"
    """``invariant``: the same bits whatever the batch, the chunks and the cache; ``fast`` keeps to a tolerance."""
    draft_tokens: int = 0
    """Tokens that the MTP block drafts ahead of each step, for the model to verify; 0: no speculation."""
    prefix: PrefixLimits = field(default_factory=PrefixLimits)
    log: str | None = None
    """Path of the log from which unfinished requests are resumed after a crash; None: no log."""

    def __post_init__(self) -> None:
        problems = below("limits.max_requests", self.max_requests, 1)
        problems += below("limits.step_tokens", self.step_tokens, 1)
        if self.max_context is not None:
            problems += below("limits.max_context", self.max_context, 2)
        problems += below("limits.cache_bytes", self.cache_bytes, 1)
        problems += not_one_of("limits.cache_format", self.cache_format, get_args(EngineCacheFormat))
        problems += not_one_of("limits.numerics", self.numerics, get_args(Numerics))
        problems += outside_whole("limits.draft_tokens", self.draft_tokens, 0, MAX_DRAFT_TOKENS)
        if not isinstance(self.prefix, PrefixLimits):
            problems.append(f"limits.prefix is {self.prefix!r}; expected PrefixLimits")
        problems += not_path("limits.log", self.log)
        refuse(problems or self._too_few_tokens())

    def _too_few_tokens(self) -> list[str]:
        """Every running request can decode in every step, so that no prompt stops it."""
        least = self.max_requests * (1 + self.draft_tokens)
        if self.step_tokens >= least:
            return []
        return [
            f"limits.step_tokens is {self.step_tokens}; expected at least max_requests x (1 + draft_tokens) = {least}, "
            "so that every running request can decode in every step"
        ]


def _not_pages(name: str, value: object, least: int) -> list[str]:
    problems = below(name, value, least)
    if not problems and isinstance(value, int) and value % PAGE:
        problems.append(f"{name} is {value}; expected a multiple of {PAGE}, the tokens of a page")
    return problems
