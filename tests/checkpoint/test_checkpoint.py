"""Saving and loading directories in the released layout: the same bits back, or one error that says everything."""

import json
import os
import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import dsv4
from dsv4.accounting.tensors import inventory
from dsv4.config.load import load_config, save_config
from dsv4.model.transformer import Transformer
from dsv4.testing.toys import flash_like, pro_like, toy_model, toy_token_ids

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ITEM_BYTES = {"F32": 4, "BF16": 2, "I64": 8}


def bfloat16_model(config):
    """The toy with matrices and norms rounded to bfloat16."""
    model = Transformer(config, weight_dtype=torch.bfloat16, activation_dtype=torch.bfloat16)
    model.load_state_dict(toy_model(config).state_dict())
    return model


@pytest.fixture(scope="module")
def model():
    return toy_model(flash_like())


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved") / "toy"
    dsv4.save_model(model, directory)
    return directory


@pytest.fixture
def sharded(saved, tmp_path):
    """A copy of the saved directory, to spoil."""
    return shutil.copytree(saved, tmp_path / "sharded")


@pytest.fixture
def single(saved, tmp_path):
    """The same checkpoint in one file: its directory, and a function that writes it with other tensors."""
    directory = tmp_path / "single"
    directory.mkdir()
    shutil.copy(saved / "config.json", directory)
    tensors = {}
    for file in saved.glob("*.safetensors"):
        tensors |= load_file(file)

    def write(changes=()):
        kept = {name: tensor for name, tensor in (tensors | dict(changes)).items() if tensor is not None}
        save_file(kept, directory / SINGLE)
        return directory

    return write


def assert_same_bits(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


# Saving


@pytest.mark.parametrize("make", [flash_like, pro_like, lambda: replace(flash_like(), mtp_kinds=())])
def test_a_float32_model_comes_back_with_the_same_bits(make, tmp_path):
    model = toy_model(make())
    dsv4.save_model(model, tmp_path / "toy")
    loaded = dsv4.load_model(tmp_path / "toy")
    assert_same_bits(model, loaded)
    assert loaded.config == model.config
    assert not loaded.training
    token_ids = toy_token_ids(model.config, 1, 20)
    with torch.no_grad():
        assert torch.equal(model(token_ids).logits, loaded(token_ids).logits)


def test_a_bfloat16_model_comes_back_with_the_same_bits(tmp_path):
    model = bfloat16_model(flash_like())
    dsv4.save_model(model, tmp_path / "toy")
    assert_same_bits(model, dsv4.load_model(tmp_path / "toy", "bfloat16"))
    assert load_config(tmp_path / "toy").storage == "bfloat16"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_precision_is_the_dtype_of_matrices_whatever_is_stored(model, saved, tmp_path, precision):
    dsv4.save_model(bfloat16_model(model.config), tmp_path / "rounded")
    for directory in (saved, tmp_path / "rounded"):
        loaded = dsv4.load_model(directory, precision)
        dtype = getattr(torch, precision)
        assert loaded.layers[2].attn.wkv.weight.dtype == dtype
        assert loaded.layers[2].ffn.experts.w1.dtype == dtype
        assert loaded.layers[2].attn.attn_sink.dtype == torch.float32
        expected = model.embed.weight if directory == saved else model.embed.weight.bfloat16()
        assert torch.equal(loaded.embed.weight, expected.to(dtype))
    assert_same_bits(dsv4.load_model(saved, "bfloat16"), dsv4.load_model(tmp_path / "rounded", "bfloat16"))


def test_files_are_those_of_the_inventory(model, saved):
    layers = model.config.num_layers
    total = layers + 3  # embedding, layers, head, MTP block
    names = [f"model-{n:05d}-of-{total:05d}.safetensors" for n in range(1, total + 1)]
    assert sorted(file.name for file in saved.iterdir()) == sorted(
        ["config.json", "generation_config.json", INDEX, *names]
    )
    index = json.loads((saved / INDEX).read_text())
    specs = {spec.name: spec for spec in inventory(model.config)}
    held, num_bytes = {}, 0
    for name in names:
        with safe_open(saved / name, framework="pt") as shard:
            assert shard.metadata() == {"format": "pt"}
            for tensor in shard.keys():  # noqa: SIM118 - not a dict
                part = shard.get_slice(tensor)
                assert (tuple(part.get_shape()), part.get_dtype()) == (specs[tensor].shape, specs[tensor].dtype)
                num_bytes += specs[tensor].num_bytes
                held[tensor] = name
    assert held == index["weight_map"]
    assert held.keys() == specs.keys()
    assert index["metadata"] == {"total_size": num_bytes}
    counts = Counter(held.values())
    assert counts[names[0]] == 1
    assert counts[names[layers + 1]] == 5
    assert held["layers.3.ffn.experts.8.w2.weight"] == names[4]
    assert held["mtp.0.e_proj.weight"] == names[-1]


def test_an_expert_is_its_slice_of_the_stack(model, saved):
    shard = load_file(saved / "model-00005-of-00009.safetensors")
    for expert in range(model.config.moe.num_experts):
        for name in ("w1", "w2", "w3"):
            stack = getattr(model.layers[3].ffn.experts, name)
            assert torch.equal(shard[f"layers.3.ffn.experts.{expert}.{name}.weight"], stack[expert])


@pytest.mark.parametrize("make", [flash_like, pro_like])
def test_config_comes_back(make, tmp_path):
    dsv4.save_model(toy_model(make()), tmp_path / "toy")
    assert load_config(tmp_path / "toy") == make()


def test_nothing_is_pickled(saved, monkeypatch):
    import pickle

    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    dsv4.load_model(saved)
    assert {file.suffix for file in saved.iterdir()} == {".safetensors", ".json"}


def test_a_model_converted_as_a_whole_is_refused(tmp_path):
    model = toy_model(flash_like()).to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"hc_attn_fn has dtype torch\.bfloat16; expected torch\.float32"):
        dsv4.save_model(model, tmp_path / "toy")
    assert not any(tmp_path.iterdir())


