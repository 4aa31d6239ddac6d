"""``dsv4 train``: from a recipe to a model, going on after a stop, and what is refused before anything is trained."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import dsv4
from dsv4.cli.main import main
from dsv4.config.load import load_config
from dsv4.config.recipes import RECIPES, load_run_config
from dsv4.config.train import Phase
from dsv4.data.tokenizer import train_tokenizer
from dsv4.testing.tiny_run import contents, records_of, tiny, write_corpus, write_recipe
from dsv4.train.loop import Trainer
from dsv4.train.metrics import read

STEPS = 5  # of the run here


def four_phases(source):
    """A dense step, two of the indexer's warm-up, two sparse ones; a checkpoint after steps 0, 1, 2, 3, 4, 5."""
    config = tiny(source)
    return replace(
        config,
        batch=replace(config.batch, start_tokens=192, tokens=192, ramp_tokens=0),
        run=replace(config.run, checkpoint_steps=1, validation_steps=4, validation_tokens=200, sample_prompt="def "),
        phases=(
            Phase(name="dense-48", tokens=192, sequence=48, attention="dense"),
            Phase(name="indexer-64", tokens=384, sequence=64, attention="dense", train="indexer"),
            Phase(name="sparse-96", tokens=384, sequence=96, attention="sparse"),
        ),
    )


@pytest.fixture(autouse=True)
def _of_no_process(monkeypatch):
    """Leave the process of the tests as it is, and do not measure the machine."""
    _leave_alone(monkeypatch)


def _leave_alone(patch):
    patch.setattr("dsv4.cli.process.keep_freed_memory", lambda: False)
    patch.setattr("dsv4.train.loop.matmul_rate", lambda dtype, device: 1e10)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "texts")


@pytest.fixture(scope="module")
def recipe(corpus, tmp_path_factory):
    return str(write_recipe(tmp_path_factory.mktemp("recipe") / "tiny.toml", four_phases(corpus)))


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    """A run that went through; copy it before changing anything."""
    run = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        _leave_alone(patch)
        assert main(["train", recipe, "--run", str(run)]) == 0
    return run


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def untrained(monkeypatch):
    """Runs that get as far as their first step count as trained; their number."""
    done = []
    monkeypatch.setattr(Trainer, "train", lambda trainer: done.append(trainer))
    return done


def checkpoint(run, step):
    return run / "checkpoints" / f"step-{step:08d}"


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_finished_like(run, finished):
    assert records_of(run) == records_of(finished)
    assert files_of(run / "model") == files_of(finished / "model")
    assert contents(checkpoint(run, STEPS)) == contents(checkpoint(finished, STEPS))


