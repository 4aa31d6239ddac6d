"""``dsv4 eval chat``: what an instruction-tuned model gets right in conversations that were held out."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from dsv4.cli.models import Precision, find_model, find_tokenizer, open_model

if TYPE_CHECKING:
    from dsv4.data.conversations.generate import Conversation
    from dsv4.engine.engine import Engine
    from dsv4.eval.chat import Mark, Part, Question, Score
    from dsv4.text.message import Message

    Answered = list[tuple[Question, Message, Mark]]

AT_ONCE = 16  # requests
MAX_TOKENS = 256  # of an answer

NAMES = {
    "arithmetic": "arithmetic",
    "tools": "tools",
    "json": "JSON",
    "echo": "said again",
    "talk": "small talk",
    "call": "the call is right",
    "answer": "the answer is right",
    "no call": "answered without a call",
    "object": "the object is right",
}


def eval_chat(
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    num: int = 50,
    mistakes: int = 0,
    precision: Precision = "float32",
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
) -> None:
    """Ask held-out questions, print how many are answered rightly, with thinking and without.

    Every answer is the likeliest one, token by token. The numbers, names and names of tools that are asked about are in
    no conversation of training.

    Args:
        run: the folder of a run, or of a model.
        num: conversations of each kind, with thinking and without.
        mistakes: print so many wrong answers of each sort.
        precision: what the model computes in.
        json: write the counts to this file.
    """
    from dsv4.eval.chat import questions, scores

    if num < 1:
        raise ValueError(f"--num is {num}; expected at least 1")
    if mistakes < 0:
        raise ValueError(f"--mistakes is {mistakes}; expected 0 or more")
    if json is not None and not json.parent.is_dir():
        raise ValueError(f"--json is {json}; expected its directory to exist")
    console = Console(highlight=False)
    start = time.perf_counter()
    asked = questions(_conversations(_held_out(run), num))
    with _engine(run, precision) as engine, Console(stderr=True).status(f"asking {len(asked)} questions"):
        answered = _ask(engine, asked, find_model(run))
    seconds = time.perf_counter() - start
    counted = scores((question, mark) for question, _, mark in answered)
    _print_mistakes(console, answered, mistakes)
    console.print(_table(counted))
    console.print(f"{len(asked)} questions in {seconds:.0f} s")
    if json is not None:
        _write(json, counted)


def _held_out(run: Path) -> float:
    """The share of facts that the run's training left out; of a model without its run, what the recipe leaves out."""
    from dsv4.config.recipes import load_recipe, load_run_config

    for folder in (run, run.resolve().parent):
        if (folder / "config.json").is_file() and (folder / "metrics.jsonl").is_file():
            data = load_run_config(folder).data
            if data.has_conversations:
                return data.validation_fraction
    return load_recipe("chat").data.validation_fraction


def _conversations(held_out: float, num: int) -> list[Conversation]:
    from dsv4.data.conversations.generate import KINDS, conversation

    return [
        conversation("validation", index, held_out, kind, thinking=thinking)
        for kind in KINDS
        for thinking in (True, False)
        for index in range(num)
    ]


def _engine(run: Path, precision: Precision) -> Engine:
    from dsv4.cli.process import keep_freed_memory
    from dsv4.config.engine import Limits
    from dsv4.data.tokenizer import check_tokenizer, load_tokenizer
    from dsv4.engine.engine import Engine

    directory = find_model(run)
    tokenizer = load_tokenizer(str(find_tokenizer(directory)))
    keep_freed_memory()
    model = open_model(directory, precision)
    check_tokenizer(tokenizer, model.config)
    return Engine(model, Limits(max_requests=AT_ONCE), tokenizer=tokenizer)


def _ask(engine: Engine, asked: list[Question], directory: Path) -> Answered:
    from dsv4.config.sampling import Sampling
    from dsv4.data.prompt import PromptTokenizer
    from dsv4.eval.chat import mark
    from dsv4.text.parse import parse
    from dsv4.text.passages import find_passages

    tokenizer, passages = engine.tokenizer, find_passages(directory)
    assert tokenizer is not None, "the engine was made with one"
    prompts = PromptTokenizer(tokenizer)
    ids = [prompts.ids(question.prompt(passages)) for question in asked]
    answered: Answered = []
    completions = engine.generate(ids, Sampling(max_tokens=MAX_TOKENS, temperature=0.0))
    for question, completion in zip(asked, completions, strict=True):
        text = tokenizer.decode(completion.token_ids, skip_special_tokens=False)
        answer = parse(text, thinking=question.thinking, tools=question.tools)
        answered.append((question, answer, mark(question, answer)))
    return answered


def _print_mistakes(console: Console, answered: Answered, most: int) -> None:
    """Some wrong answers of each sort, with their questions and what was wanted."""
    shown: dict[tuple[str, Part, bool], int] = {}
    for question, answer, mark in answered:
        sort = (question.kind, question.part, question.thinking)
        if mark.is_right or shown.get(sort, 0) >= most:
            continue
        shown[sort] = shown.get(sort, 0) + 1
        thinking = "with thinking" if question.thinking else "without"
        console.print(f"{NAMES[question.kind]}, {thinking}: {question.before[-1].text}", markup=False, soft_wrap=True)
        for name, message in (("wanted", question.wanted), ("got", answer)):
            calls = "".join(f" {call.name}({call.arguments})" for call in message.tool_calls)
            thought = f"[{message.reasoning}] " if message.reasoning else ""
            console.print(f"  {name}: {thought}{message.text}{calls}", markup=False, soft_wrap=True)


def _table(counted: dict[tuple[str, Part, bool], Score]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("held out")
    table.add_column("")
    for name in ("without thinking", "with thinking"):
        table.add_column(name, justify="right")
    rows: dict[tuple[str, Part], None] = {(kind, part): None for kind, part, _ in counted}
    for kind, part in rows:
        pair = [counted.get((kind, part, thinking)) for thinking in (False, True)]
        table.add_row(NAMES[kind], NAMES[part], *(_share(score, "right") for score in pair))
        if part == "object":
            table.add_row(NAMES[kind], "the object fits what was asked for", *(_share(s, "valid") for s in pair))
    return table


def _share(score: Score | None, what: str) -> str:
    if score is None:
        return "-"
    number = getattr(score, what)
    return f"{number} of {score.count}, {number / score.count:.1%}"


def _write(path: Path, counted: dict[tuple[str, Part, bool], Score]) -> None:
    lines = [
        {"kind": kind, "part": part, "thinking": thinking, **asdict(score)}
        for (kind, part, thinking), score in counted.items()
    ]
    path.write_text(json.dumps(lines, indent=2) + "\n", encoding="utf-8")
