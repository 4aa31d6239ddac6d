"""A run that was stopped, in whatever way, and resumed is the run that never stopped, to the bit."""

import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import dsv4
from dsv4.checkpoint.training import list_checkpoints
from dsv4.config.train import Phase
from dsv4.testing.tiny_run import contents, files_of, records_of, tiny, tiny_trainer, write_recipe
from dsv4.train.metrics import read

ROOT = Path(dsv4.__file__).parents[1]


class StoppedError(Exception):
    """Raised where a run is to stop."""


def stop_at(kind, step):
    """What to tell a trainer so that it stops after a record."""

    def tell(record):
        if (record["kind"], record.get("step")) == (kind, step):
            raise StoppedError

    return tell


def resumed(config, run, step=None, tell=lambda record: None):
    """A trainer that goes on from a checkpoint, the newest by default."""
    found = {checkpoint.step: checkpoint.path for checkpoint in list_checkpoints(run / "checkpoints")}
    trainer = tiny_trainer(config, run, tell)
    trainer.resume(found[max(found) if step is None else step])
    return trainer


def steps_kept(run):
    return [checkpoint.step for checkpoint in list_checkpoints(run / "checkpoints")]


def assert_same_runs(run, other):
    """Checkpoints in everything but the time, and the logs in everything but what is measured."""
    assert records_of(run) == records_of(other)
    assert steps_kept(run) == steps_kept(other)
    for checkpoint in list_checkpoints(other / "checkpoints"):
        assert contents(run / "checkpoints" / checkpoint.path.name) == contents(checkpoint.path), checkpoint.step


# A process that is killed


def train(*arguments):
    """Start ``dsv4 train`` as a process of its own, on one thread of the CPU."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, "-m", "dsv4", "train", *map(str, arguments)],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def kill_at(process, run, **wanted):
    """Kill a process some milliseconds after its log has a record with these fields."""
    log = run / "metrics.jsonl"
    deadline = time.monotonic() + 120
    with process:
        while not (log.exists() and any(wanted.items() <= record.items() for record in read(log))):
            assert process.poll() is None, process.communicate()[0].decode()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.04))
        process.kill()
    assert process.returncode == -9


def test_killed_in_every_phase_and_while_a_checkpoint_is_written(corpus, reference, tmp_path):
    run, recipe = tmp_path / "run", write_recipe(tmp_path / "tiny.toml", tiny(corpus))
    kill_at(train(recipe, "--run", run), run, kind="step", phase="dense-48", step=2)
    kill_at(train("--resume", run), run, kind="step", phase="indexer-64", step=7)
    kill_at(train("--resume", run), run, kind="checkpoint", step=12)
    kill_at(train("--resume", run), run, kind="step", phase="sparse-96", step=14)
    with train("--resume", run) as last:
        output = last.communicate()[0].decode()
    assert last.returncode == 0, output
    assert_same_runs(run, reference)
    assert files_of(run / "model") == files_of(reference / "model")
    assert files_of(run / "data" / "train") == files_of(reference / "data" / "train")
    starts = [record["step"] for record in read(run / "metrics.jsonl") if record["kind"] == "start"]
    assert len(starts) == 5
    assert f"resumed from step {starts[-1]}\n" in output
    assert [path.name for path in run.rglob(".*")] == []  # nothing half written is left


# Anticipatory routing: a queue in the checkpoint


def always(corpus):
    """Routing that is two steps old throughout, over all kinds of phase in 10 steps."""
    config = tiny(corpus)
    return replace(
        config,
        stability=replace(config.stability, anticipatory="always", stale_steps=2),
        batch=replace(config.batch, start_tokens=192, tokens=192, ramp_tokens=0),
        run=replace(config.run, checkpoint_steps=3, validation_steps=4),
        phases=(
            Phase(name="dense-48", tokens=700, sequence=48, attention="dense"),  # steps 1 to 4
            Phase(name="indexer-64", tokens=500, sequence=64, attention="dense", train="indexer"),  # 5 to 7
            Phase(name="sparse-96", tokens=500, sequence=96, attention="sparse"),  # 8 to 10
        ),
    )


def test_stopped_with_a_full_queue(corpus, tmp_path):
    """StoppedError in each phase, so that steps of the next one wait already; and at the end, where fewer wait."""
    config, run, other = always(corpus), tmp_path / "stopped", tmp_path / "whole"
    tiny_trainer(config, other).train()
    assert all(record["anticipatory"] for record in records_of(other, "step"))
    with pytest.raises(StoppedError):
        tiny_trainer(config, run, stop_at("step", 4)).train()
    for step, waiting, *stop in ((3, 2, "checkpoint", 7), (6, 2, "step", 10), (9, 1, "end", 10)):
        trainer = resumed(config, run, tell=stop_at(*stop))
        assert trainer.position.step == step
        assert [work.plan.step for work in trainer.anticipation.waiting] == [step + 1 + i for i in range(waiting)]
        with pytest.raises(StoppedError):
            trainer.train()
    assert_same_runs(run, other)


# Going back to an older checkpoint


@pytest.mark.parametrize(("step", "until"), [(0, 4), (8, 12), (13, None)])
def test_from_an_older_checkpoint(corpus, reference, tmp_path, step, until):
    """The steps after it come again as they were; its later checkpoints and their records are gone."""
    run = Path(shutil.copytree(reference, tmp_path / "run"))
    before = steps_kept(reference)
    trainer = resumed(tiny(corpus), run, step, stop_at("validation", until))
    assert steps_kept(run) == [kept for kept in before if kept <= step]
    assert read(run / "metrics.jsonl")[-1] == {
        "kind": "checkpoint", "step": step, "tokens": trainer.position.tokens, "path": f"step-{step:08d}"
    }  # fmt: skip
    if until is None:
        trainer.train()
        assert_same_runs(run, reference)
        return
    trainer.listen(stop_at("step", until + 1))
    with pytest.raises(StoppedError):
        trainer.train()
    for path in (run / "checkpoints").iterdir():
        assert contents(path) == contents(reference / "checkpoints" / path.name)
    ours = records_of(run)
    assert ours == records_of(reference)[: len(ours)]


def test_the_data_of_a_run_stay_what_they_were(corpus, reference, tmp_path):
    """A source that was changed or deleted meanwhile changes nothing."""
    run = Path(shutil.copytree(reference, tmp_path / "run"))
    config = tiny(corpus)
    moved = replace(config, data=replace(config.data, source=str(tmp_path / "deleted")))
    resumed(moved, run, 16).train()
    assert_same_runs(run, reference)
    assert files_of(run / "data") == files_of(reference / "data")
    shutil.rmtree(run / "data" / "train")
    with pytest.raises(ValueError, match=r"token store .*train has no manifest\.json"):
        resumed(moved, run)
