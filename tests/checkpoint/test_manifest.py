"""A checkpoint that is not what was written is refused with everything that is wrong, and what else there is."""

import json
import os
import random

import pytest
import torch

import dsv4
from dsv4.checkpoint.training import load_checkpoint, save_checkpoint
from dsv4.testing.toys import flash_like, toy_model

SHARD = "model/model-00004-of-00009.safetensors"


def refusal(path, model):
    with pytest.raises(ValueError) as error:
        load_checkpoint(path, model)
    return str(error.value)


def damaged(path, name, edit):
    file = path / name
    file.write_bytes(edit(file.read_bytes()))


@pytest.mark.parametrize("name", [SHARD, "model/config.json", "training.safetensors", "state.json"])
def test_one_wrong_bit(run, name):
    path, model = run / "step-00000120", toy_model(flash_like(), seed=1)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    damaged(path, name, lambda data: data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
    message = refusal(path, model)
    expected = json.loads((path / "manifest.json").read_text())["files"][name]["sha256"]
    assert message.startswith(f"checkpoint {path} is damaged:\n  {name} has sha256 ")
    assert f"; expected {expected}\n" in message
    assert message.endswith(f"\nuse --from 100 to resume from {run}/step-00000100")
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    load_checkpoint(run / "step-00000100", model)


def test_everything_wrong_is_listed_at_once(run, model):
    path = run / "step-00000120"
    size = (path / "training.safetensors").stat().st_size
    (path / SHARD).unlink()
    os.truncate(path / "training.safetensors", size - 1)
    damaged(path, "state.json", lambda data: data.replace(b"120", b"130"))
    lines = refusal(path, model).splitlines()
    assert lines[0] == f"checkpoint {path} is damaged:"
    assert lines[1].startswith(f"  {SHARD} is missing; expected a file of ")
    assert lines[2] == f"  training.safetensors has {size - 1} bytes; expected {size}"
    assert lines[3].startswith("  state.json has sha256 ")
    assert len(lines) == 5


def test_a_long_list_is_cut_and_counted(run, model):
    path = run / "step-00000120"
    files = json.loads((path / "manifest.json").read_text())["files"]
    files |= {f"model/extra-{number:02}": {"bytes": 1, "sha256": ""} for number in range(25)}
    (path / "manifest.json").write_text(json.dumps({"format": 1, "step": 120, "files": files}))
    lines = refusal(path, model).splitlines()
    assert len(lines) == 1 + 20 + 1 + 1
    assert lines[-2] == "  ... and 5 more"


def test_no_manifest(run, model, tmp_path):
    path = run / "step-00000120"
    (path / "manifest.json").unlink()
    message = refusal(path, model)
    assert message == (
        f"folder {path} has no manifest.json; expected a checkpoint that a training run wrote\n"
        f"use --from 100 to resume from {run}/step-00000100"
    )
    assert "has no manifest.json" in refusal(tmp_path / "no", model)
    dsv4.save_model(model, run / "foreign")
    assert refusal(run / "foreign", model).endswith(f"use --from 100 to resume from {run}/step-00000100")


@pytest.mark.parametrize(
    "text",
    [
        *(b"", b"{", b"[]", b"7", b"\xff\xfe", b'{"step": 1}', b'{"format": 1}'),
        b'{"format": 1, "step": 1, "files": []}',
        b'{"format": 1, "step": 1, "files": {"a": 1}}',
        b'{"format": 1, "step": null, "files": {}}',
    ],
    ids=repr,
)
def test_a_manifest_that_cannot_be_read(run, model, text):
    path = run / "step-00000120"
    (path / "manifest.json").write_bytes(text)
    message = refusal(path, model)
    assert f"{path}/manifest.json is damaged (" in message
    assert "); expected JSON with format, step and files\n" in message
    assert "use --from 100 to resume" in message


@pytest.mark.parametrize("version", [2, "1", None])
def test_a_manifest_of_another_format(run, model, version):
    path = run / "step-00000120"
    (path / "manifest.json").write_text(json.dumps({"format": version, "entirely": "different"}))
    assert f"{path}/manifest.json has format {version!r}; expected 1\n" in refusal(path, model)


def test_a_manifest_that_lists_too_little(run, model):
    path = run / "step-00000120"
    (path / "manifest.json").write_text(json.dumps({"format": 1, "step": 120, "files": {}}))
    lines = refusal(path, model).splitlines()
    listed = ("model/config.json", "training.safetensors", "state.json")
    assert lines[1:4] == [f"  the manifest does not list {name}" for name in listed]


def test_every_bit_of_the_manifest_counts(run, model):
    """No flipped bit inside it loads something else: either it is refused, or the result is the same."""
    path = run / "step-00000120"
    data = (path / "manifest.json").read_bytes()
    for place in random.Random(5).sample(range(len(data)), 60):
        spoilt = bytearray(data)
        spoilt[place] ^= 4
        (path / "manifest.json").write_bytes(spoilt)
        if bytes(spoilt).split() != data.split():  # else a space became another one
            assert "use --from 100" in refusal(path, model)


def test_a_checkpoint_under_another_name(run, model):
    (run / "step-00000120").rename(run / "step-00000130")
    assert "the manifest has step 120; expected that of the folder's name" in refusal(run / "step-00000130", model)


def test_the_advice_is_an_earlier_one_that_is_whole(run, model):
    save_checkpoint(run, 140, model, {}, {}, keep=3)
    for step in (120, 140):
        os.truncate(run / f"step-{step:08d}" / SHARD, 100)
    assert refusal(run / "step-00000140", model).endswith(f"use --from 100 to resume from {run}/step-00000100")
    (run / "step-00000100" / "state.json").unlink()
    save_checkpoint(run, 150, model, {}, {}, keep=3)  # later: nothing to go back to
    for step in (140, 100):
        assert refusal(run / f"step-{step:08d}", model).endswith(f"\nthere is no earlier checkpoint in {run}")
