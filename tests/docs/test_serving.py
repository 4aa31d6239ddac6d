"""The table of docs/serving.md is the committed result, and what it links to and runs is there."""

import json
import re
from pathlib import Path

import pytest

from dsv4.cli.main import VERBS

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
RESULT = json.loads((ROOT / "bench" / "results" / "serve_cpu.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", RESULT["cases"], ids=lambda case: f"{case['streams']} streams")
def test_the_table_is_the_result(case):
    engine, server = case["engine"], case["server"]
    cells = [
        str(case["streams"]),
        *(f"{case[way]:.2f}" for way in ("to_engine_ms", "first_token_back_ms")),
        *(f"{side['first_token_ms']:,.1f}" for side in (engine, server)),
        *(f"{side['token_ms']:.2f}" for side in (engine, server)),
        *(f"{side['tokens_per_second']:,.1f}" for side in (engine, server)),
        f"{case['throughput_ratio']:.3f} \u00b1 {case['throughput_ratio_error']:.3f}",
    ]
    assert f"| {' | '.join(cells)} |" in TEXT
    assert RESULT["date"] in TEXT


def test_every_file_that_is_linked_is_there():
    for link in re.findall(r"\]\((\.\./[^)]+|[a-z]+\.md)\)", TEXT):
        assert (ROOT / "docs" / link).exists(), link


def test_every_command_is_one():
    for verb in re.findall(r"dsv4 (\w+)", TEXT):
        assert verb in VERBS
