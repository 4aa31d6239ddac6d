"""Checkpoints of random weights: what the files hold, and that a tensor hangs on its name and the seed alone."""

import json
import math
import re
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from dsv4.accounting.tensors import inventory, num_shards, shard_name, total_bytes
from dsv4.checkpoint.load import load_model
from dsv4.checkpoint.names import released_tensors
from dsv4.checkpoint.synth import EMBEDDING, SMALL, synth_config, synthesise
from dsv4.config.load import load_config
from dsv4.config.presets import flash, nano, pro
from dsv4.model.init import new_model
from dsv4.ops.lowbit import Packed, dequantise, quantise_blocks, quantise_fp4
from dsv4.testing.toys import flash_like

STORAGES = ("fp4", "fp8", "bfloat16", "float32")
DTYPES = {
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64",
    torch.int8: "I8",
}
LAYERS = (1, 0, 4, 3)  # of window, window, csa, hca, csa, hca, of which the first two are routed by token id


def toy(storage):
    """Matrices of one to three blocks of 128, up and across, most with a smaller one at the edge."""
    small = flash_like()
    return replace(
        small,
        hidden_size=96,
        moe=replace(small.moe, expert_dim=288, num_experts=7),
        indexer=replace(small.indexer, top_k=4),
        storage=storage,
    )


def read(directory):
    """All tensors of a checkpoint, each with its file."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118, an open file is not a dict
                assert name not in found
                found[name] = file.get_tensor(name)
    return found


def raw(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8)


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint of some layers and the MTP block in each storage."""
    root = tmp_path_factory.mktemp("synth")
    for storage in STORAGES:
        synthesise(toy(storage), root / storage, layers=LAYERS, mtp=True, seed=5)
    return root


@pytest.fixture(scope="module")
def values(made):
    """The tensors in each storage."""
    return {storage: read(made / storage) for storage in STORAGES}


