"""A run read back: what a rollback undid is set apart, phases and switches are as the log has them."""

import dataclasses
import json
import random
import statistics

import pytest

from dsv4.config.recipes import smoke
from dsv4.testing.runs import SAMPLES, write_run
from dsv4.train.axes import Line, _averaged
from dsv4.train.history import read_history
from dsv4.train.metrics import read
from dsv4.train.words import count, duration, gibibytes, plural


@pytest.fixture
def change(tmp_path):
    """Write a run and change its records: ``change(edit, **options)`` returns the history."""

    def make(edit=lambda record: record, config=None, **options):
        write_run(tmp_path, config or smoke(), **options)
        path = tmp_path / "metrics.jsonl"
        path.write_text("".join(json.dumps(edit(record)) + "\n" for record in read(path)))
        return read_history(tmp_path)

    return make


def test_phases_follow_one_another(change):
    history = change()
    assert [span.phase.name for span in history.spans] == ["dense-64", "indexer-64", "sparse-64", "sparse-256"]
    assert sum(len(span.steps) for span in history.spans) == len(history.steps) == history.steps[-1]["step"]
    assert sum(span.tokens for span in history.spans) == history.tokens == history.end["tokens"]
    for span in history.spans:
        assert span.tokens == sum(step["batch_tokens"] for step in span.steps)
        assert {record["phase"] for record in (*span.steps, *span.validations)} == {span.phase.name}
    assert sum(len(span.validations) for span in history.spans) == len(history.validations)


def test_what_a_rollback_undid_is_set_apart(change):
    often = dataclasses.replace(smoke(), run=dataclasses.replace(smoke().run, validation_steps=2))
    history = change(config=often, spike_step=22)
    steps = [step["step"] for step in history.steps]
    assert steps == list(range(1, history.end["step"] + 1))
    (undone,) = history.undone
    back = history.rollbacks[0]["step"]
    assert [step["step"] for step in undone] == list(range(back + 1, 22))
    assert history.seconds == pytest.approx(sum(s["seconds"] for s in (*history.steps, *undone)))
    (spike,) = history.spikes
    assert (spike.step, spike.tokens, spike.loss_before) == (22, undone[-1]["tokens"], undone[-1]["loss"])
    measured = [record["step"] for record in history.validations]
    assert 20 in measured  # made, undone and made again
    assert len(set(measured)) == len(measured)
    assert [sample["step"] for sample in history.samples] == [step for step in measured for _ in SAMPLES]
    ((begin, stop),) = history.anticipatory
    routed = [step for step in history.steps if step["anticipatory"]]
    assert (begin, stop) == (routed[0]["tokens"] - routed[0]["batch_tokens"], routed[-1]["tokens"])


def test_the_jump_is_between_the_courses_of_both_sides(change):
    """Straight lines of different slopes, 0.4 nats apart at the switch, which lies between the steps 14 and 15."""

    def bend(record):
        if record["kind"] == "step":
            place = record["step"] - 14.5
            record["loss"] = 3.0 - 0.05 * place if place < 0 else 3.4 + 0.01 * place
        return record

    first = change(bend).switches[0]
    assert first.before.steps[-1]["step"] == 14
    assert first.jump == pytest.approx(0.4)
    assert first.course_before == pytest.approx((3.0, -0.05))
    assert first.course_after == pytest.approx((3.4, 0.01))
    assert first.scatter == pytest.approx(0, abs=1e-12)


def test_the_scatter_is_that_of_one_step_whatever_the_trend(change):
    noise = random.Random(5)

    def shake(record):
        if record["kind"] == "step":
            record["loss"] = 9.0 - 0.5 * record["step"] + noise.gauss(0, 0.1)
        return record

    scatters = [change(shake).switches[0].scatter for _ in range(20)]
    assert statistics.fmean(scatters) == pytest.approx(0.1, rel=0.15)  # 20 times 10 differences: 1 / sqrt(400) or so


def test_a_layer_that_did_not_run_has_no_load(change):
    history = change(num_layers=3)
    assert len(history.expert_loads) == 3
    for layer, loads in enumerate(history.expert_loads):
        ran = [step["phase"] != "indexer-64" or layer < 2 for step in history.steps]
        assert [load is not None for load in loads] == ran
    assert history.expert_loads[2][0] == history.steps[0]["expert_load"][2]


def test_one_step_after_a_switch_is_enough(change):
    history = change(max_steps=15)
    (switch,) = history.switches
    assert len(switch.after.steps) == 1
    assert switch.course_after == (switch.after.steps[0]["loss"], 0.0)


def test_an_average_lags_nowhere_and_keeps_gaps(change):
    (first, *_) = change(lambda r: {**r, "loss": 2.0 + 3.0 * r["step"]} if r["kind"] == "step" else r).spans
    straight = [2.0 + 3.0 * step["step"] for step in first.steps]
    assert _averaged(first, Line(lambda step: step["loss"], ""), half=4) == pytest.approx(straight)
    gaps = _averaged(first, Line(lambda step: None if step["step"] == 3 else 1.0, ""), half=2)
    assert [value == 1.0 for value in gaps] == [step["step"] != 3 for step in first.steps]
    spread = _averaged(first, Line(lambda step: float(step["step"] == 5), ""), half=2)
    assert spread[:8] == pytest.approx([0, 0, 0.2, 0.2, 0.2, 0.2, 0.2, 0])


@pytest.mark.parametrize("missing", ["config.json", "metrics.jsonl"])
def test_a_folder_without_its_files_is_named(tmp_path, missing):
    write_run(tmp_path, smoke(), max_steps=1)
    (tmp_path / missing).unlink()
    with pytest.raises(ValueError, match=f"run is {tmp_path}, which has no {missing}; expected the folder of a run"):
        read_history(tmp_path)


def test_a_run_without_a_step_is_named(tmp_path):
    write_run(tmp_path, smoke(), max_steps=0)
    with pytest.raises(ValueError, match=f"run is {tmp_path}, whose metrics.jsonl holds no step; expected at least"):
        read_history(tmp_path)


def test_a_damaged_recipe_is_named(tmp_path):
    write_run(tmp_path, smoke(), max_steps=1)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=f"{tmp_path / 'config.json'}: "):
        read_history(tmp_path)


def test_numbers_as_people_read_them():
    assert [count(n) for n in (7, 0.25, 999, 999.6, 1500, 16384, 999_700, 1.5e6, 32e12)] == [
        "7", "0.25", "999", "1 K", "1.5 K", "16.4 K", "1 M", "1.5 M", "32 T",
    ]  # fmt: skip
    assert [duration(s) for s in (0.3999, 59.4, 59.6, 75, 3599.7, 5000, 172_740, 172_799, 260_000)] == [
        "0.4 s", "59.4 s", "1 min 0 s", "1 min 15 s", "1 h 0 min", "1 h 23 min", "47 h 59 min", "2 d 0 h", "3 d 0 h",
    ]  # fmt: skip
    assert [gibibytes(n) for n in (2**20, 2**30, 1.5 * 2**30)] == ["1 MiB", "1.00 GiB", "1.50 GiB"]
    assert [plural(n, "step") for n in (0, 1, 2, 12345)] == ["0 steps", "1 step", "2 steps", "12,345 steps"]
