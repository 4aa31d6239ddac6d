"""Checkpoints from one storage to another: which bytes are copied, which are rounded, and what is refused."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import dsv4
from dsv4.accounting.tensors import inventory
from dsv4.checkpoint.convert import convert
from dsv4.checkpoint.source import open_source
from dsv4.config.load import load_config, save_config
from dsv4.model.transformer import Transformer
from dsv4.ops.lowbit import Packed, dequantise, quantise_blocks, quantise_fp4, reblock
from dsv4.testing.toys import flash_like, toy_model

INDEX = "model.safetensors.index.json"
TOY = flash_like()
CONFIG = replace(  # six heads of 26 channels are two blocks of rows, 320 and 160 two and more of columns
    TOY,
    hidden_size=160,
    layer_kinds=("window", "csa"),
    moe=replace(TOY.moe, num_experts=3, experts_per_token=2, expert_dim=96, num_hash_layers=1),
)
EXPERT, WIDE = "layers.1.ffn.experts.2.w1", "layers.1.attn.wq_b"
SECOND, HEAD = "model-00002-of-00005.safetensors", "model-00004-of-00005.safetensors"
THIRD = "model-00003-of-00005.safetensors"  # layer 1


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A directory of each storage: float32 and bfloat16 from a model, the others converted from them."""
    root = tmp_path_factory.mktemp("made")
    model = toy_model(CONFIG)
    dsv4.save_model(model, root / "float32")
    rounded = Transformer(CONFIG, weight_dtype=torch.bfloat16, activation_dtype=torch.bfloat16)
    rounded.load_state_dict(model.state_dict())
    dsv4.save_model(rounded, root / "bfloat16")
    convert(root / "bfloat16", root / "instruct", "instruct")
    convert(root / "instruct", root / "base", "base")
    return root


@pytest.fixture
def instruct(made, tmp_path):
    """A copy, to spoil."""
    return shutil.copytree(made / "instruct", tmp_path / "source")


@pytest.fixture
def base(made, tmp_path):
    """A copy, to spoil."""
    return shutil.copytree(made / "base", tmp_path / "source")


def tensors(directory):
    found = {}
    for file in directory.glob("*.safetensors"):
        found |= load_file(file)
    return found


def content(directory):
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def same(one, other):
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def packed(found, name):
    codes, scales = found[name + ".weight"], found[name + ".scale"]
    kind = "fp4" if codes.dtype == torch.int8 else "fp8"
    return Packed(codes.view(torch.uint8), scales if scales.dtype == torch.float32 else scales.view(torch.uint8), kind)


def in_codes(config):
    """Names of the matrices that are stored in codes, without suffix, and whether they are experts."""
    return {
        spec.name.removesuffix(".scale"): spec.kind == "routed_experts"
        for spec in inventory(config)
        if spec.role == "scale"
    }


MATRICES = in_codes(replace(CONFIG, storage="fp4"))


def change(directory, shard, changes):
    held = load_file(directory / shard) | changes
    save_file({name: tensor for name, tensor in held.items() if tensor is not None}, directory / shard)
    index = json.loads((directory / INDEX).read_text())
    placed = {name: file for name, file in index["weight_map"].items() if file != shard}
    placed |= {name: shard for name, tensor in held.items() if tensor is not None}
    (directory / INDEX).write_text(json.dumps({"weight_map": placed}))


def refusal(source, form="bfloat16", **options):
    with pytest.raises(ValueError) as caught:
        convert(source, source.parent / "target", form, **options)
    assert not (source.parent / "target").exists()
    return str(caught.value)


def refused_before_anything_is_written(source, form="bfloat16", **options):
    message = refusal(source, form, **options)
    assert not (source.parent / ".target.partial").exists()
    return message


# Values


@pytest.mark.parametrize("source", ["float32", "bfloat16"])
def test_a_matrix_without_codes_is_quantised(made, tmp_path, source):
    held = tensors(made / source)
    for form in ("instruct", "base"):
        convert(made / source, tmp_path / form, form)
        found = tensors(tmp_path / form)
        for name, is_expert in MATRICES.items():
            w = held[name + ".weight"]
            if form == "instruct" and is_expert:
                wanted = quantise_fp4(w)
            else:
                wanted = quantise_blocks(w, torch.uint8 if form == "instruct" else torch.float32)
            got = packed(found, name)
            assert got.kind == wanted.kind, name
            assert same(got.codes, wanted.codes), name
            assert same(got.scales, wanted.scales), name


