"""Text as it comes: whole characters, stop strings wherever they lie, and the same events for any grouping."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders

from dsv4.data.tokenizer import EOS, num_ids, plain_text, train_tokenizer
from dsv4.engine.text import Detokenizer, Piece, StopFinder, TextStream

REPLACEMENT = "\ufffd"
TEXTS = ["for word in words:\n    print(word, end='')\n" * 3, "caf\u00e9 na\u00efve \u4f60\u597d \u4f60\u597d"] * 2
WIDE = "e\u0301 caf\u00e9 \u4f60\u597d \U0001f600\U0001f469\u200d\U0001f680 \u00df\n"


def make_tokenizer():
    """Special tokens, bytes, merges, and added tokens that look like bytes, hold a space, or are no ASCII."""
    tokenizer = train_tokenizer(iter(TEXTS), 300)
    tokenizer.add_special_tokens(["<special>", AddedToken("\u00e9\u0120", special=True)])
    tokenizer.add_tokens(["<plain>", "\u00e9", "\u0120x", "a b", "\u00e9 \u4f60", "\uff5cx"])
    return tokenizer


TOKENIZER = make_tokenizer()
IDS = st.lists(st.integers(0, num_ids(TOKENIZER) + 3), max_size=30)


def split(items, cuts):
    """The items in groups that end at the cuts; some groups are empty."""
    places = [0, *sorted(cut % (len(items) + 1) for cut in cuts), len(items)]
    return [items[begin:end] for begin, end in pairwise(places)]


CUTS = st.lists(st.integers(0, 100), max_size=8)


# Characters


@given(IDS, CUTS, st.booleans())
def test_pieces_are_the_decoding_of_all_tokens(ids, cuts, skip):
    """Of any tokens: most of these sequences are no UTF-8."""
    detokenizer = Detokenizer(TOKENIZER, skip_special_tokens=skip)
    pieces = [detokenizer.push(group) for group in split(ids, cuts)]
    assert "".join(pieces) + detokenizer.flush() == TOKENIZER.decode(ids, skip_special_tokens=skip)
    assert detokenizer.flush() == ""


@given(st.text(max_size=20), CUTS)
def test_no_piece_holds_a_broken_character(text, cuts):
    ids = plain_text(TOKENIZER).encode(text).ids
    detokenizer = Detokenizer(TOKENIZER)
    done = ""
    for group in split(ids, cuts):
        done += detokenizer.push(group)
        assert text.startswith(done)
    assert done == text
    assert detokenizer.flush() == ""


def test_a_character_comes_with_its_last_byte():
    first = TOKENIZER.token_to_id("!") - ord("!") + 33  # byte tokens are in the order of their characters
    assert TOKENIZER.id_to_token(first) == "!"
    ids = plain_text(TOKENIZER).encode("\U0001f600x").ids
    assert len(ids) == 5
    detokenizer = Detokenizer(TOKENIZER)
    assert [detokenizer.push([token_id]) for token_id in ids] == ["", "", "", "\U0001f600", "x"]


def test_bytes_that_become_nothing_are_replaced_when_that_is_known():
    ids = plain_text(TOKENIZER).encode("\U0001f600x").ids
    detokenizer = Detokenizer(TOKENIZER)
    assert detokenizer.push(ids[:2]) == ""
    assert detokenizer.push(ids[4:]) == REPLACEMENT + "x"
    assert detokenizer.push(ids[1:2]) == REPLACEMENT
    assert detokenizer.push(ids[:3]) == ""
    assert detokenizer.flush() == REPLACEMENT
    assert detokenizer.push(ids) == "\U0001f600x"


def test_special_tokens_are_left_out_or_spelt():
    ids = [*TOKENIZER.encode("word").ids, TOKENIZER.token_to_id(EOS), TOKENIZER.token_to_id("<plain>")]
    assert Detokenizer(TOKENIZER).push(ids) == "word<plain>"
    assert Detokenizer(TOKENIZER, skip_special_tokens=False).push(ids) == f"word{EOS}<plain>"


def test_other_decoders_are_refused():
    other = Tokenizer.from_str(TOKENIZER.to_str())
    other.decoder = decoders.Metaspace()
    with pytest.raises(ValueError, match=r"the tokenizer's decoder is .*Metaspace.*; expected ByteLevel"):
        Detokenizer(other)
    settings = json.loads(TOKENIZER.to_str())
    settings["decoder"] = None
    with pytest.raises(ValueError, match="the tokenizer's decoder is None; expected ByteLevel"):
        Detokenizer(Tokenizer.from_str(json.dumps(settings)))


# Stop strings


def by_definition(text, stops):
    """The text before the stop string that ends first, of those the longest, and that one; else all of it, and None."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end - len(stop)], stop
    return text, None


