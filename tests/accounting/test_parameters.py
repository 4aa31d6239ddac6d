"""Parameter counts against the published ones."""

import dataclasses

import pytest

from dsv4.accounting.parameters import Count, parameters
from dsv4.config.presets import flash, flash_base, mini, nano, pro, pro_base

FLASH = {
    "embedding": (529_530_880, 0),
    "head": (529_530_880, 529_530_880),
    "attention": (4_599_123_136, 4_599_123_136),
    "compressor": (261_464_576, 261_464_576),
    "indexer": (225_730_176, 225_730_176),
    "router": (45_099_008, 45_099_008),
    "routed_experts": (277_025_390_592, 6_492_782_592),
    "shared_experts": (1_082_130_432, 1_082_130_432),
    "hyper_connections": (33_884_439, 33_884_439),
    "norms": (356_352, 356_352),
}
PRO = {
    "embedding": (926_679_040, 0),
    "head": (926_679_040, 926_679_040),
    "attention": (18_293_589_632, 18_293_589_632),
    "compressor": (670_128_640, 670_128_640),
    "indexer": (501_384_960, 501_384_960),
    "router": (167_925_504, 167_925_504),
    "routed_experts": (1_547_396_186_112, 24_178_065_408),
    "shared_experts": (4_029_677_568, 4_029_677_568),
    "hyper_connections": (84_069_603, 84_069_603),
    "norms": (881_664, 881_664),
}


@pytest.mark.parametrize(
    ("make", "by_kind", "main", "mtp", "both"),
    [
        (
            flash,
            FLASH,
            (284_332_240_471, 13_270_101_591),
            (6_610_048_891, 318_592_891),
            (290_942_289_362, 13_588_694_482),
        ),
        (
            pro,
            PRO,
            (1_572_997_201_763, 48_852_402_019),
            (25_840_145_979, 869_357_115),
            (1_598_837_347_742, 49_721_759_134),
        ),
    ],
)
def test_released_counts(make, by_kind, main, mtp, both):
    result = parameters(make())
    assert {kind: (count.total, count.activated) for kind, count in result.by_kind.items()} == by_kind
    assert result.main == Count(total=main[0], activated=main[1])
    assert result.mtp == Count(total=mtp[0], activated=mtp[1])
    assert result.with_mtp == Count(total=both[0], activated=both[1])


@pytest.mark.parametrize(("base", "instruct"), [(flash_base, flash), (pro_base, pro)])
def test_storage_does_not_change_parameters(base, instruct):
    assert parameters(base()) == parameters(instruct())


def test_small_models_are_small():
    assert 100e6 < parameters(mini()).main.total < 300e6
    assert 5e6 < parameters(nano()).main.total < 20e6


def test_more_experts_cost_no_more_per_token_but_their_router():
    config = nano()
    more = dataclasses.replace(config, moe=dataclasses.replace(config.moe, num_experts=16))
    few, many = parameters(config), parameters(more)
    assert many.by_kind["routed_experts"].total == 2 * few.by_kind["routed_experts"].total
    assert many.by_kind["routed_experts"].activated == few.by_kind["routed_experts"].activated
