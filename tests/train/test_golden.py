"""The golden curve. If it moved and was meant to: ``make golden``, and a commit of its own that says why."""

import json
from pathlib import Path

import numpy as np
import pytest

from dsv4.config.toml import from_dict
from dsv4.testing import golden

FILES = Path(__file__).parent / "golden"
MANIFEST, CURVE, SPREAD = (json.loads((FILES / f"{name}.json").read_text()) for name in ("manifest", "curve", "spread"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden") / "folder"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dsv4.train.loop.matmul_rate", lambda dtype, device: 1e10)
        return golden.run_curve(folder), folder


def test_the_recipe_is_that_of_the_curve():
    """As a recipe that is read: a field that came later has its default there."""
    assert from_dict(MANIFEST["recipe"]) == golden.golden(Path("texts")), "the recipe changed: make golden"


def test_the_data_are_those_of_the_curve(trained):
    """Anywhere: corpus and tokenizer do not depend on the machine."""
    assert golden.data_sha256(trained[1]) == MANIFEST["data_sha256"], "other tokens: every loss would differ"


def test_the_curve(trained):
    """To the bit on a machine like the manifest's, within rounding on others."""
    curve = trained[0]
    assert [len(values) for values in curve.values()] == [golden.STEPS] * 2
    if golden.machine().items() <= MANIFEST.items():
        assert curve == CURVE
    assert_close(curve)


def assert_close(curve):
    for name, away in golden.distances(curve, CURVE).items():
        allowed = golden.tolerance(SPREAD[name])
        worst = int(np.argmax(away - allowed))
        assert (away <= allowed).all(), (
            f"{name} of step {worst + 1} is {curve[name][worst]}; expected {CURVE[name][worst]}, "
            f"{allowed[worst]:.2g} more or less"
        )


def test_the_curve_falls_and_the_tolerance_is_small_beside_it():
    """A tolerance that a wrong learning rate or a missing term would fit into would be none."""
    losses = CURVE["loss"]
    assert losses[-1] < losses[0] - 1.5
    for name, values in CURVE.items():
        assert golden.tolerance(SPREAD[name])[-1] < np.abs(np.diff(values)).mean() / 2, name
