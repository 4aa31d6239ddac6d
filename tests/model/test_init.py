"""Fresh models: reproducible, finite, as uncertain as they should be, and with the parameters of the inventory."""

import math
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import dsv4
from dsv4.accounting.parameters import parameters
from dsv4.accounting.tensors import inventory
from dsv4.config.presets import PRESETS, nano
from dsv4.model.transformer import Transformer
from dsv4.testing.toys import flash_like, pro_like, toy_model, toy_token_ids

DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64"}


def same_bits(one, other):
    return {name: torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items()}


@pytest.mark.parametrize("make", [flash_like, pro_like])
def test_the_seed_is_the_model(make):
    first, again, other = dsv4.new_model(make(), 1), dsv4.new_model(make(), 1), dsv4.new_model(make(), 2)
    assert all(same_bits(first, again).values())
    differs = {name for name, same in same_bits(first, other).items() if not same}
    # Norms, biases, sinks and the mixes' bases and gates start from constants.
    assert differs == {
        n for n in first.state_dict() if not re.search(r"norm\.|_base$|_scale$|ape$|attn_sink$|\.bias$", n)
    }


def test_a_fresh_model_does_not_depend_on_the_global_generator():
    torch.manual_seed(1)
    first = dsv4.new_model(flash_like(), 1)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert all(same_bits(first, dsv4.new_model(flash_like(), 1)).values())
    torch.manual_seed(1)
    dsv4.new_model(flash_like(), 1)
    assert torch.equal(torch.get_rng_state(), state)


def test_every_parameter_is_finite_and_float32():
    model = dsv4.new_model(nano(), 0)
    assert model.training
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32, name
        assert parameter.isfinite().all(), name


def test_a_fresh_model_knows_nothing():
    model = dsv4.new_model(nano(), 0)
    token_ids = toy_token_ids(model.config, 1, 140)
    with torch.no_grad():
        output = model(token_ids, mtp=True)
    # Logits are sums of D = 256 products of a unit-variance hidden and weights of 0.02: variance v = 0.1, so the
    # expected loss is log V + v / 2. Over 140 tokens its mean has a deviation of sqrt(v / 140) = 0.03.
    expected = math.log(model.config.vocab_size) + 256 * 0.02**2 / 2
    for logits, targets in ((output.logits[:, :-1], token_ids[:, 1:]), (output.mtp_logits[:, :-1], token_ids[:, 2:])):
        assert F.cross_entropy(logits[0], targets[0]).item() == pytest.approx(expected, abs=0.12)


def test_hash_tables_give_distinct_experts_and_use_all_of_them():
    config = flash_like()
    tables = [table for name, table in dsv4.new_model(config, 0).named_buffers() if name.endswith("tid2eid")]
    assert len(tables) == config.moe.num_hash_layers
    for table in tables:
        assert table.shape == (config.vocab_size, config.moe.experts_per_token)
        assert all(len(set(row)) == len(row) for row in table.tolist())
        assert set(table.flatten().tolist()) == set(range(config.moe.num_experts))
    assert not torch.equal(*tables)


@pytest.mark.parametrize("make", [flash_like, pro_like])
def test_everything_learns_but_routing_biases_and_the_indexer(make):
    model = toy_model(make())
    output = model(toy_token_ids(model.config, 1, 140), mtp=True)
    (output.logits.square().mean() + output.mtp_logits.square().mean()).backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == {n for n, _ in model.named_parameters() if ".indexer." in n or n.endswith("gate.bias")}
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name in without if name.endswith("gate.bias")}


def stacked(specs):
    """The inventory with the experts of a layer as one tensor each: name to shape and dtype."""
    tensors, experts = {}, Counter()
    for spec in specs:
        match = re.fullmatch(r"(.*\.experts)\.\d+\.(w[123])\.weight", spec.name)
        name = f"{match[1]}.{match[2]}" if match else spec.name
        experts[name] += 1
        tensors[name] = ((experts[name], *spec.shape) if match else spec.shape, spec.dtype)
    return tensors


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_the_inventory(name):
    config = PRESETS[name]()
    with torch.device("meta"):
        model = Transformer(config, weight_dtype=torch.bfloat16, activation_dtype=torch.bfloat16)
    ours = {name: (tuple(t.shape), DTYPES[t.dtype]) for name, t in model.state_dict().items()}
    assert ours == stacked(inventory(replace(config, storage="bfloat16")))
    counts = parameters(config)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert sum(size for name, size in sizes.items() if not name.startswith("mtp.")) == counts.main.total
    assert sum(sizes.values()) == counts.with_mtp.total


def test_backend_and_dtypes_are_those_asked_for():
    model = Transformer(flash_like(), weight_dtype=torch.bfloat16, activation_dtype=torch.bfloat16)
    float32 = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
    assert float32 == {n for n in dict(model.named_parameters()) if re.search(r"\.?hc_|ape$|attn_sink$|gate\.bias$", n)}
