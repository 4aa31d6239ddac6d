"""Checkpoints of a training run: the same bits back, the newest kept, another model refused."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import dsv4
from dsv4.checkpoint.manifest import write_manifest
from dsv4.checkpoint.training import list_checkpoints, load_checkpoint, remove_later, save_checkpoint
from dsv4.model.transformer import Transformer
from dsv4.testing.toys import flash_like, pro_like, toy_model

SHARD = "model/model-00004-of-00009.safetensors"
STATE = {
    "step": 120,
    "tokens": 3 * 10**11,
    "phase": "sparse",
    "loss": 0.1 + 0.2,
    "loader": {"epoch": 1, "order": [5, 3, 8], "rng": 2**127 + 1},
    "expected": None,
    "text": "naïve ∂",
}


def save(directory, step, model, keep=2, **state):
    return save_checkpoint(directory, step, model, {"momentum": torch.full((3, 7), step)}, state, keep=keep)


def steps(directory):
    return [checkpoint.step for checkpoint in list_checkpoints(directory)]


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def contents(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def bits(tensor):
    return tensor.contiguous().flatten().view(torch.uint8)


def assert_same_bits(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert tensor.shape == theirs[name].shape, name
        assert torch.equal(bits(tensor), bits(theirs[name])), name


def other_model(config, dtype=torch.float32):
    """Built with the same sizes and other values in every place."""
    model = Transformer(config, weight_dtype=dtype, activation_dtype=dtype)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(3)
    return model


def refusal(path, model):
    with pytest.raises(ValueError) as error:
        load_checkpoint(path, model)
    return str(error.value)


# Round trips


@pytest.mark.parametrize("make", [flash_like, pro_like, lambda: replace(flash_like(), mtp_kinds=())])
def test_a_float32_model_comes_back_with_the_same_bits(make, tmp_path):
    model = toy_model(make())
    with torch.no_grad():  # values that arithmetic would not keep apart
        model.embed.weight[0, :3] = torch.tensor([-0.0, 1e-45, float("inf")])
        model.embed.weight.view(torch.int32)[1, 0] = 0x7FC01234  # not a number, with a payload
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = save(tmp_path, 7, model)
    loaded = other_model(make())
    places = {name: tensor.data_ptr() for name, tensor in loaded.state_dict().items()}
    load_checkpoint(path, loaded)
    assert_same_bits(before, loaded.state_dict())
    assert_same_bits(before, model.state_dict())  # saving changes nothing
    assert places == {name: tensor.data_ptr() for name, tensor in loaded.state_dict().items()}
    assert all(p.requires_grad != name.endswith("gate.bias") for name, p in loaded.named_parameters())
    assert any(name.endswith("gate.bias") for name in before)
    assert any(name.endswith("gate.tid2eid") for name in before)


def test_a_bfloat16_model_comes_back_with_the_same_bits(model, tmp_path):
    rounded = other_model(model.config, torch.bfloat16)
    rounded.load_state_dict(model.state_dict())
    loaded = other_model(model.config, torch.bfloat16)
    load_checkpoint(save(tmp_path, 7, rounded), loaded)
    assert loaded.embed.weight.dtype == torch.bfloat16
    assert_same_bits(rounded.state_dict(), loaded.state_dict())


def test_tensors_of_every_kind_come_back(model, tmp_path):
    queue = torch.arange(30).reshape(5, 6)
    tensors = {
        "muon.layers.2.attn.wq_a.weight": torch.randn(28, 40),
        "momentum.low": torch.randn(13, 3).bfloat16(),
        "half": torch.randn(4).half(),
        "double": torch.randn(2, 3, 5, dtype=torch.float64),
        "queue.tokens": queue[:2],
        "queue.strided": queue[2:].T,
        "queue.32": torch.arange(9, dtype=torch.int32),
        "rng": torch.get_rng_state(),
        "flags": torch.tensor([True, False, True]),
        "count": torch.tensor(2**40 + 1),
        "nothing": torch.empty(0, 4),
        "learned": torch.nn.Parameter(torch.randn(3)),
    }
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    loaded, _ = load_checkpoint(save_checkpoint(tmp_path, 7, model, tensors, {}, keep=2), other_model(model.config))
    assert_same_bits(before, loaded)
    assert not any(tensor.requires_grad for tensor in loaded.values())


def test_no_tensors_and_no_state(model, tmp_path):
    path = save_checkpoint(tmp_path, 0, model, {}, {}, keep=1)
    assert path == tmp_path / "step-00000000"
    assert load_checkpoint(path, other_model(model.config)) == ({}, {})


def test_the_state_comes_back(model, tmp_path):
    path = save_checkpoint(tmp_path, 120, model, {}, STATE, keep=2)
    state = load_checkpoint(path, other_model(model.config))[1]
    assert state == STATE
    assert [type(value) for value in state.values()] == [type(value) for value in STATE.values()]


def test_loaded_tensors_do_not_hold_on_to_the_file(run, model):
    path = run / "step-00000120"
    tensors, _ = load_checkpoint(path, model)
    with (path / "training.safetensors").open("r+b") as file:
        file.write(b"\xff" * os.fstat(file.fileno()).st_size)
    assert tensors["momentum"].tolist() == [[120] * 7] * 3


def test_the_files(two, model):
    path = two / "step-00000120"
    assert names(path) == ["manifest.json", "model", "state.json", "training.safetensors"]
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["format"], manifest["step"]) == (1, 120)
    assert {Path(name) for name in manifest["files"]} == contents(path).keys() - {Path("manifest.json")}
    assert_same_bits(dsv4.load_model(path / "model").state_dict(), model.state_dict())


@pytest.mark.parametrize(
    "value",
    [(1, 2), {1: 2}, float("nan"), float("inf"), torch.zeros(2), {1}, b"bytes", {"deep": [0, (1,)]}],
    ids=repr,
)
def test_a_state_that_json_would_change_is_refused(model, tmp_path, value):
    with pytest.raises(ValueError, match=r"^state\['seen'\] is .*; expected what JSON gives back unchanged$"):
        save(tmp_path, 7, model, fine=1, seen=value)
    assert not names(tmp_path)


def test_nothing_is_pickled(two, model, monkeypatch):
    import pickle

    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    load_checkpoint(two / "step-00000120", model)
    assert {path.suffix for path in contents(two)} == {".safetensors", ".json"}


# Which there are


def test_list_goes_by_name_and_number(tmp_path):
    assert list_checkpoints(tmp_path / "no") == []
    for name in ("step-100000000", "step-99999999", "step-00000003"):
        (tmp_path / name).mkdir()
    for name in ("step-3", "step-000000020", "step-0000002x", "step-00000004.old", ".step-00000005.partial", "model"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000006").write_text("a file")
    assert steps(tmp_path) == [3, 99999999, 100000000]
    assert list_checkpoints(tmp_path)[1].path == tmp_path / "step-99999999"


def test_the_newest_are_kept(model, tmp_path):
    for step in (8, 9, 10, 11):
        save(tmp_path, step, model, keep=3)
    assert names(tmp_path) == ["step-00000009", "step-00000010", "step-00000011"]
    save(tmp_path, 12, model, keep=1)
    assert names(tmp_path) == ["step-00000012"]


def test_a_damaged_one_is_not_counted_as_kept(run, model):
    os.truncate(run / "step-00000120" / SHARD, 100)
    (run / "step-00000130").mkdir()
    save(run, 140, model, keep=2)
    assert steps(run) == [100, 120, 130, 140]
    save(run, 150, model, keep=2)
    assert steps(run) == [140, 150]


def test_what_is_not_a_checkpoint_is_left_alone(run, model):
    (run / "notes.txt").write_text("mine")
    (run / "step-00000001.mine").mkdir()
    save(run, 140, model, keep=1)
    assert names(run) == ["notes.txt", "step-00000001.mine", "step-00000140"]


def test_leftovers_of_a_killed_writer_are_removed(run, model):
    (run / ".step-00000130.partial" / "model").mkdir(parents=True)
    (run / ".step-00000130.partial" / "model" / "half").write_text("half")
    (run / "step-00000100").rename(run / ".step-00000100.partial")
    assert steps(run) == [120]
    save(run, 130, model)
    assert names(run) == ["step-00000120", "step-00000130"]


@pytest.mark.parametrize("step", [110, 120])
def test_a_step_that_is_not_later_is_refused(run, model, step):
    before = contents(run)
    with pytest.raises(ValueError, match=rf"^step is {step}; expected a step after {run}/step-00000120$"):
        save(run, step, model)
    assert contents(run) == before


def test_a_run_that_went_back_forgets_what_came_later(run, model):
    save(run, 140, model, keep=3)
    (run / ".step-00000120.partial" / "model").mkdir(parents=True)  # a removal that was killed before
    assert remove_later(run, 100) == [140, 120]
    assert names(run) == ["step-00000100"]
    assert remove_later(run, 100) == []
    save(run, 110, model)
    assert names(run) == ["step-00000100", "step-00000110"]


def test_numbers_out_of_range(model, tmp_path):
    with pytest.raises(ValueError, match="step is -1; expected 0 or more"):
        save(tmp_path, -1, model)
    with pytest.raises(ValueError, match="keep is 0; expected at least 1"):
        save(tmp_path, 1, model, keep=0)


# Other models


def test_another_model_is_refused_field_by_field(two, model):
    config = model.config
    other = replace(
        config,
        vocab_size=102,
        attention=replace(config.attention, window=15),
        moe=replace(config.moe, swiglu_limit=4.0),
        layer_kinds=("window", "window", "csa", "hca", "csa", "csa"),
    )
    path = two / "step-00000120"
    lines = refusal(path, Transformer(other)).splitlines()
    assert lines[0] == f"checkpoint {path} is of another model:"
    assert set(lines[1:]) == {
        "  vocab_size is 101; expected 102",
        "  attention.window is 16; expected 15",
        "  moe.swiglu_limit is 3.0; expected 4.0",
        f"  layer_kinds is {config.layer_kinds}; expected {other.layer_kinds}",
    }


def test_another_dtype_is_refused(two, model):
    lines = refusal(two / "step-00000120", other_model(model.config, torch.bfloat16)).splitlines()
    assert lines[0] == f"checkpoint {two / 'step-00000120'} does not fit the model:"
    assert lines[1] == "  embed.weight is F32 [101, 40]; expected BF16 [101, 40]"
    half = toy_model(model.config).half()
    assert "embed.weight is F32 [101, 40]; expected torch.float16 [101, 40]" in refusal(two / "step-00000120", half)


def test_storage_is_what_the_tensors_are(two, model):
    config = replace(model.config, storage="bfloat16")  # as the presets have it, whatever is trained
    loaded = other_model(config)
    load_checkpoint(two / "step-00000120", loaded)
    assert_same_bits(model.state_dict(), loaded.state_dict())


def test_other_tensors_under_a_manifest_of_their_own(run):
    path, model = run / "step-00000120", other_model(flash_like())
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    tensors = load_file(path / SHARD)
    del tensors["layers.2.attn.wkv.weight"]
    tensors["layers.2.extra"] = torch.zeros(3)
    tensors["layers.2.attn.attn_sink"] = torch.zeros(1, 6)
    save_file(tensors, path / SHARD)
    (path / "manifest.json").unlink()
    write_manifest(path, 120)
    assert set(refusal(path, model).splitlines()[1:]) == {
        "  layers.2.attn.wkv.weight is missing",
        "  layers.2.extra is unknown",
        "  layers.2.attn.attn_sink is F32 [1, 6]; expected F32 [6]",
    }
    assert_same_bits(before, model.state_dict())


def test_a_config_that_cannot_be_read_names_its_file(run, model):
    path = run / "step-00000120"
    (path / "model/config.json").write_text("{")
    (path / "manifest.json").unlink()
    write_manifest(path, 120)
    assert f"{path}/model/config.json: expected a JSON object" in refusal(path, model)
