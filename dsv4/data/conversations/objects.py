"""Facts in a sentence or a list, and the JSON object that states them, by a schema or by names in the question.

Held out are the names of people, things and cities; numbers and colours are not.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from dsv4.data.conversations.draw import Draw
from dsv4.data.conversations.words import CITIES, COLOURS, COMMON, DRINKS, PEOPLE, THINGS

MADE_UP = 0.4  # share of names that are no real words
MOST_FIELDS = 3  # beside the name
OTHER_ORDER = 0.25  # share of texts that tell facts in another order than the schema's
BARE = 0.25  # share of schemas that neither require nor forbid anything


class Field(NamedTuple):
    """A property of the object, with the words that state it. kind: its JSON type."""

    name: str
    kind: str
    value: Any
    clause: str


class Asked(NamedTuple):
    """schema: None where the question itself says what is wanted."""

    question: str
    schema: dict[str, Any] | None
    reason: str
    answer: str


def draw_object(draw: Draw) -> Asked:
    """A question for a JSON object."""
    subject, fields = _person(draw) if draw.chance(0.5) else _thing(draw)
    fields = draw.some(fields, draw.between(1, MOST_FIELDS))
    told = draw.some(fields, len(fields)) if draw.chance(OTHER_ORDER) else fields
    if draw.chance(0.6):
        text = f"{subject.value} {_joined([field.clause for field in told])}."
    else:
        text = " ".join(f"{field.name}: {_plain(field.value)}." for field in [subject, *told])
    asked = [subject, *fields]
    schema = _schema(draw, asked) if draw.chance(0.75) else None
    if schema is None:
        text = f"JSON with {_joined([field.name for field in asked])}: {text}"
    return _asked(text, schema, asked)


def _asked(text: str, schema: dict[str, Any] | None, fields: Sequence[Field]) -> Asked:
    answer = json.dumps({field.name: field.value for field in fields})
    return Asked(text, schema, ", ".join(f"{field.name} {_plain(field.value)}" for field in fields), answer)


def _person(draw: Draw) -> tuple[Field, list[Field]]:
    name = draw.called(PEOPLE, MADE_UP).capitalize()
    age, drink = draw.below(100), draw.choice(DRINKS)
    city = draw.called(CITIES, MADE_UP).capitalize()
    is_member = draw.chance(0.5)
    return Field("name", "string", name, ""), [
        Field("age", "integer", age, f"is {age} years old"),
        Field("city", "string", city, f"lives in {city}"),
        Field("drink", "string", drink, f"drinks {drink}"),
        Field("member", "boolean", is_member, "is a member" if is_member else "is not a member"),
    ]


def _thing(draw: Draw) -> tuple[Field, list[Field]]:
    name = draw.called(THINGS if draw.chance(0.5) else COMMON, MADE_UP)
    price, colour, weight, count = draw.below(1000), draw.choice(COLOURS), draw.below(100), draw.below(1000)
    return Field("item", "string", name, ""), [
        Field("price", "integer", price, f"costs {price} euros"),
        Field("colour", "string", colour, f"is {colour}"),
        Field("weight", "integer", weight, f"weighs {weight} kg"),
        Field("count", "integer", count, f"is there {count} times"),
    ]


def _schema(draw: Draw, fields: Sequence[Field]) -> dict[str, Any]:
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {field.name: {"type": field.kind} for field in fields},
    }
    if not draw.chance(BARE):
        schema["required"] = [field.name for field in fields]
        if draw.chance(0.5):
            schema["additionalProperties"] = False
    return schema


def _joined(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _plain(value: Any) -> str:
    """As a text says it: true is yes."""
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
