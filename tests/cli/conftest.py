"""A finished run of the shortest recipe, made by the command, and the recipe as a file."""

import pytest

from dsv4.cli.main import main
from dsv4.testing.tiny_run import shortest, write_corpus, write_recipe
from dsv4.train.loop import Trainer


@pytest.fixture
def in_process(monkeypatch):
    """Leave the process of the tests as it is, use its CPU, and do not measure the machine."""
    _leave_alone(monkeypatch)


def _leave_alone(patch):
    patch.setattr("dsv4.cli.process.keep_freed_memory", lambda: False)
    patch.setattr("dsv4.device.accelerator", lambda: None)
    patch.setattr("dsv4.train.loop.matmul_rate", lambda dtype, device: 1e10)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "texts")


@pytest.fixture(scope="session")
def recipe(corpus, tmp_path_factory):
    return str(write_recipe(tmp_path_factory.mktemp("recipe") / "shortest.toml", shortest(corpus)))


@pytest.fixture(scope="session")
def finished(recipe, tmp_path_factory):
    """The folder of a run that went through; copy it before changing anything."""
    run = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        _leave_alone(patch)
        assert main(["train", recipe, "--run", str(run)]) == 0
    return run


@pytest.fixture
def untrained(monkeypatch):
    """Runs that get as far as their first step count as trained: their trainers."""
    done = []
    monkeypatch.setattr(Trainer, "train", lambda trainer: done.append(trainer))
    return done


@pytest.fixture
def fails(capsys):
    """What ``dsv4 train`` says when it fails by the user's mistake: one error, no traceback."""

    def run(*arguments):
        capsys.readouterr()
        assert main(["train", *map(str, arguments)]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("error: ")
        return captured.err.removeprefix("error: ").rstrip("\n")

    return run
