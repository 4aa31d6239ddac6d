"""The recall table of docs/training.md is the committed result of the benchmark, and shows what the text says."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
RESULT = json.loads((ROOT / "bench" / "results" / "recall.json").read_text(encoding="utf-8"))
ACCURACY = {run["kind"]: run["accuracy"] for run in RESULT["runs"]}
DISTANCES = ("64", "128", "256", "512", "1024", "2048", "4096", "8192")


@pytest.mark.parametrize(("kind", "name"), [("sparse", "two CSA layers"), ("window", "two window layers")])
def test_the_table_is_the_result(kind, name):
    row = " | ".join(f"{100 * ACCURACY[kind][distance]:.1f} %" for distance in DISTANCES)
    assert f"| {name} | {row} |" in TEXT


def test_machine_and_date_are_named():
    assert f"{RESULT['machine']}, {RESULT['date']}" in TEXT


@pytest.mark.parametrize("distance", DISTANCES)
def test_the_sparse_model_recalls_and_windows_do_not(distance):
    assert ACCURACY["sparse"][distance] > 0.95
    assert ACCURACY["window"][distance] < 0.1


def test_both_had_the_same_budget():
    assert len({run["tokens"] for run in RESULT["runs"]}) == 1
