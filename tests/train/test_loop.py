"""The run as a whole: what it logs, spikes and rollbacks to the step, what stops it, and what that leaves behind."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dsv4.checkpoint.training import list_checkpoints
from dsv4.config.train import Phase
from dsv4.testing.tiny_run import contents, records_of, tiny, tiny_trainer, write_corpus
from dsv4.train.loop import SpikeError
from dsv4.train.metrics import read
from dsv4.train.nonfinite import NonFiniteError
from dsv4.train.schedule import total_tokens


class StoppedError(Exception):
    """Raised where a run is to stop."""


def run_until(trainer, kind, step):
    """Train until there is a record of this kind and step, rolled back or not."""
    log = trainer.tell

    def tell(**record):
        log(**record)
        if (record["kind"], record["step"]) == (kind, step):
            raise StoppedError

    trainer.tell = tell
    with pytest.raises(StoppedError):
        trainer.train()


def events(run):
    """The order of things: kind and step of each record, with what else decides."""
    found = []
    for record in records_of(run):
        match record["kind"]:
            case "step":
                found.append(("step", record["step"]) + (("anticipatory",) if record["anticipatory"] else ()))
            case "rollback":
                found.append(("rollback", record["step"], record["from_step"]))
            case "anticipatory":
                found.append(("on" if record["on"] else "off", record["step"]))
            case kind:
                found.append((kind, record["step"]))
    return found


def short(corpus, **stability):
    """Dense steps of one micro-batch, a checkpoint every other step."""
    config = tiny(corpus)
    return replace(
        config,
        stability=replace(config.stability, **stability),
        batch=replace(config.batch, start_tokens=192, tokens=192, ramp_tokens=0),
        run=replace(config.run, checkpoint_steps=2, validation_steps=100, validation_tokens=100),
        phases=(Phase(name="dense-48", tokens=100 * 192, sequence=48, attention="dense"),),
    )


def spike_at(trainer, steps):
    """Let the trainer take these steps for spikes, each as often as it stands there."""
    left = list(steps)

    def is_spike(_):
        step = trainer.position.step + 1
        if step not in left:
            return False
        left.remove(step)
        return True

    trainer.spikes.is_spike = is_spike


def spoil(trainer, step, rollbacks):
    """Let the batches of a step have random targets, until there were so many rollbacks."""
    fetch = trainer.parts.loader.next_batch

    def next_batch(num_rows, sequence):
        batch = fetch(num_rows, sequence)
        if trainer.ahead.step + 1 != step or trainer.rollbacks >= rollbacks:
            return batch
        return replace(batch, targets=torch.where(batch.targets >= 0, torch.randint_like(batch.targets, 512), -1))

    trainer.parts.loader.next_batch = next_batch


# A run in which nothing happens


def test_the_course_of_a_run(reference):
    """Phase, steps, validation, checkpoint: in this order, at the steps that the recipe asks for."""
    assert events(reference) == [
        ("checkpoint", 0),
        ("phase", 0), *(("step", i) for i in (1, 2, 3, 4)), ("checkpoint", 4),
        ("step", 5), ("step", 6), ("validation", 6), ("checkpoint", 6),
        ("phase", 6), ("step", 7), ("step", 8), ("checkpoint", 8), ("step", 9), ("validation", 9), ("checkpoint", 9),
        ("phase", 9), *(("step", i) for i in (10, 11, 12)), ("validation", 12), ("checkpoint", 12),
        ("step", 13), ("validation", 13), ("checkpoint", 13),
        ("phase", 13), *(("step", i) for i in (14, 15, 16)), ("checkpoint", 16),
        ("step", 17), ("validation", 17), ("checkpoint", 17), ("end", 17),
    ]  # fmt: skip


def test_a_checkpoint_is_there_before_the_first_step(corpus, tmp_path):
    trainer = tiny_trainer(short(corpus), tmp_path / "run")
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    run_until(trainer, "step", 1)
    assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path / "run" / "checkpoints")] == [0]
    assert not all(torch.equal(before[name], parameter) for name, parameter in trainer.model.named_parameters())
    trainer.resume(tmp_path / "run" / "checkpoints" / "step-00000000")
    assert all(torch.equal(before[name], parameter) for name, parameter in trainer.model.named_parameters())


def test_what_a_step_logs_is_plausible(reference):
    (start,) = (record for record in read(reference / "metrics.jsonl") if record["kind"] == "start")
    steps = [record for record in read(reference / "metrics.jsonl") if record["kind"] == "step"]
    assert start["parameters_activated"] < start["parameters_total"]
    assert start["matmul_flops"] == 1e10
    tokens = 0
    for record in steps:
        tokens += record["batch_tokens"]
        assert record["tokens"] == tokens
        assert record["seconds"] == 1  # the clock of a tiny run ticks once a look
        assert record["tokens_per_second"] == record["batch_tokens"]
        assert 0.001 < record["flops_utilisation"] < 1
        assert 10**8 < record["memory_bytes"] < 10**10
        assert 0.9 < record["packing_utilisation"] <= 1
        warm_up = record["phase"].startswith("indexer")
        assert len(record["expert_load"]) == (5 if warm_up else 6)  # a warm-up leaves the MTP block out
        assert all(1 <= load <= 2 for load in record["expert_load"])  # of 4 experts, 2 a token
        assert 4.5 < record["loss"] < 6.5
        assert (record["mtp_loss"] is None) == warm_up
        assert warm_up == (record["grad_norm"] == 0)
        assert record["indexer_kl"] > 0
        assert 0 <= record["indexer_recall"] <= 1
        assert record["indexer_captured"] <= 1
        assert (record["indexer_grad_norm"] is None) == record["phase"].startswith("dense")
    assert [record["batch_tokens"] for record in steps[:5]] == [192, 240, 288, 336, 384]
    assert steps[-1]["tokens"] >= 5700 == total_tokens(tiny(Path()))
    assert steps[-1]["loss"] < steps[0]["loss"] - 1


def test_the_data_do_not_depend_on_the_machine(corpus, reference, tmp_path):
    """Files made in another order, elsewhere and at another time give the same tokenizer and the same tokens."""
    again = tmp_path / "again"
    again.mkdir()
    for path in sorted(corpus.iterdir(), reverse=True):
        shutil.copyfile(path, again / path.name)
    tiny_trainer(tiny(again), tmp_path / "run")
    ours, theirs = tmp_path / "run" / "data", reference / "data"
    names = sorted(path.relative_to(ours) for path in ours.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(theirs) for path in theirs.rglob("*") if path.is_file())
    for name in names:
        if name.name != "prepared.json":  # which knows the times of the files
            assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    other = write_corpus(tmp_path / "other", seed=1)
    tiny_trainer(tiny(other), tmp_path / "third")
    assert (tmp_path / "third" / "data" / "tokenizer.json").read_bytes() != (theirs / "tokenizer.json").read_bytes()


# Anticipatory routing


def test_routing_that_is_no_steps_old_changes_nothing(corpus, reference, tmp_path):
    config = tiny(corpus)
    config = replace(config, stability=replace(config.stability, anticipatory="always", stale_steps=0))
    tiny_trainer(config, tmp_path / "run").train()
    ours, theirs = records_of(tmp_path / "run"), records_of(reference)
    assert {record.pop("anticipatory") for record in ours if record["kind"] == "step"} == {True}
    assert {record.pop("anticipatory") for record in theirs if record["kind"] == "step"} == {False}
    assert ours == theirs
    for checkpoint in list_checkpoints(reference / "checkpoints"):
        mine, other = contents(tmp_path / "run" / "checkpoints" / checkpoint.path.name), contents(checkpoint.path)
        for held in (mine, other):
            del held["state.json"]["anticipation"]
        assert mine == other


# Spikes


def test_after_a_spike_the_run_is_as_if_the_step_had_never_been(corpus, reference, tmp_path):
    """A batch spoilt once, in the sparse phase; then the very steps of a run that never met it."""
    config = tiny(corpus)
    stability = replace(config.stability, anticipatory="off", spike_memory=8, spike_deviations=3.0)
    trainer = tiny_trainer(replace(config, stability=stability), tmp_path / "run")
    spoil(trainer, 12, rollbacks=1)
    run_until(trainer, "checkpoint", 13)
    assert events(tmp_path / "run")[-14:] == [
        ("phase", 9), ("step", 10), ("step", 11), ("spike", 12), ("rollback", 9, 12),
        ("phase", 9), ("step", 10), ("step", 11), ("step", 12), ("validation", 12), ("checkpoint", 12),
        ("step", 13), ("validation", 13), ("checkpoint", 13),
    ]  # fmt: skip
    (spike,) = records_of(tmp_path / "run", "spike")
    assert spike["loss"] > spike["expected"] + 3 * spike["deviation"] > spike["expected"]
    assert records_of(tmp_path / "run", "step")[-4:] == records_of(reference, "step")[9:13]


def test_a_spike_to_the_step(corpus, tmp_path):
    """Back to the last checkpoint, routing by the past for active_steps, then off; the detector has the numbers."""
    config = short(corpus, anticipatory="auto", active_steps=3, stale_steps=1)
    trainer = tiny_trainer(config, tmp_path / "run")
    spike_at(trainer, [6])
    run_until(trainer, "step", 9)
    assert events(tmp_path / "run") == [
        ("checkpoint", 0), ("phase", 0), ("step", 1), ("step", 2), ("checkpoint", 2),
        ("step", 3), ("step", 4), ("checkpoint", 4), ("step", 5),
        ("spike", 6), ("rollback", 4, 6), ("on", 4),
        ("step", 5, "anticipatory"), ("step", 6, "anticipatory"), ("checkpoint", 6),
        ("step", 7, "anticipatory"), ("off", 7), ("step", 8), ("checkpoint", 8), ("step", 9),
    ]  # fmt: skip
    steps = records_of(tmp_path / "run", "step")
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 5, 6, 7, 8, 9]
    assert [record["tokens"] for record in steps] == [192 * record["step"] for record in steps]
    before, after = (record for record in steps if record["step"] == 5)
    assert {name for name in before if before[name] != after[name]} == {
        "anticipatory"
    }  # the first choice is of its step
    assert trainer.rollbacks == 1
    trainer.resume(tmp_path / "run" / "checkpoints" / "step-00000006")
    assert [work.plan.step for work in trainer.anticipation.waiting] == [7]
    run_until(trainer, "step", 9)
    assert records_of(tmp_path / "run", "step") == steps
    assert events(tmp_path / "run")[-5:] == [
        ("step", 7, "anticipatory"), ("off", 7), ("step", 8), ("checkpoint", 8), ("step", 9)
    ]  # fmt: skip


def test_the_end_of_anticipatory_routing_is_told_where_a_checkpoint_is_written_too(corpus, tmp_path):
    """A run resumed from the very step has the record, and does not route by the past again."""
    trainer = tiny_trainer(short(corpus, anticipatory="auto", active_steps=2, stale_steps=1), tmp_path / "run")
    spike_at(trainer, [3])
    run_until(trainer, "step", 5)
    trainer.resume(tmp_path / "run" / "checkpoints" / "step-00000004")
    run_until(trainer, "step", 5)
    assert events(tmp_path / "run")[-7:] == [
        ("rollback", 2, 3), ("on", 2), ("step", 3, "anticipatory"), ("step", 4, "anticipatory"), ("off", 4),
        ("checkpoint", 4), ("step", 5),
    ]  # fmt: skip


def test_a_spike_while_routing_by_the_past_prolongs_it(corpus, tmp_path):
    """Back to checkpoints whose queue holds choices: in the middle of the time, and just after its end."""
    trainer = tiny_trainer(short(corpus, anticipatory="auto", active_steps=4, stale_steps=2), tmp_path / "run")
    spike_at(trainer, [3, 6, 9])
    run_until(trainer, "step", 13)
    assert events(tmp_path / "run")[4:] == [
        ("checkpoint", 2),
        ("spike", 3), ("rollback", 2, 3), ("on", 2),
        *(("step", i, "anticipatory") for i in (3, 4)), ("checkpoint", 4), ("step", 5, "anticipatory"),
        ("spike", 6), ("rollback", 4, 6), ("on", 4),
        *(("step", i, "anticipatory") for i in (5, 6)), ("checkpoint", 6),
        *(("step", i, "anticipatory") for i in (7, 8)), ("off", 8), ("checkpoint", 8),
        ("spike", 9), ("rollback", 8, 9), ("on", 8),
        *(("step", i, "anticipatory") for i in (9, 10)), ("checkpoint", 10),
        *(("step", i, "anticipatory") for i in (11, 12)), ("off", 12), ("checkpoint", 12), ("step", 13),
    ]  # fmt: skip


def test_too_many_rollbacks_end_the_run(corpus, tmp_path):
    """A batch that is spoilt every time. What the last checkpoint holds is what it held when it was written."""
    config = short(corpus, anticipatory="auto", active_steps=5, stale_steps=1, max_rollbacks=2, spike_deviations=0.5)
    config = replace(config, run=replace(config.run, checkpoint_steps=6))
    trainer = tiny_trainer(replace(config, stability=replace(config.stability, spike_memory=6)), tmp_path / "run")
    spoil(trainer, 8, rollbacks=99)
    last = tmp_path / "run" / "checkpoints" / "step-00000006"
    run_until(trainer, "step", 7)
    held = contents(last)
    trainer = tiny_trainer(trainer.config, tmp_path / "run")
    trainer.resume(last)
    spoil(trainer, 8, rollbacks=99)
    with pytest.raises(
        SpikeError, match=r"^the loss of step 8 is \d\.\d+ where \d\.\d+ was expected, after 2 roll"
    ) as e:
        trainer.train()
    assert "expected at most stability.max_rollbacks = 2. The last checkpoint is whole" in str(e.value)
    assert events(tmp_path / "run")[-10:] == [
        ("step", 7), ("spike", 8), ("rollback", 6, 8), ("on", 6), ("step", 7, "anticipatory"),
        ("spike", 8), ("rollback", 6, 8), ("on", 6), ("step", 7, "anticipatory"), ("spike", 8),
    ]  # fmt: skip
    assert contents(last) == held
    trainer.resume(last)
    assert trainer.rollbacks == 0


# What stops a run


def test_a_number_that_is_not_finite_stops_the_run(corpus, tmp_path):
    """The layer is named, the step is in the log as such, and nothing of it is in weights, biases or optimiser."""
    trainer = tiny_trainer(short(corpus), tmp_path / "run")
    run_until(trainer, "step", 3)
    state = trainer.model.state_dict() | trainer.optimizer.state_tensors()
    before = {name: tensor.clone() for name, tensor in state.items()}
    trainer.model.layers[2].attn.register_forward_hook(lambda module, inputs, output: output * float("nan"))
    trainer.tell = type(trainer).tell.__get__(trainer)
    with pytest.raises(NonFiniteError, match=r"^step 4: loss nan, .* It began in layers\.2\.attn\. The step was not"):
        trainer.train()
    assert all(torch.equal(before[name], tensor) for name, tensor in state.items())
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert trainer.position.step == 3
    assert events(tmp_path / "run")[-2:] == [("step", 3), ("nonfinite", 4)]


def test_a_full_disk(corpus, tmp_path, monkeypatch):
    """The error has the path and the room that is needed; the run goes on from the checkpoint before."""
    trainer = tiny_trainer(short(corpus), tmp_path / "run")
    run_until(trainer, "step", 3)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=r"the disk has 1000 bytes free; expected at least \d{7} for checkpoint"):
        trainer.train()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000000", "step-00000002"]
    monkeypatch.undo()
    trainer = tiny_trainer(short(corpus), tmp_path / "run")
    trainer.resume(tmp_path / "run" / "checkpoints" / "step-00000002")
    run_until(trainer, "step", 5)
    assert events(tmp_path / "run")[-5:] == [
        ("checkpoint", 2), ("step", 3), ("step", 4), ("checkpoint", 4), ("step", 5)
    ]  # fmt: skip
