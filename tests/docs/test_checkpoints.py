"""The tables of docs/checkpoints.md are the committed results."""

import json
import statistics
from pathlib import Path

import dsv4

ROOT = Path(dsv4.__file__).parent.parent
TEXT = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
RESULTS = ROOT / "bench" / "results"


def test_the_table_of_codes_is_the_result():
    result = json.loads((RESULTS / "released_cpu.json").read_text(encoding="utf-8"))
    for count in ("1", "8"):
        plain, coded = (statistics.median(result["rates"][name][count]) for name in ("bfloat16", "released"))
        assert f"| {count} | {plain:,.1f} | {coded:,.1f} | {result['ratios'][count]:.2f} |" in TEXT
        assert result["ratios"][count] > 1
    assert result["date"] in TEXT
    assert result["machine"] in TEXT


def test_the_table_of_layers_is_the_result():
    result = json.loads((RESULTS / "flash_layers.json").read_text(encoding="utf-8"))
    sizes = (result[name] / 1e9 for name in ("file_bytes", "held_bytes", "load_peak_bytes", "peak_bytes"))
    rates = result["prefill_tokens_per_s"], result["decode_tokens_per_s"]
    cells = [*(f"{size:.2f} GB" for size in sizes), *(f"{rate:,.1f}" for rate in rates)]
    assert f"| {' | '.join(cells)} |" in TEXT
    assert result["peak_bytes"] < 24e9
    assert result["date"] in TEXT
