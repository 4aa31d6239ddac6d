"""The speed table of docs/training.md is the committed result of the benchmark."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
RESULT = json.loads((ROOT / "bench" / "results" / "train_cpu.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("name", "form"), [
    ("tokens_per_s", "| {:,.0f} |"), ("transformers_tokens_per_s", "| {:,.0f} in"), ("peak_gb", "| {:.2f} GB,"),
    ("transformers_peak_gb", "in {:.2f} GB |"),
])  # fmt: skip
def test_numbers_are_the_result(name, form):
    assert form.format(RESULT[name]) in TEXT


@pytest.mark.parametrize(("name", "form"), [
    ("utilisation", "| {:.1f} % |"), ("newton_schulz_share", "| {:.1f} % of the step |"),
    ("optimizer_share", "| {:.1f} % |"), ("loader_share", "| {:.2f} % |"), ("memory_growth", " {:.1f} % |"),
])  # fmt: skip
def test_shares_are_the_result(name, form):
    assert form.format(100 * RESULT[name]) in TEXT


def test_marks():
    assert RESULT["utilisation"] >= 0.20
    assert RESULT["newton_schulz_share"] < 0.15
    assert RESULT["date"] in TEXT
