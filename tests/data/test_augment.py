"""Fill-in-the-middle can be undone, splitting leaves the text as it is, and both depend on the document alone."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from dsv4.data.augment import Splits, augment, borders, fill_in_the_middle, split, split_table, splits_of, uniform
from dsv4.data.special import SpecialTokens
from dsv4.data.tokenizer import NUM_BYTES, SPECIAL_TOKENS, plain_text, token_bytes, train_tokenizer

SPECIAL = SpecialTokens(bos=0, eos=1, fim_hole=3, fim_begin=4, fim_end=5)
NO_SPLITS = splits_of({}, 100)
NUM_BASE = len(SPECIAL_TOKENS) + NUM_BYTES  # ids before the first merge
TEXT = 'if a == b:\n\treturn (c,\n\td);\n\n# \u3002\n\n"x"\r\nprint("y");\n\nelse:\n\tpass\n\n\u3002\n' * 4


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(iter([TEXT]), NUM_BASE + 31)


def test_numbers_are_a_documents_own():
    numbers = uniform(7, 2, 11, 50)
    assert ((numbers >= 0) & (numbers < 1)).all()
    assert (numbers == uniform(7, 2, 11, 50)).all()
    assert (numbers[:9] == uniform(7, 2, 11, 9)).all()
    others = [uniform(*place, 50) for place in ((8, 2, 11), (7, 3, 11), (7, 2, 12))]
    assert len({*numbers, *np.concatenate(others)}) == 200


def test_numbers_stay_as_they_are():
    """Other numbers would give a resumed run other documents. Computed once, with numpy 2.4.6."""
    assert uniform(7, 2, 11, 3).tolist() == [0.10271300022855423, 0.6159952487286986, 0.5801973041408142]


@pytest.mark.parametrize("num_tokens", [1, 2, 5])
def test_every_pair_of_borders_is_equally_likely(num_tokens):
    firsts = [(i + 0.5) / (num_tokens + 1) for i in range(num_tokens + 1)]
    seconds = [(i + 0.5) / num_tokens for i in range(num_tokens)]
    found = sorted(borders(num_tokens, first, second) for first in firsts for second in seconds)
    assert found == sorted(2 * [*combinations(range(num_tokens + 1), 2)])


def test_parts_in_the_order_prefix_suffix_middle():
    tokens = np.array([10, 11, 12, 13, 14, 15], dtype=np.int32)
    result = fill_in_the_middle(tokens, SPECIAL, 1, 3)
    assert result.tolist() == [4, 10, 3, 13, 14, 15, 5, 11, 12]
    assert result.dtype == np.int32


@given(
    tokens=st.lists(st.integers(10, 99), min_size=1, max_size=12), seed=st.integers(0, 9), epoch=st.integers(0, 9),
    document=st.integers(0, 2**40),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_fill_in_the_middle_can_be_undone(tokens, seed, epoch, document):
    place = {"seed": seed, "epoch": epoch, "document": document}
    result = augment(np.array(tokens, np.int32), NO_SPLITS, SPECIAL, fim_rate=1.0, split_rate=0.0, **place).tolist()
    assert result[0] == SPECIAL.fim_begin
    hole, end = result.index(SPECIAL.fim_hole), result.index(SPECIAL.fim_end)
    prefix, suffix, middle = result[1:hole], result[hole + 1 : end], result[end + 1 :]
    assert prefix + middle + suffix == tokens
    assert middle


def test_rates_are_shares_of_documents_and_tokens():
    tokens = np.array([23] + [20] * 50, dtype=np.int32)
    splits = splits_of({20: (21, 22), 23: (24, 25)}, 100)
    num_documents = 400
    num_middles = num_split = num_both = 0
    for document in range(num_documents):
        place = {"seed": 5, "epoch": 1, "document": document}
        result = augment(tokens, splits, SPECIAL, fim_rate=0.1, split_rate=0.3, **place)
        num_middles += SPECIAL.fim_hole in result
        num_split += (result == 21).sum()
        num_both += SPECIAL.fim_hole in result and 24 in result
        # Whether and where a middle is cut out does not hang on the rate of splitting, and the other way round.
        alone = augment(tokens, splits, SPECIAL, fim_rate=0.0, split_rate=0.3, **place)
        assert sorted(alone) == sorted(result[(result < 3) | (result > 5)])
    assert 0 < num_both < num_middles / 2  # whether a document has a middle says nothing of its first token
    # Four standard deviations of a binomial count.
    assert abs(num_middles - 0.1 * num_documents) < 4 * (0.1 * 0.9 * num_documents) ** 0.5
    assert abs(num_split - 0.3 * 50 * num_documents) < 4 * (0.3 * 0.7 * 50 * num_documents) ** 0.5


def test_nothing_changes_at_rate_zero():
    tokens = np.array([20, 21, 20], dtype=np.int32)
    splits = splits_of({20: (21, 22)}, 100)
    place = {"seed": 5, "epoch": 1, "document": 2}
    assert augment(tokens, splits, SPECIAL, fim_rate=0.0, split_rate=0.0, **place).tolist() == [20, 21, 20]


TABLE = {20: (30, 31), 22: (20, 21, 40), 27: (28, 29)}


@given(tokens=st.lists(st.integers(18, 30), max_size=15), chosen=st.sets(st.integers(0, 14)))
@settings(max_examples=100, deadline=None)
def test_chosen_tokens_are_replaced_by_their_parts(tokens, chosen):
    where = [index for index, token in enumerate(tokens) if index in chosen and token in TABLE]
    expected = []
    for index, token in enumerate(tokens):
        expected += TABLE[token] if index in where else [token]
    result = split(np.array(tokens, np.int32), splits_of(TABLE, 50), np.array(where, int))
    assert result.tolist() == expected
    assert result.dtype == np.int32


def test_the_table_holds_line_breaks_with_punctuation_in_two_parts(tokenizer):
    table = split_table(tokenizer)
    texts = {token: tokenizer.decode([token], skip_special_tokens=False) for token in tokenizer.get_vocab().values()}
    merged = {token for token in texts if token >= NUM_BASE}
    has_break = {token for token in merged if set(texts[token]) & set("\r\n")}
    has_both = {token for token in has_break if set(texts[token]) & set('=:,;#"()\u3002')}
    assert table.keys() == has_both
    assert {":\n", ",\n", ");\n\n", '"\r'} <= {texts[token] for token in table}
    assert all(len(parts) == 2 for parts in table.values())
    names = {token: name for name, token in tokenizer.get_vocab().items()}
    assert all("".join(names[part] for part in parts) == names[token] for token, parts in table.items())


def bpe(tokens, merges):
    """A byte-level BPE of these tokens, as the byte-level alphabet writes them."""
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


LINE_BREAK = "\u010a"


def test_a_token_made_by_several_merges_has_the_parts_of_the_first():
    tokens = [";", LINE_BREAK, 2 * LINE_BREAK, ";" + LINE_BREAK, ";" + 2 * LINE_BREAK]
    made = [(tokens[0], tokens[1]), (tokens[1], tokens[1]), (tokens[3], tokens[1]), (tokens[0], tokens[2])]
    assert split_table(bpe(tokens, made)) == {3: (0, 1), 4: (3, 1)}


def test_half_a_character_is_no_punctuation():
    last_byte = "\u0124"  # 0x82, the last of the ideographic full stop
    assert split_table(bpe([last_byte, LINE_BREAK, last_byte + LINE_BREAK], [(last_byte, LINE_BREAK)])) == {}


def test_splitting_leaves_text_and_bytes_as_they_are(tokenizer):
    sizes = token_bytes(tokenizer)
    ids = np.array(plain_text(tokenizer).encode(TEXT).ids, dtype=np.int32)
    splits = splits_of(split_table(tokenizer), len(sizes))
    for rate in (0.4, 1.0):
        place = {"seed": 3, "epoch": 0, "document": 6}
        result = augment(ids, splits, SPECIAL, fim_rate=0.0, split_rate=rate, **place)
        assert len(result) > len(ids)
        assert tokenizer.decode(result.tolist()) == TEXT
        with_middle = augment(ids, splits, SPECIAL, fim_rate=1.0, split_rate=rate, **place)
        assert sizes[with_middle].sum() == sizes[result].sum() == sizes[ids].sum() == len(TEXT.encode())


def test_a_table_as_arrays():
    splits = splits_of(TABLE, 30)
    assert isinstance(splits, Splits)
    parts = {t: splits.parts[splits.first[t] : splits.first[t] + splits.num_parts[t]].tolist() for t in TABLE}
    assert parts == {token: list(its_parts) for token, its_parts in TABLE.items()}
    assert splits.num_parts.sum() == 30 + 1 + 2 + 1
