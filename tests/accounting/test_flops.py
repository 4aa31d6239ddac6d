"""FLOPs against sums written out, and against figure 1 of the report."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4.accounting.cost import Cost, flops_by_kind, total_flops, total_fp8_equivalent
from dsv4.accounting.flops import decode, decode_each, mtp, prefill, training, visible_at, visible_in
from dsv4.config.presets import flash, flash_base, nano, pro

MILLION = 1048576


def test_rates():
    for precision, equivalent in (("fp4", 5), ("fp8", 10), ("bf16", 20)):
        assert Cost(kind="head", flops=10, precision=precision).fp8_equivalent == equivalent


def test_matrices_of_flash_are_twice_the_activated_parameters_that_multiply():
    d, heads = 4096, 64
    vectors = (
        356_352  # norms
        + 43 * (1024 + 512 + heads)  # query and key-value norms, sinks
        + 21 * (4 * 1024 + 512)  # CSA position tables and norms
        + 20 * (128 * 512 + 512)  # HCA ones
        + 21 * (4 * 256 + 128)  # indexer ones
        + 40 * 256  # balance biases
        + 43 * 2 * (24 + 3)  # hyper-connection biases and gates
        + 5  # of the head
    )
    mixing = 43 * 2 * (2 * 4 * d + 16 * d) + 4 * d
    kinds = flops_by_kind(decode(flash(), MILLION))
    scores = 21 * 2 * 64 * (128 + 1) * (MILLION // 4)
    matrices = sum(kinds.values()) - kinds["attention"] - scores
    assert matrices == 2 * (13_270_101_591 - vectors + mixing)


def test_attention_of_flash_at_one_million():
    kinds = flops_by_kind(decode(flash(), MILLION))
    keys = 2 * 128 + 21 * (128 + 512) + 20 * (128 + 8192)
    assert kinds["attention"] == 4 * 64 * 512 * keys


def test_attention_of_pro_at_the_edges():
    # Token 127 closes no HCA block; token 128 closes one and sees it.
    for context, window, hca in ((127, 127, 0), (128, 128, 1), (129, 128, 1)):
        csa = context // 4  # all picked: fewer than 1024
        keys = 30 * (window + csa) + 31 * (window + hca)
        assert flops_by_kind(decode(pro(), context))["attention"] == 4 * 128 * 512 * keys


def test_precisions_of_flash():
    costs = decode(flash(), 4096)
    by = {(cost.kind, cost.precision): 0 for cost in costs}
    for cost in costs:
        by[cost.kind, cost.precision] += cost.flops
    assert by["projections", "bf16"] == 2 * 43 * 8192 * 4096  # wo_a alone
    assert ("experts", "bf16") not in by
    assert by["experts", "fp8"] == 2 * 6_492_782_592
    assert by["indexer", "fp4"] == 21 * 2 * 64 * 128 * 1024
    assert by["head", "bf16"] == 2 * 529_530_880
    assert {cost.precision for cost in decode(nano(), 4096)} == {"bf16"}
    assert {c.precision for c in decode(flash_base(), 4096) if c.kind == "indexer"} == {"fp8", "bf16"}


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 700), top_k=st.integers(1, 60), window=st.integers(1, 200))
def test_a_sequence_sees_what_its_tokens_see(length, top_k, window):
    config = nano()
    config = dataclasses.replace(
        config,
        attention=dataclasses.replace(config.attention, window=window),
        indexer=dataclasses.replace(config.indexer, top_k=top_k),
    )
    tokens = [visible_at(config, n) for n in range(1, length + 1)]
    for field in dataclasses.fields(tokens[0]):
        assert getattr(visible_in(config, length), field.name) == sum(getattr(token, field.name) for token in tokens)


def test_prefill_is_the_sum_of_its_decodes_but_for_the_head():
    config, length = nano(), 300
    decodes = sum(total_flops(decode(config, n)) for n in range(1, length + 1))
    head = 2 * config.vocab_size * config.hidden_size
    collapse = 2 * (4 * 4 * config.hidden_size + 4 * config.hidden_size)  # hc_head_fn, then the mix
    assert total_flops(prefill(config, length)) == decodes - (length - 1) * (head + collapse)


def test_training_is_three_forwards_but_for_the_indexer():
    config, length = nano(), 512
    forward = flops_by_kind(decode_sum(config, length))
    train = flops_by_kind(training(config, length))
    for kind in ("projections", "attention", "compressor", "experts", "shared", "router", "hyper_connections", "head"):
        assert train[kind] == 3 * forward[kind], kind
    assert train["mtp"] == 3 * total_flops(mtp(config, length))


def decode_sum(config, length):
    return [cost for costs in decode_each(config, range(1, length + 1)) for cost in costs]


def total_scores(config, length):
    per_entry = config.layer_kinds.count("csa") * 2 * config.indexer.num_heads * (config.indexer.head_dim + 1)
    return per_entry * visible_in(config, length).csa_scored


def test_indexer_training_by_hand():
    config, length = nano(), 512
    scores = total_scores(config, length)
    matrices = flops_by_kind(decode_sum(config, length))["indexer"] - scores
    picked = scores * visible_in(config, length).csa_picked // visible_in(config, length).csa_scored
    assert flops_by_kind(training(config, length))["indexer"] == 2 * matrices + scores + 2 * picked


def test_mtp_by_hand():
    config, length = nano(), 300
    D, H, K, N = 256, 4, 128, 4
    vectors = 5 * D + 128 + K + H + 2 * (24 + 3) + 5 + 8  # norms, latent norms, sinks, stream biases and gates, balance
    matrices = 745_031 - vectors + 4096 * D  # of its own, and the shared head
    mixing = 2 * (2 * N * D + N * N * D) + N * D
    window = sum(min(n, 128) for n in range(1, length + 1))
    assert total_flops(mtp(config, length)) == 2 * length * (matrices + mixing) + 4 * H * K * window


def test_no_mtp_no_mtp_cost():
    config = dataclasses.replace(nano(), mtp_kinds=())
    assert mtp(config, 10) == ()
    assert "mtp" not in flops_by_kind(training(config, 10))


def test_equivalents_add_up():
    costs = decode(pro(), MILLION)
    assert total_fp8_equivalent(costs) == sum(
        cost.flops * {"fp4": 0.5, "fp8": 1, "bf16": 2}[cost.precision] for cost in costs
    )


@pytest.mark.parametrize("account", [decode, prefill, training])
def test_empty_is_refused(account):
    with pytest.raises(ValueError, match="is 0; expected at least 1 token"):
        account(nano(), 0)
