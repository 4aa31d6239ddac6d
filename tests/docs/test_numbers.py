"""docs/numbers.md is what the configs say today."""

import subprocess
import sys
from pathlib import Path

import dsv4

ROOT = Path(dsv4.__file__).parent.parent


def test_numbers_are_current():
    command = [sys.executable, "bench/model_numbers.py"]
    environment = {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=environment)
    assert (ROOT / "docs" / "numbers.md").read_text(encoding="utf-8") == result.stdout, "run: make numbers"
