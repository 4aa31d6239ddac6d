"""Cache bytes against the published layouts."""

import pytest

from dsv4.accounting.cache import (
    CACHE_FORMATS,
    bytes_per_token,
    cache_bytes,
    entry_bytes,
    gqa_bytes_per_token,
    index_row_bytes,
    row_bytes,
    state_bytes,
    tail_bytes,
    window_bytes,
)
from dsv4.config.presets import flash, nano, pro

MILLION = 1048576


@pytest.mark.parametrize(
    ("make", "per_token", "gib"),
    [
        (flash, (13_760, 6_880, 3_514, 3_850), (13.44, 6.72, 3.43, 3.76)),
        (pro, (19_696, 9_848, 5_031, 5_511), (19.23, 9.62, 4.91, 5.38)),
    ],
)
def test_bytes_per_token(make, per_token, gib):
    assert CACHE_FORMATS == ("float32", "bfloat16", "packed", "packed-fp8")
    for form, expected, total in zip(CACHE_FORMATS, per_token, gib, strict=True):
        assert round(bytes_per_token(make(), form)) == expected
        assert round(entry_bytes(make(), form, MILLION) / 2**30, 2) == total


def test_rows():
    assert [row_bytes(flash(), form) for form in CACHE_FORMATS] == [2048, 1024, 584, 584]
    assert [index_row_bytes(flash(), form) for form in CACHE_FORMATS] == [512, 256, 68, 132]
    assert row_bytes(nano(), "packed") == 96 + 2 * 32 + 8


def test_fixed_state():
    assert window_bytes(flash(), "packed") == 44 * 128 * 584
    hca, csa, index = 2 * 4 * 128 * 512, 2 * 4 * 8 * 1024, 2 * 4 * 8 * 256
    assert tail_bytes(flash()) == 20 * hca + 21 * (csa + index)
    assert state_bytes(pro(), "packed") == 62 * 128 * 584 + 31 * hca + 30 * (csa + index)


def test_only_whole_entries_are_stored():
    config = nano()  # 2 CSA layers, 1 HCA layer
    row, index = 168, 17
    for context, csa, hca in ((3, 0, 0), (4, 1, 0), (127, 31, 0), (128, 32, 1), (255, 63, 1), (256, 64, 2)):
        assert entry_bytes(config, "packed", context) == 2 * csa * (row + index) + 1 * hca * row
    assert cache_bytes(config, "packed", 3) == state_bytes(config, "packed")


@pytest.mark.parametrize("make", [flash, pro])
def test_about_two_per_cent_of_grouped_query_attention(make):
    config = make()
    assert round(100 * float(bytes_per_token(config, "packed")) / gqa_bytes_per_token(config.num_layers)) == 2
    assert gqa_bytes_per_token(43) == 176_128
