"""How a mask follows an output: forwards, back, and in one go; through the thinking; and past what spells a mark."""

import json
import random
from importlib.util import find_spec

import numpy as np
import pytest
from tokenizers import Tokenizer

from dsv4.config.engine import Limits
from dsv4.config.sampling import Sampling
from dsv4.data.tokenizer import PACKAGE, RELEASED, load_tokenizer, plain_text, train_tokenizer
from dsv4.engine.engine import Engine
from dsv4.engine.text import BYTES, Detokenizer
from dsv4.serve.grammar_tokens import MARKS, Vocabulary
from dsv4.serve.masks import LOOK_BACK, Grammars, OutputMask
from dsv4.testing.toys import tiny_model
from dsv4.text.message import Tool
from dsv4.text.tokens import DSML, END_THINK, EOS, SPECIAL_TOKENS, THINK, USER

VOCAB = 290
TOOL = Tool(function={"name": "look_up"})
CALL = f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="look_up">\n<{DSML}parameter name="'


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(iter(["for word in words:\n    print(word)\n", '{"word": "word"}\n'] * 4), VOCAB)


@pytest.fixture(scope="module")
def grammars(tokenizer):
    return Grammars(tokenizer, VOCAB, tokenizer.token_to_id(EOS))


@pytest.fixture(scope="module")
def token(tokenizer):
    return tokenizer.token_to_id


@pytest.fixture(scope="module")
def spelled(tokenizer):
    """The tokens of a text, one for each byte."""
    names = {byte: name for name, byte in BYTES.items()}
    return lambda text: [tokenizer.token_to_id(names[byte]) for byte in text.encode()]


@pytest.fixture(scope="module")
def marked(spelled, token):
    """The same for a text in which marks are tokens."""

    def ids(text):
        pieces = [spelled(piece) for piece in text.split(DSML)]
        return pieces[0] + [index for piece in pieces[1:] for index in [token(DSML), *piece]]

    return ids


@pytest.fixture(scope="module")
def grammar(grammars):
    return grammars.tool_calls([TOOL], choice="auto", answer={"type": "array"})


@pytest.fixture(scope="module")
def outputs(marked, token):
    """Three answers to the end, with their thinking before them: two calls that part late, and one that is JSON."""
    call = f"</{DSML}parameter>\n</{DSML}invoke>\n</{DSML}tool_calls>"
    answers = [f'{CALL}k" string="true">word{call}', f'{CALL}k" string="false">[1, 2]{call}', '["word"]']
    thinking = [*marked("for "), token(END_THINK)]
    return [[*thinking, *marked(answer), token(EOS)] for answer in answers], len(thinking)


def same(one, other):
    return one is other is None or (one is not None and other is not None and np.array_equal(one, other))


# Forwards and back


@pytest.mark.parametrize("thinks", [False, True])
def test_going_back_is_as_if_it_had_never_gone_on(grammar, outputs, token, thinks):
    chance = random.Random(5 + thinks)
    after = token(END_THINK) if thinks else None
    outputs, begin = outputs
    outputs = [output if thinks else output[begin:] for output in outputs]
    fresh = [[OutputMask(grammar, after=after)(output[:n]) for n in range(len(output) + 1)] for output in outputs]
    mask = OutputMask(grammar, after=after)
    for _ in range(300):
        which = chance.randrange(3)
        n = chance.randrange(len(outputs[which]) + 1)
        assert same(mask(outputs[which][:n]), fresh[which][n])


def test_what_comes_after_the_end_does_not_count(grammar, outputs, token):
    mask, output = OutputMask(grammar, after=None), outputs[0][0][outputs[1] :]
    last = mask(output[:-1])
    assert np.flatnonzero(last).tolist() == [token(EOS)]
    assert mask(output) is None
    assert mask([*output, 30, 31]) is None  # drafts
    assert same(mask(output[:-1]), last)


def test_an_output_that_does_not_follow_the_grammar_is_an_error_and_no_more(grammar, outputs):
    mask, output = OutputMask(grammar, after=None), outputs[0][0][outputs[1] :]
    with pytest.raises(ValueError, match=f"token {output[2]} of the output, at place 1, does not follow"):
        mask([output[0], output[2]])
    assert same(mask(output[:5]), OutputMask(grammar, after=None)(output[:5]))


class Counted(list):
    """A list that counts what is taken out of it."""

    taken = 0

    def __getitem__(self, place):
        found = super().__getitem__(place)
        Counted.taken += len(found) if isinstance(place, slice) else 1
        return found

    def __iter__(self):
        raise AssertionError("the whole output was read")


def test_the_work_for_a_token_does_not_grow_with_the_output(grammars, spelled):
    mask, output, counts = OutputMask(grammars.tool_calls([TOOL], choice="auto"), after=None), spelled("a" * 900), []
    for n in range(800, 900):
        Counted.taken = 0
        mask(Counted(output[:n]))
        counts.append(Counted.taken)
    assert counts[0] >= 800  # all at once, as after a resume
    assert max(counts[1:]) <= LOOK_BACK + 20


