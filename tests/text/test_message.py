import pytest

from dsv4.text.message import Message, Tool, ToolCall, content_text, message_from_released

CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}


def test_a_released_message_is_read_whole():
    message = message_from_released(
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "hm",
            "tool_calls": [CALL],
            "mask": 1,
            "wo_eos": True,
        }
    )
    assert message == Message(
        role="assistant",
        content=None,
        reasoning="hm",
        tool_calls=(ToolCall(name="f", arguments='{"a": 1}', id="c1"),),
        wo_eos=True,
    )
    system = message_from_released(
        {
            "role": "system",
            "content": "s",
            "response_format": {"type": "object"},
            "tools": [{"function": {"name": "f"}}],
        }
    )
    assert system.tools == (Tool(function={"name": "f"}),)
    assert system.response_format == {"type": "object"}
    tool = message_from_released(
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}
    )
    assert (tool.tool_call_id, tool.text) == ("c1", "a\n\n[Unsupported image]")
    assert message_from_released({"role": "user", "content": "q", "task": "query"}).task == "query"


@pytest.mark.parametrize(
    ("released", "match"),
    [
        ({"role": "user", "colour": "red"}, "colour"),
        ({"role": "robot"}, "robot"),
        ({"content": "x"}, "role is None"),
        ({"role": "user", "task": "dance"}, "dance"),
        ({"role": "user", "reasoning_content": "hm"}, "reasoning.*user.*assistant"),
        ({"role": "system", "tool_calls": [CALL]}, "tool_calls.*system"),
        ({"role": "assistant", "tools": [{"function": {"name": "f"}}]}, "tools.*assistant.*system, developer"),
        ({"role": "user", "response_format": {"type": "object"}}, "response_format"),
        ({"role": "system", "task": "title"}, "task of"),
        ({"role": "user", "wo_eos": True}, "wo_eos"),
        ({"role": "user", "tool_call_id": "c"}, "tool_call_id"),
        ({"role": "assistant", "tool_calls": [{"id": "c"}]}, "function.*None"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}, "two texts"),
        ({"role": "system", "tools": [{"function": {"name": ""}}]}, "name is ''"),
        ({"role": "system", "tools": [{"function": {"name": "f", "parameters": [1]}}]}, "parameters of tool f"),
    ],
)
def test_errors_name_what_is_wrong(released, match):
    with pytest.raises(ValueError, match=match):
        message_from_released(released)


def test_what_a_tool_says_of_itself():
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    tool = Tool(function={"name": "f", "parameters": schema, "strict": True})
    assert (tool.name, tool.parameters, tool.properties, tool.is_strict) == ("f", schema, schema["properties"], True)
    bare = Tool(function={"name": "g", "parameters": None})
    assert (bare.parameters, bare.properties, bare.is_strict) == ({}, {}, False)
    assert Tool(function={"name": "g", "parameters": {"properties": 3}}).properties == {}


def test_content_as_one_text():
    assert content_text(None) == content_text("") == content_text([]) == ""
    assert content_text([{"type": "text", "text": "a"}, {"type": "text"}, {"type": "image_url"}]) == (
        "a\n\n\n\n[Unsupported image_url]"
    )
