"""Time is linear in the length of the text, also of texts made to be hard: four times as long, four times the time."""

from time import process_time

import pytest

from dsv4.text.events import CallArguments, CallEnd
from dsv4.text.message import Tool
from dsv4.text.parse import Parser
from dsv4.text.tokens import DSML, END_THINK

OPEN, F = f"<{DSML}tool_calls>", f'<{DSML}invoke name="f">'
A, DONE = f'<{DSML}parameter name="a" string="true">', f"</{DSML}parameter>"
TOOLS = (Tool(function={"name": "f", "parameters": {"properties": {"a": {}}}}),)
NUM_LETTERS = 3_000

HARD = {
    "text": ("", "word "),
    "breaks": ("", "\n"),
    "marks": ("", "<"),
    "beginnings": ("", f"<{DSML}"),
    "no tags": ("", f'<{DSML}invoke name="'),
    "endless": (f'<{DSML}invoke name="', "a>"),
    "blocks": ("", f"{OPEN}\n"),
    "thoughts": ("", END_THINK),
    "calls": (f"{OPEN}\n", f"{F}\n"),
    "strays": (f"{OPEN}\n", f"a{F}a"),
    "value": (f"{OPEN}{F}{A}", "<x>\n"),
    "json": (f"{OPEN}{F}{A.replace('true', 'false')}", "[0,"),
    "wrapped": (f"{OPEN}{F}{A.replace(chr(34) + 'a', chr(34) + 'input')}", "<x>\n"),
    "repeated": (f"{OPEN}{F}{A}x{DONE}", f"{A}y{DONE}"),
    "ends": (f"{OPEN}{F}", f"</{DSML}invoke>{F} "),
}


def seconds(text, size, **options):
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    best = float("inf")
    for _ in range(2):
        parser = Parser(tools=TOOLS, **options)
        start = process_time()
        for piece in pieces:
            parser.push(piece)
        parser.finish()
        best = min(best, process_time() - start)
    return best


@pytest.mark.parametrize("size", [1, 10**9])
@pytest.mark.parametrize(("kind", "thinking"), [*((kind, False) for kind in HARD), ("blocks", True), ("text", True)])
def test_time_is_linear(kind, thinking, size):
    head, unit = HARD[kind]
    num_letters = NUM_LETTERS if size == 1 else 20 * NUM_LETTERS  # there squares show later
    short = head + unit * (num_letters // len(unit))
    long = head + unit * (4 * num_letters // len(unit))
    # Squares would take sixteen times as long; the constant is for texts that take no time at all.
    assert seconds(long, size, thinking=thinking) < 9 * seconds(short, size, thinking=thinking) + 0.01


def test_thousands_of_parameters():
    parameters = [
        f'<{DSML}parameter name="p{i}" string="{"true" if i % 2 else "false"}">{i}{DONE}\n' for i in range(4096)
    ]
    times = []
    for count in (1024, 4096):
        text = f"{OPEN}\n{F}\n{''.join(parameters[:count])}</{DSML}invoke>\n</{DSML}tool_calls>"
        times.append(seconds(text, 64, thinking=False))
        parser = Parser(thinking=False)
        events = parser.push(text)
        assert CallEnd(0) in events
        assert sum(event.text.count('"p') for event in events if isinstance(event, CallArguments)) == count
    assert times[1] < 9 * times[0]
