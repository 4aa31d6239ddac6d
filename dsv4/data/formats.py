"""The texts of one file: plain text is one, JSONL holds one a line, Parquet one a row. No torch.

Bytes that are not UTF-8 come as lone surrogates, so that the caller finds them as it finds those that JSON can
spell: ``text.encode()`` fails. Nothing is decoded twice and no format needs an error of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

PARQUET_ROWS = 256  # rows in memory at a time


def texts(path: Path, text_field: str) -> Iterator[tuple[str, str]]:
    """Yield (place, text) of a file: place is ``:row``, counted from 1, in JSONL and Parquet, and empty elsewhere.

    ``text_field`` names the field of a text in JSONL and Parquet; a ``ValueError`` names the file and the line that
    lacks it, or what else keeps the file from being read.
    """
    if path.suffix == ".jsonl":
        yield from _jsonl(path, text_field)
    elif path.suffix == ".parquet":
        yield from _parquet(path, text_field)
    else:
        yield "", _decoded(path.read_bytes())


def _decoded(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def _jsonl(path: Path, text_field: str) -> Iterator[tuple[str, str]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f":{number}", _field(f"{path}, line {number}", line, text_field)


def _field(where: str, line: bytes, text_field: str) -> str:
    try:
        record = json.loads(_decoded(line))
    except ValueError as error:
        raise ValueError(f"{where} is not JSON ({error}); expected an object a line") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where} is a {type(record).__name__}; expected an object with a field {text_field!r}")
    if text_field not in record:
        raise ValueError(f"{where} has the fields {list(record)}; expected data.text_field = {text_field!r} among them")
    text = record[text_field]
    if not isinstance(text, str):
        raise ValueError(f"{where}: field {text_field!r} is a {type(text).__name__}; expected a string")
    return text


def _parquet(path: Path, text_field: str) -> Iterator[tuple[str, str]]:
    try:
        pyarrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError as error:
        raise ValueError(f"{path} is Parquet, which needs pyarrow; expected pip install 'dsv4[parquet]'") from error
    try:
        table = parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from error
    with table:
        schema = table.schema_arrow
        if text_field not in schema.names:
            raise ValueError(f"{path} has the fields {schema.names}; expected data.text_field = {text_field!r} there")
        kind = schema.field(text_field).type
        if kind not in (pyarrow.string(), pyarrow.large_string()):
            raise ValueError(f"{path}: field {text_field!r} is a {kind}; expected a string")
        row = 0
        for batch in table.iter_batches(batch_size=PARQUET_ROWS, columns=[text_field]):
            # As bytes: Parquet does not promise that a string is UTF-8.
            for raw in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                row += 1
                if raw is None:
                    raise ValueError(f"{path}, row {row}: field {text_field!r} is null; expected a string")
                yield f":{row}", _decoded(raw)