def fails(capsys, *arguments):
    """What a command says that fails as the user's mistake: one error, no traceback."""
    capsys.readouterr()
    assert main(["train", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    return captured.err.removeprefix("error: ").rstrip("\n")


# From start to end


def test_a_run_from_its_recipe_to_a_model(recipe, corpus, tmp_path, capsys):
    run = tmp_path / "new" / "run"
    assert main(["train", recipe, "--run", str(run)]) == 0
    assert {path.name for path in run.iterdir()} == {"config.json", "data", "metrics.jsonl", "checkpoints", "model"}
    assert load_run_config(run) == four_phases(corpus)
    model = dsv4.load_model(run / "model")
    assert model.config == replace(load_config("smoke"), storage="float32")  # masters, as trained
    assert (run / "model" / "tokenizer.json").read_bytes() == (run / "data" / "tokenizer.json").read_bytes()
    lines = [line.rstrip() for line in capsys.readouterr().err.splitlines()]
    (sample,) = records_of(run, "sample")
    for line in (
        "smoke: 330,574 parameters, 269,774 activated",
        "phase dense-48: dense attention, rows of 48 tokens",
        "phase sparse-96: sparse attention, rows of 96 tokens",
        f"sample: def {sample['text'].splitlines()[0]}".rstrip(),
        f"model: {run / 'model'}",
    ):
        assert line in lines
    assert any(line.startswith("step 4: validation loss ") for line in lines)
    assert any(line.startswith("done: 960 tokens in ") for line in lines)


def test_every_choice_of_a_recipe_is_an_option(recipe, tmp_path, untrained):
    arguments = ["--seed", "7", "--optimizer.peak-lr", "0.002", "--run.checkpoint-steps", "3"]
    assert main(["train", recipe, "--run", str(tmp_path / "run"), *arguments]) == 0
    config = load_run_config(tmp_path / "run")
    assert (config.seed, config.optimizer.peak_lr, config.run.checkpoint_steps) == (7, 0.002, 3)
    assert untrained[0].config == config


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
    (run / ".model.partial").mkdir()  # as if it had been killed there
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


def test_from_an_older_step(finished, run, capsys):
    assert main(["train", "--resume", str(run), "--from", "2"]) == 0
    assert "resumed from step 2\n" in capsys.readouterr().err
    assert_finished_like(run, finished)
    starts = [record["step"] for record in read(run / "metrics.jsonl") if record["kind"] == "start"]
    assert starts == [0, 2]
    assert fails(capsys, "--resume", run, "--from", "6") == "--from is 6; expected one of 0, 1, 2, 3, 4, 5"


def test_a_damaged_checkpoint_is_not_resumed_from(finished, run, capsys):
    (run / "metrics.jsonl").write_text("".join((finished / "metrics.jsonl").read_text().splitlines(True)[:-2]))
    path = checkpoint(run, 5) / "training.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    before = files_of(run)
    message = fails(capsys, "--resume", run)
    assert f"checkpoint {checkpoint(run, 5)} is damaged" in message
    assert "training.safetensors" in message
    assert message.endswith(f"use --from 4 to resume from {checkpoint(run, 4)}")
    assert files_of(run) == before
    assert main(["train", "--resume", str(run), "--from", "4"]) == 0
    assert_finished_like(run, finished)


def test_a_run_that_another_machine_went_on_with_is_not_begun_again(recipe, run, capsys):
    """Neither with its checkpoints, nor where they were deleted."""
    before = files_of(run)
    expected = f"run is {run}, which holds a run already; expected a new folder, or --resume {run}"
    assert fails(capsys, recipe, "--run", run) == expected
    assert files_of(run) == before
    shutil.rmtree(run / "checkpoints")
    assert fails(capsys, recipe, "--run", run) == expected
    assert fails(capsys, "--resume", run) == f"run is {run}, which has no checkpoint; expected one in {run}/checkpoints"


def test_resuming_what_is_no_run(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "nowhere"):
        expected = f"run is {folder}, which has no config.json; expected the folder of a run"
        assert fails(capsys, "--resume", folder) == expected
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
def test_a_nan_is_one_red_line_with_the_layer(finished, recipe, tmp_path, capsys, monkeypatch):
    build = dsv4.train.setup.build_model

    def poisoned(*arguments):
        model = build(*arguments)
        calls = []

        def hook(module, inputs, output):
            calls.append(module)
            return output * float("nan") if len(calls) > 3 else output

        model.layers[3].attn.register_forward_hook(hook)
        return model

    monkeypatch.setattr("dsv4.train.setup.build_model", poisoned)
    run = tmp_path / "run"
    with pytest.raises(SystemExit) as caught:
        main(["train", recipe, "--run", str(run)])
    assert caught.value.code == 1
    (step,) = (record["step"] for record in records_of(run, "nonfinite"))
    line = red_line(capsys.readouterr())
    assert line.startswith(f"error: step {step}: loss nan")
    assert "It began in layers.3.attn. " in line
    assert read(run / "metrics.jsonl")[-1]["kind"] == "nonfinite"
    assert not (run / "model").exists()
    monkeypatch.undo()
    _leave_alone(monkeypatch)
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


def test_a_full_disk_before_the_first_step_and_later(finished, recipe, tmp_path, capsys, monkeypatch):
    """The same command works once there is room; and so does --resume after the first checkpoint."""
    run, calls = tmp_path / "run", []

    def disk_usage(path):
        calls.append(path)
        return SimpleNamespace(free=10**9 if len(calls) % 3 else 1000)

    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    message = fails_late(capsys, recipe, "--run", run)
    assert "the disk has 1000 bytes free; expected at least " in message
    assert str(checkpoint(run, 0)) in message
    monkeypatch.setattr("shutil.disk_usage", disk_usage)
    assert str(checkpoint(run, 2)) in fails_late(capsys, recipe, "--run", run)
    monkeypatch.undo()
    _leave_alone(monkeypatch)
    assert main(["train", "--resume", str(run)]) == 0
    assert_finished_like(run, finished)


def fails_late(capsys, *arguments):
    """The last line of a run that had begun."""
    assert main(["train", *map(str, arguments)]) == 2
    line = capsys.readouterr().err.rstrip("\n").splitlines()[-1]
    assert line.startswith("error: ")
    return line


# What is refused before anything is trained


def with_files(folder, files):
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return str(folder)


def with_source(path, files, **data):
    config = four_phases(with_files(path / "source", files))
    return str(write_recipe(path / "bad.toml", replace(config, data=replace(config.data, **data))))


def other_tokenizer(path, corpus):
    texts = (file.read_text() for file in sorted(corpus.iterdir()))
    train_tokenizer(texts, 300).save(str(path / "tokenizer.json"))
    config = four_phases(corpus)
    return str(
        write_recipe(path / "bad.toml", replace(config, data=replace(config.data, tokenizer=f"{path}/tokenizer.json")))
    )


def too_small(path, finished):
    """A few texts, and a tokenizer that does not mind."""
    texts = {f"{i}.txt": f"def {'a' * i}\n".encode() for i in range(1, 9)}
    tokenizer = str(finished / "data" / "tokenizer.json")
    return with_source(path, texts, tokenizer=tokenizer, validation_fraction=0.5)


def with_text(path, corpus, change):
    text = write_recipe(path / "bad.toml", four_phases(corpus)).read_text()
    changed = change(text)
    assert changed != text
    (path / "bad.toml").write_text(changed)
    return str(path / "bad.toml")


BINARY = {"a.bin": b"\x00\x01", "b.bin": b"PK\x00"}

BAD = {
    "no file": (
        lambda path, corpus, finished: with_source(path, {}),
        "data.source is {path}/source, which holds no file to read; expected files in it that are neither hidden nor",
    ),
    "no folder": (
        lambda path, corpus, finished: str(write_recipe(path / "bad.toml", four_phases(path / "nowhere"))),
        "data.source is {path}/nowhere, which does not exist; expected stdlib, a folder or a file",
    ),
    "binary": (
        lambda path, corpus, finished: with_source(path, BINARY, bad_files="error"),
        "{path}/source/a.bin is binary (it has a NUL byte); expected UTF-8 text, or data.bad_files = \"skip\"",
    ),
    "only binary": (
        lambda path, corpus, finished: with_source(path, BINARY, bad_files="skip"),
        "data.source is {path}/source, which holds no usable document; expected at least one",
    ),
    "not UTF-8": (
        lambda path, corpus, finished: with_source(path, {"a.txt": b"caf\xe9"}, bad_files="error"),
        "{path}/source/a.txt is not UTF-8 (after 3 characters); expected UTF-8 text, or",
    ),
    "too few pairs": (
        lambda path, corpus, finished: with_source(path, {f"{i}.txt": b"a" * i for i in range(1, 9)}, validation_fraction=0.5),
        "the tokenizer reached 281 of vocab_size = 512 ids; expected more text to train it on, or a smaller vocabulary",
    ),
    "less than a batch": (
        lambda path, corpus, finished: too_small(path, finished),
        "; expected at least one batch: 192 tokens, 2 rows of 96",
    ),
    "a tokenizer of another size": (
        lambda path, corpus, finished: other_tokenizer(path, corpus),
        "the tokenizer has 300 ids; expected the model's vocab_size = 512",
    ),
    "no such recipe": (
        lambda path, corpus, finished: "smok",
        "recipe is 'smok'; expected one of smoke, demo, mini, flash, pro; did you mean smoke?",
    ),
    "no such file": (
        lambda path, corpus, finished: str(path / "no.toml"),
        "recipe file is {path}/no.toml; expected a file that exists",
    ),
    "no such field": (
        lambda path, corpus, finished: with_text(path, corpus, lambda text: text.replace("seed = 0", "seed = 0\nsead = 0")),
        "{path}/bad.toml: recipe has 1 problem:\n  - unknown field sead; did you mean seed?",
    ),
    "no such model": (
        lambda path, corpus, finished: with_text(path, corpus, lambda text: text.replace('"smoke"', '"smokey"')),
        "preset is 'smokey'; expected one of ",
    ),
    "sparse too early": (
        lambda path, corpus, finished: with_text(
            path, corpus, lambda text: text.replace('train = "indexer"', 'train = "all"')
        ),
        "phase sparse-96: attention is 'sparse' before any phase has train = 'indexer'; expected the indexer to be",
    ),
    "rows within the window": (
        lambda path, corpus, finished: with_text(
            path, corpus, lambda text: text.replace("sequence = 48", "sequence = 16")
        ),
        "phase dense-48: sequence is 16; expected more than the model's window = 16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_and_leaves_the_folder_free(name, corpus, finished, recipe, tmp_path, capsys, untrained):
    make, expected = BAD[name]
    run = tmp_path / "run"
    message = fails(capsys, make(tmp_path, corpus, finished), "--run", run)
    assert expected.format(path=tmp_path) in message
    assert not (run / "metrics.jsonl").exists()
    assert not (run / "config.json").exists()
    assert untrained == []
    assert main(["train", recipe, "--run", str(run)]) == 0  # the second try
    assert len(untrained) == 1
    assert files_of(run / "data" / "train") == files_of(finished / "data" / "train")


def test_a_wrong_option_exits_two(recipe, tmp_path, capsys):
    for arguments in (
        ["train", recipe, "--run", str(tmp_path / "run"), "--optimizer.peak-rl", "1"],
        ["train", recipe, "--run", str(tmp_path / "run"), "--seed", "one"],
        ["train", recipe],
        ["train", "--resume"],
    ):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
        assert capsys.readouterr().err
    assert fails(capsys, "--rum", "x") == "the first argument is --rum; expected a recipe or --resume"
    assert list(tmp_path.iterdir()) == []


def test_a_value_out_of_range_is_named(recipe, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["train", recipe, "--run", str(tmp_path / "run"), "--run.keep-checkpoints", "1"])
    assert caught.value.code == 2
    assert "run.keep_checkpoints is 1; expected at least 2" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(recipe, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in fails(capsys, recipe, "--run", tmp_path / "file")
