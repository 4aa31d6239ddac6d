"""The table of docs/ablations.md is the committed result, and what the text says of it holds."""

import json
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

import pytest

import dsv4

ROOT = Path(dsv4.__file__).parent.parent
PATH = ROOT / "bench" / "results" / "ablations.json"
RESULT = json.loads(PATH.read_text(encoding="utf-8"))
TEXT = (ROOT / "docs" / "ablations.md").read_text(encoding="utf-8")
VARIANTS = ("base", "adamw", "adamw-low", "adamw-high", "residual", "unconstrained", "dense")


def of(variant, name):
    return [run[name] for run in RESULT["runs"] if run["variant"] == variant]


def test_the_table_is_the_result():
    command = [sys.executable, "bench/ablations.py", "--table", "--json", str(PATH)]
    environment = {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=environment)
    assert result.stdout in TEXT


@pytest.mark.parametrize("variant", VARIANTS)
def test_three_seeds_each(variant):
    assert sorted(of(variant, "seed")) == [0, 1, 2]


def test_machine_and_date_are_named():
    assert f"{RESULT['machine']}, {RESULT['date']}" in TEXT


@pytest.mark.parametrize("variant", ["adamw", "adamw-low", "adamw-high"])
def test_muon_is_ahead_of_adamw_by_more_than_the_spread(variant):
    ours, theirs = of("base", "bits_per_byte"), of(variant, "bits_per_byte")
    assert mean(theirs) - mean(ours) > 2 * (stdev(ours) + stdev(theirs))


def test_constrained_mixes_neither_grow_nor_fade():
    assert all(abs(gain - 1) < 0.05 for gain in of("base", "gain"))
    assert min(of("unconstrained", "gain")) > max(of("base", "gain"))
