"""The fixed English passages of a checkpoint, read from its own ``encoding/`` folder as data, or our own.

What a release says about tools, response formats and effort is part of that release, and it changed between releases.
So a checkpoint's passages come from the constants of its encoder, ``encoding/*.py``: those files are parsed and never
run. A constant is a name that a module assigns once, at its top level, from texts: a literal, a sum of constants, a
dictionary of constants, or an f-string of constants.

Such a template is meant for ``str.format``. Its fields other than the place of the schemas (``{dsml_token}``, say) are
replaced by the constants of the same name, or by those that a call ``TEMPLATE.format(field=CONSTANT)`` in the file
names; doubled braces become single ones. A template with braces that are no fields at all, as in JSON, is meant for
``str.replace`` and stays as it is.
"""

from __future__ import annotations

import ast
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dsv4.text.tokens import DSML

TOOLS_MARK, RESPONSE_MARK = "{tool_schemas}", "{schema}"
TOOLS_FIELDS, RESPONSE_FIELDS = ("tool_schemas", "tools"), ("schema", "response_format")
LEVELS = ("low", "high", "max")

TWO_LEVELS = {"minimal": "high", "low": "high", "medium": "high", "high": "high", "xhigh": "high", "max": "max",
              "ultra": "max"}  # fmt: skip
"""The April release: thinking is high or max."""

THREE_LEVELS = {"minimal": "low", "low": "low", "medium": "high", "high": "high", "xhigh": "high", "max": "max",
                "ultra": "max"}  # fmt: skip
"""Releases since 0731: low has no prefix, high has what was the prefix of max, max a new one."""

Constant = str | dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Passages:
    """The fixed passages of a checkpoint.

    ``tools`` holds ``{tool_schemas}`` where the schemas go, one line each, and ``response_format`` holds ``{schema}``.
    ``efforts`` gives the prefix of a prompt for each level of effort, and ``mapping`` the level for each word that a
    client may use. Raises ``ValueError`` for a lacking mark or a word whose level has no prefix.
    """

    tools: str
    response_format: str
    efforts: Mapping[str, str]
    mapping: Mapping[str, str]

    def __post_init__(self) -> None:
        for field, text, mark in (
            ("tools", self.tools, TOOLS_MARK),
            ("response_format", self.response_format, RESPONSE_MARK),
        ):
            if mark not in text:
                raise ValueError(f"the passage {field} is {text!r}; expected {mark} in it")
        for word, level in self.mapping.items():
            if level not in self.efforts:
                raise ValueError(f"effort {word} has level {level!r}; expected one of {', '.join(self.efforts)}")

    def effort_prefix(self, effort: str) -> str:
        """The prefix for a word of ``mapping``, empty for none; a ``ValueError`` lists the words."""
        if effort not in self.mapping:
            raise ValueError(f"effort is {effort!r}; expected one of {', '.join(self.mapping)}")
        return self.efforts[self.mapping[effort]]


OWN = Passages(
    tools=(
        "## Tools\n\n"
        "You may call the tools below. A call ends your answer and looks like this, one parameter a line:\n\n"
        f"<{DSML}tool_calls>\n"
        f'<{DSML}invoke name="TOOL">\n'
        f'<{DSML}parameter name="KEY" string="true">VALUE</{DSML}parameter>\n'
        f"</{DSML}invoke>\n"
        f"</{DSML}tool_calls>\n\n"
        'Texts stand as they are. Any other value is JSON, with string="false".\n\n'
        f"{TOOLS_MARK}\n"
    ),
    response_format=f"## Response format\n\nAnswer with JSON alone, as this schema has it:\n{RESPONSE_MARK}",
    efforts={"high": "", "max": "Think for as long as it helps.\n\n"},
    mapping=TWO_LEVELS,
)
"""The passages of models trained here, in our own words; short, because such models are small."""


def find_passages(model_directory: Path) -> Passages:
    """The passages in ``model_directory/encoding``, or ``OWN`` if there are no Python files in such a folder."""
    folder = model_directory / "encoding"
    return read_passages(folder) if _files(folder) else OWN


def read_passages(encoding_directory: Path) -> Passages:
    """Read the passages out of the constants of ``encoding_directory/*.py``, which are parsed and never run.

    The tool passage is the constant that has a field ``tool_schemas``, the response format the one whose name says
    so and that has a field ``schema``. Efforts are one dictionary of the levels, or a constant for each whose name has
    ``EFFORT`` in it and ends with the level. A file that has a text for ``low`` or ``high`` has three levels; any other
    has ``high``, without a prefix, and ``max``. Raises one ``ValueError`` that names the files and all that is missing.
    """
    files = _files(encoding_directory)
    if not files:
        raise ValueError(f"{encoding_directory} has no Python files; expected the encoder of a release")
    constants: dict[str, Constant] = {}
    aliases: dict[tuple[str, str], str] = {}
    for file in files:
        module = _parse(file)
        constants |= _constants(module)
        aliases |= _aliases(module)
    reader = _Reader(constants, aliases)
    tools = reader.template("tool", TOOLS_FIELDS, TOOLS_MARK)
    response_format = reader.template("response_format", RESPONSE_FIELDS, RESPONSE_MARK)
    efforts = reader.efforts()
    if reader.problems or tools is None or response_format is None or efforts is None:
        raise ValueError(f"{', '.join(map(str, files))}: {'; '.join(reader.problems)}")
    mapping = THREE_LEVELS if "low" in efforts else TWO_LEVELS
    return Passages(tools=tools, response_format=response_format, efforts=efforts, mapping=mapping)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.py") if path.is_file())


