"""What an engine tells its log, in the engine's own terms; nothing where there is no log."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple, cast

from dsv4.config.sampling import Sampling
from dsv4.engine.log import LoggedRequest, WriteAheadLog
from dsv4.engine.outputs import Piece
from dsv4.engine.request import Finish, Request
from dsv4.engine.sample import LogProbabilities, NoTokenError


class Found(NamedTuple):
    """A request of an earlier engine that nobody has taken. It has ended if it has a finish.

    logprobs: of its output. error: what it ended with, if by an error.
    """

    request: Request
    logprobs: list[LogProbabilities]
    has_mask: bool
    error: NoTokenError | None


class Journal:
    """A log, or none. found: what the log holds of an earlier engine, until it is taken over."""

    def __init__(self, path: str | None) -> None:
        self._log = None if path is None else WriteAheadLog(path)
        self.found = [] if self._log is None else [_found(logged) for logged in self._log.found]

    def __contains__(self, id: str) -> bool:
        return self._log is not None and id in self._log

    def add(self, request: Request, *, has_mask: bool) -> None:
        if self._log is not None:
            self._log.append_request(
                request.id, request.prompt_ids, asdict(request.sampling), request.seed, salt=request.salt.hex(),
                has_mask=has_mask,
            )  # fmt: skip

    def add_tokens(self, pieces: Sequence[Piece]) -> None:
        if self._log is not None:
            self._log.append_tokens(token for piece in pieces for token in _tokens(piece))

    def end(self, piece: Piece) -> None:
        """Note a request's last piece, whose tokens were added."""
        if self._log is not None:
            self._log.append_end(piece.id, str(piece.finish), None if piece.error is None else str(piece.error))

    def take(self, id: str) -> None:
        """Note that a request's caller has what came of it."""
        if self._log is not None:
            self._log.append_taken(id)

    def commit(self) -> None:
        """Return once all of it is on the disk; an ``OSError`` if it cannot be, and the next commit tries again."""
        if self._log is not None:
            self._log.commit()

    def close(self) -> None:
        if self._log is not None:
            self._log.close()


def _tokens(piece: Piece) -> Iterator[tuple[Any, ...]]:
    """A piece's tokens as the log takes them, with their log-probabilities if they were asked for."""
    with_each = [piece.logprobs] if piece.logprobs else []
    return ((piece.id, *token) for token in zip(piece.token_ids, *with_each, strict=True))


def _found(logged: LoggedRequest) -> Found:
    request = Request(
        id=logged.id, prompt_ids=logged.prompt_ids, sampling=_sampling(logged.sampling), seed=logged.seed,
        salt=bytes.fromhex(logged.salt), output_ids=logged.output_ids, finish=cast("Finish | None", logged.finish),
    )  # fmt: skip
    logprobs = [LogProbabilities(own, [(id, value) for id, value in top]) for own, top in logged.logprobs]
    error = None if logged.error is None else NoTokenError(logged.error)
    return Found(request, logprobs, logged.has_mask, error)


def _sampling(fields: dict[str, Any]) -> Sampling:
    """The sampling of a log, in which tuples have become lists."""
    bias = tuple((int(i), float(value)) for i, value in fields["logit_bias"])
    stops = {name: tuple(fields[name]) for name in ("stop", "stop_token_ids")}
    return Sampling(**{**fields, "logit_bias": bias, **stops})
