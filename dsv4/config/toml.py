"""A recipe as plain data: strict reading from a TOML file or a dict, and writing to a dict.

A TOML file has the fields of ``TrainConfig`` by their own names, one table a part, ``[[phases]]`` for the schedule.
It may start from a built-in recipe (``base = "demo"``) and give only what differs. Every problem is reported at once:
unknown names with the nearest known one, missing names, wrong types, values out of range.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from dsv4.config.reader import Reader
from dsv4.config.train import TrainConfig


def read_toml(path: Path, named: Callable[[object], TrainConfig]) -> TrainConfig:
    """Read a .toml file; ``named`` returns the recipe that a file may start from, or raises ValueError."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8, not TOML, or a name given twice
        raise ValueError(f"{path}: expected TOML: {error}") from error
    try:
        if "base" in data:
            data = _merge(to_dict(named(data.pop("base"))), data)
        return from_dict(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def to_dict(config: TrainConfig) -> dict[str, object]:
    """Return the whole recipe as values that JSON can hold; ``from_dict`` reads them back to an equal recipe."""
    return dataclasses.asdict(config)


def from_dict(data: Mapping[str, object]) -> TrainConfig:
    """Read a whole recipe; raise one ValueError that lists everything wrong with it."""
    reader = Reader(data)
    return reader.finish("recipe", _read(reader, TrainConfig))


def _merge(below: Mapping[str, object], above: Mapping[str, object]) -> dict[str, object]:
    """Tables are merged field by field; anything else, a list included, is replaced whole."""
    merged = dict(below)
    for name, value in above.items():
        old = below.get(name)
        merged[name] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _read(reader: Reader, make: type) -> Any:
    """Read one config class, field by field, by the types it declares; None if anything is wrong."""
    fields = {field.name: field for field in dataclasses.fields(make)}
    none = dataclasses.MISSING
    optional = [name for name, field in fields.items() if (field.default, field.default_factory) != (none, none)]
    reader.check_names(list(fields), optional)
    types = get_type_hints(make)
    read = {name: _read_field(reader, name, types[name]) for name in fields if name in reader.data}
    missing = {name: None for name in fields if name not in read and name not in optional}
    return reader.build(make, **read, **missing)


def _read_field(reader: Reader, name: str, kind: Any) -> Any:
    """Read one field of a declared type; one word out of a few is checked by the class itself."""
    if kind is str or get_origin(kind) is Literal:
        return reader.string(name)
    if kind is bool:
        return reader.boolean(name)
    if kind is int:
        return reader.integer(name)
    if kind is float:
        number = reader.number(name)
        return None if number is None else float(number)
    if get_origin(kind) is tuple:
        return _read_tuple(reader, name, get_args(kind))
    part = reader.nested(name)
    if part is None:
        return None
    value = _read(part, kind)
    reader.absorb(part)
    return value


def _read_tuple(reader: Reader, name: str, kinds: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Read a list with one declared type for each item, or with one for any number of them (``kind, ...``)."""
    values = reader.sequence(name)
    if values is None:
        return None
    if kinds[-1] is ...:
        kinds = kinds[:1] * len(values)
    elif len(values) != len(kinds):
        return reader.problem(name, f"a list of {len(kinds)}")
    items = Reader({f"{name}[{i}]": value for i, value in enumerate(values)}, prefix=reader.prefix)
    read = [_read_field(items, item, kind) for item, kind in zip(items.data, kinds, strict=True)]
    reader.absorb(items)
    return None if any(value is None for value in read) else tuple(read)
