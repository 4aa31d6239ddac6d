"""``dsv4 synth``: what it writes and says, and what it refuses before it writes."""

import shutil
from collections import namedtuple

import pytest

from dsv4.accounting.tensors import inventory, total_bytes
from dsv4.checkpoint.synth import synth_config, synthesise
from dsv4.cli.main import main
from dsv4.config.load import load_config, save_config
from dsv4.config.presets import smoke

Usage = namedtuple("Usage", "total used free")


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("mtp", [False, True])
def test_some_layers(mtp, tmp_path, capsys):
    target = tmp_path / "model"
    assert main(["synth", "smoke", str(target), "--layers", "0,3,2", "--seed", "9", *["--mtp"] * mtp]) == 0
    config = synth_config(smoke(), (0, 3, 2), mtp=mtp)
    assert load_config(target) == config
    synthesise(smoke(), tmp_path / "same", layers=(0, 3, 2), mtp=mtp, seed=9)
    assert contents(target) == contents(tmp_path / "same")
    specs = inventory(config)
    size = f"{total_bytes(specs):,} bytes"
    captured = capsys.readouterr()
    assert f"{target} needs {size}" in captured.err
    assert f"{target}: {len(specs)} tensors, {size}" in captured.out
    assert f"in {5 + mtp} files, stored as bfloat16, in " in captured.out


def test_all_layers_and_seed_zero_without_options(tmp_path):
    assert main(["synth", "smoke", str(tmp_path / "model")]) == 0
    synthesise(smoke(), tmp_path / "same", seed=0)
    assert contents(tmp_path / "model") == contents(tmp_path / "same")
    assert load_config(tmp_path / "model").layer_kinds == smoke().layer_kinds


def test_a_config_file(tmp_path):
    save_config(smoke(), tmp_path / "own.json")
    assert main(["synth", str(tmp_path / "own.json"), str(tmp_path / "model"), "--layers", "4"]) == 0
    assert load_config(tmp_path / "model") == synth_config(smoke(), (4,))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("0,x", "--layers is '0,x'; expected numbers with commas between them, such as 0,2,3"),
        ("", "--layers is ''; expected numbers"),
        ("0,5", "layers holds 5; expected 0 to 4"),
        ("2,0", "layers holds 2 before 0; expected"),
    ],
)
def test_a_choice_that_cannot_be(layers, message, tmp_path, capsys):
    assert main(["synth", "smoke", str(tmp_path / "model"), "--layers", layers]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {message}")
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_directory_in_use_is_left_as_it_is(tmp_path, capsys):
    (tmp_path / "note.txt").write_text("mine")
    assert main(["synth", "smoke", str(tmp_path)]) == 2
    assert f"error: directory is {tmp_path}, which exists and is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_a_disk_that_is_too_small(tmp_path, capsys, monkeypatch):
    needed = total_bytes(inventory(synth_config(smoke())))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, needed - 1))
    assert main(["synth", "smoke", str(tmp_path / "model")]) == 2
    error = capsys.readouterr().err
    assert f"error: {tmp_path / 'model'} needs {needed:,} bytes" in error
    assert f"has {needed - 1:,} free" in error
    assert list(tmp_path.iterdir()) == []
    left = tmp_path / ".model.partial"
    left.mkdir()
    (left / "of-an-earlier-run").write_bytes(b"x")  # makes room, or is kept
    assert main(["synth", "smoke", str(tmp_path / "model")]) == 0
