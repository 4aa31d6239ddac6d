"""From logits to a token: penalties, masks, temperature, cuts, and one draw. NumPy in float64, on the CPU, row by row.

A row is the logits of one token of one request. Everything here sees one row and nothing else, so a token depends on
its own logits, request and seed, and never on what else is in the batch. The steps, in this order:

1. Repetition penalty r, over the tokens of prompt and output: logit / r if it is positive, else logit * r.
2. Presence and frequency penalties, over the output alone: logit - presence * [count > 0] - frequency * count.
3. Logit bias: added.
4. Mask of structured output: what it does not allow becomes -inf.
5. Temperature: softmax(logit / temperature). At 0 all is on the largest logit; of equal ones, on the smallest id.
   The steps after this one then change nothing.
6. top_k: the k largest logits; of equal ones the smaller ids. 0: all.
7. top_p: of what top_k left, the fewest likeliest tokens that hold top_p of its mass; of equal ones the smaller ids.
8. min_p: tokens of at least min_p times the likeliest one's probability.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, NamedTuple

import numpy as np

from dsv4.config.sampling import Sampling

Purpose = Literal["token", "draft", "accept", "correct"]
PURPOSES: dict[Purpose, int] = {"token": 0, "draft": 1, "accept": 2, "correct": 3}
"""What a uniform number is for. A change of these numbers changes what every seed gives."""

# Sizes that change the time and, but for the rounding of sums, nothing else.
FEW = 2048  # weights that are sorted at once
SAMPLE = 1024  # weights that tell where to search
MARGIN = 32  # of the sample, to either side: two deviations of a rank in the middle of it
BLOCK = 128  # probabilities or logits that are looked at as one first


class Seen:
    """How often a request has seen each token of the vocabulary, for the penalties."""

    def __init__(self, vocab_size: int, prompt_ids: Iterable[int], output_ids: Iterable[int] = ()) -> None:
        self.in_prompt = np.zeros(vocab_size, bool)
        self.in_output = np.zeros(vocab_size, np.int32)
        self.in_prompt[np.fromiter(prompt_ids, np.int64)] = True
        np.add.at(self.in_output, np.fromiter(output_ids, np.int64), 1)

    def add(self, token_id: int) -> None:
        """Count one more token of the output."""
        self.in_output[token_id] += 1

    def remove(self, token_id: int) -> None:
        """Take ``add`` back, as for a draft that did not hold."""
        self.in_output[token_id] -= 1


class NoTokenError(ValueError):
    """No token can be chosen for one request, by its own logits, penalties or mask: others are not concerned."""


class LogProbabilities(NamedTuple):
    """Logarithms of probabilities of one token and of the likeliest ones."""

    chosen: float
    top: list[tuple[int, float]]
    """Id and log-probability, likeliest first, of equal ones the smaller id; the chosen one too if it is among them."""


def needs_seen(sampling: Sampling) -> bool:
    """Whether a penalty asks for the counts of tokens."""
    return bool(sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1)


def uniform(seed: int, position: int, purpose: Purpose) -> float:
    """Return a number of [0, 1) that these three alone decide: 53 bits of Philox.

    seed: 0 to 2**64 - 1. position: of the token among the request's output tokens, from 0.
    """
    # The generator counts in the lowest of the counter's four words, the position is in the next: no two overlap.
    bits = np.random.Philox(key=PURPOSES[purpose] << 64 | seed, counter=position << 64).random_raw()
    return (int(bits) >> 11) * 2.0**-53


def next_token(
    logits: np.ndarray,
    sampling: Sampling,
    *,
    seed: int,
    position: int,
    seen: Seen | None = None,
    mask: np.ndarray | None = None,
    name: str = "",
) -> int:
    """Return the token of output ``position``: ``choose(distribution(...), uniform(seed, position, "token"))``.

    Arguments are those of ``distribution`` and of ``uniform``. At temperature 0 no distribution is formed.
    """
    if sampling.temperature == 0:
        if needs_seen(sampling) or sampling.logit_bias or mask is not None:
            logits = logits.astype(np.float64)
            _adjust_(logits, sampling, seen, mask, name)
        return _likeliest(logits, name)
    return choose(distribution(logits, sampling, seen=seen, mask=mask, name=name), uniform(seed, position, "token"))


def distribution(
    logits: np.ndarray,
    sampling: Sampling,
    *,
    seen: Seen | None = None,
    mask: np.ndarray | None = None,
    name: str = "",
) -> np.ndarray:
    """Return the probabilities a token is drawn with: [V] float64, by the steps at the top of this file.

    logits: [V] float32, as the model gives them; not changed. seen: counts of the tokens before this one; needed only
    where ``needs_seen(sampling)``. mask: [V] bool, the tokens allowed here. name: the request's, for errors.

    Raises ``NoTokenError`` if the logits hold NaN or +inf, if no token is possible, or if the mask is of another shape,
    and ``ValueError`` if a biased id is outside V.
    """
    # All in place, in one array: memory asked for anew would cost more than the arithmetic.
    values = logits.astype(np.float64)
    _adjust_(values, sampling, seen, mask, name)
    likeliest = _likeliest(values, name)
    best = values[likeliest]
    if sampling.temperature == 0:
        kept, shares = likeliest, 1.0
    elif 0 < sampling.top_k < len(values):
        kept = np.sort(_largest(values, sampling.top_k))
        shares = _cut_(values[kept], best, sampling)
    else:
        return _cut_(values, best, sampling)
    values[:] = 0
    values[kept] = shares
    return values


def choose(weights: np.ndarray, u: float) -> int:
    """Return the id at ``u`` of the cumulative distribution: the first whose sum, itself included, is over u * total.

    weights: [V] float64, 0 or more, and not all 0; probabilities, or any multiple of them. u: in [0, 1). An id of
    weight 0 is never returned.
    """
    # A running sum of V numbers is a chain of V additions; sums of blocks, then one block, are far fewer.
    ends = np.add.reduceat(weights, np.arange(0, len(weights), BLOCK)).cumsum()
    wanted = u * ends[-1]
    block = _first_over(ends, wanted)
    before = ends[block - 1] if block else 0.0
    begin = block * BLOCK
    return begin + _first_over(weights[begin : begin + BLOCK].cumsum(), wanted - before)


def log_probabilities(logits: np.ndarray, chosen: int, num: int) -> LogProbabilities:
    """Return what the model itself says, before penalties, bias, mask, temperature and cuts: log_softmax in float64.

    logits: [V] float32. chosen: the token taken. num: how many of the likeliest to return.
    """
    best = float(logits.max())
    weights = logits.astype(np.float64)
    weights -= best
    log_total = best + math.log(np.exp(weights, out=weights).sum())
    top = _largest(logits, min(num, len(logits))) if num else []
    return LogProbabilities(
        float(logits[chosen]) - log_total, [(int(index), float(logits[index]) - log_total) for index in top]
    )


def _adjust_(logits: np.ndarray, sampling: Sampling, seen: Seen | None, mask: np.ndarray | None, name: str) -> None:
    """Steps 1 to 4, in place: [V] float64."""
    if needs_seen(sampling):
        assert seen is not None, f"request {name} has penalties; expected the counts of its tokens"
        _penalise_(logits, sampling, seen)
    if sampling.logit_bias:
        _bias_(logits, sampling, name)
    if mask is not None:
        if mask.shape != logits.shape:
            raise NoTokenError(
                f"request {name}: the mask has shape {list(mask.shape)}; expected the logits', {list(logits.shape)}"
            )
        if not mask.any():
            raise NoTokenError(f"request {name}: the mask allows no token; expected at least one of {len(mask)}")
        logits[~mask] = -np.inf


def _penalise_(logits: np.ndarray, sampling: Sampling, seen: Seen) -> None:
    if sampling.repetition_penalty != 1:
        ids = np.flatnonzero(seen.in_prompt | (seen.in_output > 0))
        found = logits[ids]
        penalty = sampling.repetition_penalty
        with np.errstate(over="ignore"):  # an infinite logit is refused by name, later
            logits[ids] = np.where(found > 0, found / penalty, found * penalty)
    ids = np.flatnonzero(seen.in_output)
    logits[ids] -= sampling.presence_penalty + sampling.frequency_penalty * seen.in_output[ids]


def _bias_(logits: np.ndarray, sampling: Sampling, name: str) -> None:
    for token_id, value in sampling.logit_bias:
        if token_id >= len(logits):
            raise ValueError(f"request {name}: logit_bias has token {token_id}; expected 0 to {len(logits) - 1}")
        logits[token_id] += value


def _likeliest(logits: np.ndarray, name: str) -> int:
    """The first of the largest logits, which must be a number: argmax stops at a NaN if there is one."""
    index = int(logits.argmax())
    if not math.isfinite(logits[index]):
        raise NoTokenError(
            f"request {name}: the largest logit is {logits[index]} (token {index}); expected a finite number"
        )
    return index


def _cut_(weights: np.ndarray, best: float, sampling: Sampling) -> np.ndarray:
    """Steps 5, 7 and 8: logits, of which ``best`` is the largest, become probabilities in place; returned."""
    weights -= best  # at most 0: no temperature is too small
    with np.errstate(over="ignore"):  # -inf is right for what is so far below
        weights /= sampling.temperature
    np.exp(weights, out=weights)
    if sampling.top_p < 1:
        _keep_mass_(weights, sampling.top_p)
    if sampling.min_p > 0:
        weights *= weights >= sampling.min_p  # the likeliest one's weight is exp(0) = 1
    weights /= weights.sum()
    return weights


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Ids of the ``count`` largest values, largest first, of equal ones the smaller id."""
    whole = len(values) // BLOCK * BLOCK
    if count <= whole // BLOCK:
        # As many blocks have a maximum of at least this, so as many values are at least this: most others drop out.
        maxima = values[:whole].reshape(-1, BLOCK).max(axis=1)  # [V // BLOCK]
        least = np.partition(maxima, len(maxima) - count)[len(maxima) - count]
    else:
        least = np.partition(values, len(values) - count)[len(values) - count]
    ids = np.flatnonzero(values >= least)
    return ids[np.argsort(-values[ids], kind="stable")[:count]]


