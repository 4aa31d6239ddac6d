"""Write the golden curve, tests/train/golden: 100 losses, and how far rounding alone takes them apart.

Run ``make golden`` after a change that is meant to move them, and commit the files on their own, with the reason. One
thread; about two minutes.
"""

from __future__ import annotations

import json
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

from dsv4.testing import golden

TARGET = Path(__file__).parents[1] / "tests" / "train" / "golden"
NUDGES = (1, 2, 3, 4, 5)


def main() -> None:
    """Train once for the curve, twice for proof that it is one, and with nudged parameters for the spread."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        curve = golden.run_curve(folder / "first")
        if golden.run_curve(folder / "second") != curve:
            raise SystemExit("two runs differ: the curve would be golden by chance")
        spread: dict[str, list[float]] = {}
        for seed in NUDGES:
            away = golden.distances(curve, golden.run_curve(folder / f"nudged-{seed}", nudge=seed))
            spread = {name: [*map(max, spread.get(name, values), values)] for name, values in away.items()}
        data = golden.data_sha256(folder / "first")
    manifest = {
        "script": "bench/golden_curve.py",
        "date": date.today().isoformat(),
        **golden.machine(),
        "numpy": version("numpy"),
        "tokenizers": version("tokenizers"),
        "threads": 1,
        "backend": "portable",
        "seed": golden.recipe()["seed"],
        "data_sha256": data,
        "recipe": golden.recipe(),
        "nudges": list(NUDGES),
    }
    TARGET.mkdir(exist_ok=True)
    for name, content in (("manifest", manifest), ("curve", curve), ("spread", spread)):
        (TARGET / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