def test_instruct_stays_the_same_bytes(made, tmp_path):
    convert(made / "instruct", tmp_path / "again", "instruct")
    assert content(tmp_path / "again") == content(made / "instruct")


def test_base_stays_the_same_bytes(made, tmp_path):
    convert(made / "bfloat16", tmp_path / "once", "base")  # with scales that are no powers of two
    convert(tmp_path / "once", tmp_path / "twice", "base")
    assert content(tmp_path / "twice") == content(tmp_path / "once")


@pytest.mark.parametrize("source", ["instruct", "base"])
def test_bfloat16_holds_the_values(made, tmp_path, source):
    convert(made / source, tmp_path / "wide", "bfloat16")
    held, found = tensors(made / source), tensors(tmp_path / "wide")
    assert found.keys() == {name for name in held if not name.endswith(".scale")}
    for name in MATRICES:
        assert same(found[name + ".weight"], dequantise(packed(held, name), torch.bfloat16)), name


def test_instruct_to_base_loses_nothing(made):
    held, found = tensors(made / "instruct"), tensors(made / "base")
    for name, is_expert in MATRICES.items():
        one, other = packed(held, name), packed(found, name)
        assert other.kind == "fp8"
        assert other.scales.dtype == torch.float32
        assert torch.equal(dequantise(one, torch.float32), dequantise(other, torch.float32)), name
        kept = reblock(one) if is_expert else one
        assert same(kept.codes, other.codes), name
        assert torch.equal(kept.scales.view(torch.float8_e8m0fnu).float(), other.scales), name


def test_base_to_instruct_is_quantised_anew(made, tmp_path):
    convert(made / "bfloat16", tmp_path / "base", "base")
    convert(tmp_path / "base", tmp_path / "instruct", "instruct")
    held, found = tensors(tmp_path / "base"), tensors(tmp_path / "instruct")
    for name, is_expert in MATRICES.items():
        w = dequantise(packed(held, name), torch.float32)
        wanted = quantise_fp4(w) if is_expert else quantise_blocks(w)
        got = packed(found, name)
        assert same(got.codes, wanted.codes), name
        assert same(got.scales, wanted.scales), name


def test_fp8_experts_with_scales_of_a_byte(made, base, tmp_path):
    """The released inference code writes such: codes and scales stay as they are where the target has them."""
    for shard in base.glob("*.safetensors"):
        held = load_file(shard)
        bytes_ = {n: t.to(torch.float8_e8m0fnu) for n, t in held.items() if n.endswith(".scale")}
        change(base, shard.name, bytes_)
    assert open_source(base).config.storage == "fp8"
    convert(base, tmp_path / "base", "base")
    assert content(tmp_path / "base") == content(made / "base")
    convert(base, tmp_path / "instruct", "instruct")
    held, found = tensors(made / "instruct"), tensors(tmp_path / "instruct")
    assert same(found[WIDE + ".weight"], held[WIDE + ".weight"])
    assert same(found[WIDE + ".scale"], held[WIDE + ".scale"])
    one, other = packed(held, EXPERT), packed(found, EXPERT)
    assert torch.equal(dequantise(one, torch.float32), dequantise(other, torch.float32))


@pytest.mark.parametrize("form", ["instruct", "base", "bfloat16"])
@pytest.mark.parametrize("source", ["float32", "bfloat16", "instruct", "base"])
def test_what_is_in_no_codes_goes_as_it_is(made, tmp_path, source, form):
    convert(made / source, tmp_path / "target", form)
    held, found = tensors(made / source), tensors(tmp_path / "target")
    config = load_config(tmp_path / "target")
    assert config == replace(CONFIG, storage={"instruct": "fp4", "base": "fp8"}.get(form, "bfloat16"))
    assert {spec.name: spec.shape for spec in inventory(config)} == {n: tuple(t.shape) for n, t in found.items()}
    plain = [s for s in inventory(config) if s.role != "scale" and s.name.removesuffix(".weight") not in MATRICES]
    assert {spec.dtype for spec in plain} == {"BF16", "F32", "I64"}
    for spec in plain:
        wanted = held[spec.name].bfloat16() if spec.dtype == "BF16" else held[spec.name]
        assert same(found[spec.name], wanted), spec.name


