"""V3.2 and the comparison of figure 1 (right) of the report."""

import itertools

from dsv4.accounting.cost import flops_by_kind, total_fp8_equivalent
from dsv4.accounting.efficiency import CONTEXTS, rows
from dsv4.accounting.v32 import V32Config, decode, kv_bytes_per_token, matrix_parameters

MILLION = 1048576


def test_v32_sizes():
    total, used = matrix_parameters(V32Config())
    assert round(total / 1e9) == 672  # 671B and an indexer of 14M in each of 61 layers
    assert round(used / 1e9) == 37
    assert kv_bytes_per_token(V32Config()) == 48_068


def test_v32_without_indexers_is_v3():
    # V3 without its MTP module holds 671,026,419,200 parameters; its norms and balance biases multiply nothing.
    indexer = 61 * (1536 * 8192 + 7168 * 128 + 7168 * 64)
    norms = 61 * (2 * 7168 + 1536 + 512) + 7168
    assert matrix_parameters(V32Config())[0] - indexer + norms + 58 * 256 == 671_026_419_200


def test_v32_decode_by_hand():
    config = V32Config()
    kinds = flops_by_kind(decode(config, MILLION))
    assert kinds["attention"] == 2 * 61 * 128 * 2048 * (576 + 512)
    matrices = 61 * (1536 * 8192 + 7168 * 128 + 7168 * 64)
    assert kinds["indexer"] == 2 * (matrices + 61 * 64 * 129 * MILLION)
    scores = 2 * 61 * 64 * 129 * MILLION
    assert sum(kinds.values()) - kinds["attention"] - scores == 2 * matrix_parameters(config)[1]
    assert flops_by_kind(decode(config, 100))["attention"] == 2 * 61 * 128 * 100 * (576 + 512)


def test_figure_one():
    last = rows()[-1]
    assert last.context == MILLION
    assert f"{last.flops_share(last.pro):.0%}" == "27%"
    assert f"{last.flops_share(last.flash):.0%}" == "10%"
    assert f"{last.kv_share(last.pro):.0%}" == "10%"
    assert f"{last.kv_share(last.flash):.0%}" == "7%"


def test_rows_grow():
    table = rows()
    assert tuple(row.context for row in table) == CONTEXTS == tuple(4096 * 2**i for i in range(9))
    for before, after in itertools.pairwise(table):
        for name in ("v32", "pro", "flash"):
            assert getattr(after, name).kv_bytes == 2 * getattr(before, name).kv_bytes
            assert getattr(after, name).flops > getattr(before, name).flops
        assert after.flops_share(after.pro) < before.flops_share(before.pro)
    assert table[0].v32.flops == total_fp8_equivalent(decode(V32Config(), 4096))
