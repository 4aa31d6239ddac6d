"""The tags in a completion: where one may begin, and how to read one that is not quite right.

    <|DSML|tool_calls>  <|DSML|invoke name="NAME">  <|DSML|parameter name="KEY" string="true">  and the same with </

(| stands for the fullwidth bar.) Some models write ``toolcalls`` or ``function_calls``, other attributes or spaces.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from dsv4.text.tokens import BAR, DSML, END_THINK, THINK

Kind = Literal["think", "block", "call", "parameter", "unknown"]

MARKS = (THINK, END_THINK, f"<{DSML}", f"</{DSML}")
MARK = re.compile("|".join(map(re.escape, MARKS)))
LONGEST_MARK = max(map(len, MARKS))
LONGEST_TAG = 1024  # characters; a tag that has not ended by then is none

NAMES: dict[str, Kind] = {"tool_calls": "block", "invoke": "call", "parameter": "parameter"}
OTHER_NAMES: dict[str, Kind] = {
    "toolcalls": "block",
    "toolcall": "block",
    "functioncalls": "block",
    "functioncall": "block",
    "invoke": "call",
    "parameter": "parameter",
    "param": "parameter",
}
"""What models write instead, in small letters and without ``_`` and ``-``."""

BEGINNING = re.compile(rf"</?{DSML}([\w-]*)(.?)", re.DOTALL)
ATTRIBUTE = re.compile(rf"""([\w-]+)\s*=\s*(?:"([^"{BAR}]*)"|'([^'{BAR}]*)'|([^\s"'<>=]+))""")
TAG = re.compile(rf"""<(/?){DSML}([\w-]+)((?:\s+{ATTRIBUTE.pattern})*)\s*>""")
# As they are meant to be written, but with quotes inside the name.
QUOTED_CALL = re.compile(rf'<{DSML}invoke name="([^{BAR}]*?)">')
QUOTED_PARAMETER = re.compile(rf'<{DSML}parameter name="([^{BAR}]*?)" string="(true|false)">')


@dataclass(frozen=True, kw_only=True)
class Tag:
    """A tag: its text, what it marks, whether it is an end. A beginning may have a name and say what its value is.

    ``unknown`` is a tag of another name, without the name it needs, or a mark that no tag follows.
    """

    text: str
    kind: Kind
    closes: bool
    name: str = ""
    is_string: bool | None = None
    is_exact: bool = True


def find_mark(text: str, start: int) -> tuple[int, bool]:
    """Where the next mark begins and True; or where one may begin in the last characters (or the end) and False."""
    match = MARK.search(text, start)
    if match:
        return match.start(), True
    last = text.rfind("<", max(start, len(text) - LONGEST_MARK + 1))
    if last >= 0 and any(mark.startswith(text[last:]) for mark in MARKS):
        return last, False
    return len(text), False


def read_tag(text: str, start: int, *, is_all: bool) -> Tag | None:
    """The tag at ``start``, where a mark stands, or None if it needs more text (never if ``is_all``).

    What is decided with less of the text stays decided with more of it.
    """
    mark = next(mark for mark in MARKS if text.startswith(mark, start))
    if mark in (THINK, END_THINK):
        return Tag(text=mark, kind="think", closes=mark == END_THINK)
    no_tag = Tag(text=mark, kind="unknown", closes=mark.startswith("</"))
    beginning = BEGINNING.match(text, start, start + LONGEST_TAG)
    name, after = beginning.groups() if beginning else ("", "")
    if after and (not name or not (after.isspace() or after == ">")):
        return no_tag
    limit = start + LONGEST_TAG
    next_mark = text.find(DSML, start + len(mark), limit)  # a tag holds the mark once
    end = limit if next_mark < 0 else next_mark
    if text.find(">", start + len(mark), end) >= 0:
        found = [pattern.match(text, start, end) for pattern in (TAG, QUOTED_CALL, QUOTED_PARAMETER)]
        # The first to end, as if the text came letter by letter.
        first = min((match for match in found if match), key=lambda match: match.end(), default=None)
        if first:
            return _tag(first) if first.re is TAG else _quoted(first)
    return no_tag if is_all or next_mark >= 0 or len(text) >= limit else None


def _tag(match: re.Match[str]) -> Tag:
    closes, word, attributes = bool(match[1]), match[2], match[3]
    values = {key: double or single or bare for key, double, single, bare in ATTRIBUTE.findall(attributes)}
    kind = NAMES.get(word)
    is_exact = kind is not None
    if kind is None:
        kind = OTHER_NAMES.get(word.replace("_", "").replace("-", "").lower(), "unknown")
    if kind in ("call", "parameter") and not closes and "name" not in values:
        kind = "unknown"
    is_string = {"true": True, "false": False}.get(values.get("string", "").lower())
    return Tag(
        text=match[0], kind=kind, closes=closes, name=values.get("name", ""), is_string=is_string, is_exact=is_exact
    )


def _quoted(match: re.Match[str]) -> Tag:
    if match.re is QUOTED_CALL:
        return Tag(text=match[0], kind="call", closes=False, name=match[1])
    return Tag(text=match[0], kind="parameter", closes=False, name=match[1], is_string=match[2] == "true")
