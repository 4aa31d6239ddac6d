"""The four released pairs of a conversation and its prompt, and the tool passage that stands in the prompts."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dsv4.text.message import message_from_released
from dsv4.text.passages import OWN, TOOLS_MARK
from dsv4.text.tokens import USER

GOLDENS = Path(__file__).with_name("goldens")


@pytest.fixture(scope="session")
def goldens():
    """[(messages, prompt text)] of pairs 1 to 4."""
    pairs = []
    for number in (1, 2, 3, 4):
        released = json.loads((GOLDENS / f"test_input_{number}.json").read_text(encoding="utf-8"))
        if isinstance(released, dict):  # tools beside the messages belong to the first of them
            messages = [released["messages"][0] | {"tools": released["tools"]}, *released["messages"][1:]]
        else:
            messages = released
        prompt = (GOLDENS / f"test_output_{number}.txt").read_bytes().decode()
        pairs.append(([message_from_released(message) for message in messages], prompt))
    return pairs


@pytest.fixture(scope="session")
def released(goldens):
    """Passages with the released text about tools, taken from the first prompt; the rest is ours."""
    messages, prompt = goldens[0]
    text = prompt.split(f"{messages[0].content}\n\n", 1)[1].split(USER, 1)[0]
    schemas = [line for line in text.split("\n") if line.startswith('{"name"')]
    assert len(schemas) == 2
    return replace(OWN, tools=text.replace("\n".join(schemas), TOOLS_MARK))
