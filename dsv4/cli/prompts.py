"""The file of ``dsv4 generate --prompts``: a prompt a line, as it stands, or as JSON with a sampling of its own."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from dsv4.config.sampling import MAX_SEED, Sampling

JSON_LINES = ".jsonl"  # how the name of a file of JSON ends

FIELDS = tuple(field.name for field in fields(Sampling))


@dataclass(frozen=True)
class Prompt:
    """One line of the file, counted from 1."""

    line: int
    text: str
    sampling: Sampling


def read_prompts(path: Path, sampling: Sampling) -> list[Prompt]:
    """Read the prompts of a file; blank lines are none.

    sampling: of a line that does not say otherwise. Its seed is the first line's; each further line has the next one,
    so that equal prompts do not get equal answers. Raises one ``ValueError`` for all lines that cannot be understood.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts is {path}, which is not UTF-8 ({error}); expected a text file") from error
    prompts: list[Prompt] = []
    problems: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        own = replace(sampling, seed=((sampling.seed or 0) + number - 1) % (MAX_SEED + 1))
        try:
            text, own = (line, own) if path.suffix != JSON_LINES else _parse(line, own)
        except ValueError as error:
            problems += [f"{path}, line {number}: {problem}" for problem in str(error).splitlines()]
        else:
            prompts.append(Prompt(number, text, own))
    if problems:
        raise ValueError("\n".join(problems))
    if not prompts:
        raise ValueError(f"--prompts is {path}, which has no prompt; expected one a line")
    return prompts


def _parse(line: str, sampling: Sampling) -> tuple[str, Sampling]:
    """Read one line of JSON."""
    try:
        found: Any = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{error}; expected a JSON object") from error
    if not isinstance(found, dict):
        raise ValueError(f"the line holds a {type(found).__name__}; expected a JSON object")
    text = found.pop("prompt", None)
    if not isinstance(text, str):
        raise ValueError(f"prompt is {text!r}; expected a text")
    unknown = [name for name in found if name not in FIELDS]
    if unknown:
        raise ValueError(f"unknown {', '.join(unknown)}; expected prompt, and of {', '.join(FIELDS)} what differs")
    return text, replace(sampling, **{name: _tuples(value) for name, value in found.items()})


def _tuples(value: Any) -> Any:
    """What JSON can only write as lists."""
    return tuple(_tuples(inner) for inner in value) if isinstance(value, list) else value
