"""Training memory: every parameter in one optimizer, sums written out."""

import dataclasses

from dsv4.accounting.memory import (
    optimizer_of,
    training_memory,
    weights_bytes,
)
from dsv4.accounting.parameters import parameters
from dsv4.accounting.tensors import inventory
from dsv4.config.presets import flash, nano


def test_who_updates_what():
    who = {spec.name: optimizer_of(spec) for spec in inventory(nano())}
    for name in (
        "embed.weight",
        "head.weight",
        "norm.weight",
        "layers.0.attn_norm.weight",
        "layers.0.attn.q_norm.weight",
        "layers.0.attn.attn_sink",
        "layers.0.hc_attn_base",
        "layers.0.hc_attn_scale",
        "hc_head_base",
        "layers.2.attn.compressor.ape",
        "layers.2.attn.compressor.norm.weight",
        "mtp.0.enorm.weight",
    ):
        assert who[name] == "adamw", name
    for name in (
        "layers.0.attn.wq_a.weight",
        "layers.0.hc_attn_fn",
        "hc_head_fn",
        "layers.0.ffn.gate.weight",
        "layers.0.ffn.experts.0.w1.weight",
        "layers.2.attn.indexer.weights_proj.weight",
        "layers.2.attn.compressor.wgate.weight",
        "mtp.0.e_proj.weight",
    ):
        assert who[name] == "muon", name
    assert who["layers.0.ffn.gate.tid2eid"] == "none"
    assert who["layers.2.ffn.gate.bias"] == "none"


def test_sums_of_nano():
    memory = training_memory(nano())
    biases = (5 - 1 + 1) * 8  # four scored layers and MTP
    learned = parameters(nano()).with_mtp.total - biases
    assert memory.master_bytes == memory.gradient_bytes == 4 * learned
    assert memory.muon_bytes // 4 + memory.adamw_bytes // 8 == learned
    assert memory.weights_bytes == weights_bytes(nano())  # nothing to widen in BF16 storage
    assert memory.total_bytes == sum(dataclasses.asdict(memory).values())


def test_quantised_weights_are_widened_to_train():
    same = dataclasses.replace(flash(), storage="bfloat16")
    assert training_memory(flash()) == training_memory(same)