def test_a_bfloat16_conversion_loads(made, tmp_path):
    convert(made / "float32", tmp_path / "target", "bfloat16")
    ours, theirs = (dsv4.load_model(path).state_dict() for path in (tmp_path / "target", made / "bfloat16"))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_what_the_tensors_are_counts_not_what_the_config_says(made, instruct, tmp_path):
    save_config(CONFIG, instruct)
    convert(instruct, tmp_path / "target", "instruct")
    assert content(tmp_path / "target") == content(made / "instruct")


def test_one_file_without_an_index(made, tmp_path):
    (tmp_path / "single").mkdir()
    save_file(tensors(made / "instruct"), tmp_path / "single" / "model.safetensors")
    shutil.copy(made / "instruct" / "config.json", tmp_path / "single")
    convert(tmp_path / "single", tmp_path / "target", "instruct")
    assert content(tmp_path / "target") == content(made / "instruct")


# Experts whose scales lie far apart


@pytest.fixture
def far_apart(instruct):
    scales = load_file(instruct / THIRD)[EXPERT + ".scale"].view(torch.uint8)
    scales[3, 1] = scales[3, 1] - 30
    change(instruct, THIRD, {EXPERT + ".scale": scales.view(torch.float8_e8m0fnu)})
    return instruct


def test_a_loss_is_refused_unless_asked_for(far_apart, tmp_path):
    message = refusal(far_apart, "base")
    assert message.startswith(f"{EXPERT}.weight in {far_apart / THIRD}: packed has ")
    assert "expected scales less far apart, or lossy=True" in message
    convert(far_apart, tmp_path / "target", "base", lossy=True)
    wanted = reblock(packed(tensors(far_apart), EXPERT), lossy=True)
    assert same(packed(tensors(tmp_path / "target"), EXPERT).codes, wanted.codes)


@pytest.mark.parametrize(("source", "form"), [("instruct", "bfloat16"), ("base", "base"), ("bfloat16", "base")])
def test_lossy_where_it_means_nothing(made, tmp_path, source, form):
    with pytest.raises(ValueError, match=r"lossy is given for \w+ to \w+; expected fp4 to base"):
        convert(made / source, tmp_path / "target", form, lossy=True)
    assert not list(tmp_path.iterdir())


# Other files


def test_small_files_come_along(instruct, tmp_path):
    (instruct / "tokenizer.json").write_bytes(b'{"a": 1}')
    (instruct / "tokenizer_config.json").write_bytes(b"{}")
    (instruct / "README.md").write_bytes(b"not this")
    (instruct / "encoding" / "tests").mkdir(parents=True)
    (instruct / "encoding" / "encoding_dsv4.py").write_bytes(b"pass\n")
    (instruct / "encoding" / "tests" / "one.txt").write_bytes(b"1\n")
    (instruct / "encoding" / "encoding_dsv4.cpython-311.pyc").write_bytes(b"nor this")
    convert(instruct, tmp_path / "target", "bfloat16")
    found = content(tmp_path / "target")
    for name in ("tokenizer.json", "tokenizer_config.json", "encoding/encoding_dsv4.py", "encoding/tests/one.txt"):
        assert found[name] == (instruct / name).read_bytes()
    assert "README.md" not in found
    assert not any(name.endswith(".pyc") for name in found)


def test_generation_config(made):
    assert json.loads((made / "instruct" / "generation_config.json").read_text()) == {
        "bos_token_id": 0,
        "eos_token_id": 1,
        "do_sample": True,
        "temperature": 1.0,
        "top_p": 1.0,
        "transformers_version": json.loads((made / "instruct" / "config.json").read_text())["transformers_version"],
    }


def test_a_run_stands_for_its_model(made, tmp_path):
    shutil.copytree(made / "bfloat16", tmp_path / "run" / "model")
    (tmp_path / "run" / "config.json").write_text('{"phases": []}')  # the recipe's
    convert(tmp_path / "run", tmp_path / "target", "instruct")
    assert content(tmp_path / "target") == content(made / "instruct")


# Interrupted


