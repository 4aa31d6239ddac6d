"""What ``dsv4 inspect`` prints."""

import dataclasses
import json

import pytest

from dsv4.accounting.parameters import parameters
from dsv4.cli.format import decimal, flops, gibibytes, gigabytes, tokens
from dsv4.cli.main import main
from dsv4.config.load import from_released, save_config
from dsv4.config.presets import flash, nano


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")


def test_flash_table(capsys):
    assert main(["inspect", "flash"]) == 0
    text = capsys.readouterr().out
    for expected in (
        "43: 2 window, 21 CSA, 20 HCA, 1 MTP block; the first 3 routed by token id",
        "window x2, (csa hca) x20, csa",
        "69,187 tensors, 159,609,485,896 bytes (159.61 GB) in 46 files, stored as fp4",
        "284,332,240,471",
        "13,270,101,591",
        "290,942,289,362",
        "decode at 1M",
        "prefill of 64K",
        "train on 4K",
        "13,760",
        "3,514",
        "Muon momentum",
        "activations of 4K tokens",
    ):
        assert expected in text, expected


def test_nothing_is_cut_off_in_a_narrow_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["inspect", "flash"]) == 0
    assert "\u2026" not in capsys.readouterr().out


def test_json_has_the_same_numbers(capsys):
    assert main(["inspect", "flash", "--json", "--context", "65536"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert from_released(data["config"]) == flash()
    summary = data["summary"]
    assert summary["parameters"]["main"] == {"total": 284_332_240_471, "activated": 13_270_101_591}
    assert summary["parameters"]["by_kind"]["norms"]["total"] == 356_352
    assert summary["checkpoint"]["total_bytes"] == 159_609_485_896
    assert summary["cache_bytes_per_token"]["packed"] == 3514.25
    assert [at["context"] for at in summary["at_context"]] == [65536]
    assert summary["training_tokens"] == 65536


def test_a_file_is_inspected_like_a_preset(capsys, tmp_path):
    config = dataclasses.replace(nano(), mtp_kinds=(), moe=dataclasses.replace(nano().moe, num_hash_layers=0))
    save_config(config, tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "5: 2 window, 2 CSA, 1 HCA\n" in text
    total = parameters(nano()).main.total
    assert f"{total + 8:,}" in text  # the layer routed by token id is scored, with a bias for each of 8 experts
    assert f"{total:,}" not in text


def test_a_longest_context_below_the_shown_ones(capsys, tmp_path):
    save_config(dataclasses.replace(nano(), max_context=1000), tmp_path)
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)["summary"]
    assert [at["context"] for at in summary["at_context"]] == [1000]
    assert summary["training_tokens"] == 1000


def test_numbers_as_people_read_them():
    assert decimal(284_332_240_471) == "284.33 B"
    assert decimal(999) == "999"
    assert flops(1.213e12) == "1.21 TFLOP"
    assert flops(10) == "10 FLOP"
    assert gigabytes(159_609_485_896) == "159.61 GB"
    assert gibibytes(2**30) == "1.00 GiB"
    assert gibibytes(10) == "10 B"
    assert [tokens(n) for n in (1048576, 65536, 4096, 1000, 1536)] == ["1M", "64K", "4K", "1,000", "1,536"]
