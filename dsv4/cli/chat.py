"""``dsv4 chat``: a conversation in the terminal, by the same service that answers over HTTP."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console

from dsv4.cli.chat_tools import TOOLS, read_table, run_tool
from dsv4.cli.generate import Serving
from dsv4.cli.models import RESIDENCE, Residence
from dsv4.cli.serve import build_service, require_packages
from dsv4.config.sampling import Sampling
from dsv4.config.serve import ServeOptions

if TYPE_CHECKING:
    from dsv4.serve.answer_text import Collected
    from dsv4.serve.service import Service
    from dsv4.serve.turn import Told
    from dsv4.text.message import Message

SERVING = Serving(precision="bfloat16", concurrency=1)
MAX_ROUNDS = 4  # of tools, for one question
HELP = """/effort off|high|max   whether and how hard to think
/tools on|off          a calculator, a clock, and the table of --table
/retry                 answer once more
/new                   forget the conversation
/quit                  or Ctrl-D; Ctrl-C stops an answer"""


@dataclass(kw_only=True)
class Chat:
    """A conversation and how it goes on."""

    service: Service
    sampling: Sampling
    table: dict[str, str]
    effort: str
    has_tools: bool
    messages: list[Message] = field(default_factory=list)
    runner: asyncio.Runner = field(default_factory=asyncio.Runner)
    num_tried: int = 0
    """Answers so far, each of which draws by a seed of its own."""


def chat(
    path: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL_OR_RUN")],
    effort: str = "high",
    tools: bool = False,
    table: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    system: str | None = None,
    temperature: float = 0.6,
    top_p: float = 0.95,
    max_tokens: int = 4096,
    seed: int = 0,
    serving: Annotated[Serving, tyro.conf.arg(name="")] = SERVING,
    residence: Annotated[Residence, tyro.conf.arg(name="")] = RESIDENCE,
) -> None:
    """Talk with a model. /help lists what can be changed on the way.

    Args:
        path: the folder of a run (its finished model, or else its newest checkpoint) or a checkpoint directory.
        effort: off, high or max: whether and how hard to think before an answer.
        tools: let the model call a calculator, a clock, and the table.
        table: a file with lines of key = value, for the model's tool lookup.
        system: what the model is told before the conversation.
        temperature: below 1 the likely tokens become likelier; 0 takes the likeliest.
        top_p: draw from the fewest likeliest tokens that have this probability together.
        max_tokens: tokens of an answer at most, thinking included.
        seed: of the draws; an answer has this one plus the number of those before it.
    """
    require_packages()
    from dsv4.text.message import Message

    if table is not None and not table.is_file():
        raise ValueError(f"--table is {table}; expected a file that exists")
    known = read_table(table.read_text(encoding="utf-8")) if table is not None else {}
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    service = build_service(path, ServeOptions(), serving, residence, name=None)
    talk = Chat(service=service, sampling=sampling, table=known, effort="off", has_tools=tools)
    _set_effort(talk, effort)
    if system is not None:
        talk.messages.append(Message(role="system", content=system))
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{service.name}; /help lists commands", style="dim")
    try:
        _talk(talk, console)
    finally:
        talk.runner.close()
        service.engine.close()


def _talk(talk: Chat, console: Console) -> None:
    from dsv4.text.message import Message

    first = len(talk.messages)
    while True:
        try:
            said = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if said in ("/quit", "/exit"):
            return
        if said.startswith("/"):
            if said != "/retry":
                _command(talk, said, first, console)
                continue
            while len(talk.messages) > first and talk.messages[-1].role != "user":
                talk.messages.pop()
        elif said:
            talk.messages.append(Message(role="user", content=said))
        if len(talk.messages) > first and talk.messages[-1].role == "user":
            _answer(talk, console)


def _command(talk: Chat, said: str, first: int, console: Console) -> None:
    name, _, value = said.partition(" ")
    try:
        if name == "/effort":
            _set_effort(talk, value.strip())
        elif name == "/tools" and value.strip() in ("on", "off"):
            talk.has_tools = value.strip() == "on"
        elif name == "/new":
            del talk.messages[first:]
        else:
            console.print(HELP, style="dim", markup=False)
    except ValueError as error:
        console.print(str(error), style="red", markup=False)


def _set_effort(talk: Chat, effort: str) -> None:
    known = ("off", *talk.service.passages.efforts)
    if effort not in known:
        raise ValueError(f"effort is {effort!r}; expected one of {', '.join(known)}")
    talk.effort = effort


def _answer(talk: Chat, console: Console) -> None:
    """Print an answer as it comes, and run the tools that it calls, until it calls none."""
    from dsv4.serve.errors import ApiError
    from dsv4.text.message import Message

    for _ in range(MAX_ROUNDS):
        try:
            found = talk.runner.run(_turn(talk, console))
        except ApiError as error:
            console.print(error.message, style="red", markup=False)
            return
        except KeyboardInterrupt:
            console.print("\nstopped", style="dim")
            return
        calls = tuple(found.calls)
        talk.messages.append(
            Message(role="assistant", content=found.content, reasoning=found.reasoning or None, tool_calls=calls)
        )
        if not calls:
            return
        for call in calls:
            result = run_tool(call.name, call.arguments, table=talk.table, now=datetime.now().astimezone())
            console.print(f"{call.name} {call.arguments} = {result}", style="cyan", markup=False)
            talk.messages.append(Message(role="tool", tool_call_id=call.id, content=result))


async def _turn(talk: Chat, console: Console) -> Collected:
    from dsv4.serve.answer_text import gather
    from dsv4.serve.turn import Turn

    seed = ((talk.sampling.seed or 0) + talk.num_tried) % 2**63
    talk.num_tried += 1
    turn = Turn(
        messages=tuple(talk.messages), tools=TOOLS if talk.has_tools else (), thinking=talk.effort != "off",
        effort="high" if talk.effort == "off" else talk.effort, sampling=replace(talk.sampling, seed=seed),
    )  # fmt: skip
    begun = time.perf_counter()
    answer = talk.service.answer(await talk.service.prepare(turn), "")
    found = gather([one async for one in _shown(answer, console)])
    rate = found.usage.num_output / (time.perf_counter() - begun)
    console.print(
        f"\n{found.usage.num_output} tokens, {rate:.0f} a second; {found.usage.num_cached} of "
        f"{found.usage.num_prompt} of the prompt were known",
        style="dim",
    )
    return found


async def _shown(answer: AsyncIterator[Sequence[Told]], console: Console) -> AsyncIterator[Told]:
    """Print thinking dim and content plain."""
    from dsv4.text.parse import Content, Note, Reasoning

    was_thinking = False
    async for one in (one async for news in answer for one in news):
        if isinstance(one, Reasoning):
            console.print(one.text, style="dim italic", end="", markup=False)
            was_thinking = True
        elif isinstance(one, Content):
            console.print(("\n\n" if was_thinking else "") + one.text, end="", markup=False)
            was_thinking = False
        elif isinstance(one, Note):
            console.print(f"\n({one.text})", style="yellow", markup=False)
        yield one