@pytest.mark.parametrize("storage", STORAGES)
def test_the_files_are_the_inventory(storage, made, values):
    config = synth_config(toy(storage), LAYERS, mtp=True)
    specs = inventory(config)
    found = {name: (tuple(tensor.shape), DTYPES[tensor.dtype]) for name, tensor in values[storage].items()}
    assert found == {spec.name: (spec.shape, spec.dtype) for spec in specs}
    index = json.loads((made / storage / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total_bytes(specs)
    total = num_shards(config)
    assert index["weight_map"] == {spec.name: shard_name(spec.shard, total) for spec in specs}
    assert load_config(made / storage) == config
    generation = json.loads((made / storage / "generation_config.json").read_text())
    assert {name: generation[name] for name in ("do_sample", "temperature", "top_p")} == {
        "do_sample": True,
        "temperature": 1.0,
        "top_p": 1.0,
    }
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (config.bos_token_id, config.eos_token_id)


@pytest.mark.parametrize("storage", ["fp4", "fp8"])
def test_codes_are_those_of_the_float_matrix(storage, values):
    held, floats = values[storage], values["float32"]
    scales = [name for name in held if name.endswith(".scale")]
    assert len(scales) > 100
    for name in scales:
        weight = name.removesuffix("scale") + "weight"
        codes, scale = held[weight].view(torch.uint8), held[name]
        is_fp4 = storage == "fp4" and ".experts." in name
        if is_fp4:
            wanted = quantise_fp4(floats[weight])
        else:
            wanted = quantise_blocks(floats[weight], torch.uint8 if storage == "fp4" else torch.float32)
        assert torch.equal(codes, wanted.codes), name
        if storage == "fp4":
            scale = scale.view(torch.uint8)
            assert int(scale.max()) < 255, name
        assert torch.equal(scale, wanted.scales), name
        wanted.check_scales()


@pytest.mark.parametrize("storage", STORAGES)
def test_matrices_keep_the_size_of_what_passes_through(storage, values):
    """The deviation of each kind of matrix, over layers and experts, within four standard errors and what codes cost.

    Rounding changes a variance by its error: relative steps up to 1/3 in FP4 lower the deviation by 0.3%, and the
    floor of Base scales is far below.
    """
    config = toy(storage)
    kinds = defaultdict(list)
    for spec in inventory(synth_config(config, LAYERS, mtp=True)):
        if spec.role != "matrix":
            continue
        tensor, scale = values[storage][spec.name], values[storage].get(spec.name.removesuffix("weight") + "scale")
        if scale is not None:
            kind = "fp4" if spec.dtype == "I8" else "fp8"
            numbers = scale if scale.dtype == torch.float32 else scale.view(torch.uint8)
            tensor = dequantise(Packed(tensor.view(torch.uint8), numbers, kind), torch.float32)
        is_mix = spec.name.endswith("_fn")
        spread = config.initializer_range if is_mix else spec.logical_shape[1] ** -0.5
        kinds[re.sub(r"\d+", "N", spec.name)].append((tensor.double() / spread).flatten())
    assert len(kinds) > 20
    for name, parts in kinds.items():
        numbers = torch.cat(parts)
        allowed = 4 / math.sqrt(2 * len(numbers)) + 0.005
        assert numbers.std().item() == pytest.approx(1, abs=allowed), name
        assert abs(numbers.mean().item()) < 4 / math.sqrt(len(numbers)), name
        within = (numbers.abs() < 1).double().mean().item()  # of a normal number: 0.6827
        if len(numbers) > 20000 and "experts" not in name:  # E2M1 holds few values near one deviation
            assert within == pytest.approx(0.6827, abs=0.02), name


def test_everything_else_is_near_a_fresh_model(values):
    held = values["float32"]
    config = synth_config(toy("float32"), LAYERS, mtp=True)
    fresh = {name: tensor for name, tensor in released_tensors(new_model(config)) if tensor.dtype == torch.float32}
    for name, tensor in fresh.items():
        leaf = name.rsplit(".", 1)[-1]
        if leaf.endswith(("_base", "_scale")) or leaf == "attn_sink":
            assert torch.equal(held[name], tensor), name
        elif tensor.dim() == 1 or leaf == "ape":
            away = (held[name] - tensor) / SMALL
            assert 0.3 < away.square().mean().sqrt() < 2, name
    embed = held["embed.weight"]
    assert embed.std().item() == pytest.approx(EMBEDDING, rel=0.03)


def test_tables_name_distinct_experts_evenly(values):
    tables = [tensor for name, tensor in values["fp4"].items() if name.endswith("tid2eid")]
    assert len(tables) == 2
    assert not torch.equal(*tables)
    num_experts = toy("fp4").moe.num_experts
    for table in tables:
        assert all(len(set(row)) == len(row) for row in table.tolist())
        for column in table.T:  # 101 draws of 7: 14.4 each, give or take 3.5
            counts = torch.bincount(column, minlength=num_experts)
            assert len(counts) == num_experts
            assert 1 <= counts.min() <= counts.max() < 33


def test_the_same_seed_gives_the_same_bytes_by_any_number_of_workers(made, tmp_path):
    torch.set_num_threads(2)
    synthesise(toy("fp4"), tmp_path / "again", layers=LAYERS, mtp=True, seed=5, workers=3)
    assert contents(tmp_path / "again") == contents(made / "fp4")


def test_another_seed_gives_other_numbers(values, tmp_path):
    synthesise(toy("fp4"), tmp_path / "other", layers=LAYERS, mtp=True, seed=6)
    other = read(tmp_path / "other")
    for name, tensor in values["fp4"].items():
        is_constant = name.endswith(("_base", "_scale", "attn_sink"))
        may_be_equal = is_constant or name.endswith(".scale")  # scales have few values
        assert may_be_equal or not torch.equal(raw(tensor), raw(other[name])), name


def test_a_layer_holds_the_same_whatever_others_are_there(values, tmp_path):
    synthesise(toy("fp4"), tmp_path / "all", mtp=True, seed=5)
    whole, part = read(tmp_path / "all"), values["fp4"]
    for name, tensor in part.items():
        if name.startswith("layers."):
            start, place, rest = name.split(".", 2)
            name = f"{start}.{LAYERS[int(place)]}.{rest}"
        assert torch.equal(raw(tensor), raw(whole[name])), name
    for rest in ("attn.wq_a.weight", "ffn.experts.0.w1.weight", "ffn.experts.1.w1.weight", "hc_attn_fn"):
        layers = [whole[f"layers.{layer}.{rest}"] for layer in range(6)]
        assert not any(torch.equal(raw(a), raw(b)) for i, a in enumerate(layers) for b in layers[:i]), rest
    first = [whole[f"layers.0.ffn.experts.{expert}.w1.weight"] for expert in range(2)]
    assert not torch.equal(*first)


def test_what_was_cut_off_goes_on(made, tmp_path):
    class CutOffError(Exception):
        pass

    def stop(done, total):
        if done > total // 2:
            raise CutOffError

    for seed in (6, 5):  # what another seed left is not taken over
        with pytest.raises(CutOffError):
            synthesise(toy("fp4"), tmp_path / "model", layers=LAYERS, mtp=True, seed=seed, tell=stop)
        assert not (tmp_path / "model").exists()
    told = []
    synthesise(
        toy("fp4"), tmp_path / "model", layers=LAYERS, mtp=True, seed=5, tell=lambda *counts: told.append(counts)
    )
    assert contents(tmp_path / "model") == contents(made / "fp4")
    total = total_bytes(inventory(synth_config(toy("fp4"), LAYERS, mtp=True)))
    assert 0 < told[0][0] < total  # what was whole is not made again
    assert told[-1] == (total, total)


def test_activations_neither_vanish_nor_explode(made):
    """Every sub-layer gives numbers as large as the embedding's, and logits are apart by about one."""
    model = load_model(made / "bfloat16")
    sizes = []
    for block in model.layers:
        for part in (block.attn, block.ffn):
            part.register_forward_hook(lambda module, given, made: sizes.append(_size(made)))
    with torch.no_grad():
        logits = model(torch.randint(0, model.config.vocab_size, (2, 150))).logits
    assert len(sizes) == 2 * len(LAYERS)
    assert all(0.15 < size < 1.5 for size in sizes), sizes  # seen: 0.38 to 0.76
    assert logits.std().item() == pytest.approx(1, abs=0.1)


def _size(made):
    tensor = made[0] if isinstance(made, tuple) else made
    return tensor.square().mean().sqrt().item()


def test_a_config_of_some_layers():
    config = toy("fp4")
    part = synth_config(config, LAYERS)
    assert part.layer_kinds == ("window", "window", "csa", "hca")
    assert part.moe.num_hash_layers == 2
    assert part.mtp_kinds == ()
    assert synth_config(config, (3, 5)).moe.num_hash_layers == 0
    assert synth_config(config, (1, 5)).layer_kinds == ("window", "hca")
    assert synth_config(config, (1, 5)).moe == replace(config.moe, num_hash_layers=1)
    assert synth_config(config, mtp=True) == config


@pytest.mark.parametrize(
    ("preset", "size", "tensors"), [(flash, 159_609_485_896, 69_187), (pro, 864_704_792_696, 145_116)]
)
def test_all_layers_have_the_bytes_of_the_release(preset, size, tensors):
    specs = inventory(synth_config(preset(), range(preset().num_layers), mtp=True))
    assert total_bytes(specs) == size
    assert len(specs) == tensors


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((0, 6), "layers holds 6; expected 0 to 5"),
        ((-1,), "layers holds -1; expected 0 to 5"),
        ((0, 3, 3), "layers holds 3 twice; expected each layer once"),
        ((), "layers is empty; expected at least one layer"),
        ((1, 3, 0), "layers holds 3 before 0; expected layers that are routed by token id, those below 2, to come"),
    ],
)
def test_a_choice_that_cannot_be(layers, message, tmp_path):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        synthesise(toy("fp4"), tmp_path / "model", layers=layers)
    assert list(tmp_path.iterdir()) == []


def test_an_mtp_block_that_is_not_there():
    with pytest.raises(ValueError, match="mtp is True, but the model has no MTP block; expected False"):
        synth_config(replace(nano(), mtp_kinds=()), mtp=True)


def test_no_workers(tmp_path):
    with pytest.raises(ValueError, match="workers is 0; expected at least 1"):
        synthesise(toy("fp4"), tmp_path / "model", workers=0)


def test_a_directory_in_use(tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not empty"):
        synthesise(toy("fp4"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]
