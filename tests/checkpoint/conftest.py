"""A run's folder with two checkpoints, to read and to spoil."""

import shutil

import pytest
import torch

from dsv4.checkpoint.training import save_checkpoint
from dsv4.testing.toys import flash_like, toy_model


@pytest.fixture(scope="module")
def model():
    return toy_model(flash_like())


@pytest.fixture(scope="module")
def two(model, tmp_path_factory):
    """A run's folder with checkpoints of steps 100 and 120."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    for step in (100, 120):
        save_checkpoint(directory, step, model, {"momentum": torch.full((3, 7), step)}, {"step": step}, keep=2)
    return directory


@pytest.fixture
def run(two, tmp_path):
    """A copy of it, to spoil."""
    return shutil.copytree(two, tmp_path / "checkpoints")
