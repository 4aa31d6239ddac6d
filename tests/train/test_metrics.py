"""metrics.jsonl: what is written is what is read, torn ends are mended, damage is named, resuming takes back."""

import json

import pytest

from dsv4.config.recipes import smoke
from dsv4.testing.runs import write_run
from dsv4.train.metrics import FIELDS, MetricsLog, read, truncate

CHECKPOINT = {"kind": "checkpoint", "step": 3, "tokens": 1500, "path": "step-00000003"}


@pytest.fixture
def full(tmp_path):
    """The log of a whole run with a spike and a rollback, as its lines."""
    write_run(tmp_path, smoke(), spike_step=21, num_layers=3)
    return (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)


def test_records_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    sample = {"step": 2, "kind": "sample", "prompt": 'a "b"\n\u2028', "text": "</script>\0\ud800 \u00e9"}
    spike = {"kind": "spike", "deviation": 0.1 + 0.2, "loss": 1e300, "step": 7, "expected": 5e-324}
    for record in (CHECKPOINT, sample, spike):
        log.append(record)
    assert read(path) == [CHECKPOINT, sample, spike]
    lines = path.read_text(encoding="utf-8").split("\n")
    assert len(lines) == 4
    assert [list(json.loads(line)) for line in lines[:3]] == [
        ["kind", *FIELDS[kind]] for kind in ("checkpoint", "sample", "spike")
    ]


def test_only_a_run_with_a_teacher_has_a_kl_to_it(tmp_path):
    """Logs from before there were teachers are read, and truncated, as they are."""
    log = MetricsLog(tmp_path / "metrics.jsonl")
    taught = {"kind": "step", **dict.fromkeys(FIELDS["step"], 0)}
    alone = {name: value for name, value in taught.items() if name != "distill_kl"}
    for record in (taught, alone):
        log.append(record)
    truncate(log.path, 0)
    assert read(log.path) == [taught, alone]
    with pytest.raises(ValueError, match="rollback has field 'distill_kl'; expected step, from_step"):
        log.append({"kind": "rollback", "step": 1, "from_step": 2, "distill_kl": 0.1})


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"kind": "rollback", "step": 1}, "record: rollback lacks field 'from_step'; expected step, from_step"),
        ({"kind": "rollback", "step": 1, "from_step": 2, "to": 3}, "record: rollback has field 'to'; expected step,"),
        ({"kind": "rolback", "step": 1}, "record: kind is 'rolback'; expected one of start, phase, step,"),
        ({"step": 1, "from_step": 2}, "record: kind is None; expected one of start,"),
        ({"kind": "baseline", "name": "x", "bits_per_byte": float("nan")}, "baseline: bits_per_byte is nan; expected"),
        ({"kind": "spike", "step": 1, "loss": float("inf"), "expected": 1.0, "deviation": 1.0}, "spike: loss is inf"),
        ({**dict.fromkeys(FIELDS["step"], 0), "kind": "step", "expert_load": [1.0, float("nan")]}, "expert_load is"),
    ],
)
def test_a_wrong_record_is_refused_and_nothing_is_written(tmp_path, record, message):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(CHECKPOINT)
    with pytest.raises(ValueError, match=message):
        log.append(record)
    assert read(log.path) == [CHECKPOINT]


def test_a_record_is_in_the_file_as_soon_as_it_is_appended_and_a_checkpoint_on_the_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("os.fsync", synced.append)
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"kind": "nonfinite", "step": 1})
    assert (len(read(log.path)), len(synced)) == (1, 0)
    log.append(CHECKPOINT)
    assert (len(read(log.path)), len(synced)) == (2, 1)


def test_a_torn_last_line_is_left_out_wherever_it_is_torn(tmp_path, full):
    path = tmp_path / "metrics.jsonl"
    whole = [json.loads(line) for line in full[:3]]
    for length in range(1, len(full[3])):
        path.write_bytes(b"".join(full[:3]) + full[3][:length])
        assert read(path) == whole, length


