"""Stop strings through the engine: whatever the tokens are, no part of one is ever shown, and nothing else is held."""

import numpy as np
import pytest

from dsv4.config.sampling import Sampling
from dsv4.data.tokenizer import num_ids, plain_text
from dsv4.engine.engine import Engine

WRITTEN = "for word in words:\n caf\u00e9 \u4f60\u597d!"


def script(tokenizer, ids):
    """A mask that allows one text alone, token by token."""

    def mask(output):
        allowed = np.zeros(num_ids(tokenizer), bool)
        allowed[ids[len(output)]] = True
        return allowed

    return mask


def write(writer, tokenizer, small, text, stop, *, single=False, drafts=0):
    """The completion and the pieces of a request that can only write ``text``. single: a token for each byte."""
    plain = plain_text(tokenizer)
    parts = [bytes([byte]) for byte in text.encode()] if single else None
    ids = plain.encode(text).ids if parts is None else [byte_id(tokenizer, part) for part in parts]
    engine = Engine(writer, small(draft_tokens=drafts), tokenizer=tokenizer)
    sampling = Sampling(max_tokens=len(ids), stop=stop, seed=1, ignore_eos=True)
    id = engine.add("x", sampling, mask=script(tokenizer, ids))
    pieces = []
    while not engine.is_idle:
        pieces += engine.step()
    assert engine.pool.num_free == engine.pool.num_pages
    completion = engine.take(id)
    assert "".join(piece.text for piece in pieces) == completion.text
    assert [token for piece in pieces for token in piece.token_ids] == completion.token_ids == ids[: len(pieces)]
    return completion, pieces, ids


def byte_id(tokenizer, part):
    """The token of one byte."""
    found = [i for i in range(num_ids(tokenizer)) if tokenizer.id_to_token(i) == _BYTE_NAMES[part[0]]]
    return found[0]


def _byte_names():
    from dsv4.engine.text import BYTES

    return {byte: name for name, byte in BYTES.items()}


_BYTE_NAMES = _byte_names()

CASES = {
    "over the middles of tokens": (("ord in wo",), "for w", "ord in wo"),
    "the whole first token": (("for",), "", "for"),
    "in the first token": (("o",), "f", "o"),
    "at the very end": (("!",), WRITTEN[:-1], "!"),
    "one is a beginning of another": (("word in", "wo"), "for ", "wo"),
    "one ends where another does": (("s:\n", "words:\n", "\n"), "for word in ", "words:\n"),
    "others that go on differently": (("word is", "words:\nx", "\u00e9 "), "for word in words:\n caf", "\u00e9 "),
    "one character of several bytes": (("\u597d",), WRITTEN[:-2], "\u597d"),
    "none that comes": (("worm", "\u4f60!", "!!"), WRITTEN, None),
}  # fmt: skip


@pytest.mark.parametrize("single", [False, True], ids=["tokens", "bytes"])
@pytest.mark.parametrize(("stop", "before", "found"), CASES.values(), ids=CASES.keys())
def test_text_ends_before_the_stop_string(writer, tokenizer, small, stop, before, found, single):
    completion, pieces, ids = write(writer, tokenizer, small, WRITTEN, stop, single=single)
    assert completion.text == before
    assert completion.finish == ("length" if found is None else "stop")
    shown = ""
    for piece in pieces:
        shown += piece.text
        # A part of a stop string that comes is never shown, and one that does not come, in the end.
        assert before.startswith(shown)
    # The tokens go up to the one in which the stop string ends: one fewer would not hold it.
    text = tokenizer.decode(ids[: len(completion.token_ids) - 1])
    if found is not None:
        assert before + found not in text
        assert tokenizer.decode(completion.token_ids).startswith(before + found)


def test_a_text_is_shown_as_soon_as_no_stop_string_can_begin_there(writer, tokenizer, small):
    _, pieces, _ = write(writer, tokenizer, small, "word words", ("rdX", "s"), single=True)
    assert [piece.text for piece in pieces] == ["w", "o", "", "", "rd ", "w", "o", "", "", "rd"]


def test_a_character_that_never_comes_whole(writer, tokenizer, small):
    """Its bytes are a replacement character at the end, which may be a stop string, and is no part of one before."""
    whole = "\u4f60".encode()
    engine = Engine(writer, small(), tokenizer=tokenizer)
    ids = [byte_id(tokenizer, bytes([byte])) for byte in (ord("a"), *whole[:2])]
    texts = {}
    for stop in ((), ("a\ufffd",), ("\ufffd",), ("\u4f60",)):
        id = engine.add("x", Sampling(max_tokens=3, stop=stop, ignore_eos=True, seed=0), mask=script(tokenizer, ids))
        while not engine.is_idle:
            engine.step()
        texts[stop] = engine.take(id).text
    assert texts == {(): "a\ufffd", ("a\ufffd",): "", ("\ufffd",): "a", ("\u4f60",): "a\ufffd"}


def draft_rightly(engine, completion):
    """Let the drafts of an engine's only request be the tokens of a known output."""
    draft = engine.runner.draft

    def known(streams, spans):
        streams, logits = draft(streams, spans)
        for span, row in zip(spans, logits, strict=True):
            place = span.position + len(span.next_ids) + 1 - len(completion.prompt_ids)
            row[completion.token_ids[min(place, len(completion.token_ids) - 1)]] = 1e4
        return streams, logits

    engine.runner.draft = known


@pytest.mark.parametrize("drafts", [1, 3])
def test_drafts_that_hold_past_a_stop_string_are_no_part_of_the_output(writer, tokenizer, small, drafts):
    """Of an output without a stop, any piece of text is one: the output with it is the one without, cut."""
    sampling = Sampling(max_tokens=30, temperature=0, ignore_eos=True)
    (whole,) = Engine(writer, small(), tokenizer=tokenizer).generate(["for"], sampling)
    engine = Engine(writer, small(draft_tokens=drafts), tokenizer=tokenizer)
    draft_rightly(engine, whole)
    num_cut = 0
    for begin in range(0, len(whole.text) - 2, 3):
        stop = whole.text[begin : begin + 2]
        (cut,) = engine.generate(["for"], Sampling(**{**vars(sampling), "stop": (stop,)}))
        assert cut.text == whole.text[: whole.text.index(stop)]
        assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
        assert cut.finish == "stop"
        num_cut += 1 + cut.num_accepted + cut.num_drafted // drafts > len(cut.token_ids)
    assert num_cut > 2  # a draft behind the stop had held
    assert engine.pool.num_free == engine.pool.num_pages