def _parse(file: Path) -> ast.Module:
    try:
        return ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be parsed: {error}; expected Python") from error


class _Reader:
    """Looks for passages among constants and keeps what is wrong with them."""

    def __init__(self, constants: Mapping[str, Constant], aliases: Mapping[tuple[str, str], str]) -> None:
        self.texts = {name: value for name, value in constants.items() if isinstance(value, str)}
        self.tables = {name: value for name, value in constants.items() if isinstance(value, dict)}
        self.aliases = aliases
        self.problems: list[str] = []

    def template(self, word: str, fields: tuple[str, ...], mark: str) -> str | None:
        for name, text in self.texts.items():
            found = next((field for field in fields if f"{{{field}}}" in text), None)
            if word in name.lower() and found is not None:
                return self._fill(name, text, found, mark)
        self.problems.append(f"no constant with {word} in its name has a field {{{fields[0]}}}")
        return None

    def efforts(self) -> dict[str, str] | None:
        levels = {
            level: text
            for name, text in self.texts.items()
            for level in LEVELS
            if "effort" in name.lower() and name.lower().endswith(level) and text != level
        }
        for name, table in self.tables.items():
            if "effort" in name.lower() and "max" in table:
                levels |= {level: table[level] for level in LEVELS if level in table}
        if "max" not in levels:
            self.problems.append("no constant such as REASONING_EFFORT_MAX has the prefix of effort max")
            return None
        if "low" in levels and "high" not in levels:
            self.problems.append("a constant has the prefix of effort low, but none that of high")
            return None
        return {"low": ""} | levels if "high" in levels else {"high": ""} | levels

    def _fill(self, name: str, text: str, found: str, mark: str) -> str | None:
        """Fill in the fields of a template but for ``found``, whose place will say ``mark``."""
        try:
            pieces = list(string.Formatter().parse(text))
        except ValueError:  # a single brace: not for str.format
            return text.replace(f"{{{found}}}", mark)
        if not all(field is None or field.isidentifier() for _, field, _, _ in pieces):
            return text.replace(f"{{{found}}}", mark)
        filled = []
        for literal, field, _, _ in pieces:
            filled.append(literal)
            if field == found:
                filled.append(mark)
            elif field is not None:
                value = self.texts.get(self.aliases.get((name, field), field))
                if value is None:
                    self.problems.append(f"{name} has a field {{{field}}}, but there is no such constant")
                    return None
                filled.append(value)
        return "".join(filled)


def _constants(module: ast.Module) -> dict[str, Constant]:
    constants: dict[str, Constant] = {}
    for statement in module.body:
        match statement:
            case ast.Assign(targets=targets, value=value):
                names = [target.id for target in targets if isinstance(target, ast.Name)]
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                names = [name]
            case _:
                continue
        constant = _table(value, constants) if isinstance(value, ast.Dict) else _text(value, constants)
        if constant is not None:
            constants |= dict.fromkeys(names, constant)
    return constants


def _text(node: ast.expr | None, known: Mapping[str, Constant]) -> str | None:
    """The text that an expression of constants stands for, or None."""
    match node:
        case ast.Constant(value=str() as text):
            return text
        case ast.Name(id=name):
            text = known.get(name)
            return text if isinstance(text, str) else None
        case ast.FormattedValue(value=value, conversion=-1, format_spec=None):
            return _text(value, known)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            parts = [_text(left, known), _text(right, known)]
        case ast.JoinedStr(values=values):
            parts = [_text(value, known) for value in values]
        case _:
            return None
    texts = [part for part in parts if part is not None]
    return "".join(texts) if len(texts) == len(parts) else None


def _table(node: ast.Dict, known: Mapping[str, Constant]) -> dict[str, str] | None:
    """A dictionary of texts; None as a value is no text, and here means an empty one."""
    table = {}
    for key, value in zip(node.keys, node.values, strict=True):
        name = _text(key, known)
        empty = isinstance(value, ast.Constant) and value.value is None
        text = "" if empty else _text(value, known)
        if name is None or text is None:
            return None
        table[name] = text
    return table


def _aliases(module: ast.Module) -> dict[tuple[str, str], str]:
    """For each ``TEMPLATE.format(field=NAME)`` in the file: (TEMPLATE, field) to NAME."""
    aliases = {}
    for node in ast.walk(module):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id=template), attr="format"), keywords=keywords):
                for keyword in keywords:
                    if keyword.arg is not None and isinstance(keyword.value, ast.Name):
                        aliases[template, keyword.arg] = keyword.value.id
    return aliases
