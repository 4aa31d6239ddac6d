"""The table of docs/engine.md on models larger than memory is the committed result."""

import json
from pathlib import Path

import pytest

import dsv4

ROOT = Path(dsv4.__file__).parent.parent
TEXT = (ROOT / "docs" / "engine.md").read_text(encoding="utf-8")
RESULT = json.loads((ROOT / "bench" / "results" / "larger_than_memory.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", RESULT["cases"], ids=lambda c: f"{c['weights']} {c['limit_gib']} {c['pool_gib']}")
def test_the_table_is_the_result(case):
    limit, pool = (f"{x:g} GiB" if x else "-" for x in (case["limit_gib"], case["pool_gib"]))
    row = f"| {case['weights']} | {limit} | {pool} |"
    result = case["result"]
    if result is None:
        assert f"{row} killed |" in TEXT
        return
    row += f" {result['prefill_tokens_per_s']:,.0f} | {result['decode_tokens_per_s']:.1f} |"
    row += f" {result['resident_memory_bytes'] / 2**30:.2f} GiB |"
    if case["pool_gib"]:
        share = result["expert_hits"] / (result["expert_hits"] + result["expert_misses"])
        row += f" {share:.0%} | {result['expert_bytes_per_token'] / 1e6:.1f} MB |"
        assert result["expert_pool_bytes"] <= case["pool_gib"] * 2**30
    assert row in TEXT


def test_a_checkpoint_that_does_not_fit_ran_in_less():
    limit = max(case["limit_gib"] for case in RESULT["cases"] if case["limit_gib"]) * 2**30
    assert RESULT["checkpoint_bytes"] > 3 * limit
    killed = [case for case in RESULT["cases"] if case["result"] is None]
    assert [(case["weights"], case["pool_gib"]) for case in killed] == [("memory", None)]


def test_size_lengths_machine_and_date_are_named():
    for part in (
        f"{RESULT['checkpoint_bytes'] / 1e9:.2f} GB", f"{RESULT['prompt_tokens']:,} tokens",
        f"{RESULT['output_tokens']} of output", RESULT["machine"], RESULT["date"],
    ):  # fmt: skip
        assert part in TEXT
