"""How the tokens of one request are chosen, and when it ends. No torch.

Defaults are the release's own (temperature 1, top_p 1) or leave the model's distribution alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv4.config.checks import below, is_number, is_whole, not_flag, outside, outside_whole, refuse

MAX_LOGPROBS = 20
MAX_BIAS = 100
MAX_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What one request asks for."""

    max_tokens: int = 256
    """Tokens of output at most; fewer where the context ends before."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_p: float = 1.0
    """Keep the likeliest tokens that hold this share together; 1 keeps all."""
    top_k: int = 0
    """Keep this many of the likeliest tokens; 0 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this share as likely as the likeliest; 0 keeps all."""
    presence_penalty: float = 0.0
    """Taken off the logit of each token that the output holds."""
    frequency_penalty: float = 0.0
    """Taken off the logit of a token once for each time that the output holds it."""
    repetition_penalty: float = 1.0
    """Divides the positive logits, and multiplies the negative, of tokens in prompt or output; 1 leaves them alone."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Pairs of a token id and what is added to its logit."""
    stop: tuple[str, ...] = ()
    """Strings before which the output ends."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the output, beside the model's own end."""
    ignore_eos: bool = False
    """Go on past the model's own end of text."""
    seed: int | None = None
    """The same seed gives the same tokens; None lets the engine choose one."""
    logprobs: int | None = None
    """Of how many of the likeliest tokens log-probabilities are returned, beside the chosen one's; None: of none."""

    def __post_init__(self) -> None:
        problems = below("sampling.max_tokens", self.max_tokens, 1)
        if not is_number(self.temperature) or self.temperature < 0:
            problems.append(f"sampling.temperature is {self.temperature!r}; expected a finite number of at least 0")
        if not is_number(self.top_p) or not 0 < self.top_p <= 1:
            problems.append(f"sampling.top_p is {self.top_p!r}; expected 0 < top_p <= 1")
        problems += below("sampling.top_k", self.top_k, 0)
        problems += outside("sampling.min_p", self.min_p, 0, 1)
        problems += outside("sampling.presence_penalty", self.presence_penalty, -2, 2)
        problems += outside("sampling.frequency_penalty", self.frequency_penalty, -2, 2)
        if not is_number(self.repetition_penalty) or self.repetition_penalty <= 0:
            problems.append(
                f"sampling.repetition_penalty is {self.repetition_penalty!r}; expected a finite number above 0"
            )
        problems += _bias_problems(self.logit_bias)
        problems += _stop_problems(self.stop)
        problems += _stop_id_problems(self.stop_token_ids)
        problems += not_flag("sampling.ignore_eos", self.ignore_eos)
        if self.seed is not None:
            problems += outside_whole("sampling.seed", self.seed, 0, MAX_SEED)
        if self.logprobs is not None:
            problems += outside_whole("sampling.logprobs", self.logprobs, 0, MAX_LOGPROBS)
        refuse(problems)


def _bias_problems(pairs: object) -> list[str]:
    if not isinstance(pairs, tuple):
        return [f"sampling.logit_bias is {pairs!r}; expected a tuple of pairs (token id, bias)"]
    problems: list[str] = []
    known: set[int] = set()
    for i, pair in enumerate(pairs):
        if not isinstance(pair, tuple) or len(pair) != 2:
            problems.append(f"sampling.logit_bias[{i}] is {pair!r}; expected a pair (token id, bias)")
            continue
        token, bias = pair
        problems += below(f"sampling.logit_bias[{i}][0]", token, 0)
        problems += outside(f"sampling.logit_bias[{i}][1]", bias, -MAX_BIAS, MAX_BIAS)
        if is_whole(token) and token in known:
            problems.append(f"sampling.logit_bias gives token {token} twice; expected each token once")
        if is_whole(token):
            known.add(token)
    return problems


def _stop_problems(stop: object) -> list[str]:
    if not isinstance(stop, tuple):
        return [f"sampling.stop is {stop!r}; expected a tuple of strings"]
    return [
        f"sampling.stop[{i}] is {text!r}; expected a string that is not empty"
        for i, text in enumerate(stop)
        if not isinstance(text, str) or not text
    ]


def _stop_id_problems(ids: object) -> list[str]:
    if not isinstance(ids, tuple):
        return [f"sampling.stop_token_ids is {ids!r}; expected a tuple of token ids"]
    return [line for i, token in enumerate(ids) for line in below(f"sampling.stop_token_ids[{i}]", token, 0)]
