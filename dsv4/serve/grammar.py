"""What an answer may be, as a grammar: JSON of a schema, or tool calls in the DSML markup.

The grammars are written in the Lark dialect of llguidance: upper-case names are regular expressions, ``%json`` is a
value of a schema, and ``<[7]>`` is the token with id 7. So a marker is the token itself and never a text that spells
it, and no other special token fits anywhere. With MARK for that token, a block of calls is::

    (blank line)<MARKtool_calls>
    <MARKinvoke name="NAME">
    <MARKparameter name="KEY" string="true">text as it is</MARKparameter>
    <MARKparameter name="KEY" string="false">JSON</MARKparameter>
    </MARKinvoke>
    </MARKtool_calls>(end of text)

A call without parameters has an empty line in their place. The parameters of a strict tool come in the order of its
schema.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dsv4.serve.grammar_schema import Parameter, check_name, check_schema, parameters
from dsv4.text.message import Tool

BLANKS = r"[ \n\t\r]{1,64}"
"""White space inside JSON: room for an indent, but not for a model that goes on with blanks for ever."""

# A text ends with the "<" or "</" of the mark that follows. Were that an item of its own, the text could take it too,
# and would, being the longer.
RULES = r"""
TEXT: /(?s:.*)/
VALUE: /(?s:.*)<\//
KEY: /[^"\x00-\x1f\x7f]+/
before: /(?s:.*)</
parameter: mark "parameter name=\"" KEY "\" string=\"" ("true\">" VALUE | "false\">" any "</") mark "parameter>"
some: ("\n<" parameter)+ "\n</" | "\n\n</"
"""


def json_grammar(schema: Mapping[str, Any], name: str = "schema") -> str:
    """Return the grammar of a JSON value of this schema; ``name`` is what errors call it.

    Raises ``ValueError`` for a schema that is no JSON or has values that cannot be written.
    """
    check_schema(schema, name)
    return f"start: {_json(schema)}\n"


def tools_grammar(tools: Sequence[Tool], choice: str, answer: Mapping[str, Any] | None, mark: int) -> str:
    """Return the grammar of an answer that may or must call tools. mark: the id of the DSML token.

    choice: ``auto``, ``required``, or the name of a tool; answer: the schema of what ``auto`` says without a call, None
    for text. Raises ``ValueError`` for tools that cannot be called in the markup, and for a name that is none of them.
    """
    names = [tool.name for tool in tools]
    for name in names:
        check_name(name, "the name of a tool")
        if names.count(name) > 1:
            raise ValueError(f"tools has {names.count(name)} of the name {name!r}; expected each name once")
    called = [tool for tool in tools if choice in ("auto", "required", tool.name)]
    if not called:
        raise ValueError(f"the tool to call is {choice!r}; expected one of {', '.join(names)}")
    if choice != "auto":
        start = ['start: "\\n\\n<" block']
    elif answer is None:
        start = ["start: TEXT | before block"]
    else:
        check_schema(answer, "schema")
        start = ['start: answer | "\\n\\n<" block', f"answer: {_json(answer)}"]
    several = "+" if choice in ("auto", "required") else ""
    rules = [
        *start,
        RULES,
        f"mark: <[{mark}]>",
        f"any: {_json({})}",
        f'block: mark "tool_calls>" ("\\n<" mark "invoke name=\\"" call){several} "\\n</" mark "tool_calls>"',
        "call: " + " | ".join(f"call_{index}" for index in range(len(called))),
    ]
    for index, tool in enumerate(called):
        filled = f"some_{index}" if tool.is_strict else "some"
        text = _text(f'{tool.name}">')
        rules.append(f'call_{index}: {text} {filled} mark "invoke>"')
        if tool.is_strict:
            rules += _strict(index, parameters(tool))
    return "\n".join(rules)


def _strict(call: int, found: Sequence[Parameter]) -> list[str]:
    """The rules of the parameters of one strict tool, in their order: those that are required, and any of the others.

    from_1_2 is what may follow when parameter 2 of tool 1 is the next; the first of all is one of those up to the
    first that is required.
    """
    rules, firsts, is_open = [], [], True
    for index, parameter in enumerate(found):
        item = f"parameter_{call}_{index}"
        rules += _parameter(item, parameter)
        rest = f"from_{call}_{index + 1}"
        given = f'"\\n<" {item}'
        rules.append(f"from_{call}_{index}: {given if parameter.is_required else f'({given})?'} {rest}")
        if is_open:
            firsts.append(f'{given} {rest} "\\n</"')
            is_open = not parameter.is_required
    if is_open:
        firsts.append('"\\n\\n</"')
    return [*rules, f'from_{call}_{len(found)}: ""', f"some_{call}: " + " | ".join(firsts)]


def _parameter(item: str, parameter: Parameter) -> list[str]:
    """The rules of one parameter: texts as they are, or JSON."""
    texts = [_text(f"{value}</") for value in parameter.values]
    for least, most in parameter.lengths:
        texts.append(f"/(?s:.{{{least},{'' if most is None else most}}})<\\//")
    forms, rules = [], []
    if texts:
        forms.append(f'"true\\">" ({" | ".join(texts)})')
    if parameter.schema is not None:
        forms.append(f'"false\\">" {item}_json "</"')
        rules.append(f"{item}_json: {_json(parameter.schema)}")
    name = _text(f'parameter name="{parameter.name}" string="')
    return [*rules, f'{item}: mark {name} ({" | ".join(forms)}) mark "parameter>"']


def _json(schema: Mapping[str, Any]) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": {"whitespace_pattern": BLANKS}})


def _text(text: str) -> str:
    """A text as it is: JSON's escapes are those of the grammar."""
    return json.dumps(text, ensure_ascii=False)
