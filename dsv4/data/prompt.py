"""A prompt to token ids: special tokens by their ids, everything else as plain text."""

from __future__ import annotations

from tokenizers import Tokenizer

from dsv4.data.tokenizer import plain_text
from dsv4.text.encode import Prompt
from dsv4.text.tokens import SPECIAL_TOKENS


class PromptTokenizer:
    """Turns prompts into ids. Raises ``ValueError`` with all the special tokens that ``tokenizer`` lacks."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        found = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
        ids = {token: token_id for token, token_id in found.items() if token_id is not None}
        missing = [token for token in SPECIAL_TOKENS if token not in ids]
        if missing:
            raise ValueError(f"the tokenizer lacks {', '.join(missing)}; expected the released special tokens")
        self._special = ids
        self._plain = plain_text(tokenizer)

    def special(self, token: str) -> int:
        """The id of a special token of the release."""
        return self._special[token]

    def ids(self, prompt: Prompt) -> list[int]:
        """The ids of ``prompt``. Raises ``ValueError`` for half a surrogate pair, which no tokenizer can read."""
        ids: list[int] = []
        for part in prompt.parts:
            if isinstance(part, str):
                ids += self._plain.encode(_whole(part), add_special_tokens=False).ids
            else:
                ids.append(self._special[part.text])
        return ids


def _whole(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"a message has the character {text[error.start]!r}, half of a surrogate pair; expected whole characters"
        ) from error
    return text
