"""The ids of special tokens come from the tokenizer, by the released names."""

import pytest
from tokenizers import Tokenizer, models

from dsv4.data.special import SpecialTokens
from dsv4.data.tokenizer import BOS, EOS, FIM_BEGIN, FIM_END, FIM_HOLE


def test_ids_by_name():
    names = [FIM_END, "text", EOS, FIM_BEGIN, BOS, FIM_HOLE]
    tokenizer = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=[]))
    assert SpecialTokens.of(tokenizer) == SpecialTokens(bos=4, eos=2, fim_begin=3, fim_hole=5, fim_end=0)


def test_missing_names_are_all_told():
    tokenizer = Tokenizer(models.BPE(vocab={BOS: 0, FIM_HOLE: 1, FIM_BEGIN: 2}, merges=[]))
    with pytest.raises(ValueError, match=f"the tokenizer lacks {EOS}, {FIM_END}; expected the released"):
        SpecialTokens.of(tokenizer)
