"""The tables of docs/quantisation.md are the committed result of ``make qat-study``, and what the text says holds."""

import json
import subprocess
import sys
from pathlib import Path
from statistics import stdev

import pytest

ROOT = Path(__file__).parents[2]
PATH = ROOT / "bench" / "results" / "qat_study.json"
RESULT = json.loads(PATH.read_text(encoding="utf-8"))
RUNS = RESULT["runs"]
TEXT = (ROOT / "docs" / "quantisation.md").read_text(encoding="utf-8")
each_seed = pytest.mark.parametrize("run", RUNS, ids=lambda run: f"seed {run['seed']}")


def bits(run, name):
    return run[name]["bits_per_byte"]


def curves(run):
    """The loss of each step, counted from the switch, of the plain continuation and of that in FP4."""
    return dict(run["curve"]["plain"]), dict(run["curve"]["qat"])


def test_the_tables_are_the_result():
    command = [sys.executable, "bench/qat_study.py", "--table", "--json", str(PATH)]
    environment = {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=environment)
    tables = result.stdout.strip().split("\n\n")
    assert len(tables) == 3
    for table in tables:
        assert f"\n\n{table}\n\n" in TEXT


def test_machine_date_and_time_are_named():
    assert f"{RESULT['machine']}, {RESULT['date']}, {RESULT['seconds'] / 60:.0f}\nminutes" in TEXT


def test_three_seeds_of_the_same_length():
    assert [run["seed"] for run in RUNS] == [0, 1, 2]
    (steps, after, tokens, queries), *others = {
        (r["steps"], r["steps_after_switch"], r["tokens"], r["recall"]["plain"]["queries"]) for r in RUNS
    }
    assert not others
    assert tokens == 2048 * steps
    assert f"{2048 * (steps - after) / 1000:.0f} K tokens" in TEXT
    assert f"{steps - after} steps of 2,048" in TEXT
    assert f"three continuations of {after} steps" in TEXT
    assert f"After {steps} steps" in TEXT
    assert f"{queries:,} queries" in TEXT


@each_seed
def test_both_continuations_begin_at_one_checkpoint(run):
    plain, qat = curves(run)
    assert [plain[step] for step in plain if step <= 0] == [qat[step] for step in qat if step <= 0]
    assert all(plain[step] != qat[step] for step in plain if step > 0)
    assert max(plain) == max(qat) == run["steps_after_switch"]


@each_seed
def test_rounding_costs_next_to_nothing_and_training_with_it_wins_nothing(run):
    spread = stdev(bits(r, "plain") for r in RUNS)
    assert 0 < bits(run, "rounded") - bits(run, "plain") < spread / 10
    assert 0 < bits(run, "rounded_fp8") - bits(run, "plain") < spread / 20
    assert abs(bits(run, "qat") - bits(run, "rounded")) < 0.0007
    assert abs(bits(run, "fp8") - bits(run, "rounded_fp8")) < 0.0003


@each_seed
def test_the_switch_is_lost_in_the_scatter(run):
    plain, qat = curves(run)
    moved = [qat[step] - plain[step] for step in plain if step > 0]
    scatter = stdev(loss for step, loss in plain.items() if -10 < step <= 0)
    assert max(map(abs, moved)) < 0.026
    assert 0.0025 < stdev(moved) < 0.0055
    assert 50 * stdev(moved) < scatter
    assert 0.27 <= round(scatter, 2) <= 1.51


@each_seed
def test_one_pick_in_twelve_or_thirteen_changes(run):
    plain, qat = run["recall"]["plain"], run["recall"]["qat"]
    for found in (plain, qat):
        assert 11.5 < 1 / (1 - found["mean"]) < 13.5
    assert all(0 < qat["layers"][layer] - plain["layers"][layer] < 0.004 for layer in plain["layers"])
    assert f"{plain['visible']:.0f} on average" in TEXT
    assert f"would reach {100 * plain['chance']:.0f} %" in TEXT
