"""``--weights`` and ``--expert-bytes``: the same answers, what a benchmark says of it, and what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dsv4
from dsv4.checkpoint.convert import convert
from dsv4.cli.main import main
from dsv4.cli.models import Residence, check_residence
from dsv4.config.presets import smoke
from dsv4.data.tokenizer import train_tokenizer

TEXTS = [path.read_text(encoding="utf-8") for path in sorted((Path(dsv4.__file__).parent / "config").glob("*.py"))]
SLOT = 3 * 40 * 28 * 4  # bytes of an expert of smoke in float32, in whole multiples of 64
COMMON = ("--prompt", "def ", "--tokens", "20", "--numerics", "invariant")

pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A model in a folder, with its tokenizer."""
    directory = tmp_path_factory.mktemp("run") / "model"
    dsv4.save_model(dsv4.new_model(smoke(), seed=5), directory)
    train_tokenizer(iter(TEXTS), smoke().vocab_size).save(str(directory / "tokenizer.json"))
    return directory


def run(*arguments):
    assert main([*map(str, arguments)]) == 0


@pytest.mark.parametrize("options", [(), ("--expert-bytes", SLOT), ("--expert-bytes", 10**8)])
def test_generate_writes_the_same(directory, capsys, options):
    run("generate", directory, *COMMON)
    wanted = capsys.readouterr().out
    run("generate", directory, *COMMON, "--weights", "mapped", *options)
    assert capsys.readouterr().out == wanted


def bench(directory, tmp_path, *options):
    file = tmp_path / "results.json"
    lengths = ("--prompt-tokens", 60, "--output-tokens", 5, "--concurrency", 1, 2)
    run("bench", "engine", directory, *lengths, "--precision", "float32", "--json", file, *options)
    return json.loads(file.read_text(encoding="utf-8"))


def test_the_benchmark_counts_what_was_read(directory, tmp_path, capsys):
    results = bench(directory, tmp_path, "--weights", "mapped", "--expert-bytes", 5 * SLOT)
    assert (results["weights_are"], results["expert_bytes"]) == ("mapped", 5 * SLOT)
    assert results["parameters"] == sum(x.numel() for x in dsv4.new_model(smoke()).parameters())
    out = capsys.readouterr().out
    for case in results["cases"]:
        experts = smoke().num_layers * smoke().moe.num_experts
        assert case["expert_misses"] > experts / 2
        assert case["expert_hits"] > 0
        assert case["expert_bytes_read"] == case["expert_misses"] * SLOT
        assert case["expert_bytes_per_token"] == case["expert_bytes_read"] / (65 * case["requests"])
        assert case["expert_pool_bytes"] == 5 * SLOT
        assert 10**7 < case["resident_memory_bytes"] <= case["peak_memory_bytes"] + 10**7
        assert f"{case['expert_hits']:,}" in out
        assert f"{case['expert_bytes_per_token']:,.0f}" in out
    assert "Experts" in out


def test_each_case_is_counted_by_itself(directory, tmp_path):
    results = bench(directory, tmp_path, "--weights", "mapped", "--expert-bytes", 10**8, "--backend", "portable")
    assert results["backend"] == "portable"
    assert [case["expert_misses"] for case in results["cases"]] == [0, 0]  # all were read while it warmed up


@pytest.mark.parametrize("options", [(), ("--weights", "mapped")])
def test_without_a_pool_there_is_nothing_to_count(directory, tmp_path, capsys, options):
    results = bench(directory, tmp_path, *options)
    assert (results["weights_are"], results["expert_bytes"]) == ("mapped" if options else "memory", None)
    assert results["backend"] == "auto"
    assert not any(name.startswith("expert_") for name in results["cases"][0])
    assert "Experts" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--expert-bytes", 10**6), "--expert-bytes is 1000000 with --weights memory; expected --weights mapped"),
        (("--weights", "mapped", "--expert-bytes", 0), "--expert-bytes is 0; expected at least 1"),
        (
            ("--weights", "mapped", "--expert-bytes", 5),
            f"expert_bytes is 5; expected at least the {SLOT} of one expert",
        ),
    ],
)
@pytest.mark.parametrize("command", [("generate", "{}", *COMMON), ("bench", "engine", "{}", "--prompt-tokens", "20")])
def test_what_has_no_effect_is_refused(directory, capsys, command, options, message):
    command = [part.format(directory) for part in command]
    precision = ("--precision", "float32")
    assert main([*command, *precision, *map(str, options)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {message}")
    assert captured.out == ""


def test_a_preset_is_in_no_file(capsys, monkeypatch):
    monkeypatch.setattr("dsv4.model.init.initialize_", lambda *_: pytest.fail("a model was made"))
    assert main(["bench", "engine", "smoke", "--prompt-tokens", "20", "--weights", "mapped"]) == 2
    assert "with the preset smoke; expected the folder of a run or checkpoint" in capsys.readouterr().err


def test_an_accelerator_needs_experts_of_its_own(monkeypatch):
    monkeypatch.setattr("dsv4.device.accelerator", lambda: torch.device("meta"))
    check_residence(Residence(expert_bytes=10**6))
    check_residence(Residence(weights="mapped", expert_bytes=10**6))
    with pytest.raises(ValueError, match="--weights mapped is given without --expert-bytes; expected both"):
        check_residence(Residence(weights="mapped"))


@pytest.fixture(scope="module")
def in_codes(directory, tmp_path_factory):
    """A model as the release is stored, with the same tokenizer."""
    root, config = tmp_path_factory.mktemp("codes"), smoke()
    config = replace(config, hidden_size=96, moe=replace(config.moe, expert_dim=64))
    dsv4.save_model(dsv4.new_model(config, seed=5), root / "float32")
    convert(root / "float32", root / "instruct", "instruct")
    shutil.copy(directory / "tokenizer.json", root / "instruct")
    return root / "instruct"


def test_codes_in_files_write_the_same_and_are_counted(in_codes, tmp_path, capsys):
    slot = 3 * (96 * 64 // 2 + 96 * 64 // 32)
    options = "--precision", "released", "--weights", "mapped", "--expert-bytes", 5 * slot
    run("generate", in_codes, *COMMON, "--precision", "released")
    wanted = capsys.readouterr().out
    for given in (options[:-2], options):
        run("generate", in_codes, *COMMON, *given)
        assert capsys.readouterr().out == wanted
    file = tmp_path / "results.json"
    run("bench", "engine", in_codes, "--prompt-tokens", 60, "--output-tokens", 5, "--json", file, *options)
    results = json.loads(file.read_text(encoding="utf-8"))
    assert (results["precision"], results["weights_are"], results["expert_bytes"]) == ("released", "mapped", 5 * slot)
    for case in results["cases"]:
        assert case["expert_bytes_read"] == case["expert_misses"] * slot > 0
        assert case["expert_pool_bytes"] == 5 * slot
    assert "Experts" in capsys.readouterr().out
