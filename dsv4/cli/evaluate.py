"""``dsv4 eval``: what a model is worth, one verb for each way to ask."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tyro

from dsv4.cli.eval_chat import eval_chat

EVALS: dict[str, Callable[..., None]] = {"chat": eval_chat}


def evaluate(argv: Sequence[str]) -> None:
    """Evaluate a model: chat (held-out conversations)."""
    tyro.extras.subcommand_cli_from_dict(
        EVALS,
        prog="dsv4 eval",
        description="Evaluate a model.",
        args=list(argv),
        config=(tyro.conf.FlagCreatePairsOff,),
    )
