"""The special tokens that data is made with, by id."""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Tokenizer

from dsv4.data.tokenizer import BOS, EOS, FIM_BEGIN, FIM_END, FIM_HOLE


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Ids of what stands around a document, and of what marks its parts in fill-in-the-middle."""

    bos: int
    eos: int
    fim_begin: int
    fim_hole: int
    fim_end: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> SpecialTokens:
        """Look the released names up; a ``ValueError`` names those that the tokenizer lacks."""
        names = {"bos": BOS, "eos": EOS, "fim_begin": FIM_BEGIN, "fim_hole": FIM_HOLE, "fim_end": FIM_END}
        ids = {
            field: token_id for field, name in names.items() if (token_id := tokenizer.token_to_id(name)) is not None
        }
        missing = [names[field] for field in names.keys() - ids.keys()]
        if missing:
            raise ValueError(f"the tokenizer lacks {', '.join(sorted(missing))}; expected the released special tokens")
        return cls(**ids)