def test_drafts_at_the_end_of_a_long_output_are_taken_back(grammars, spelled):
    grammar, text = grammars.json_schema({"type": "string"}), spelled('"' + "a" * 9 * LOOK_BACK)
    mask = OutputMask(grammar, after=None)
    mask(text)
    for drafts in ("b\\", 'b"', "bb"):  # what comes next: an escape, the end, or anything
        for n in (2, 0, 1, 2):
            output, Counted.taken = text + spelled(drafts)[:n], 0
            assert same(mask(Counted(output)), OutputMask(grammar, after=None)(output))
            assert Counted.taken <= LOOK_BACK + 20


# Thinking


def test_thinking_is_free_until_it_ends(grammars, tokenizer, token):
    mask = OutputMask(grammars.json_schema({"type": "object"}), after=token(END_THINK))
    allowed = mask(plain_text(tokenizer).encode("for word").ids)
    special = sorted(tokenizer.get_added_tokens_decoder())
    assert allowed[max(special) + 1 :].all()
    assert np.flatnonzero(allowed[: max(special) + 1]).tolist() == [token(END_THINK)]
    begun = mask([40, token(END_THINK)])
    assert same(begun, OutputMask(grammars.json_schema({"type": "object"}), after=None)([]))
    assert begun[token("{")]
    assert not begun[token("w")]


def test_a_text_may_end_while_it_thinks_only_if_nothing_is_demanded(grammars, token):
    after, eos = token(END_THINK), token(EOS)
    demands = [
        grammars.json_schema({"type": "object"}),
        grammars.json_schema({"type": "string"}),
        grammars.tool_calls([TOOL], choice="required"),
        grammars.tool_calls([TOOL], choice="look_up"),
        grammars.tool_calls([TOOL], choice="auto", answer={}),
    ]
    for grammar in demands:
        assert grammar.is_demanding
        mask = OutputMask(grammar, after=after)
        assert not mask([])[eos]
        assert not mask([40])[eos]
        assert not mask([40, after])[eos]
    free = grammars.tool_calls([TOOL], choice="auto")
    assert not free.is_demanding
    mask = OutputMask(free, after=after)
    assert mask([40])[eos]
    assert mask([40, eos]) is None
    assert mask([40, after])[eos]


def test_no_call_begins_inside_the_thinking(grammars, spelled, token):
    allowed = OutputMask(grammars.tool_calls([TOOL], choice="auto"), after=token(END_THINK))(spelled("\n\n<"))
    assert not allowed[[token(DSML), token(USER), token(THINK)]].any()


# Marks that text would spell

BEGINNINGS = {"text": "", "thinking": "", "JSON": '{"', "name": CALL, "value": CALL + 'k" string="true">'}


@pytest.mark.parametrize(("place", "mark"), [*((place, DSML) for place in BEGINNINGS), ("thinking", END_THINK)])
def test_a_mark_is_not_spelled(grammars, marked, spelled, token, place, mark):
    grammar = (
        grammars.json_schema({"type": "object"}) if place == "JSON" else grammars.tool_calls([TOOL], choice="auto")
    )
    mask = OutputMask(grammar, after=token(END_THINK) if place == "thinking" else None)
    begin, text = marked(BEGINNINGS[place]), spelled(f"{mark[:3]} a {mark}")
    for n in range(len(text) - 1):
        assert mask(begin + text[:n])[text[n]], n
    allowed = mask(begin + text[:-1])
    assert not allowed[text[-1]]
    assert allowed.any()
    if place == "thinking":
        assert mask([])[text[-1]]


def test_the_end_of_the_thinking_is_a_text_as_any_other_after_it(grammars, tokenizer, token):
    mask = OutputMask(grammars.json_schema({"const": f"a{END_THINK}"}), after=token(END_THINK))
    output = [40, token(END_THINK)]
    while (allowed := mask(output)) is not None:
        output.append(int(allowed.argmax()))
    assert Detokenizer(tokenizer, skip_special_tokens=False).push(output[2:-1]) == f'"a{END_THINK}"'
    assert token(END_THINK) not in output[2:]


def test_the_name_of_a_special_token_is_no_text(tokenizer, spelled, token):
    """It ends as the mark begins, so that text after it could seem to complete another."""
    vocabulary = Vocabulary(tokenizer, VOCAB, token(EOS))
    text = spelled(DSML.removeprefix("\uff5c"))
    assert vocabulary.spelling([*spelled("\uff5c"), *text[:-1]], MARKS).tolist() == [text[-1]]
    assert vocabulary.spelling([token(DSML), *text[:-1]], MARKS).tolist() == []


