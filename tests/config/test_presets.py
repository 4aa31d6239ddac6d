"""Presets: the released patterns, the small models' promises, names."""

import dataclasses
from collections import Counter

import pytest

from dsv4.accounting.flops import decode
from dsv4.accounting.parameters import parameters
from dsv4.config.model import RATIO
from dsv4.config.presets import (
    PRESETS,
    bench_engine,
    flash,
    flash_base,
    nano,
    nano_long,
    preset,
    pro,
    pro_base,
    smoke,
)


def test_released_patterns_are_the_released_compress_ratios():
    assert [RATIO[kind] for kind in flash().layer_kinds] == [0, 0] + [4, 128] * 20 + [4]
    assert [RATIO[kind] for kind in pro().layer_kinds] == [128, 128] + [4, 128] * 29 + [4]
    assert Counter(flash().layer_kinds) == {"window": 2, "csa": 21, "hca": 20}
    assert Counter(pro().layer_kinds) == {"csa": 30, "hca": 31}


@pytest.mark.parametrize(("base", "instruct"), [(flash_base, flash), (pro_base, pro)])
def test_base_differs_from_instruct_in_storage_alone(base, instruct):
    assert base().storage == "fp8"
    assert dataclasses.replace(base(), storage="fp4") == instruct()


@pytest.mark.parametrize("name", ["mini", "nano", "smoke"])
def test_small_models_have_every_idea_of_the_large(name):
    config = preset(name)
    assert set(config.layer_kinds) == {"window", "csa", "hca"}
    assert config.mtp_kinds == ("window",)
    assert 0 < config.moe.num_hash_layers < config.num_layers
    assert config.storage == "bfloat16"
    # A context must be long enough for the indexer to leave entries out, and for an HCA entry beyond the window.
    assert config.max_context // RATIO["csa"] > config.indexer.top_k
    assert config.max_context > config.attention.window + RATIO["hca"]
    assert config.indexer.head_dim % 32 == 0  # keys quantise in groups of 32; a row's last group may be short of 64


def test_toy_sizes_of_nano_differ_where_a_swap_could_hide():
    config = nano()
    assert config.hidden_size != config.attention.num_heads * config.attention.head_dim
    assert config.attention.group_dim == 256


def test_smoke_is_tiny():
    assert 100_000 < parameters(smoke()).with_mtp.total < 350_000


def test_nano_1m_is_nano_but_for_its_context():
    assert dataclasses.replace(nano_long(), max_context=nano().max_context) == nano()
    assert nano_long().max_context == 2**20


def test_the_indexer_of_nano_is_in_proportion_to_that_of_flash():
    def share(config):
        costs = decode(config, 2**20)
        return sum(cost.flops for cost in costs if cost.kind == "indexer") / sum(cost.flops for cost in costs)

    assert [config.indexer.head_dim / config.attention.head_dim for config in (nano(), flash())] == [0.25, 0.25]
    assert [round(100 * share(config)) for config in (nano(), flash())] == [72, 65]


def test_bench_engine_is_the_shape_of_the_benchmark():
    config = bench_engine()
    assert [RATIO[kind] for kind in config.layer_kinds] == [0, 0, 4, 128, 4, 128, 4, 128]
    assert parameters(config).main.total // 10**6 == 246
    assert config.vocab_size == 129280
    assert config.max_context == 2**20


def test_every_preset_is_found_by_name():
    released, ours = ["flash", "pro", "flash-base", "pro-base"], ["mini", "nano", "smoke", "nano-1m", "bench-engine"]
    assert list(PRESETS) == released + ours
    for name, make in PRESETS.items():
        assert preset(name) == make()


def test_unknown_preset_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"preset is 'flahs'; expected one of flash, pro, .*did you mean flash\?"):
        preset("flahs")