def test_a_dtype_no_checkpoint_has_is_refused(tmp_path):
    model = toy_model(flash_like()).half()
    with pytest.raises(ValueError, match=r"embed\.weight has dtype torch\.float16; expected torch\.float32 or"):
        dsv4.save_model(model, tmp_path / "toy")
    assert not any(tmp_path.iterdir())


def test_the_current_directory_and_a_link_are_directories_too(model, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    (tmp_path / "real").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for directory in (".", "../link"):
        dsv4.save_model(model, directory)
    monkeypatch.chdir(tmp_path)
    assert (tmp_path / "here" / "config.json").is_file()
    assert (tmp_path / "real" / "config.json").is_file()


def test_saving_changes_nothing_in_the_model(tmp_path):
    model = toy_model(flash_like())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dsv4.save_model(model, tmp_path / "toy")
    assert model.training
    assert model.config == flash_like()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_empty_directory_may_be_there(model, tmp_path):
    dsv4.save_model(model, tmp_path)
    assert_same_bits(model, dsv4.load_model(tmp_path))


def test_a_directory_in_use_is_refused(model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not empty; expected a new or empty one"):
        dsv4.save_model(model, tmp_path)
    with pytest.raises(ValueError, match="exists and is not empty; expected a new or empty one"):
        dsv4.save_model(model, tmp_path / "notes.txt")
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_a_parent_that_is_not_there_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="does not exist; expected an existing parent"):
        dsv4.save_model(model, tmp_path / "no" / "toy")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("is_there", [False, True], ids=["new", "empty"])
def test_a_save_that_fails_leaves_nothing(model, tmp_path, monkeypatch, is_there):
    import dsv4.checkpoint.save as home

    calls = []

    def fail_at_third(tensors, path, **kwargs):
        calls.append(path)
        if len(calls) == 3:
            raise OSError("no space left")
        save_file(tensors, path, **kwargs)

    monkeypatch.setattr(home, "save_file", fail_at_third)
    if is_there:
        (tmp_path / "toy").mkdir()
    with pytest.raises(OSError, match="no space left"):
        dsv4.save_model(model, tmp_path / "toy")
    assert len(calls) == 3
    assert [entry.name for entry in tmp_path.rglob("*")] == (["toy"] if is_there else [])
    monkeypatch.undo()
    dsv4.save_model(model, tmp_path / "toy")  # and a second try finds nothing in its way
    assert_same_bits(model, dsv4.load_model(tmp_path / "toy"))


# Loading


@pytest.fixture
def no_model(monkeypatch):
    """No model is built, let alone filled, for a checkpoint that does not fit."""
    import dsv4.checkpoint.load as home

    def refuse(*args, **kwargs):
        raise AssertionError("a model was built")

    monkeypatch.setattr(home, "Transformer", refuse)


def refusal(directory, **options) -> str:
    with pytest.raises(ValueError) as error:
        dsv4.load_model(directory, **options)
    return str(error.value)


def test_a_single_file_without_index(model, single):
    assert_same_bits(model, dsv4.load_model(single()))


def test_everything_wrong_is_listed_at_once(single, no_model):
    message = refusal(
        single(
            {
                "norm.weight": None,
                "layers.2.attn.compressor.ape": None,
                "layers.9.attn.wq_a.weight": torch.zeros(28, 40),
                "layers.2.attn.indexer.extra": torch.zeros(3),
                "head.weight": torch.zeros(100, 40),
                "layers.0.attn.attn_sink": torch.zeros(1, 6),
                "embed.weight": torch.zeros(101, 40, dtype=torch.float16),
                "layers.0.ffn.gate.tid2eid": torch.zeros(101, 5, dtype=torch.int32),
                "layers.1.ffn.experts.3.w2.weight": torch.zeros(22, 40, dtype=torch.int8),
            }
        )
    )
    assert "does not fit its config.json" in message
    assert set(message.splitlines()[1:]) == {
        "  norm.weight: missing",
        "  layers.2.attn.compressor.ape: missing",
        "  layers.9.attn.wq_a.weight: unknown tensor",
        "  layers.2.attn.indexer.extra: unknown tensor",
        "  head.weight: has shape [100, 40]; expected [101, 40], in model.safetensors",
        "  layers.0.attn.attn_sink: has shape [1, 6]; expected [6], in model.safetensors",
        "  embed.weight: has dtype F16; expected BF16 or F32, in model.safetensors",
        "  layers.0.ffn.gate.tid2eid: has dtype I32; expected I64, in model.safetensors",
        "  layers.1.ffn.experts.3.w2.weight: has shape [22, 40]; expected [40, 22], in model.safetensors",
        "  layers.1.ffn.experts.3.w2.weight: has dtype I8; expected BF16 or F32, in model.safetensors",
    }


def test_a_table_is_not_taken_for_a_matrix_nor_a_matrix_for_a_table(single, no_model):
    message = refusal(
        single(
            {
                "layers.0.ffn.gate.tid2eid": torch.zeros(101, 5),
                "layers.2.ffn.gate.bias": torch.zeros(9, dtype=torch.int64),
            }
        )
    )
    assert "layers.0.ffn.gate.tid2eid: has dtype F32; expected I64" in message
    assert "layers.2.ffn.gate.bias: has dtype I64; expected BF16 or F32" in message


@pytest.mark.parametrize("wrong", [-1, flash_like().moe.num_experts])
@pytest.mark.parametrize("weights", ["memory", "mapped"])
def test_a_table_of_experts_that_are_not_there(single, wrong, weights):
    name = "layers.1.ffn.gate.tid2eid"
    table = load_file(single() / SINGLE)[name]
    table[7, 1] = wrong
    assert f"{name} holds expert {wrong}; expected 0 to" in refusal(single({name: table}), weights=weights)


def test_a_long_list_is_cut_and_counted(single, no_model):
    extra = {f"extra.{number}": torch.zeros(1) for number in range(25)}
    lines = refusal(single(extra)).splitlines()
    assert len(lines) == 1 + 20 + 1
    assert lines[-1] == "  ... and 5 more"


@pytest.mark.parametrize("end", ["data", "header", "start"])
def test_a_truncated_file(sharded, no_model, end):
    file = sharded / "model-00004-of-00009.safetensors"
    size = {"data": file.stat().st_size - 1, "header": 100, "start": 0}[end]
    os.truncate(file, size)
    assert f"file {file} cannot be read as safetensors" in refusal(sharded)


def test_every_truncated_file_is_named(sharded, no_model):
    files = sorted(sharded.glob("*.safetensors"))[1:3]
    for file in files:
        file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"cannot be read") as error:
        dsv4.load_model(sharded)
    assert all(file.name in str(error.value) for file in files)