def test_a_token_with_a_mark_inside_is_never_written(tokenizer, token):
    settings = json.loads(tokenizer.to_str())
    last = max(settings["model"]["vocab"], key=settings["model"]["vocab"].get)
    del settings["model"]["vocab"][last]
    settings["model"]["vocab"][f"a{END_THINK}b"] = VOCAB - 1
    settings["model"]["merges"] = []
    grammars = Grammars(Tokenizer.from_str(json.dumps(settings)), VOCAB, token(EOS))
    mask = OutputMask(grammars.tool_calls([TOOL], choice="auto"), after=token(END_THINK))
    assert mask([])[VOCAB - 2 :].tolist() == [True, False]
    assert mask([token(END_THINK)])[VOCAB - 2 :].tolist() == [True, True]  # no mark any more
    assert mask([])[VOCAB - 2 :].tolist() == [True, False]


def test_tokens_that_end_a_mark_in_any_way_are_not_written():
    """Of several characters, with more behind them, or with the whole mark inside."""
    tokenizer = train_tokenizer(iter([f"a{DSML}tool </think>\n"] * 9), 292)
    vocabulary = Vocabulary(tokenizer, 300, tokenizer.token_to_id(EOS))
    ids = {text: index for index, text in enumerate(vocabulary.bytes) if vocabulary.is_text[index]}
    assert len(ids) == 292 - len(SPECIAL_TOKENS)
    lengths = set()
    for mark in (DSML.encode(), END_THINK.encode()):
        for n in range(len(mark)):
            wanted = {index for text, index in ids.items() if mark in mark[:n] + text}
            lengths |= {len(vocabulary.bytes[index]) for index in wanted}
            for size in range(1, n + 1):  # of the last token so far
                last = mark[n - size : n]
                if last in ids:
                    before = [ids[bytes([byte])] for byte in mark[: n - size]] + [ids[last]]
                    assert set(vocabulary.spelling(before, MARKS).tolist()) == wanted
    assert max(lengths) > 1


# The vocabulary


def test_ids_without_a_token_are_never_written(tokenizer, token):
    grammars = Grammars(tokenizer, VOCAB + 5, token(EOS))
    for grammar in (grammars.json_schema({"type": "object"}), grammars.tool_calls([TOOL], choice="auto")):
        for after in (None, token(END_THINK)):
            allowed = OutputMask(grammar, after=after)([])
            assert allowed.shape == (VOCAB + 5,)
            assert not allowed[VOCAB:].any()


def test_a_vocabulary_that_does_not_fit_is_an_error(tokenizer, grammars, token):
    with pytest.raises(ValueError, match=f"vocab_size is {VOCAB - 1}; expected at least the tokenizer's {VOCAB}"):
        Grammars(tokenizer, VOCAB - 1, token(EOS))
    with pytest.raises(ValueError, match="eos_token_id is 200; expected one of the tokenizer's special tokens"):
        Grammars(tokenizer, VOCAB, 200)
    with pytest.raises(ValueError, match=f"after is {VOCAB}; expected a token id from 0 to {VOCAB - 1}"):
        OutputMask(grammars.json_schema({"type": "object"}), after=VOCAB)


@pytest.mark.skipif(find_spec(PACKAGE) is None, reason="the released tokenizer is not installed")
def test_the_released_tokens_of_a_call_fit():
    """Also where the next characters are certain, since then only the tokens that the tokenizer makes of them fit."""
    tokenizer = load_tokenizer(RELEASED)
    plain, mark = plain_text(tokenizer), tokenizer.token_to_id(DSML)
    grammars = Grammars(tokenizer, 129_280, tokenizer.token_to_id(EOS))
    text = f'{CALL}place" string="true">Bei\u4eac</{DSML}parameter>\n<{DSML}parameter name="days" string="false">12'
    text += f"</{DSML}parameter>\n</{DSML}invoke>\n</{DSML}tool_calls>{DSML}"
    whole = [token for piece in text.split(DSML)[:-1] for token in [*plain.encode(piece).ids, mark]][:-1]
    for choice in ("auto", "required", "look_up"):
        mask = OutputMask(grammars.tool_calls([TOOL], choice=choice), after=None)
        for n, token in enumerate(whole):
            assert mask(whole[:n])[token]
        assert np.flatnonzero(mask(whole)).tolist() == [tokenizer.token_to_id(EOS)]


# In an engine


@pytest.mark.parametrize("draft_tokens", [0, 2])
def test_an_engine_writes_what_the_mask_allows(tokenizer, grammars, draft_tokens):
    model, limits = tiny_model(VOCAB, max_context=256), Limits(cache_bytes=2**20, draft_tokens=draft_tokens)
    engine = Engine(model, limits, tokenizer=tokenizer)
    grammar = grammars.json_schema({"enum": ["word", "words", "print"]})
    sampling = [Sampling(max_tokens=40, seed=seed) for seed in range(3)]
    ids = [engine.add("for word in", one, mask=OutputMask(grammar, after=None)) for one in sampling]
    while not engine.is_idle:
        engine.step()
    found = [engine.take(id) for id in ids]
    assert [one.finish for one in found] == ["stop"] * 3
    assert {json.loads(one.text) for one in found} <= {"word", "words", "print"}