def safe(text, stops):
    """The text but for its longest end that a stop string may begin with."""
    held = max((n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])), default=0)
    return text[: len(text) - held]


LETTERS = st.text("ab\u00e9", max_size=24)
STOPS = st.lists(st.text("ab\u00e9", min_size=1, max_size=6), max_size=4)


@given(LETTERS, STOPS, CUTS)
def test_any_split_gives_the_same_text_and_stop(text, stops, cuts):
    finder = StopFinder(stops)
    pieces = [finder.push(part) for part in split(text, cuts)]
    assert ("".join(pieces) + finder.flush(), finder.found) == by_definition(text, stops)


@given(LETTERS, STOPS)
def test_no_character_is_held_longer_than_it_must_be(text, stops):
    finder = StopFinder(stops)
    done = ""
    for index, character in enumerate(text):
        done += finder.push(character)
        before, stop = by_definition(text[: index + 1], stops)
        assert finder.found == stop
        assert done == (before if stop else safe(before, stops))


@pytest.mark.parametrize(
    ("stops", "text", "before", "found"),
    [
        (["abc", "b"], "xabc", "xa", "b"),  # b ends first
        (["bc", "abc", "c"], "xabc", "x", "abc"),  # all end at c
        (["ab", "abc"], "xabc", "x", "ab"),
        (["aab"], "aaab", "a", "aab"),  # a false start
        (["abab!", "bac"], "ababac", "aba", "bac"),
        (["aa"], "aaaa", "", "aa"),
        (["\n\n"], "a\n\n\nb", "a", "\n\n"),
        (["stop"], "sto", "sto", None),
        ([], "abc", "abc", None),
    ],
)
def test_overlapping_stop_strings(stops, text, before, found):
    for parts in ([text], list(text)):
        finder = StopFinder(stops)
        assert "".join(map(finder.push, parts)) + finder.flush() == before
        assert finder.found == found


def test_nothing_follows_a_stop():
    finder = StopFinder(["b"])
    assert finder.push("abc") == "a"
    assert finder.push("d") == finder.flush() == ""


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match=r"stop is \('a', ''\); expected no empty string"):
        StopFinder(["a", ""])


def test_a_long_stop_string_takes_linear_time():
    """A thousand characters of which each end is a false start: a search from each would take 10**9 steps."""
    finder = StopFinder(["a" * 1000 + "b"])
    assert finder.push("a" * 100_000) == "a" * 99_000
    assert finder.push("bc") == ""
    assert finder.found == "a" * 1000 + "b"


# Both


def test_a_stop_string_that_never_tokenises_alone():
    """It begins inside a token, spans others and ends inside one; the tokens after that one are not of the output."""
    plain, stop = plain_text(TOKENIZER), "ord in wo"
    ids = plain.encode("for word in words in words").ids
    assert [plain.decode([token_id]) for token_id in ids] == ["for", " word", " in", " words", " in", " words"]
    assert not set(plain.encode(stop).ids) <= set(ids)
    stream = TextStream(TOKENIZER, [stop])
    assert stream.push(ids) == Piece("for w", stop, 4)
    assert stream.push(ids) == stream.finish() == Piece("", stop, 0)


def test_what_is_held_comes_at_the_end():
    stream = TextStream(TOKENIZER, ["word!"])
    ids = plain_text(TOKENIZER).encode("word\U0001f600").ids
    text = "".join(stream.push([token_id]).text for token_id in ids[:-1])
    assert text == ""
    assert stream.finish() == Piece("word" + REPLACEMENT, None, 0)
    stream = TextStream(TOKENIZER, [REPLACEMENT])
    assert stream.push(ids[:-1]) == Piece("word", None, len(ids) - 1)
    assert stream.finish() == Piece("", REPLACEMENT, 0)


@given(
    st.text("wordin\u00e9\U0001f600 :\n", max_size=20), IDS, CUTS,
    st.lists(st.sampled_from(["in", "or", "\u00e9", "d\n", "\U0001f600:", "word in", " ", REPLACEMENT]), max_size=3),
)  # fmt: skip
def test_any_grouping_of_tokens_gives_the_same_events(text, more, cuts, stops):
    ids = plain_text(TOKENIZER).encode(text).ids + more

    def events(groups):
        stream = TextStream(TOKENIZER, stops)
        pieces = [*(stream.push(group) for group in groups), stream.finish()]
        return "".join(piece.text for piece in pieces), pieces[-1].stop, sum(piece.num_tokens for piece in pieces)

    before, stop, used = events(split(ids, cuts))
    assert (before, stop) == by_definition(TOKENIZER.decode(ids), stops)
    assert (before, stop, used) == events([[token_id] for token_id in ids])
    if stop is None:
        assert used == len(ids)
    assert TextStream(TOKENIZER).push(plain_text(TOKENIZER).encode(WIDE).ids).text == WIDE
