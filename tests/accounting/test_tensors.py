"""The inventory against the released checkpoints: counts, bytes, names and shapes."""

import dataclasses
from collections import Counter

import pytest

from dsv4.accounting.tensors import count_by_dtype, inventory, num_shards, shard_name, total_bytes
from dsv4.config.presets import PRESETS, flash, flash_base, nano, pro, pro_base

FLASH_DTYPES = {"BF16": 433, "F32": 417, "F8_E4M3": 375, "F8_E8M0": 34167, "I64": 3, "I8": 33792}
PRO_DTYPES = {"BF16": 619, "F32": 590, "F8_E4M3": 528, "F8_E8M0": 71952, "I64": 3, "I8": 71424}
FLASH_BASE_DTYPES = {"BF16": 433, "F32": 34584, "F8_E4M3": 34167, "I64": 3}
PRO_BASE_DTYPES = {"BF16": 619, "F32": 72542, "F8_E4M3": 71952, "I64": 3}
RELEASED = [
    (flash, 69187, 159_609_485_896, 46, FLASH_DTYPES),
    (pro, 145116, 864_704_792_696, 64, PRO_DTYPES),
    (flash_base, 69187, 292_555_345_480, 46, FLASH_BASE_DTYPES),
    (pro_base, 145116, 1_602_325_824_632, 64, PRO_BASE_DTYPES),
]


@pytest.mark.parametrize(("make", "tensors", "num_bytes", "shards", "dtypes"), RELEASED)
def test_released_checkpoints_to_the_byte(make, tensors, num_bytes, shards, dtypes):
    specs = inventory(make())
    assert len(specs) == tensors
    assert total_bytes(specs) == num_bytes
    assert count_by_dtype(specs) == dtypes
    assert num_shards(make()) == shards == max(spec.shard for spec in specs)
    assert len({spec.name for spec in specs}) == tensors


@pytest.mark.parametrize(("make", "tensors", "num_bytes"), [(flash, 1575, 3_593_787_756), (pro, 2343, 13_956_587_692)])
def test_mtp_block_to_the_byte(make, tensors, num_bytes):
    specs = [spec for spec in inventory(make()) if spec.is_mtp]
    assert len(specs) == tensors
    assert total_bytes(specs) == num_bytes
    assert not [spec.name for spec in specs if "embed" in spec.name or spec.name == "mtp.0.head.weight"]


@pytest.mark.parametrize(
    ("make", "per_layer"), [(flash, {"window": 1565, "csa": 1576, "hca": 1569}), (pro, {"csa": 2344, "hca": 2337})]
)
def test_tensors_per_layer_and_shard(make, per_layer):
    config = make()
    counts = Counter(spec.shard for spec in inventory(config))
    assert counts[1] == 1
    for layer, kind in enumerate(config.layer_kinds):
        assert counts[layer + 2] == per_layer[kind], (layer, kind)
    assert counts[config.num_layers + 2] == 5
    for spec in inventory(config):
        if spec.name.startswith("layers."):
            assert spec.shard == int(spec.name.split(".")[1]) + 2


def test_shard_names():
    assert shard_name(1, 46) == "model-00001-of-00046.safetensors"
    assert shard_name(46, 46) == "model-00046-of-00046.safetensors"


