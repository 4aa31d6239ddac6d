"""A small corpus, and a finished run of the tiny recipe over it that was never stopped."""

import pytest

from dsv4.checkpoint.save import save_model
from dsv4.testing.tiny_run import tiny, tiny_trainer, write_corpus
from dsv4.train.setup import finish


@pytest.fixture(autouse=True)
def _no_measuring(monkeypatch):
    """The machine's matrix-product rate takes half a second to measure, and decides nothing."""
    monkeypatch.setattr("dsv4.train.loop.matmul_rate", lambda dtype, device: 1e10)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "texts")


@pytest.fixture(scope="session")
def reference(corpus, tmp_path_factory):
    """The run's folder; copy it before changing anything."""
    run = tmp_path_factory.mktemp("reference") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dsv4.train.loop.matmul_rate", lambda dtype, device: 1e10)
        trainer = tiny_trainer(tiny(corpus), run)
        trainer.train()
        finish(trainer.parts, save_model)
    return run