def test_nothing_is_appended_to_a_torn_line_until_it_is_truncated(tmp_path, full):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(full[0] + full[1][:-1])
    log = MetricsLog(path)
    with pytest.raises(ValueError, match=r"metrics\.jsonl ends in a torn line; expected it truncated"):
        log.append(CHECKPOINT)
    assert path.read_bytes() == full[0] + full[1][:-1]
    truncate(path, 0)
    log.append(CHECKPOINT)
    assert read(path) == [json.loads(full[0]), CHECKPOINT]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"kind": "anticipatory", "step": 4,', "line 2: .*; expected one JSON object"),
        (b"", "line 2: .*; expected one JSON object"),
        (b"\x00\x00\x00", "line 2: .*; expected one JSON object"),
        (b"\xff\xfe\xfd", "line 2: .*; expected one JSON object"),
        (b"[1, 2]", "line 2: the line holds a list; expected a JSON object"),
        (b'{"kind": "anticipatory", "step": 4}', "line 2: anticipatory lacks field 'on'"),
        (b'{"kind": ["step"], "step": 4}', r"line 2: kind is \['step'\]; expected one of"),
        (b'{"kind": "baseline", "name": "x", "bits_per_byte": NaN}', "line 2: baseline: bits_per_byte is nan"),
    ],
)
def test_a_damaged_line_is_named_even_if_it_is_the_last(tmp_path, full, line, message):
    path = tmp_path / "metrics.jsonl"
    for after in (full[1], b""):
        path.write_bytes(full[0] + line + b"\n" + after)
        with pytest.raises(ValueError, match=r"metrics\.jsonl, " + message):
            read(path)


def test_a_run_killed_anywhere_and_resumed_has_the_log_of_one_never_stopped(tmp_path, full):
    path = tmp_path / "metrics.jsonl"
    records = [json.loads(line) for line in full]
    assert sum(record["kind"] == "rollback" for record in records) == 1
    tried = set()
    for stop in range(len(full)):
        saved = [place for place in range(stop) if records[place]["kind"] == "checkpoint"]
        for place in saved[-2:]:  # the newest checkpoint, or the one before where the newest is damaged
            path.write_bytes(b"".join(full[:stop]) + full[stop][: stop % len(full[stop])])
            truncate(path, records[place]["step"])
            assert path.read_bytes() == b"".join(full[: place + 1]), (stop, place)
            tried.add(place)
    assert len(tried) == sum(record["kind"] == "checkpoint" for record in records)
    assert [file.name for file in tmp_path.iterdir() if file.name.endswith(".partial")] == []


def test_a_checkpoint_returned_to_keeps_what_it_knew_and_no_more(tmp_path):
    """The same step numbers stand twice in the log; those after the checkpoint go, whichever time they were written."""
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for _ in range(2):
        log.append({**CHECKPOINT, "step": 8})
        log.append({"kind": "spike", "step": 8, "loss": 9.0, "expected": 3.0, "deviation": 0.1})
        log.append({"kind": "rollback", "step": 7, "from_step": 8})
    truncate(path, 8)
    assert [record["kind"] for record in read(path)] == ["checkpoint", "spike", "rollback", "checkpoint"]


def test_without_the_checkpoints_record_later_steps_go(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.append({"kind": "baseline", "name": "byte 5-gram", "bits_per_byte": 2.25})
    for step in (1, 2, 3):
        log.append({"kind": "anticipatory", "step": step, "on": True})
    truncate(path, 2)
    assert [record.get("step") for record in read(path)] == [None, 1, 2]


def test_a_log_may_be_truncated_while_it_is_in_use(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        log.append({"kind": "nonfinite", "step": step})
    truncate(log.path, 1)
    log.append({"kind": "nonfinite", "step": 4})
    assert [record["step"] for record in read(log.path)] == [1, 4]