def test_a_conversion_goes_on_where_it_was_cut_off(made, tmp_path):
    def stop(done, total):
        if (tmp_path / ".target.partial" / THIRD).exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(made / "bfloat16", tmp_path / "target", "instruct", tell=stop)
    first = {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".target.partial").glob("model-*")}
    assert sorted(first) == [f"model-0000{n}-of-00005.safetensors" for n in (1, 2, 3)]
    convert(made / "bfloat16", tmp_path / "target", "instruct")
    assert content(tmp_path / "target") == content(made / "instruct")
    assert {name: (tmp_path / "target" / name).stat().st_mtime_ns for name in first} == first


@pytest.mark.parametrize("changed", ["form", "source", "version", None])
def test_another_conversion_starts_again(made, tmp_path, monkeypatch, changed):
    source = shutil.copytree(made / "bfloat16", tmp_path / "source")
    first = tmp_path / ".target.partial" / "model-00001-of-00005.safetensors"

    def stop(done, total):
        if first.exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "target", "instruct", tell=stop)
    stamp = first.stat().st_mtime_ns
    if changed == "source":
        os.utime(source / HEAD, ns=(1, 1))
    if changed == "version":
        monkeypatch.setattr("dsv4.checkpoint.convert._VERSION", 2)
    convert(source, tmp_path / "target", "base" if changed == "form" else "instruct")
    was_kept = (tmp_path / "target" / first.name).stat().st_mtime_ns == stamp
    assert was_kept == (changed is None)


# Refused before anything is written


def test_everything_wrong_is_listed_at_once(instruct):
    held = load_file(instruct / THIRD)
    change(
        instruct,
        THIRD,
        {
            WIDE + ".weight": held[WIDE + ".weight"].view(torch.int8),
            WIDE + ".scale": held[WIDE + ".scale"][:1].clone(),
            EXPERT + ".weight": held[EXPERT + ".weight"][:, :-1].clone(),
            EXPERT + ".scale": held[EXPERT + ".scale"].float(),
            "layers.1.ffn.experts.0.w2.weight": held["layers.1.ffn.experts.0.w2.weight"].view(torch.float8_e4m3fn),
            "layers.1.ffn.experts.1.w2.scale": None,
            "layers.1.attn_norm.weight": torch.ones(160),
            "layers.1.ffn.gate.scale": torch.ones(1, 1),
        },
    )
    message = refused_before_anything_is_written(instruct)
    assert message.splitlines()[0] == f"checkpoint {instruct} does not fit its config.json:"
    assert set(message.splitlines()[1:]) == {
        f"  {WIDE}.weight: has dtype I8; expected F8_E4M3, in {THIRD}",
        f"  {WIDE}.scale: has shape [1, 1]; expected [2, 1], in {THIRD}",
        f"  {EXPERT}.weight: has shape [96, 79]; expected [96, 80], in {THIRD}",
        f"  {EXPERT}.scale: has dtype F32; expected F8_E8M0, in {THIRD}",
        f"  layers.1.ffn.experts.0.w2.weight: has dtype F8_E4M3; expected I8, in {THIRD}",
        "  layers.1.ffn.experts.1.w2.scale: missing",
        f"  layers.1.attn_norm.weight: has dtype F32; expected BF16, in {THIRD}",
        "  layers.1.ffn.gate.scale: unknown tensor",
    }


def test_fp4_codes_under_an_fp8_name_of_a_base_checkpoint(base):
    held = load_file(base / THIRD)[WIDE + ".weight"].view(torch.int8)
    change(base, THIRD, {WIDE + ".weight": held})
    assert f"{WIDE}.weight: has dtype I8; expected F8_E4M3, in {THIRD}" in refused_before_anything_is_written(base)


def test_a_long_list_is_cut_and_counted(instruct):
    change(instruct, THIRD, {f"extra.{number}": torch.zeros(1) for number in range(25)})
    lines = refused_before_anything_is_written(instruct).splitlines()
    assert len(lines) == 1 + 20 + 1
    assert lines[-1] == "  ... and 5 more"


@pytest.mark.parametrize("end", ["data", "header", "start", "gone", "long header"])
def test_a_damaged_file(instruct, end):
    path = instruct / SECOND
    if end == "gone":
        path.unlink()
    elif end == "long header":
        path.write_bytes((path.stat().st_size + 1).to_bytes(8, "little") + path.read_bytes()[8:])
    else:
        os.truncate(path, {"data": path.stat().st_size - 1, "header": 100, "start": 0}[end])
    assert f"file {path} cannot be read as safetensors" in refused_before_anything_is_written(instruct)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/tmp/outside.safetensors", "sub/in.safetensors", ".."])
