"""What a server remembers of its own answers: the thinking before a tool call, by the call's id.

The released format wants the thinking of a turn that called a tool back with the tool's result. Clients that speak a
protocol without thinking cannot send it, and many that could do not: it is put back from here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace

from dsv4.text.message import Message

MAX_BYTES = 2**25


class ReasoningMemory:
    """The thinking of the latest tool calls, of each user apart, in so many bytes at most."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes, self._num_bytes = max_bytes, 0
        self._known: OrderedDict[tuple[str, str], str] = OrderedDict()

    def keep(self, user: str, call_ids: Sequence[str], reasoning: str) -> None:
        """Remember the thinking before these calls."""
        for call_id in call_ids:
            self._known[user, call_id] = reasoning
            self._num_bytes += _size(user, call_id, reasoning)
        while self._num_bytes > self._max_bytes:
            (owner, call_id), oldest = self._known.popitem(last=False)
            self._num_bytes -= _size(owner, call_id, oldest)

    def repair(self, user: str, messages: Sequence[Message]) -> tuple[Message, ...]:
        """Put the thinking back into assistant messages that call tools and have none."""
        return tuple(self._repaired(user, message) for message in messages)

    def _repaired(self, user: str, message: Message) -> Message:
        if message.role != "assistant" or message.reasoning or not message.tool_calls:
            return message
        for call in message.tool_calls:
            found = self._known.get((user, call.id))
            if found is not None:
                return replace(message, reasoning=found)
        return message


def _size(user: str, call_id: str, reasoning: str) -> int:
    return len(user) + len(call_id) + 4 * len(reasoning)  # a character takes four bytes at most
