"""Items and events, out of what is told of an answer."""

import pytest

from dsv4.serve.responses_output import InputReader, Output
from dsv4.serve.turn import CallBegun
from dsv4.text.events import CallArguments, CallEnd, Content, Reasoning


def told(*all_told, custom=()):
    output = Output(frozenset(custom))
    found = [one for single in all_told for one in output.tell(single)]
    return output, found


def test_content_after_a_call_is_an_item_of_its_own():
    output, _ = told(
        Reasoning("a"), Content("b"), CallBegun(0, "call_1", "f"), CallArguments(0, "{}"), CallEnd(0), Content("c")
    )
    list(output.close("completed"))
    assert [item["type"] for item in output.items] == ["reasoning", "message", "function_call", "message"]
    assert output.items[3]["content"][0]["text"] == "c"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [('{"input": "a\\n\\"b\\" \\u00e9 \\ud83d\\ude00 \u4f60 \\\\"}', 'a\n"b" \xe9 \U0001f600 \u4f60 \\'), ("{}", ""),
     ('{"input": 5}', '{"input": 5}'), ('{"other": "a"}', '{"other": "a"}'), ('{"input": "a", "b": "c"}', "a")],
)  # fmt: skip
def test_the_text_of_a_custom_tool_comes_out_of_its_json(arguments, text):
    """However it is cut, the pieces make the text."""
    for size in range(1, len(arguments) + 1):
        pieces = [CallArguments(0, arguments[i : i + size]) for i in range(0, len(arguments), size)]
        output, found = told(CallBegun(0, "call_1", "p"), *pieces, CallEnd(0), custom=["p"])
        assert output.items[0]["input"] == text
        assert "".join(one["delta"] for one in found if one["type"].endswith(".delta")) == text


def test_the_text_of_a_custom_tool_comes_as_it_is_written():
    reader = InputReader()
    assert [reader.push(piece) for piece in ('{"in', 'put": "a', "b\\", "nc\\ud83d", "\\ude00", '"', "}")] == [
        "", "a", "b", "\nc", "\U0001f600", "", "",
    ]  # fmt: skip
    assert reader.text == "ab\nc\U0001f600"
