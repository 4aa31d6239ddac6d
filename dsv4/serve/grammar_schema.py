"""What a JSON schema means for tool calls: which parameters are written as text and which as JSON.

Of a strict tool each property is one parameter: ``string="true"`` with the text as it is where the schema says that it
is a string, any or one of some, ``string="false"`` with JSON otherwise. A string with a ``pattern`` or a ``format`` is
written as JSON too, quotes and all, since only there it can be enforced. A tool takes no parameters but those it names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dsv4.text.message import Tool
from dsv4.text.tokens import DSML

NAME = re.compile(r'[^"\x00-\x1f\x7f]+')  # stands between quotes in the markup, which has no escapes

ANNOTATIONS = frozenset(
    ("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment")
)
"""Keywords that limit nothing."""

DEFINITIONS = ("$defs", "definitions")

PARAMETERS = frozenset(("type", "properties", "required", "additionalProperties", "$schema", "$id", *DEFINITIONS))
"""Keywords of the parameters of a strict tool. More properties than those named are never written, so what
additionalProperties says is kept whatever it is."""

KINDS = {
    bool: {"boolean"}, int: {"integer", "number"}, float: {"number"}, type(None): {"null"}, list: {"array"},
    dict: {"object"},
}  # fmt: skip
"""The types of a JSON value that is no string, as schemas name them."""

OTHERS = frozenset().union(*KINDS.values())

Lengths = tuple[int, int | None]


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter and the forms of its value.

    values: strings that it may be; lengths: it may be any text of so many characters, at least and at most; schema: of
    what is written as JSON, None if nothing is.
    """

    name: str
    is_required: bool
    values: tuple[str, ...]
    lengths: tuple[Lengths, ...]
    schema: Mapping[str, Any] | None


def check_schema(schema: Any, name: str) -> None:
    """Raise ``ValueError`` if this is no schema in JSON, or holds a text that would read as markup."""
    if not isinstance(schema, Mapping):
        raise ValueError(f"{name} is {schema!r:.80}; expected an object, a JSON schema")
    try:
        json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name} is no JSON: {error}; expected a JSON schema") from error
    for text in _texts(schema):
        if DSML in text:
            raise ValueError(f"{name} has the text {text!r:.80}; expected none with {DSML}, which is a mark")
    for reference in _references(schema):
        seen, found = {reference}, _referred(schema, reference)
        while isinstance(found, Mapping) and isinstance(found.get("$ref"), str):
            if found["$ref"] in seen:
                raise ValueError(f"{name} has the reference {reference!r}, which leads to itself; expected a schema")
            seen.add(found["$ref"])
            found = _referred(schema, found["$ref"])


def check_name(name: str, what: str) -> None:
    """Raise ``ValueError`` for a name that cannot stand in the markup."""
    if NAME.fullmatch(name) is None or DSML in name:
        raise ValueError(f"{what} is {name!r:.80}; expected characters other than quotes, line breaks and {DSML}")


def parameters(tool: Tool) -> list[Parameter]:
    """Return the parameters of a strict tool in the order of its schema.

    Raises ``ValueError`` for what a call in the markup cannot keep: it has parameters, and no other structure.
    """
    schema, name = tool.parameters, f"the parameters of tool {tool.name!r}"
    unknown = sorted(set(schema) - PARAMETERS - ANNOTATIONS)
    if unknown:
        raise ValueError(f"{name} have {', '.join(unknown)}, which cannot be enforced; expected properties alone")
    if schema.get("type", "object") != "object":
        raise ValueError(f"{name} have the type {schema['type']!r}; expected object")
    properties, required = schema.get("properties", {}), schema.get("required", [])
    lacking = [key for key in required if key not in properties]
    if lacking:
        raise ValueError(f"{name} require {', '.join(map(repr, lacking))}; expected names among their properties")
    for reference in _references(schema):
        if not reference.startswith(tuple(f"#/{place}/" for place in DEFINITIONS)):
            raise ValueError(f"{name} refer to {reference!r}; expected #/$defs/NAME or #/definitions/NAME")
    definitions = {place: schema[place] for place in DEFINITIONS if place in schema}
    found = []
    for key, value in properties.items():
        check_name(key, f"a property of tool {tool.name!r}")
        forms = _Forms(definitions)
        forms.add(value)
        if forms.is_empty:  # of an optional property that can have no value
            continue
        found.append(
            Parameter(
                name=key, is_required=key in required, values=tuple(forms.values), lengths=tuple(forms.lengths),
                schema=forms.schema,
            )
        )  # fmt: skip
    return found


