"""The ``dsv4`` command: one verb per file, each a function whose arguments are the verb's options.

A verb whose imports are heavy imports them in its body, so that ``dsv4 inspect`` starts without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tyro
from rich.console import Console

from dsv4.cli.efficiency import efficiency
from dsv4.cli.inspect import inspect

VERBS: dict[str, Callable[..., None]] = {
    "inspect": inspect,
    "efficiency": efficiency,
}

USER_ERROR = 2  # exit code; tyro's own for a wrong option is 2 as well


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code. What the user did wrong is printed in red, without a traceback."""
    try:
        tyro.extras.subcommand_cli_from_dict(
            VERBS,
            prog="dsv4",
            description="DeepSeek-V4 in one package: what a model is, and what it costs.",
            args=argv,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    except (ValueError, OSError) as error:
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", style="red", markup=False, highlight=False)
        return USER_ERROR
    return 0
