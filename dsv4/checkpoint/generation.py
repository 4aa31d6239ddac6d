"""``generation_config.json``, as the releases have it."""

from __future__ import annotations

import json

from dsv4.config.load import to_released
from dsv4.config.model import ModelConfig

GENERATION = "generation_config.json"


def generation_config(config: ModelConfig) -> bytes:
    """Return the file's content: sampling from the model's own distribution."""
    content = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "do_sample": True,
        "temperature": 1.0,
        "top_p": 1.0,
        "transformers_version": to_released(config)["transformers_version"],
    }
    return (json.dumps(content, indent=2) + "\n").encode()