def test_a_tensor_of_the_index_that_nobody_knows(sharded, no_model):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["ghost"] = index["weight_map"]["embed.weight"]
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="ghost: in the index, but in no file"):
        dsv4.load_model(sharded)


def test_a_file_that_is_not_there(sharded, no_model):
    file = sharded / "model-00004-of-00009.safetensors"
    file.unlink()
    assert f"file {file} cannot be read as safetensors" in refusal(sharded)


def edit_index(directory, edit):
    index = json.loads((directory / INDEX).read_text())
    edit(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


def test_a_tensor_the_index_does_not_name(sharded, no_model):
    edit_index(sharded, lambda weight_map: weight_map.pop("layers.0.attn.wq_a.weight"))
    assert "layers.0.attn.wq_a.weight: in model-00002-of-00009.safetensors; the index puts it in no file" in refusal(
        sharded
    )


def test_a_tensor_in_another_file_than_the_index_says(sharded, no_model):
    first, head = "model-00001-of-00009.safetensors", "model-00008-of-00009.safetensors"
    edit_index(sharded, lambda weight_map: weight_map.update({"norm.weight": first}))
    assert f"norm.weight: in {head}; the index puts it in {first}" in refusal(sharded)


def test_a_tensor_in_two_files(sharded, no_model):
    first = sharded / "model-00001-of-00009.safetensors"
    save_file(load_file(first) | {"norm.weight": torch.zeros(40)}, first)
    assert f"norm.weight: in {first.name}; the index puts it in model-00008-of-00009.safetensors" in refusal(sharded)


def test_a_tensor_the_index_names_and_its_file_lacks(sharded, no_model):
    head = sharded / "model-00008-of-00009.safetensors"
    tensors = load_file(head)
    del tensors["norm.weight"]
    save_file(tensors, head)
    assert "norm.weight: missing" in refusal(sharded)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/tmp/outside.safetensors", "sub/inside.safetensors"])
def test_a_file_outside_the_directory(sharded, no_model, name):
    save_file({"norm.weight": torch.zeros(40)}, sharded.parent / "outside.safetensors")
    edit_index(sharded, lambda weight_map: weight_map.update({"norm.weight": name}))
    assert f"names the file {name!r}; expected a plain name inside {sharded}" in refusal(sharded)


@pytest.mark.parametrize(
    "text", [b"{", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": null}', b"\xff\xfe", b""], ids=repr
)
def test_an_index_that_cannot_be_read(sharded, no_model, text):
    (sharded / INDEX).write_bytes(text)
    message = refusal(sharded)
    assert f"index {sharded / INDEX} is not readable" in message
    assert "expected JSON with a weight_map" in message


def test_neither_index_nor_single_file(sharded, no_model):
    (sharded / INDEX).unlink()
    assert f"has neither {INDEX} nor {SINGLE}; expected one of them" in refusal(sharded)


def test_no_config(sharded, no_model):
    (sharded / "config.json").unlink()
    assert refusal(sharded) == f"directory is {sharded}; expected one that holds a config.json"


def test_no_directory(tmp_path, no_model):
    assert "expected a directory with config.json and safetensors files" in refusal(tmp_path / "no")
    (tmp_path / "file").write_text("")
    assert "expected a directory with config.json and safetensors files" in refusal(tmp_path / "file")


def test_a_config_of_another_model(sharded, no_model):
    config = load_config(sharded)
    save_config(replace(config, moe=replace(config.moe, expert_dim=24)), sharded)
    message = refusal(sharded)
    assert "layers.0.ffn.experts.0.w1.weight: has shape [22, 40]; expected [24, 40]" in message


def test_scales_beside_numbers_are_unknown(single, no_model):
    message = refusal(single({"layers.0.attn.wq_a.scale": torch.ones(1, 1)}))
    assert message.splitlines()[1:] == ["  layers.0.attn.wq_a.scale: unknown tensor"]


def test_what_the_tensors_are_counts_not_what_the_config_says(tmp_path):
    config = replace(flash_like(), hidden_size=64, moe=replace(flash_like().moe, expert_dim=96))
    model = toy_model(config)
    dsv4.save_model(model, tmp_path / "toy")
    save_config(replace(config, storage="fp4"), tmp_path / "toy")
    assert_same_bits(model, dsv4.load_model(tmp_path / "toy"))


@pytest.mark.parametrize("precision", ["float16", "fp8", "", "Float32"])
def test_an_unknown_precision(saved, no_model, precision):
    assert (
        refusal(saved, precision=precision)
        == f"precision is {precision!r}; expected one of released, float32, bfloat16"
    )


def test_an_unknown_backend(saved):
    assert "backend is 'fast'; expected one of" in refusal(saved, backend="fast")
