"""Every parameter in one group, the groups as the report and the accounting have them, matrices counted by hand."""

import re
from dataclasses import replace
from fnmatch import fnmatchcase

import pytest
import torch

from dsv4.accounting.memory import optimizer_of
from dsv4.accounting.tensors import inventory
from dsv4.checkpoint.names import released_tensors
from dsv4.config.presets import PRESETS, flash, nano, pro
from dsv4.model.transformer import Transformer
from dsv4.optim import groups
from dsv4.optim.groups import Rule, assign, is_indexer
from dsv4.testing.toys import flash_like, pro_like

CONFIGS = {"flash_like": flash_like, "pro_like": pro_like, **PRESETS}


def without_memory(config):
    with torch.device("meta"):
        return Transformer(config)


def names_of(config):
    return [name for name, _ in without_memory(config).named_parameters()]


@pytest.mark.parametrize("make", CONFIGS.values(), ids=CONFIGS)
def test_the_groups_are_those_the_accounting_counts(make):
    model = without_memory(make())
    assigned = assign([name for name, _ in model.named_parameters()], model.config, per_head=False)
    kinds = dict.fromkeys(assigned.muon, "muon") | dict.fromkeys(assigned.adamw, "adamw")
    seen = {}
    for spec in inventory(make()):
        name = re.sub(r"\.experts\.\d+\.(w\d)\.weight$", r".experts.\1", spec.name)  # experts are stacked in memory
        if spec.role != "scale":
            assert kinds.get(name, "none") == seen.setdefault(name, optimizer_of(spec)), name
    assert seen.keys() == model.state_dict().keys()


def test_who_updates_what():
    assigned = assign(names_of(nano()), nano(), per_head=False)
    assert {name for name in assigned.adamw if not name.startswith(("layers.", "mtp."))} == {
        "embed.weight", "head.weight", "norm.weight", "hc_head_base", "hc_head_scale",
    }  # fmt: skip
    assert [name.removeprefix("layers.4.") for name in assigned.adamw if name.startswith("layers.4.")] == [
        "hc_attn_base", "hc_ffn_base", "hc_attn_scale", "hc_ffn_scale", "attn_norm.weight", "attn.attn_sink",
        "attn.q_norm.weight", "attn.kv_norm.weight", "attn.compressor.ape", "attn.compressor.norm.weight",
        "attn.indexer.compressor.ape", "attn.indexer.compressor.norm.weight", "ffn_norm.weight",
    ]  # fmt: skip
    assert [name.removeprefix("layers.4.") for name in assigned.muon if name.startswith("layers.4.")] == [
        "hc_attn_fn", "hc_ffn_fn", "attn.wq_a.weight", "attn.wq_b.weight", "attn.wkv.weight", "attn.wo_a.weight",
        "attn.wo_b.weight", "attn.compressor.wkv.weight", "attn.compressor.wgate.weight", "attn.indexer.wq_b.weight",
        "attn.indexer.weights_proj.weight", "attn.indexer.compressor.wkv.weight",
        "attn.indexer.compressor.wgate.weight", "ffn.gate.weight", "ffn.experts.w1", "ffn.experts.w2",
        "ffn.experts.w3", "ffn.shared_experts.w1.weight", "ffn.shared_experts.w2.weight",
        "ffn.shared_experts.w3.weight",
    ]  # fmt: skip
    assert {"mtp.0.e_proj.weight", "mtp.0.h_proj.weight", "mtp.0.hc_head_fn"} <= assigned.muon.keys()
    assert not [name for name in (*assigned.muon, *assigned.adamw) if name.endswith("gate.bias")]


def test_how_parameters_divide():
    config = flash_like()
    whole, heads = (assign(names_of(config), config, per_head=per_head).muon for per_head in (False, True))
    divided = {name.removeprefix("layers.4."): n for name, n in whole.items() if n > 1 and name.startswith("layers.4.")}
    assert divided == {"attn.wo_a.weight": 2} | {f"ffn.experts.w{i}": 9 for i in (1, 2, 3)}
    changed = {name.removeprefix("layers.4."): n for name, n in heads.items() if n != whole[name]}
    assert changed["attn.wq_b.weight"] == 6
    assert changed["attn.indexer.wq_b.weight"] == 18
    assert len(changed) == 7 + 2  # the queries of six layers and the MTP block, and of two indexers


def test_experts_divide_as_a_checkpoint_does():
    model = without_memory(flash_like())
    muon = assign([name for name, _ in model.named_parameters()], model.config, per_head=False).muon
    files = [name for name, _ in released_tensors(model) if ".ffn.experts." in name]
    assert sum(number for name, number in muon.items() if ".experts." in name) == len(files)


def test_the_order_is_that_of_the_model():
    names = names_of(pro_like())
    assigned = assign(names, pro_like(), per_head=False)
    for group in (assigned.muon, assigned.adamw):
        assert list(group) == sorted(group, key=names.index)


def test_every_rule_has_a_parameter():
    names = [*names_of(flash()), *names_of(pro())]
    for rule in groups.RULES:
        assert any(fnmatchcase(name, rule.pattern) for name in names), rule


def test_a_parameter_of_no_group_is_an_error():
    names = [*names_of(flash_like()), "layers.0.attn.wq_c.weight", "layers.1.engram.weight"]
    with pytest.raises(ValueError) as error:
        assign(names, flash_like(), per_head=False)
    assert str(error.value).splitlines() == [
        "layers.0.attn.wq_c.weight fits 0 rules; expected one",
        "layers.1.engram.weight fits 0 rules; expected one",
    ]


def test_a_parameter_of_two_groups_is_an_error(monkeypatch):
    monkeypatch.setattr(groups, "RULES", (*groups.RULES, Rule("*.wkv.weight", "adamw")))
    with pytest.raises(ValueError, match=r"layers\.0\.attn\.wkv\.weight fits 2 rules; expected one"):
        assign(names_of(flash_like()), flash_like(), per_head=False)


def test_a_model_without_mtp_needs_no_other_rules():
    config = replace(flash_like(), mtp_kinds=())
    assert not [name for name in assign(names_of(config), config, per_head=True).muon if name.startswith("mtp")]


def test_the_indexers_parameters():
    named = {name for name in names_of(flash_like()) if is_indexer(name)}
    parts = ("wq_b.weight", "weights_proj.weight", *(f"compressor.{p}" for p in ("ape", "wkv.weight", "wgate.weight")))
    assert named == {f"layers.{i}.attn.indexer.{part}" for i in (2, 4) for part in (*parts, "compressor.norm.weight")}
