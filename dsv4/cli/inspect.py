"""``dsv4 inspect``: sizes and costs of a model, from its config alone."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from dsv4.accounting.cache import CACHE_FORMATS
from dsv4.accounting.summary import Summary, summarize
from dsv4.cli.format import decimal, gibibytes, gigabytes, tokens
from dsv4.config.load import load_config, to_released
from dsv4.config.model import ModelConfig

CONTEXTS = (4096, 65536, 1048576)  # those a model reaches are shown

CACHE_NOTES = {
    "float32": "every channel F32",
    "bfloat16": "every channel BF16",
    "packed": "FP8 rows with BF16 rotary channels, FP4 indexer keys",
    "packed-fp8": "the same rows, FP8 indexer keys",
}


def inspect(
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")],
    context: Annotated[int | None, tyro.conf.arg(metavar="TOKENS")] = None,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Print sizes and costs of a model: parameters, checkpoint, FLOPs, cache and training memory.

    Args:
        model: a preset (flash, pro, flash-base, pro-base, mini, nano, smoke), a checkpoint directory, or a config .json
            file.
        context: the one length to account for; without it 4K to train, and 4K, 64K and 1M to prefill and decode, as
            far as the model goes.
        as_json: print one JSON object instead of tables.
    """
    config = load_config(model)
    contexts = _contexts(config, context)
    summary = summarize(config, contexts)
    if as_json:
        print(json.dumps({"config": to_released(config), "summary": to_json(summary)}, indent=2))
        return
    console = Console(highlight=False)
    console.print(f"{model}: {_identity(config, summary)}\n", soft_wrap=True, markup=False)
    for table in (_parameters(summary), _flops(summary), _cache(summary), _training(summary)):
        console.print(table)


def to_json(summary: Summary) -> dict[str, object]:
    """Turn a summary into plain JSON values, sums included."""
    result = dataclasses.asdict(summary)
    result["parameters"] |= {
        "main": dataclasses.asdict(summary.parameters.main),
        "with_mtp": dataclasses.asdict(summary.parameters.with_mtp),
    }
    result["training_memory"]["total_bytes"] = summary.training_memory.total_bytes
    return result


def _contexts(config: ModelConfig, context: int | None) -> tuple[int, ...]:
    if context is None:
        return tuple(length for length in CONTEXTS if length <= config.max_context) or (config.max_context,)
    if not 1 <= context <= config.max_context:
        raise ValueError(f"--context is {context}; expected 1 to {config.max_context}, the model's longest context")
    return (context,)


def _identity(config: ModelConfig, summary: Summary) -> str:
    counts = ", ".join(
        f"{count} {kind if kind == 'window' else kind.upper()}" for kind, count in summary.layers.items()
    )
    mtp = f", {summary.mtp_blocks} MTP block" if summary.mtp_blocks else ""
    hashed = f"; the first {summary.hash_layers} routed by token id" if summary.hash_layers else ""
    checkpoint = summary.checkpoint
    return (
        f"DeepSeek-V4, hidden size {config.hidden_size:,}, vocabulary {config.vocab_size:,}, "
        f"context {tokens(config.max_context)}\n"
        f"layers      {config.num_layers}: {counts}{mtp}{hashed}\n"
        f"pattern     {summary.pattern}\n"
        f"checkpoint  {checkpoint.tensors:,} tensors, {checkpoint.total_bytes:,} bytes "
        f"({gigabytes(checkpoint.total_bytes)}) in {checkpoint.shards} files, stored as {config.storage}\n"
        f"dtypes      {', '.join(f'{count:,} {dtype}' for dtype, count in checkpoint.tensors_by_dtype.items())}"
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def _parameters(summary: Summary) -> Table:
    table = _table("Parameters", "kind", "total", "", "used by a token", "")
    counts = summary.parameters
    rows = [(kind.replace("_", " "), count) for kind, count in counts.by_kind.items()]
    for name, count in sorted(rows, key=lambda row: -row[1].total):
        table.add_row(name, f"{count.total:,}", decimal(count.total), f"{count.activated:,}", decimal(count.activated))
    table.add_section()
    for name, count in (("main model", counts.main), ("MTP block", counts.mtp), ("with MTP", counts.with_mtp)):
        table.add_row(name, f"{count.total:,}", decimal(count.total), f"{count.activated:,}", decimal(count.activated))
    return table


def _flops(summary: Summary) -> Table:
    works = {f"decode at {tokens(at.context)}": at.decode for at in summary.at_context}
    works |= {f"prefill of {tokens(at.context)}": at.prefill for at in summary.at_context}
    works[f"train on {tokens(summary.training_tokens)}"] = summary.training
    size, unit = (1e9, "GFLOP") if max(work.flops for work in works.values()) >= 1e9 else (1e6, "MFLOP")
    table = _table(f"{unit} per token", "", "all", "FP8-equiv.", "matrices", "attention", "indexer")
    for name, work in works.items():
        attention, indexer = work.by_kind["attention"], work.by_kind.get("indexer", 0)
        rest = work.flops - attention - indexer
        values = (work.flops, work.fp8_equivalent, rest, attention, indexer)
        table.add_row(name, *(f"{value / size:,.2f}" for value in values))
    return table


def _cache(summary: Summary) -> Table:
    contexts = [f"at {tokens(at.context)}" for at in summary.at_context]
    table = _table("Key-value cache of one sequence", "format", "B/token", "fixed", *contexts)
    for form in CACHE_FORMATS:
        table.add_row(
            form,
            f"{summary.cache_bytes_per_token[form]:,.0f}",
            gibibytes(summary.cache_state_bytes[form]),
            *(gibibytes(at.cache_bytes[form]) for at in summary.at_context),
        )
    table.caption = "\n".join(f"{form}: {note}" for form, note in CACHE_NOTES.items())
    table.caption_justify = "left"
    return table


def _training(summary: Summary) -> Table:
    memory = summary.training_memory
    table = _table("Training memory", "what", "bytes", "")
    rows = {
        "weights, BF16 and F32": memory.weights_bytes,
        "master weights, F32": memory.master_bytes,
        "gradients, F32": memory.gradient_bytes,
        "Muon momentum, F32": memory.muon_bytes,
        "AdamW moments, F32": memory.adamw_bytes,
        f"activations of {tokens(summary.training_tokens)} tokens, BF16": summary.activation_bytes,
    }
    for name, value in rows.items():
        table.add_row(name, f"{value:,}", gibibytes(value))
    return table
