"""The ``dsv4`` command: one verb per file, each a function whose arguments are the verb's options.

A verb whose imports are heavy imports them in its body, so that ``dsv4 inspect`` starts without torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import tyro
from rich.console import Console

from dsv4.cli.bench import bench
from dsv4.cli.chat import chat
from dsv4.cli.convert import convert
from dsv4.cli.efficiency import efficiency
from dsv4.cli.evaluate import evaluate
from dsv4.cli.generate import generate
from dsv4.cli.inspect import inspect
from dsv4.cli.report import report
from dsv4.cli.serve import serve
from dsv4.cli.synth import synth
from dsv4.cli.train import train

VERBS: dict[str, Callable[..., None]] = {
    "inspect": inspect,
    "efficiency": efficiency,
    "train": train,
    "report": report,
    "generate": generate,
    "serve": serve,
    "chat": chat,
    "synth": synth,
    "bench": bench,
    "eval": evaluate,
    "convert": convert,
}

OWN_ARGUMENTS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": train,
    "bench": bench,
    "eval": evaluate,
}
"""Verbs that read their arguments themselves: the options of ``train`` are the fields of the recipe that it names, and
``bench`` and ``eval`` have verbs of their own."""

USER_ERROR = 2  # exit code; tyro's own for a wrong option is 2 as well


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code. What the user did wrong is printed in red, without a traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments and arguments[0] in OWN_ARGUMENTS:
            OWN_ARGUMENTS[arguments[0]](arguments[1:])
            return 0
        tyro.extras.subcommand_cli_from_dict(
            VERBS,
            prog="dsv4",
            description="DeepSeek-V4 in one package: what a model is and costs, training it, and what it says.",
            args=arguments,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    except (ValueError, OSError) as error:
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", style="red", markup=False, highlight=False)
        return USER_ERROR
    return 0