# Literal shapes of Flash: what is written here was read off the released files' headers.
SHAPES = {
    "embed.weight": ((129280, 4096), "BF16"),
    "head.weight": ((129280, 4096), "BF16"),
    "norm.weight": ((4096,), "BF16"),
    "hc_head_fn": ((4, 16384), "F32"),
    "hc_head_base": ((4,), "F32"),
    "hc_head_scale": ((1,), "F32"),
    "layers.2.hc_attn_fn": ((24, 16384), "F32"),
    "layers.2.hc_ffn_base": ((24,), "F32"),
    "layers.2.hc_ffn_scale": ((3,), "F32"),
    "layers.2.attn.wq_a.weight": ((1024, 4096), "F8_E4M3"),
    "layers.2.attn.wq_a.scale": ((8, 32), "F8_E8M0"),
    "layers.2.attn.wq_b.weight": ((32768, 1024), "F8_E4M3"),
    "layers.2.attn.wkv.scale": ((4, 32), "F8_E8M0"),
    "layers.2.attn.attn_sink": ((64,), "F32"),
    "layers.2.attn.wo_a.weight": ((8192, 4096), "F8_E4M3"),
    "layers.2.attn.wo_b.weight": ((4096, 8192), "F8_E4M3"),
    "layers.2.attn.compressor.wkv.weight": ((1024, 4096), "BF16"),
    "layers.2.attn.compressor.ape": ((4, 1024), "F32"),
    "layers.2.attn.compressor.norm.weight": ((512,), "BF16"),
    "layers.3.attn.compressor.wgate.weight": ((512, 4096), "BF16"),
    "layers.3.attn.compressor.ape": ((128, 512), "F32"),
    "layers.2.attn.indexer.wq_b.weight": ((8192, 1024), "F8_E4M3"),
    "layers.2.attn.indexer.weights_proj.weight": ((64, 4096), "BF16"),
    "layers.2.attn.indexer.compressor.wkv.weight": ((256, 4096), "BF16"),
    "layers.2.attn.indexer.compressor.ape": ((4, 256), "F32"),
    "layers.2.attn.indexer.compressor.norm.weight": ((128,), "BF16"),
    "layers.2.ffn.gate.weight": ((256, 4096), "BF16"),
    "layers.2.ffn.gate.tid2eid": ((129280, 6), "I64"),
    "layers.3.ffn.gate.bias": ((256,), "F32"),
    "layers.3.ffn.experts.255.w1.weight": ((2048, 2048), "I8"),
    "layers.3.ffn.experts.255.w1.scale": ((2048, 128), "F8_E8M0"),
    "layers.3.ffn.experts.0.w2.weight": ((4096, 1024), "I8"),
    "layers.3.ffn.experts.0.w2.scale": ((4096, 64), "F8_E8M0"),
    "layers.3.ffn.shared_experts.w3.weight": ((2048, 4096), "F8_E4M3"),
    "mtp.0.e_proj.weight": ((4096, 4096), "F8_E4M3"),
    "mtp.0.h_proj.scale": ((32, 32), "F8_E8M0"),
    "mtp.0.enorm.weight": ((4096,), "BF16"),
    "mtp.0.norm.weight": ((4096,), "BF16"),
    "mtp.0.hc_head_fn": ((4, 16384), "F32"),
    "mtp.0.ffn.gate.bias": ((256,), "F32"),
}
ABSENT = (
    "layers.1.attn.compressor.ape",
    "layers.3.attn.indexer.wq_b.weight",
    "layers.2.ffn.gate.bias",
    "layers.3.ffn.gate.tid2eid",
    "layers.2.attn.indexer.weights_proj.scale",
    "layers.2.ffn.gate.scale",
    "mtp.0.attn.compressor.ape",
    "mtp.0.ffn.gate.tid2eid",
    "mtp.1.norm.weight",
)


def test_names_shapes_and_dtypes_of_flash():
    specs = {spec.name: spec for spec in inventory(flash())}
    for name, expected in SHAPES.items():
        assert (specs[name].shape, specs[name].dtype) == expected, name
    assert not [name for name in ABSENT if name in specs]
    assert specs["layers.3.ffn.experts.0.w2.weight"].logical_shape == (4096, 2048)


def test_base_scales_are_f32_blocks():
    specs = {spec.name: spec for spec in inventory(flash_base())}
    weight, scale = specs["layers.3.ffn.experts.0.w1.weight"], specs["layers.3.ffn.experts.0.w1.scale"]
    assert (weight.shape, weight.dtype) == ((2048, 4096), "F8_E4M3")
    assert (scale.shape, scale.dtype) == ((16, 32), "F32")


@pytest.mark.parametrize("name", ["mini", "nano"])
def test_bfloat16_is_the_release_without_scales(name):
    config = PRESETS[name]()
    plain = {spec.name: spec for spec in inventory(config)}
    quantised = {spec.name: spec for spec in inventory(dataclasses.replace(config, storage="fp4"))}
    assert set(plain) == {key for key, spec in quantised.items() if spec.role != "scale"}
    for key, spec in plain.items():
        assert spec.shape == quantised[key].logical_shape
        assert spec.dtype == (quantised[key].dtype if quantised[key].dtype in ("F32", "I64") else "BF16")


def test_blocks_of_odd_sizes_round_up():
    config = dataclasses.replace(nano(), storage="fp8", hidden_size=288)
    scale = next(spec for spec in inventory(config) if spec.name == "layers.0.attn.wq_a.scale")
    assert scale.shape == (1, 3)


def test_without_mtp_there_is_no_last_shard():
    config = dataclasses.replace(nano(), mtp_kinds=())
    assert num_shards(config) == num_shards(nano()) - 1
    assert [s for s in inventory(nano()) if not s.is_mtp] == list(inventory(config))
