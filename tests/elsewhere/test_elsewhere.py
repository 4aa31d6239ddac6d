"""The portable path on a device that nothing in the package knows: operations, a whole run, an engine."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.elsewhere.place import build, compiler

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler here")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("elsewhere") / "device.so"
    build(path)
    return path


def python(library, *arguments):
    environment = {**os.environ, "ELSEWHERE": str(library), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


def test_the_tests_of_all_portable_operations(library):
    """Those of this suite, with tensors made elsewhere: an operation that makes one on the CPU beside them fails."""
    suite = ("-m", "pytest", "-p", "tests.elsewhere.plugin", "-p", "no:cacheprovider")
    told = python(library, *suite, "-k", "portable and not native and not triton", "tests/ops", "tests/model")
    assert int(re.findall(r"(\d+) passed", told)[-1]) > 600


def test_a_run_and_what_its_model_writes(library, tmp_path):
    """``dsv4 train`` finds the device by itself, through every kind of phase; an engine goes on with its model.

    Sums of the CPU may run in another order, for its operations get copies without gaps.
    """
    there, here = json.loads(python(library, "-m", "tests.elsewhere.whole", library, tmp_path).splitlines()[-1])
    assert (there["device"], here["device"]) == ("elsewhere:0", "cpu")
    assert there["tokens"] == here["tokens"]
    assert [one["kind"] for one in there["records"]] == [one["kind"] for one in here["records"]]
    steps = [[one for one in side["records"] if one["kind"] == "step"] for side in (there, here)]
    assert len(steps[0]) == 5
    for elsewhere, own in zip(*steps, strict=True):
        assert elsewhere.keys() == own.keys()
        for name in ("loss", "grad_norm", "indexer_kl"):
            if name in own:
                assert elsewhere[name] == pytest.approx(own[name], rel=1e-5), name
    records = map(json.loads, (tmp_path / "elsewhere/metrics.jsonl").read_text().splitlines())
    memory = [one["memory_bytes"] for one in records if "memory_bytes" in one]
    assert all(10**6 < bytes < 10**8 for bytes in memory)  # what the device holds, not what the process does


def test_tensors_of_two_places_do_not_meet(library):
    told = python(
        library, "-c",
        "import sys, torch; from tests.elsewhere.place import register; register(sys.argv[1])\n"
        "assert torch.accelerator.current_accelerator().type == 'elsewhere'\n"
        "x = torch.ones(3, device='elsewhere')\n"
        "own = torch.ones(3)\n"
        "for meet in (lambda: torch.cat([x, own]), lambda: x + own, lambda: x[own > 0]):\n"
        "    try: meet()\n"
        "    except RuntimeError as error: print('refused', error)\n",
        library,
    )  # fmt: skip
    assert told.count("refused") == 2  # torch takes indices from the CPU