class _Forms:
    """The forms of a value, as its schema and those that it refers to are read."""

    def __init__(self, definitions: Mapping[str, Any]) -> None:
        self.values: list[str] = []
        self.lengths: list[Lengths] = []
        self._schemas: list[Mapping[str, Any]] = []
        self._definitions = definitions

    @property
    def is_empty(self) -> bool:
        return not (self.values or self.lengths or self._schemas)

    @property
    def schema(self) -> Mapping[str, Any] | None:
        """One schema for all that is written as JSON, with the definitions it may refer to."""
        if not self._schemas:
            return None
        schema = self._schemas[0] if len(self._schemas) == 1 else {"anyOf": self._schemas}
        return {**schema, **self._definitions}

    def add(self, schema: Mapping[str, Any] | bool, seen: frozenset[str] = frozenset()) -> None:
        """Add the forms of a schema. seen: the references that led here; another round by them adds nothing."""
        if isinstance(schema, bool):
            schema = {} if schema else {"enum": []}
        limits = {key: value for key, value in schema.items() if key not in ANNOTATIONS}
        kinds = {"string", *OTHERS} if "type" not in limits else _kinds(limits["type"])
        if limits.keys() == {"$ref"}:
            if limits["$ref"] not in seen:
                self.add(_referred(self._definitions, limits["$ref"]), seen | {limits["$ref"]})
        elif limits.keys() == {"anyOf"}:
            for one in limits["anyOf"]:
                self.add(one, seen)
        elif limits.keys() - {"type"} in ({"enum"}, {"const"}):
            self._add_values(limits.get("enum", [limits.get("const")]), kinds)
        elif "string" in kinds and limits.keys() <= {"type", "minLength", "maxLength"}:
            self.lengths.append((int(limits.get("minLength", 0)), limits.get("maxLength")))
            if kinds != {"string"}:
                self._schemas.append({"type": sorted(kinds - {"string"})})
        else:
            self._schemas.append(schema)

    def _add_values(self, values: list[Any], kinds: set[str]) -> None:
        if "string" in kinds:
            self.values += [value for value in values if isinstance(value, str)]
        others = [value for value in values if not isinstance(value, str) and kinds & KINDS[type(value)]]
        if others:
            self._schemas.append({"enum": others})


def _kinds(kind: str | list[str]) -> set[str]:
    return {kind} if isinstance(kind, str) else set(kind)


def _texts(schema: Mapping[str, Any]) -> Iterator[str]:
    """Every name and every text of a schema that may have to be written: all but descriptions and the like."""
    waiting: list[Any] = [schema]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, Mapping):
            yield from one
            # a property may be called "title": what is no text is looked into
            waiting += [value for key, value in one.items() if key not in ANNOTATIONS or isinstance(value, Mapping)]
        elif isinstance(one, list | tuple):
            waiting += one


def _referred(root: Mapping[str, Any], reference: str) -> Any:
    """What a reference inside a schema points to; None if there is no such place, which the library tells of."""
    found: Any = root
    for step in reference.split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        if isinstance(found, Mapping):
            found = found.get(step)
        elif isinstance(found, list | tuple) and step.isdecimal() and int(step) < len(found):
            found = found[int(step)]
        else:
            return None
    return found


def _references(schema: Mapping[str, Any]) -> Iterator[str]:
    waiting: list[Any] = [schema]
    while waiting:
        one = waiting.pop()
        if isinstance(one, Mapping):
            if isinstance(one.get("$ref"), str):
                yield one["$ref"]
            waiting += one.values()
        elif isinstance(one, list | tuple):
            waiting += one
