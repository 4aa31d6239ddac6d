"""``dsv4 convert``."""

from dataclasses import replace
from typing import get_args

import pytest

import dsv4
import dsv4.checkpoint.convert
from dsv4.cli.convert import Form
from dsv4.cli.main import main
from dsv4.config.load import load_config
from dsv4.config.presets import smoke
from dsv4.testing.toys import toy_model

CONFIG = replace(
    smoke(),
    hidden_size=64,
    layer_kinds=("window", "csa"),
    moe=replace(smoke().moe, num_experts=2, expert_dim=32),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run, as far as convert looks at it."""
    folder = tmp_path_factory.mktemp("run")
    dsv4.save_model(toy_model(CONFIG), folder / "model")
    (folder / "model" / "tokenizer.json").write_text("{}")
    return folder


@pytest.mark.parametrize(("form", "storage"), [("instruct", "fp4"), ("base", "fp8"), ("bfloat16", "bfloat16")])
def test_it_says_what_was_written(run, tmp_path, capsys, form, storage):
    target = tmp_path / "target"
    assert main(["convert", str(run), str(target), "--format", form]) == 0
    files = list(target.iterdir())
    assert load_config(target) == replace(CONFIG, storage=storage)
    num_bytes = sum(file.stat().st_size for file in files)
    assert len(files) == 5 + 4  # shards; config, index, generation_config, tokenizer
    assert capsys.readouterr().out.startswith(f"{target}: 9 files, {num_bytes:,} bytes (")


def test_there_and_back(run, tmp_path):
    assert main(["convert", str(run / "model"), str(tmp_path / "one"), "--format", "instruct"]) == 0
    assert main(["convert", str(tmp_path / "one"), str(tmp_path / "two"), "--format", "base", "--lossy"]) == 0
    assert load_config(tmp_path / "two").storage == "fp8"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["SRC", "SRC", "--format", "base"], "which exists and is not empty; expected a new or empty one"),
        (["/nowhere", "DST", "--format", "base"], "directory is /nowhere; expected a directory with config.json"),
        (["SRC", "DST", "--format", "base", "--lossy"], "lossy is given for float32 to base"),
        (["SRC", "/nowhere/DST", "--format", "base"], "/nowhere does not exist; expected an existing parent"),
    ],
)
def test_errors_are_one_line_and_exit_two(run, tmp_path, capsys, arguments, message):
    places = {"SRC": str(run), "DST": str(tmp_path / "target")}
    assert main(["convert", *(places.get(word, word) for word in arguments)]) == 2
    captured = capsys.readouterr()
    error = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert message in error[0]
    assert "Traceback" not in captured.err
    assert not list(tmp_path.iterdir())


def test_a_format_nobody_knows(run, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["convert", str(run), str(tmp_path / "target"), "--format", "fp4"])
    assert caught.value.code == 2
    assert "instruct" in capsys.readouterr().err


def test_the_forms_are_those_of_the_library():
    assert get_args(Form) == get_args(dsv4.checkpoint.convert.Form)
