"""The Python of docs/engine.md runs, on a small model in the place of the demo's; its table is the committed result."""

import json
import re
from pathlib import Path

import pytest

import dsv4
from dsv4.config.presets import smoke
from dsv4.model.init import new_model

ROOT = Path(dsv4.__file__).parent.parent
TEXT = (ROOT / "docs" / "engine.md").read_text(encoding="utf-8")


def test_the_python_block_runs(monkeypatch, capsys):
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    asked = []

    def load_model(path):
        asked.append(path)
        return new_model(smoke()).requires_grad_(False)

    monkeypatch.setattr(dsv4, "load_model", load_model, raising=False)
    exec(compile(block, "docs/engine.md", "exec"), {})
    assert asked == ["runs/demo/model"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all(line.split()[0] in ("stop", "length") for line in lines)


RESULT = json.loads((ROOT / "bench" / "results" / "engine_cpu.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", RESULT["cases"], ids=lambda c: f"{c['prompt_tokens']} x {c['concurrency']}")
def test_the_table_is_the_result(case):
    speeds = f"{case['prefill_tokens_per_s']:,.0f} | {case['decode_tokens_per_s']:,.1f}"
    memory = f"{case['peak_memory_bytes'] / 2**30:.2f} GiB"
    assert f"| {case['prompt_tokens']:,} | {case['concurrency']} | {speeds} | {memory} |" in TEXT
    assert case["cache_used_bytes"] == case["cache_predicted_bytes"]


CONTEXT = json.loads((ROOT / "bench" / "results" / "context_cpu.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("at", CONTEXT["lengths"], ids=lambda at: str(at["length"]))
def test_the_table_of_lengths_is_the_result(at):
    dense = next((d for d in CONTEXT["dense"] if d["length"] == at["length"]), None)
    names = ("prompt_tokens_per_s", "decode_tokens_per_s")
    cells = [f"{found[name]:,.0f}" if found else "-" for found in (at, dense) for name in names]
    memory = f"{at['cache_used_bytes'] / 2**20:,.1f} MiB"
    assert f"| {at['length']:,} | {' | '.join(cells)} | {memory} |" in TEXT
    assert at["cache_used_bytes"] == at["cache_predicted_bytes"]
    assert at["resident_bytes"] < 24 * 2**30


def test_machine_and_date_are_named():
    for result in (RESULT, CONTEXT):
        assert result["machine"] in TEXT
        assert result["date"] in TEXT
