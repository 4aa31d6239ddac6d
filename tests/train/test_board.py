"""TensorBoard: the events of a run are the records of its log, also after it was stopped and went on."""

import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dsv4.testing.tiny_run import read
from dsv4.train.board import Board, require_tensorboard


def events(directory):
    accumulator = EventAccumulator(str(directory), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def curve(directory, tag):
    """Step to value; TensorBoard keeps float32."""
    return {point.step: point.value for point in events(directory).Scalars(tag)}


def test_every_number_of_a_step_is_a_curve(reference, tmp_path):
    records = read(reference / "metrics.jsonl")
    board = Board(tmp_path, step=0)
    for record in records:
        board.write(record)
    steps = [record for record in records if record["kind"] == "step"]
    assert curve(tmp_path, "step/loss") == pytest.approx({r["step"]: r["loss"] for r in steps})
    with_kl = {r["step"]: r["indexer_kl"] for r in steps if r["indexer_kl"] is not None}
    assert curve(tmp_path, "step/indexer_kl") == pytest.approx(with_kl)
    assert curve(tmp_path, "step/expert_load/1") == pytest.approx({r["step"]: r["expert_load"][1] for r in steps})
    validations = {r["step"]: r["bits_per_byte"] for r in records if r["kind"] == "validation"}
    assert curve(tmp_path, "validation/bits_per_byte") == pytest.approx(validations)


def test_what_is_undone_is_hidden(tmp_path):
    def step(number, loss):
        return {"kind": "step", "step": number, "tokens": 8 * number, "phase": "dense", "loss": loss}

    board = Board(tmp_path, step=0)
    for number in (1, 2, 3):
        board.write(step(number, float(number)))
    board.write({"kind": "rollback", "step": 1, "from_step": 3})
    board.write(step(2, 20.0))
    assert curve(tmp_path, "step/loss") == {1: 1.0, 2: 20.0}
    resumed = Board(tmp_path, step=1)  # another process, from the checkpoint of step 1
    resumed.write(step(2, 30.0))
    assert curve(tmp_path, "step/loss") == {1: 1.0, 2: 30.0}


def test_a_sample_is_text(tmp_path):
    Board(tmp_path, step=0).write({"kind": "sample", "step": 5, "prompt": "def ", "text": "f(x):"})
    (tensor,) = events(tmp_path).Tensors("sample/text_summary")
    assert tensor.tensor_proto.string_val == [b"def f(x):"]


def test_without_the_extra_its_name_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # as if it were not there
    with pytest.raises(ValueError, match=r"run.tensorboard is true, .* pip install 'dsv4\[tensorboard\]'"):
        require_tensorboard()