def _keep_mass_(weights: np.ndarray, share: float) -> None:
    """Set to 0, in place, all but the fewest largest weights that hold ``share`` < 1 of the sum.

    The least weight kept is searched by mass, not by rank: a sample tells about where it is, one pass over the
    candidates proves it or says on which side to go on, and only a few are sorted in the end.
    """
    candidates, wanted = weights, share * weights.sum()
    while len(candidates) > FEW:
        high, low = _bracket(candidates, wanted / candidates.sum())
        over = candidates > high
        over_mass = np.einsum("v,v->", candidates, over)  # their sum, with no array for them
        if over_mass >= wanted:
            candidates = candidates[over]
            continue
        inside = candidates[(candidates <= high) & (candidates >= low)]
        missing = wanted - over_mass - inside.sum()
        parts = (inside, wanted - over_mass) if missing <= 0 else (candidates[candidates < low], missing)
        if len(parts[0]) == len(candidates) or not parts[0].any():  # equal ones, or missing by rounding alone
            break
        candidates, wanted = parts
    ordered = np.sort(candidates)[::-1]
    last = min(int(np.searchsorted(ordered.cumsum(), wanted)), len(ordered) - 1)  # over the end by rounding alone
    least = ordered[last]
    equal = np.flatnonzero(weights == least)
    num_kept = last + 1 - int(np.searchsorted(-ordered, -least))  # of the equal ones
    weights *= weights >= least
    weights[equal[num_kept:]] = 0


def _bracket(candidates: np.ndarray, share: float) -> tuple[float, float]:
    """Two of the candidates between which, by a sample, the largest ones reach ``share`` of the sum."""
    sample = np.sort(candidates[:: len(candidates) // SAMPLE])[::-1]
    sums = sample.cumsum()
    place = int(np.searchsorted(sums, share * sums[-1]))
    return sample[max(place - MARGIN, 0)], sample[min(place + MARGIN, len(sample) - 1)]


def _first_over(ends: np.ndarray, wanted: float) -> int:
    """The first index whose running sum is over ``wanted``; where rounding leaves none, the last that adds anything."""
    index = int(np.searchsorted(ends, wanted, side="right"))
    return index if index < len(ends) else int(np.searchsorted(ends, ends[-1], side="left"))
