"""Train a model elsewhere and on the CPU, let both write, and print all of it.

    python -m tests.elsewhere.whole LIBRARY FOLDER

The CPU computes for both of them, so that all numbers are the same.
"""

import json
import sys
from pathlib import Path

import torch

import dsv4
from dsv4 import device, native
from dsv4.cli.main import main
from dsv4.config.engine import Limits
from dsv4.config.sampling import Sampling
from dsv4.engine.engine import Engine
from dsv4.testing.tiny_run import MEASURED, shortest, write_corpus, write_recipe
from dsv4.train import loop
from dsv4.train.metrics import read
from tests.elsewhere.place import register

PROMPTS = [[0, 3, 4], [0, *range(2, 150)]]


def train(recipe, run):
    """Records of a run, and what its model writes."""
    assert main(["train", str(recipe), "--run", str(run)]) == 0
    model = dsv4.load_model(run / "model").to(device.best())
    engine = Engine(model, Limits(cache_bytes=2**22))
    answers = engine.generate(PROMPTS, Sampling(max_tokens=20, temperature=0, ignore_eos=True))
    records = [{k: v for k, v in r.items() if k not in MEASURED} for r in read(run / "metrics.jsonl")]
    return {"device": str(engine.runner.device), "records": records, "tokens": [one.token_ids for one in answers]}


def both(library, folder):
    torch.set_num_threads(1)
    native.available = lambda: False  # the portable path on the CPU, too
    loop.matmul_rate = lambda dtype, device: 1e10
    recipe = write_recipe(folder / "recipe.toml", shortest(write_corpus(folder / "corpus")))
    register(library)
    found = [train(recipe, folder / "elsewhere")]
    device.accelerator = lambda: None
    found.append(train(recipe, folder / "here"))
    print(json.dumps(found))


if __name__ == "__main__":
    both(*map(Path, sys.argv[1:]))
