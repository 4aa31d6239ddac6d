"""Which tokens of a conversation the assistant writes: those it is trained on.

After the mark of the assistant stands the prompt's own ``<think>`` or ``</think>``; what follows, up to and with the
end of the answer, is written. It is told by the tokens alone, so that a token store needs no flags: text that spells a
mark is not the mark's token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from dsv4.text.tokens import ASSISTANT, EOS

PROMPTED = 2  # tokens: the mark, and the one that opens or closes thinking


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Ids of the mark before an answer, and of its end."""

    assistant: int
    eos: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Answers:
        """Look the released names up; a ``ValueError`` names what the tokenizer lacks."""
        assistant, eos = (tokenizer.token_to_id(name) for name in (ASSISTANT, EOS))
        if assistant is None or eos is None:
            raise ValueError(f"the tokenizer lacks {ASSISTANT} or {EOS}; expected the released special tokens")
        return cls(assistant=assistant, eos=eos)

    def written(self, token_ids: np.ndarray) -> np.ndarray:
        """Which of a piece's tokens, [n] integers, an assistant writes: [n] bool.

        The rest of an answer whose mark was cut off does not count: its question is not there.
        """
        places = np.arange(len(token_ids))
        last_mark = np.maximum.accumulate(np.where(token_ids == self.assistant, places, -1))
        last_end = np.maximum.accumulate(np.where(token_ids == self.eos, places, -1))
        ended = np.concatenate([[-1], last_end[:-1]])  # before this token
        return (last_mark > ended) & (places - last_mark >= PROMPTED)
