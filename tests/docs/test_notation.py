"""NOTATION.md is complete: every config field, every tensor of a checkpoint, every shape letter."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from dsv4.accounting.tensors import inventory
from dsv4.config.fields import FIELDS
from dsv4.config.model import ModelConfig
from dsv4.config.presets import flash, pro

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "NOTATION.md").read_text(encoding="utf-8")


def config_fields() -> list[str]:
    rooms = ("attention", "indexer", "rope", "hyper_connections", "moe")
    top = [field.name for field in dataclasses.fields(ModelConfig) if field.name not in rooms]
    inner = [f"{room}.{field.name}" for room in rooms for field in dataclasses.fields(getattr(flash(), room))]
    return top + inner


@pytest.mark.parametrize("name", config_fields())
def test_every_config_field_is_explained(name):
    assert f"`{name}`" in TEXT


@pytest.mark.parametrize("field", [f for f in FIELDS if f.released and f.ours], ids=lambda f: f.released)
def test_a_field_and_its_released_key_share_a_row(field):
    ours = field.ours.removeprefix("model.")
    rows = [line for line in TEXT.splitlines() if f"`{ours}`" in line]
    assert any(f"`{field.released}`" in row or "the same" in row for row in rows)


def test_every_tensor_of_a_checkpoint_is_listed():
    listed = set()
    for cell in re.findall(r"^\| (`[^|]+) \|", TEXT, flags=re.MULTILINE):
        names = re.findall(r"`([^`]+)`", cell)
        # `.w2.weight` after `ffn.experts.{e}.w1.weight` stands for the same prefix.
        prefix = names[0].removesuffix(".weight").rsplit(".", 1)[0]
        listed |= {prefix + name if name.startswith(".") else name for name in names}
    for config in (flash(), pro()):
        for tensor in inventory(config):
            name = re.sub(r"^layers\.\d+\.", "", tensor.name)
            if name not in {"mtp.0.e_proj.weight", "mtp.0.h_proj.weight"} and re.match(r"mtp\.0\.(attn|ffn|hc)", name):
                name = name.removeprefix("mtp.0.")
            name = re.sub(r"experts\.\d+\.", "experts.{e}.", name)
            name = re.sub(r"attn\.indexer\.compressor\..*", "attn.indexer.compressor.*", name)
            if not name.endswith(".scale") or name.startswith("hc_"):
                assert name in listed, tensor.name


@pytest.mark.parametrize("letter", sorted(set("BTSCmVDHKRQGOWIJPNMEAF")))
def test_every_shape_letter_is_in_the_legend(letter):
    assert re.search(rf"^\| {letter} \|", TEXT, flags=re.MULTILINE)


def test_docstrings_use_no_other_shape_letter():
    legend = set(re.findall(r"^\| (\w) \|", TEXT, flags=re.MULTILINE))
    for path in (ROOT / "dsv4" / "ops").glob("*/__init__.py"):
        for shape in re.findall(r"\[((?:[A-Z]|\.\.\.)(?:, [A-Z])+)\]", path.read_text(encoding="utf-8")):
            letters = set(shape.replace("...", "").replace(",", " ").split())
            assert letters <= legend, f"{path.parent.name}: [{shape}]"
