"""The released pairs: the prompts byte for byte, and the assistant's turns in them read back."""

import hashlib
import json
from pathlib import Path

import pytest

from dsv4.text.encode import assistant_text, encode
from dsv4.text.parse import parse
from dsv4.text.passages import TOOLS_MARK
from dsv4.text.tokens import ASSISTANT, END_THINK, EOS, THINK

GOLDENS = Path(__file__).with_name("goldens")
IS_THINKING = (True, True, True, False)


def test_the_files_are_those_of_the_manifest():
    manifest = json.loads((GOLDENS / "manifest.json").read_text())
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in GOLDENS.glob("test_*")}
    assert files == manifest["sha256"]
    assert len(files) == 8


def test_the_tool_passage_is_the_released_one(released):
    passage = released.tools.replace(TOOLS_MARK, "").encode()
    assert len(passage) == 989
    assert hashlib.sha256(passage).hexdigest().startswith("c7d31593")


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_the_prompts_are_the_released_ones(goldens, released, number):
    messages, expected = goldens[number - 1]
    prompt = encode(messages, thinking=IS_THINKING[number - 1], passages=released)
    assert prompt.text.encode() == expected.encode()


@pytest.mark.parametrize(("number", "turn"), [(1, 2), (1, 4), (2, 4), (3, 3), (3, 5), (4, 3)])
def test_turns_of_the_prompts_are_read_back(goldens, number, turn):
    messages, prompt = goldens[number - 1]
    message, thinking = messages[turn], IS_THINKING[number - 1]
    written = assistant_text(message, thinking=thinking).text
    assert ASSISTANT + (THINK if thinking else END_THINK) + written in prompt
    assert written.endswith(EOS)
    read = parse(written, thinking=thinking)
    assert (read.text, read.reasoning) == (message.text, message.reasoning)
    assert [(call.name, call.arguments) for call in read.tool_calls] == [
        (call.name, call.arguments) for call in message.tool_calls
    ]
