"""DeepSeek-V4, whole: one code base to train, quantise, serve and measure it.

Importing this package costs nothing: torch is loaded when a model is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsv4.checkpoint.load import load_model as load_model
    from dsv4.checkpoint.save import save_model as save_model
    from dsv4.config.engine import Limits as Limits
    from dsv4.config.sampling import Sampling as Sampling
    from dsv4.engine.engine import Engine as Engine
    from dsv4.model.init import new_model as new_model

__version__ = "0.1.0"

__all__ = ["Engine", "Limits", "Sampling", "load_model", "new_model", "save_model"]

_HOMES = {
    "Engine": "dsv4.engine.engine",
    "Limits": "dsv4.config.engine",
    "Sampling": "dsv4.config.sampling",
    "load_model": "dsv4.checkpoint.load",
    "save_model": "dsv4.checkpoint.save",
    "new_model": "dsv4.model.init",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'dsv4' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
