"""Conversations of every kind, whole and in order, and the same again."""

from collections import Counter

import pytest

from dsv4.data.conversations.arithmetic import TABLE
from dsv4.data.conversations.generate import FIRST, KINDS, NUM_FIRST, REST, conversation

HELD_OUT = 0.1


@pytest.mark.parametrize(
    ("side", "first", "stage"),
    [
        ("train", 0, FIRST), ("train", NUM_FIRST - 800, FIRST), ("train", NUM_FIRST, REST), ("validation", 0, REST)
    ],
)  # fmt: skip
def test_shares_add_up_and_are_kept(side, first, stage):
    assert sum(stage.kinds.values()) == pytest.approx(1)
    made = [conversation(side, first + index, HELD_OUT) for index in range(800)]
    counts = Counter(one.kind for one in made)
    assert counts.keys() == stage.kinds.keys()
    for kind, share in stage.kinds.items():
        assert abs(counts[kind] - 800 * share) < 50
    assert abs(sum(one.thinking for one in made) - 800 * stage.thinking) < 50
    assert {one.effort for one in made if not one.thinking} == {"high"}
    assert {one.effort for one in made if one.thinking} == {"high", "max"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("thinking", [True, False])
def test_roles_take_turns(kind, thinking):
    turns = set()
    for index in range(100):
        made = conversation("train", index, HELD_OUT, kind, thinking=thinking)
        assert (made.kind, made.thinking) == (kind, thinking)
        roles = [message.role for message in made.messages]
        roles = roles[roles[0] == "system" :]
        assert roles[0] == "user"
        assert roles[-1] == "assistant"
        assert all(role == ("assistant" if i % 2 else roles[i]) for i, role in enumerate(roles))
        assert len(made.values) == roles.count("assistant")
        for message in made.messages:
            if message.role == "assistant":
                assert bool(message.reasoning) == thinking
                assert bool(message.text) != bool(message.tool_calls)
        turns.add(roles.count("user"))
    assert turns == ({1} if kind == "json" else {1, 2, 3, 4} if kind != "arithmetic" else turns)


def test_a_result_follows_its_call():
    for index in range(100):
        made = conversation("train", index, HELD_OUT, "tools")
        ids = [call.id for message in made.messages for call in message.tool_calls]
        assert len(set(ids)) == len(ids)
        assert [message.tool_call_id for message in made.messages if message.role == "tool"] == ids


def test_a_conversation_is_a_function_of_side_and_index():
    assert conversation("train", 7, HELD_OUT) == conversation("train", 7, HELD_OUT)
    made = [conversation(side, i, HELD_OUT, "tools") for side in ("train", "validation") for i in range(50)]
    assert len({str(one.messages) for one in made}) == 100


def test_thinking_does_not_change_what_is_asked():
    for index in range(30):
        pair = [conversation("validation", index, HELD_OUT, "json", thinking=thinking) for thinking in (True, False)]
        assert pair[0].messages[:-1] == pair[1].messages[:-1]
        assert pair[0].messages[-1].text == pair[1].messages[-1].text


def test_held_out_sums_are_asked_in_validation_only():
    def sums(side):
        made = [conversation(side, index, HELD_OUT, "arithmetic", thinking=False) for index in range(400)]
        found = set()
        for one in made:
            for message in one.messages:
                numbers = [
                    int(word) for word in message.text.replace("?", " ").replace(".", " ").split() if word.isdigit()
                ]
                if message.role == "user" and len(numbers) == 2 and max(numbers) >= TABLE:
                    sign = "-" if "-" in message.text or "minus" in message.text else "+"
                    found.add((sign, *sorted(numbers)))
        return found

    train, validation = sums("train"), sums("validation")
    assert len(train) > 300
    assert len(validation) > 150
    assert not train & validation
