"""The same layer in transformers: its eager code with fresh weights of its own, the strongest it has for this model.

What fits is tried with the whole prompt at once first, then in chunks. Its cache is filled by its own prefill alone, so
decoding is measured for one sequence that its prefill got through.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from dsv4.config.load import to_released
from dsv4.config.model import ModelConfig


def why_none() -> str | None:
    """Return why there is no such layer here, or None."""
    if find_spec("transformers") is None:
        return "transformers is not installed"
    if find_spec("transformers.models.deepseek_v4") is None:
        from transformers import __version__

        return f"transformers {__version__} has no DeepSeek-V4"
    return None


class Twin:
    """transformers' model of one layer, without the head. config: of a single layer."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        from transformers import AutoModel
        from transformers.models.deepseek_v4 import DeepseekV4Config

        self.config, self.device = config, device
        released: dict[str, Any] = to_released(config)
        theirs = DeepseekV4Config(**released)
        with device:
            self.model: Any = AutoModel.from_config(theirs, dtype=dtype, attn_implementation="eager")
        self.model.to(device)

    def train(self, tokens: int) -> Callable[[], object]:
        """Return a training step: forward and backward, the gradients dropped."""
        ids = self._ids(tokens)
        grad = torch.randn(1, tokens, self.config.hidden_size, dtype=self.model.dtype, device=self.device)

        def run() -> None:
            self.model(ids, use_cache=False).last_hidden_state.backward(grad)
            self.model.zero_grad(set_to_none=True)

        return run

    def prefill(self, tokens: int, chunk: int) -> Callable[[], Any]:
        """Return what takes a whole prompt in, chunk by chunk, and returns the cache."""
        ids = self._ids(tokens)

        @torch.no_grad()
        def run() -> Any:
            cache = None
            for part in ids.split(chunk, dim=1):
                cache = self.model(part, past_key_values=cache, use_cache=True).past_key_values
            return cache

        return run

    def decode(self, cache: Any) -> Callable[[], object]:
        """Return a step of one more token of the sequence in a cache, which grows by it."""
        ids = self._ids(1)

        @torch.no_grad()
        def run() -> None:
            self.model(ids, past_key_values=cache, use_cache=True)

        return run

    def _ids(self, tokens: int) -> torch.Tensor:
        return torch.randint(0, self.config.vocab_size, (1, tokens), device=self.device)
