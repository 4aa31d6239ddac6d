"""The tables of docs/speed.md are the committed results of the benchmark."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
RESULTS = json.loads((ROOT / "bench" / "results" / "model_cpu.json").read_text(encoding="utf-8"))


def rows_with(tokens: int) -> list[str]:
    return [line for line in TEXT.splitlines() if line.startswith("|") and f"| {tokens:,} |" in line]


# transformers with kept memory is quoted in prose, for one size.
TABLED = [case for case in RESULTS["cases"] if case["engine"] == "dsv4" or not case["keeps_memory"]]


@pytest.mark.parametrize("case", TABLED, ids=lambda c: f"{c['engine']}-{c['task']}-{c['dtype']}-{c['tokens']}")
def test_speed_and_memory_of_every_case_are_quoted(case):
    quoted = f"{case['tokens_per_s']:,.0f}"
    row = next(row for row in rows_with_task(case["task"], case["tokens"]) if quoted in row)
    assert f"{case['peak_gb']:.2f} GB" in row
    if case["engine"] == "dsv4":
        assert f"{quoted} at {case['utilisation']:.0%}".replace("%", " %") in row
        assert f" {case['times_the_last']:.1f} |" in row


def rows_with_task(task: str, tokens: int) -> list[str]:
    word = {"train": "| forward and backward |", "prefill": "| cached prefill |"}[task]
    return [line for line in TEXT.splitlines() if line.startswith(f"{word} {tokens:,} |")]


@pytest.mark.parametrize("case", RESULTS["flat"], ids=lambda c: f"{c['dtype']}-{c['tokens']}")
def test_the_flat_table_is_the_result(case):
    assert any(f" {case['tokens_per_s']:,.0f} |" in row for row in rows_with(case["tokens"]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_shares_are_the_result(dtype):
    for part in RESULTS["shares"][dtype].values():
        assert f" {part:.0%} |".replace("%", " %") in TEXT


def test_machine_and_date_are_named():
    assert RESULTS["date"] in TEXT
    assert RESULTS["machine"].split(",")[0].split()[0] in TEXT
