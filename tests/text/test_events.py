from dsv4.text.events import CallArguments, CallBegin, CallEnd, Content, Note, Reasoning, message_of
from dsv4.text.message import Message, ToolCall


def test_a_message_is_what_its_events_say():
    events = [
        Reasoning("a"), Reasoning("b"), Content("c"), Note("n"), CallBegin(0, "f"), CallArguments(0, "{"),
        CallArguments(0, "}"), CallEnd(0), CallBegin(1, "g"), CallArguments(1, '{"a": '), Content("d"),
    ]  # fmt: skip
    assert message_of(events) == Message(
        role="assistant", content="cd", reasoning="ab", tool_calls=(ToolCall(name="f", arguments="{}"),)
    )
    assert message_of([]) == Message(role="assistant", content="", reasoning=None)