def test_an_index_that_names_a_path_outside(instruct, name):
    index = json.loads((instruct / INDEX).read_text())
    index["weight_map"]["norm.weight"] = name
    (instruct / INDEX).write_text(json.dumps(index))
    message = refused_before_anything_is_written(instruct)
    assert f"names the file {name!r}; expected a plain name inside {instruct}" in message


@pytest.mark.parametrize("text", [b"{", b"[]", b"{}", b'{"weight_map": []}', b"\xff\xfe", b""], ids=repr)
def test_an_index_that_cannot_be_read(instruct, text):
    (instruct / INDEX).write_bytes(text)
    assert f"index {instruct / INDEX} is not readable" in refused_before_anything_is_written(instruct)


def test_files_that_disagree_with_the_index(instruct):
    index = json.loads((instruct / INDEX).read_text())
    placed = index["weight_map"]
    placed["norm.weight"] = SECOND
    placed["ghost"] = HEAD
    del placed["head.weight"]
    (instruct / INDEX).write_text(json.dumps(index))
    assert set(refused_before_anything_is_written(instruct).splitlines()[1:]) == {
        f"  norm.weight: in {HEAD}; the index puts it in {SECOND}",
        f"  head.weight: in {HEAD}; the index puts it in no file",
        "  ghost: in the index, but in no file",
    }


def test_neither_index_nor_single_file(instruct):
    (instruct / INDEX).unlink()
    assert f"has neither {INDEX} nor model.safetensors" in refused_before_anything_is_written(instruct)


def test_no_source(tmp_path):
    message = refused_before_anything_is_written(tmp_path / "no")
    assert message == f"directory is {tmp_path / 'no'}; expected a directory with config.json and safetensors files"


def test_sizes_that_fp4_does_not_allow(tmp_path):
    dsv4.save_model(toy_model(replace(CONFIG, hidden_size=40)), tmp_path / "toy")
    message = refused_before_anything_is_written(tmp_path / "toy", "instruct")
    assert message == "the FP4 scale group is 32; expected a divisor of hidden_size = 40"


def test_an_unknown_form(instruct):
    message = refused_before_anything_is_written(instruct, "fp4")
    assert message == "form is 'fp4'; expected one of instruct, base, bfloat16"


def test_a_target_in_use(made, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not empty; expected a new or empty one"):
        convert(made / "bfloat16", tmp_path, "instruct")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


# Refused when they are read


@pytest.mark.parametrize("name", [EXPERT, WIDE])
@pytest.mark.parametrize("form", ["instruct", "base", "bfloat16"])
def test_a_scale_byte_that_is_no_number(instruct, name, form):
    scales = load_file(instruct / THIRD)[name + ".scale"].view(torch.uint8)
    scales[1, 0] = 255
    change(instruct, THIRD, {name + ".scale": scales.view(torch.float8_e8m0fnu)})
    assert refusal(instruct, form).startswith(f"{name}.scale in {instruct / THIRD}: scales holds 255 at [1, 0]")


@pytest.mark.parametrize("value", [0.0, -0.5, float("inf"), float("nan")])
@pytest.mark.parametrize("form", ["instruct", "base", "bfloat16"])
def test_a_float_scale_that_is_no_positive_number(base, value, form):
    scales = load_file(base / THIRD)[WIDE + ".scale"]
    scales[1, 0] = value
    change(base, THIRD, {WIDE + ".scale": scales})
    assert refusal(base, form).startswith(f"{WIDE}.scale in {base / THIRD}: scales holds {value} at [1, 0]")


def test_a_weight_that_is_not_finite(made, tmp_path):
    source = shutil.copytree(made / "bfloat16", tmp_path / "source")
    w = load_file(source / THIRD)[EXPERT + ".weight"]
    w[2, 7] = torch.inf
    change(source, THIRD, {EXPERT + ".weight": w})
    assert refusal(source, "instruct").startswith(f"{EXPERT}.weight in {source / THIRD}: w holds inf at [2, 7]")
