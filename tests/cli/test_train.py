"""``dsv4 train``: from a recipe to a model, going on after a stop, and what is refused before anything is trained."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import dsv4
from dsv4.cli.main import main
from dsv4.config.load import load_config
from dsv4.config.recipes import RECIPES, load_run_config
from dsv4.testing.tiny_run import contents, files_of, records_of, shortest
from dsv4.train.metrics import read

pytestmark = pytest.mark.usefixtures("in_process")

STEPS = 5  # of the shortest recipe


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def checkpoint(run, step):
    return run / "checkpoints" / f"step-{step:08d}"


def assert_finished_like(run, finished):
    assert records_of(run) == records_of(finished)
    assert files_of(run / "model") == files_of(finished / "model")
    assert contents(checkpoint(run, STEPS)) == contents(checkpoint(finished, STEPS))


# From start to end


def test_tensorboard_is_asked_for_in_the_recipe(recipe, tmp_path, monkeypatch, fails):
    run = tmp_path / "run"
    assert main(["train", recipe, "--run", str(run), "--run.tensorboard"]) == 0
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    message = fails(recipe, "--run", tmp_path / "other", "--run.tensorboard")
    assert "pip install 'dsv4[tensorboard]'" in message
    assert not (tmp_path / "other").exists()


def test_a_run_from_its_recipe_to_a_model(recipe, corpus, tmp_path, capsys):
    run = tmp_path / "new" / "run"
    assert main(["train", recipe, "--run", str(run)]) == 0
    assert {path.name for path in run.iterdir()} == {"config.json", "data", "metrics.jsonl", "checkpoints", "model"}
    assert load_run_config(run) == shortest(corpus)
    model = dsv4.load_model(run / "model")
    assert model.config == replace(load_config("smoke"), storage="float32")  # masters, as trained
    assert (run / "model" / "tokenizer.json").read_bytes() == (run / "data" / "tokenizer.json").read_bytes()
    lines = [line.rstrip() for line in capsys.readouterr().err.splitlines()]
    for line in (
        "smoke: 330,574 parameters, 269,774 activated",
        "phase dense-48: dense attention, rows of 48 tokens",
        "phase sparse-96: sparse attention, rows of 96 tokens",
        f"model: {run / 'model'}",
    ):
        assert line in lines
    for begin in ("step 4: validation loss ", "sample: def ", "done: 960 tokens in "):
        assert any(line.startswith(begin) for line in lines)


def test_every_choice_of_a_recipe_is_an_option(recipe, tmp_path, untrained):
    arguments = ["--seed", "7", "--optimizer.peak-lr", "0.002", "--run.checkpoint-steps", "3"]
    assert main(["train", recipe, "--run", str(tmp_path / "run"), *arguments]) == 0
    config = load_run_config(tmp_path / "run")
    assert (config.seed, config.optimizer.peak_lr, config.run.checkpoint_steps) == (7, 0.002, 3)
    assert untrained[0].config == config


def test_a_teacher_is_an_option(finished, recipe, tmp_path, untrained, fails):
    run, model = tmp_path / "run", finished / "model"
    asked = [recipe, "--run", str(run), "--distill.teacher", str(model), "--distill.weight", "0.5"]
    assert fails(*asked).endswith(f"; expected the teacher's, {model}/tokenizer.json")
    assert not run.exists()
    assert main(["train", *asked, "--data.tokenizer", f"{model}/tokenizer.json"]) == 0
    assert (untrained[0].config.distill.teacher, untrained[0].config.distill.weight) == (str(model), 0.5)
    assert untrained[0].parts.teacher.config.vocab_size == 512


def test_help(capsys):
    for arguments in ([], ["--help"]):
        assert main(["train", *arguments]) == 0
        text = capsys.readouterr().out
        assert "dsv4 train RECIPE --run DIR" in text
        assert all(name in text for name in RECIPES)
    with pytest.raises(SystemExit) as caught:
        main(["train", "smoke", "--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--optimizer.peak-lr" in text
    assert "Report: 2.7e-4 (Flash)" in text


# Going on


def test_a_finished_run_is_complete(finished, run, capsys):
    before = files_of(run)
    assert main(["train", "--resume", str(run)]) == 0
    assert "the run is complete: 5 steps" in capsys.readouterr().err
    assert files_of(run) == before
    shutil.rmtree(run / "model")
    (run / ".model.partial").mkdir()
    (run / ".model.partial" / "half").write_text("what a kill left behind")
    assert main(["train", "--resume", str(run)]) == 0
    assert "the run is complete: 5 steps" in capsys.readouterr().err
    assert files_of(run) == before
    assert not (run / ".model.partial").exists()


def test_a_run_stopped_after_its_last_step_is_ended(finished, run):
    """All steps are done, but the last records and the model are missing."""
    log = run / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    assert [json.loads(line)["kind"] for line in lines[-3:]] == ["checkpoint", "sample", "end"]
    for count in (1, 2):
        log.write_text("".join(lines[:-count]))
        shutil.rmtree(run / "model")
        assert main(["train", "--resume", str(run)]) == 0
        assert_finished_like(run, finished)


def test_from_an_older_step(finished, run, capsys, fails):
    assert main(["train", "--resume", str(run), "--from", "2"]) == 0
    assert "resumed from step 2\n" in capsys.readouterr().err
    assert_finished_like(run, finished)
    starts = [record["step"] for record in read(run / "metrics.jsonl") if record["kind"] == "start"]
    assert starts == [0, 2]
    assert fails("--resume", run, "--from", "6") == "--from is 6; expected one of 0, 1, 2, 3, 4, 5"


def test_a_damaged_checkpoint_is_not_resumed_from(finished, run, fails):
    (run / "metrics.jsonl").write_text("".join((finished / "metrics.jsonl").read_text().splitlines(True)[:-2]))
    path = checkpoint(run, 5) / "training.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    before = files_of(run)
    message = fails("--resume", run)
    assert f"checkpoint {checkpoint(run, 5)} is damaged" in message
    assert "training.safetensors" in message
    assert message.endswith(f"use --from 4 to resume from {checkpoint(run, 4)}")
    assert files_of(run) == before
    assert main(["train", "--resume", str(run), "--from", "4"]) == 0
    assert_finished_like(run, finished)


def test_a_run_is_not_begun_again(recipe, run, fails):
    """Not even where its checkpoints were deleted: its log is worth keeping."""
    before = files_of(run)
    expected = f"run is {run}, which holds a run already; expected a new folder, or --resume {run}"
    assert fails(recipe, "--run", run) == expected
    assert files_of(run) == before
    shutil.rmtree(run / "checkpoints")
    assert fails(recipe, "--run", run) == expected
    assert fails("--resume", run) == f"run is {run}, which has no checkpoint; expected one in {run}/checkpoints"


def test_resuming_what_is_no_run(tmp_path, fails):
    for folder in (tmp_path, tmp_path / "nowhere"):
        expected = f"run is {folder}, which has no config.json; expected the folder of a run"
        assert fails("--resume", folder) == expected
    assert list(tmp_path.iterdir()) == []


# What stops a run


def red_line(captured):
    """The error at the end of what was shown, the cursor just back from the progress line."""
    assert "Traceback" not in captured.err
    line = captured.err.rstrip("\n").splitlines()[-1].removeprefix("\x1b[?25h")
    assert line.startswith("\x1b[31m")
    assert line.endswith("\x1b[0m")
    return line.removeprefix("\x1b[31m").removesuffix("\x1b[0m")


@pytest.fixture
def _colours(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)


@pytest.mark.usefixtures("_colours")
def test_a_nan_is_one_red_line_with_the_layer(finished, recipe, tmp_path, capsys):
    build = dsv4.train.setup.build_model

    def poisoned(*arguments, **given):
        model = build(*arguments, **given)
        calls = []

        def hook(module, inputs, output):
            calls.append(module)
            return output * float("nan") if len(calls) > 3 else output

        model.layers[3].attn.register_forward_hook(hook)
        return model

    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dsv4.train.setup.build_model", poisoned)
        with pytest.raises(SystemExit) as caught:
            main(["train", recipe, "--run", str(run)])
    assert caught.value.code == 1
    (step,) = (record["step"] for record in records_of(run, "nonfinite"))
    line = red_line(capsys.readouterr())
    assert line.startswith(f"error: step {step}: loss nan")
    assert "It began in layers.3.attn. " in line
    assert read(run / "metrics.jsonl")[-1]["kind"] == "nonfinite"
    assert not (run / "model").exists()
    assert main(["train", "--resume", str(run)]) == 0
    assert_finished_like(run, finished)


@pytest.mark.usefixtures("_colours")
def test_too_many_spikes_are_one_red_line(finished, recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dsv4.train.spikes.SpikeDetector.is_spike", lambda detector, loss: True)
    run = tmp_path / "run"
    with pytest.raises(SystemExit) as caught:
        main(["train", recipe, "--run", str(run), "--stability.max-rollbacks", "1"])
    assert caught.value.code == 1
    captured = capsys.readouterr()
    assert red_line(captured).startswith("error: the loss of step 1 is 6.")
    assert "back to step 0" in captured.err
    assert contents(checkpoint(run, 0)) == contents(checkpoint(finished, 0))


def test_a_full_disk_before_the_first_step_and_later(finished, recipe, tmp_path, capsys):
    """The same command works once there is room; and so does --resume after the first checkpoint."""
    run, calls = tmp_path / "run", []

    def two_more(path):
        calls.append(path)
        return SimpleNamespace(free=10**9 if len(calls) <= 2 else 1000)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
        message = fails_late(capsys, recipe, "--run", run)
        assert "the disk has 1000 bytes free; expected at least " in message
        assert str(checkpoint(run, 0)) in message
        patch.setattr("shutil.disk_usage", two_more)
        assert str(checkpoint(run, 2)) in fails_late(capsys, recipe, "--run", run)
    assert main(["train", "--resume", str(run)]) == 0
    assert_finished_like(run, finished)


def fails_late(capsys, *arguments):
    """The last line of a run that had begun."""
    assert main(["train", *map(str, arguments)]) == 2
    line = capsys.readouterr().err.rstrip("\n").splitlines()[-1]
    assert line.startswith("error: ")
    return line
