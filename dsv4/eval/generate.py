"""Text from a model: one token after another, with the model's own state.

The prompt is one call, every further token another one: decoding is prefill with one token. Only the last position's
logits are formed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from dsv4.model.state import State
from dsv4.model.transformer import Transformer


def generate(
    model: Transformer,
    prompt_ids: list[int],
    *,
    num_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    stop_ids: set[int],
) -> Iterator[int]:
    """Yield up to ``num_tokens`` token ids that go on from ``prompt_ids``.

    temperature: divides the logits; 0 takes the likeliest token. top_p: draw from the fewest likeliest tokens that
    together have at least this probability. seed: of the draws, which happen on the CPU: logits of any device give the
    same tokens. stop_ids: a token that ends the text and is not yielded. The text also ends, without an error, where
    prompt and answer fill the model's max_context.
    """
    max_context = model.config.max_context
    if not 1 <= len(prompt_ids) <= max_context:
        raise ValueError(f"prompt_ids has {len(prompt_ids)} tokens; expected 1 to max_context = {max_context}")
    if num_tokens < 0:
        raise ValueError(f"num_tokens is {num_tokens}; expected 0 or more")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; expected a finite number, 0 or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; expected 0 < top_p <= 1")
    room = min(num_tokens, max_context - len(prompt_ids))
    return _continue(model, prompt_ids, room, temperature, top_p, seed, stop_ids)


def _continue(
    model: Transformer,
    prompt_ids: list[int],
    num_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    stop_ids: set[int],
) -> Iterator[int]:
    generator = torch.Generator().manual_seed(seed)
    state = model.new_state(1)
    new_ids = prompt_ids
    for _ in range(num_tokens):
        token_id = _choose(_last_logits(model, new_ids, state), temperature, top_p, generator)
        if token_id in stop_ids:
            return
        yield token_id
        new_ids = [token_id]


@torch.no_grad()
def _last_logits(model: Transformer, new_ids: list[int], state: State) -> torch.Tensor:
    """Advance the state by the new tokens and return the logits after the last one, [V] float64 on the CPU."""
    token_ids = torch.tensor([new_ids], device=model.embed.weight.device)
    streams, _ = model.run(token_ids, state=state)  # [1, T, N, D]
    return model.logits(model.hidden(streams[:, -1:]))[0, 0].double().cpu()


def _choose(logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """logits: [V] float64."""
    if temperature == 0:
        return int(logits.argmax())
    scaled = (logits - logits.max()) / temperature  # at most 0: no temperature is too small
    likeliest, token_ids = scaled.softmax(dim=0).sort(descending=True, stable=True)
    before = likeliest.cumsum(dim=0) - likeliest  # what the likelier ones have together
    kept = likeliest * (before < top_p)
    return int(token_ids[torch.multinomial(kept, 1, generator=generator)])
