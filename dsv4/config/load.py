"""Read and write model configurations, field for field, and refuse whatever is not understood.

``config.json`` as released with the weights, the reference runtime's ``inference/config.json``, and preset
names all become the same ``ModelConfig``. A file's problems are collected and reported together. What the
architecture fixes (one key-value head, one shared expert, ...) must have its released value.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from dsv4.config.files import write_then_rename
from dsv4.config.model import ModelConfig
from dsv4.config.presets import PRESETS, preset
from dsv4.config.released import from_released, refuse_relatives, to_released
from dsv4.config.runtime import from_runtime

__all__ = ["from_released", "from_runtime", "load_config", "save_config", "to_released"]


def load_config(source: str | Path) -> ModelConfig:
    """Load a directory with a ``config.json``, a ``.json`` file of either flavour, or a preset by name."""
    if source in PRESETS:  # a directory of that name is reached as ./nano
        return preset(str(source))
    path = Path(source)
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise ValueError(f"directory is {path.parent}; expected one that holds a config.json")
    elif path.suffix != ".json":
        if len(path.parts) > 1:
            raise ValueError(
                f"model is {str(source)!r}; expected a preset name, a directory or a .json file that exists"
            )
        return preset(str(source))
    elif not path.is_file():
        raise ValueError(f"config file is {path}; expected a file that exists")
    data = _read_object(path)
    try:
        refuse_relatives(data)
        return from_runtime(data) if "dim" in data and "hidden_size" not in data else from_released(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def save_config(config: ModelConfig, path: str | Path) -> None:
    """Write the released form to ``path``, or to ``config.json`` in it when it is a directory."""
    path = Path(path)
    target = path / "config.json" if path.is_dir() else path
    if target.suffix != ".json":
        raise ValueError(f"config path is {path}; expected a directory that exists or a name that ends in .json")
    text = json.dumps(to_released(config), indent=2) + "\n"
    write_then_rename(target, lambda partial: _write(partial, text))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _read_object(path: Path) -> Mapping[str, object]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
    except ValueError as error:  # not UTF-8, not JSON, or a name given twice
        raise ValueError(f"{path}: expected a JSON object: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: the file holds a {type(data).__name__}; expected a JSON object")
    return data


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"field {next(n for n in names if names.count(n) > 1)} is given twice; expected once")
    return result
