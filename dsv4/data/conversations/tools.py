"""Questions that a tool answers: which tool, called how, what it gives back, and what is then said.

The tools are those of a toolbox in the system message: one for each of a few nouns, such as ``get_price``, or some of
those that the server's page offers. Held out are the keys that are looked up.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsv4.data.conversations.draw import Draw
from dsv4.data.conversations.words import COLOURS, COMMON, DAYS, PEOPLE, PLACES, THINGS, words
from dsv4.text.message import Tool

NOUNS = words(
    """price colour weight owner capital age size stock code phone height width speed title language currency rating
    address email number"""
)
FIND = ("Find", "Look up")
LOOKUP, CALCULATOR, CLOCK = "lookup", "calculator", "clock"
MOST_TOOLS = 3
PAGE = 0.5  # share of toolboxes with the page's tools
MADE_UP = 0.5  # share of keys that are no real words
UNITS = {
    "price": ("euros", "dollars", "pounds"), "weight": ("g", "kg"), "size": ("cm", "m", "mm"), "height": ("cm", "m"),
    "width": ("cm", "m"), "speed": ("km", "miles"),
}  # fmt: skip
MISSING = 0.08  # share of look-ups that find nothing


def _tool(name: str, description: str, properties: Mapping[str, Any], **more: object) -> Tool:
    parameters = {"type": "object", "properties": properties, "required": list(properties), **more}
    return Tool(function={"name": name, "description": description, "parameters": parameters})


FIXED = (
    _tool(
        LOOKUP, "Look up the value of a key.", {"key": {"type": "string", "description": "What to look up."}},
        additionalProperties=False,
    ),
    _tool(
        CALCULATOR, "Work out an arithmetic expression.",
        {"expression": {"type": "string", "description": "Numbers with + - * / % ^ and brackets."}},
        additionalProperties=False,
    ),
    _tool(CLOCK, "Tell the date and the time.", {}, additionalProperties=False),
)  # fmt: skip
"""The tools that the server's page offers, as it offers them."""


@dataclass(frozen=True, kw_only=True)
class Use:
    """One use of a tool. value: what the answer must hold."""

    question: str
    tool: str
    arguments: dict[str, str]
    result: str
    answer: str
    value: str

    @property
    def arguments_text(self) -> str:
        return json.dumps(self.arguments)


def draw_toolbox(draw: Draw) -> tuple[Tool, ...]:
    """One to three tools, no two of them for the same."""
    count = draw.between(1, MOST_TOOLS)
    if draw.chance(PAGE):
        return tuple(draw.some(FIXED, count))
    return tuple(
        _tool(f"get_{noun}", f"The {noun} of a thing.", {"name": {"type": "string"}})
        for noun in draw.some(NOUNS, count)
    )


def draw_use(draw: Draw, tools: Sequence[Tool]) -> Use:
    """A question for one of the tools."""
    tool = draw.choice(tools)
    if tool.name == CALCULATOR:
        return _calculation(draw)
    if tool.name == CLOCK:
        return _time(draw)
    return _lookup(draw, tool)


def _lookup(draw: Draw, tool: Tool) -> Use:
    (parameter,) = tool.parameters["properties"]
    noun = tool.name.rpartition("_")[2]
    is_table = tool.name == LOOKUP
    if is_table:
        noun = draw.choice(NOUNS)
    key = draw_key(draw, noun)
    value = _value(draw, noun)
    named = not is_table or draw.chance(0.6)  # a table's key is what is asked for, with its noun or without
    what = f"the {noun} of {key}" if named else key
    if is_table:
        key = what.removeprefix("the ")
    asks = (f"What is {what}?", f"{what}?", f"Tell me {what}.", f"what is {what}", f"{FIND[is_table]} {what}.")
    if draw.chance(MISSING):
        result, answer, value = "not found", f"I found nothing for {key}.", f"found nothing for {key}"
    else:
        result = value if draw.chance(0.6) else json.dumps({draw.choice((noun, "value", "result")): value})
        answer = f"{what[0].upper() + what[1:] if named else key} is {value}."
    return Use(
        question=draw.choice(asks), tool=tool.name, arguments={parameter: key},
        result=result, answer=answer, value=value,
    )  # fmt: skip


def draw_key(draw: Draw, noun: str) -> str:
    """What is looked up, of two words now and then."""
    if noun == "capital":
        return draw.called(PLACES, MADE_UP).capitalize()
    if noun in ("age", "phone"):
        return draw.called(PEOPLE, MADE_UP).capitalize()
    key = draw.called(THINGS if draw.chance(0.5) else COMMON, MADE_UP)
    return f"{draw.choice((*COLOURS, 'the', 'the', 'the'))} {key}" if draw.chance(0.15) else key


def _value(draw: Draw, noun: str) -> str:
    if noun in UNITS:
        return f"{draw.below(1000)} {draw.choice(UNITS[noun])}"
    if noun == "colour":
        return draw.choice(COLOURS)
    if noun in ("owner", "title", "language", "capital"):
        return draw.choice((*PEOPLE, *PLACES)) if draw.chance(0.5) else draw.name().capitalize()
    if noun in ("code", "email", "address", "currency"):
        return draw.name()
    return str(draw.below(100 if noun == "age" else 1000))


def _calculation(draw: Draw) -> Use:
    left, sign, right = draw.fact(
        lambda: (draw.below(1000), draw.choice("+-*"), draw.below(1000)), lambda made: f"calculator {made}"
    )
    text = f"{left} {sign} {right}"
    value = str(left + right if sign == "+" else left - right if sign == "-" else left * right)
    asks = (f"What is {text}?", f"{text}", f"{text} = ?", f"Compute {text}.", f"How much is {text}?")
    return Use(
        question=draw.choice(asks), tool=CALCULATOR, arguments={"expression": text},
        result=value if draw.chance(0.7) else json.dumps({"result": value}), answer=f"{text} = {value}", value=value,
    )  # fmt: skip


def _time(draw: Draw) -> Use:
    time = f"{draw.below(24):02d}:{draw.below(60):02d}"
    if draw.chance(0.7):
        time += f":{draw.below(60):02d}"
    if draw.chance(0.6):
        time = f"20{draw.between(10, 39)}-{draw.between(1, 12):02d}-{draw.between(1, 28):02d} {time}"
    if draw.chance(0.5):
        time = f"{draw.choice(DAYS)} {time}"
    asks = ("What time is it?", "What is the time?", "Tell me the time.", "what time is it", "What day is it?")
    return Use(
        question=draw.choice(asks), tool=CLOCK, arguments={},
        result=time if draw.chance(0.7) else json.dumps({"time": time}), answer=f"It is {time}.", value=time,
    )  # fmt: skip
