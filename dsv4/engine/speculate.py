"""Which drafts hold: tokens proposed by the MTP block, judged by the model's own distributions.

The model gives p_0 .. p_k, in one step, where p_i follows the drafts d_1 .. d_i. Either rule below accepts some first
drafts and adds one more token: what replaces the first draft that fails, or what follows the last.

``match`` keeps a draft while it is the token that plain decoding takes there. The output is that of plain decoding,
token for token, greedy or sampled, whatever the drafts are and wherever steps begin. A draft made by ``next_token``
on the draft's logits, with the same seed and position, uses the uniform number of the token it guesses; at
temperature 0 it is the draft's likeliest token.

``verify`` is rejection sampling, for drafts d_i drawn from q_i with numbers of their own. It accepts as often as any
rule can, with probability sum min(p, q), and the output follows p exactly, but the tokens are others than those of
plain decoding with the same seed. Draft x holds with probability min(1, p(x) / q(x)), else a token is drawn from
max(p - q, 0), normalised. Proof:

    P(x) = q(x) min(1, p(x) / q(x)) + P(rejected) max(p(x) - q(x), 0) / sum max(p - q, 0)
    P(rejected) = 1 - sum min(p, q) = sum (p - min(p, q)) = sum max(p - q, 0)
    P(x) = min(p(x), q(x)) + max(p(x) - q(x), 0) = p(x), and so for each position, given the tokens before it.

The numbers of a position are drawn for it alone. What is kept before a draft that was thrown away does not depend on
it, so the numbers it was drawn with are as good as new when a later step settles that position.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from dsv4.engine.sample import choose, uniform


def match(chosen: Iterable[int], drafts: Sequence[int]) -> list[int]:
    """Return the accepted drafts and one more token: 1 to k + 1 of them, those of plain decoding.

    chosen: k + 1 tokens, the i-th taken by ``next_token`` after drafts 1 .. i. It is read no further than the drafts
    hold, so an iterator may count draft i, or move a mask on, when it is asked for the token after it.
    """
    tokens = []
    for token, draft in zip(chosen, [*drafts, None], strict=False):
        tokens.append(token)
        if token != draft:
            break
    return tokens


def verify(
    targets: Iterable[np.ndarray],
    drafts: Sequence[int],
    proposals: Sequence[np.ndarray],
    *,
    seed: int,
    position: int,
) -> list[int]:
    """Return the accepted drafts and one more token: 1 to k + 1 of them, distributed as the targets say.

    targets: p_0 .. p_k, each [V] float64, after every step of ``distribution``; read as ``match`` reads its tokens.
    drafts: d_1 .. d_k. proposals: q_1 .. q_k, each [V] float64: d_i was ``choose(q_i, uniform(seed, place, "draft"))``
    with place = position + i - 1. position: of the first token returned, among the request's output tokens.
    """
    tokens = []
    rest = iter(targets)
    for draft, q in zip(drafts, proposals, strict=True):
        place = position + len(tokens)
        p = next(rest)
        assert q[draft] > 0, f"draft {draft} of output position {place} has probability 0; expected a draw from q"
        if uniform(seed, place, "accept") * q[draft] >= p[draft]:  # never where p is at least q: u is below 1
            return [*tokens, choose(_residual(p, q), uniform(seed, place, "correct"))]
        tokens.append(draft)
    return [*tokens, choose(next(rest), uniform(seed, position + len(tokens), "token"))]


def _residual(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """What p has over q, not normalised: [V]. Where they are equal but for rounding it may be empty: then p itself."""
    over = p - q
    np.maximum(over, 0, out=over)
    return over if over.any() else p
