"""What single tokens spell, for clients that want to see them."""

from __future__ import annotations

from tokenizers import Tokenizer

from dsv4.engine.text import spelling


def token_text(tokenizer: Tokenizer, token_id: int) -> bytes:
    """The bytes of a token, which may be part of a character; of a special token, its name."""
    token = tokenizer.id_to_token(token_id)
    return b"" if token is None else spelling(token)
