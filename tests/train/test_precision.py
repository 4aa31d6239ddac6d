"""Phases in FP8 and FP4: switched on and off within a run, resumed to the bit, checked before training."""

from dataclasses import replace

import pytest
import torch

from dsv4.checkpoint.training import list_checkpoints
from dsv4.config.fit import check_against_model
from dsv4.config.load import save_config
from dsv4.config.presets import smoke
from dsv4.config.train import Phase
from dsv4.model.precision import is_packed, rounds_weights
from dsv4.testing.tiny_run import contents, records_of, shortest, tiny_trainer
from dsv4.train.metrics import read

PHASES = (
    Phase(name="plain", tokens=192, sequence=48, attention="dense"),
    Phase(name="warm-up", tokens=192, sequence=64, attention="dense", train="indexer"),
    Phase(name="fp8", tokens=384, sequence=96, attention="sparse", precision="fp8"),
    Phase(name="fp4", tokens=576, sequence=96, attention="sparse", precision="fp4"),
    Phase(name="off", tokens=192, sequence=96, attention="sparse"),
)


@pytest.fixture(scope="module")
def recipe(corpus, tmp_path_factory):
    """A run through every precision, of a model whose sizes FP4 divides."""
    path = tmp_path_factory.mktemp("precision") / "model.json"
    save_config(replace(smoke(), hidden_size=96, moe=replace(smoke().moe, expert_dim=64)), path)
    return replace(shortest(corpus), model=str(path), phases=PHASES)


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """That run, on one thread as tests have it, and what it told."""
    torch.set_num_threads(1)
    path, seen = tmp_path_factory.mktemp("whole") / "run", Seen()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dsv4.train.loop.matmul_rate", lambda dtype, device: 1e10)
        seen.trainer = tiny_trainer(recipe, path, seen.tell)
        seen.trainer.train()
    return path, seen


class Seen:
    """What the model rounded when each step had been told, and the losses."""

    def __init__(self):
        self.trainer, self.rounds, self.losses = None, {}, {}

    def tell(self, record):
        if record["kind"] == "step":
            model = self.trainer.model
            self.rounds[record["step"]] = rounds_weights(model), model.rounds, model.layers[0].ffn.experts.rounds
            self.losses[record["step"]] = record["loss"]


def test_a_run_through_every_precision(whole):
    path, seen = whole
    plain, fp8, fp4 = (False, False, None), (True, False, "fp8"), (True, True, "fp4")
    assert list(seen.rounds.values()) == [plain, plain, fp8, fp8, fp4, fp4, fp4, plain]
    assert not is_packed(seen.trainer.model)
    assert all(0 < loss < 8 for loss in seen.losses.values())
    (last,) = [record for record in read(path / "metrics.jsonl") if record["kind"] == "end"]
    assert last["bits_per_byte"] > 0


@pytest.mark.parametrize("step", [3, 5, 6])
def test_a_run_resumed_in_any_precision_is_the_same(recipe, whole, tmp_path, step):
    (whole, _), again = whole, tmp_path / "again"

    class StoppedError(Exception):
        pass

    def stop(record):
        if (record["kind"], record.get("step")) == ("checkpoint", step):
            raise StoppedError

    with pytest.raises(StoppedError):
        tiny_trainer(recipe, again, stop).train()
    trainer = tiny_trainer(recipe, again, lambda record: None)
    trainer.resume(list_checkpoints(again / "checkpoints")[-1].path)
    trainer.train()
    assert records_of(whole) == records_of(again)
    last, same = (list_checkpoints(run / "checkpoints")[-1] for run in (whole, again))
    assert contents(last.path) == contents(same.path)


def test_sizes_that_fp4_does_not_divide_are_named(corpus):
    config = replace(shortest(corpus), phases=PHASES)
    with pytest.raises(ValueError, match=r"phase fp4: precision is 'fp4', and .*FP4 scale group") as error:
        check_against_model(config, smoke())
    assert "phase fp8" not in str(error.value)
