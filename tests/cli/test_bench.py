"""``dsv4 bench``: what it measures on a tiny model, what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dsv4
from dsv4.cli.bench_context import dense_twin
from dsv4.cli.bench_setup import Options, machine, random_model, random_prompts, resident_bytes
from dsv4.cli.main import main
from dsv4.config.presets import nano, smoke
from dsv4.data.tokenizer import train_tokenizer
from dsv4.engine.measure import predicted_bytes

TEXTS = [path.read_text(encoding="utf-8") for path in sorted((Path(dsv4.__file__).parent / "config").glob("*.py"))]

pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture
def bench(tmp_path, capsys):
    """What a benchmark prints, and writes as JSON."""

    def run(*arguments):
        file = tmp_path / "results.json"
        assert main(["bench", *map(str, arguments), "--json", str(file)]) == 0
        return capsys.readouterr().out, json.loads(file.read_text(encoding="utf-8"))

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model in a folder, with its tokenizer."""
    directory = tmp_path_factory.mktemp("run") / "model"
    dsv4.save_model(dsv4.new_model(smoke(), seed=5), directory)
    train_tokenizer(iter(TEXTS), smoke().vocab_size).save(str(directory / "tokenizer.json"))
    return directory


def test_engine(bench):
    out, results = bench(
        "engine", "smoke", "--prompt-tokens", 30, "--output-tokens", 4, "--concurrency", 1, 2, "--draft-tokens", 0, 1,
        "--numerics", "invariant",
    )  # fmt: skip
    assert results["benchmark"] == "engine"
    assert (results["model"], results["weights"], results["precision"]) == ("smoke", "random", "bfloat16")
    assert results["machine"] == machine()
    cases = results["cases"]
    assert [(case["concurrency"], case["draft_tokens"]) for case in cases] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    for case in cases:
        assert case["total_prompt_tokens"] == 30 * case["requests"] == 30 * case["concurrency"]
        assert case["total_output_tokens"] == 4 * case["requests"]
        assert case["prefill_tokens_per_s"] > 0
        assert case["decode_tokens_per_s"] > 0
        assert 0 < case["first_token_s"]["p50"] <= case["first_token_s"]["p99"]
        assert 0 < case["token_s"]["p50"] <= case["token_s"]["p90"]
        assert case["cache_used_bytes"] == case["cache_predicted_bytes"] <= case["cache_allocated_bytes"]
        assert case["peak_memory_bytes"] > 10**7
        has_drafts = case["draft_tokens"] > 0
        assert (case["num_drafted"] > 0, case["acceptance"] is not None) == (has_drafts, has_drafts)
        assert (case["decode_speed_up"] is not None) == has_drafts
    rate = cases[3]["decode_tokens_per_s"] / cases[2]["decode_tokens_per_s"]
    assert cases[3]["decode_speed_up"] == pytest.approx(rate)
    for word in ("smoke, random weights", "30 + 4 x 2,", "invariant", "draft", "Tokens per second", "Memory"):
        assert word in out
    assert f"{cases[0]['cache_used_bytes']:,}" in out


def test_engine_without_drafts_measured_plain_has_no_speed_up(bench):
    _, results = bench("engine", "smoke", "--prompt-tokens", 20, "--output-tokens", 3, "--draft-tokens", 1)
    assert results["cases"][0]["decode_speed_up"] is None


def test_engine_on_text_with_a_trained_model(bench, trained, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXTS[-1], encoding="utf-8")
    arguments = ("engine", trained, "--prompt-tokens", 20, "--output-tokens", 3, "--requests", 2, "--text", text)
    _, results = bench(*arguments, "--precision", "float32")
    assert results["weights"] == "trained"
    assert results["prompts"] == str(text)
    assert results["cases"][0]["total_prompt_tokens"] == 40
    text.write_text("too short", encoding="utf-8")
    assert main(["bench", *map(str, arguments)]) == 2


def test_cache(bench):
    out, results = bench(
        "cache", "smoke", "--prompt-tokens", 400, "--suffix-tokens", 10, "--output-tokens", 3, "--period", 256
    )
    full, periodic, zero = results["policies"]
    assert [row["policy"] for row in results["policies"]] == ["full", "periodic", "zero"]
    for row in results["policies"]:
        assert row["same_bits"] is True
        assert row["tokens_found"] == 384
        assert 0 < row["bytes_read"] <= row["bytes_written"]
        assert row["first_token_s"] > 0
        assert row["first_token_without_s"] == full["first_token_without_s"] > 0
    assert full["bytes_written"] > periodic["bytes_written"] > zero["bytes_written"]
    assert (full["files"], periodic["files"], zero["files"]) == (6, 4, 3)
    assert (full["tokens_recomputed"], periodic["tokens_recomputed"], zero["tokens_recomputed"]) == (0, 128, 128)
    assert f"{periodic['tokens_found']:,}" in out
    assert "yes" in out
    assert "NO" not in out


def test_cache_of_a_prompt_that_ends_with_a_page(bench):
    """The first run ends in the step that gives the state to be kept."""
    arguments = ("--prompt-tokens", 256, "--suffix-tokens", 1, "--output-tokens", 2, "--period", 128)
    _, results = bench("cache", "smoke", *arguments)
    assert [row["tokens_recomputed"] for row in results["policies"]] == [0, 0, 128]
    assert all(row["same_bits"] for row in results["policies"])


def test_cache_leaves_no_folder(bench, tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    bench("cache", "smoke", "--prompt-tokens", 130, "--suffix-tokens", 1, "--output-tokens", 1, "--folder", place)
    assert list(place.iterdir()) == []


def test_context(bench, tmp_path):
    plot = tmp_path / "context.svg"
    out, results = bench(
        "context", "smoke", "--lengths", 300, 64, 160, "--dense-limit", 200, "--decode-tokens", 2, "--step-tokens", 64,
        "--plot", plot,
    )  # fmt: skip
    assert [at["length"] for at in results["lengths"]] == [64, 160, 300]
    assert [at["length"] for at in results["dense"]] == [64, 160]
    for at in results["lengths"] + results["dense"]:
        assert at["prefill_tokens_per_s"] > 0
        assert at["prompt_tokens_per_s"] > 0
        assert at["decode_tokens_per_s"] > 0
        assert at["resident_bytes"] > 10**7
        assert at["cache_used_bytes"] == at["cache_predicted_bytes"]
    assert results["lengths"][2]["cache_used_bytes"] == predicted_bytes(smoke(), "bfloat16", 300)
    assert results["dense"][1]["cache_used_bytes"] == (160 - 2) * 6 * 80 * 2  # a row in every ring for all that is run
    assert "compressed" in out
    assert "dense twin" in out
    assert "at 300, of the rates at 64: the whole prompt" in out
    text = plot.read_text(encoding="utf-8")
    for word in ("The whole prompt", "Decoding", "Cache of the sequence", "dense twin", "160"):
        assert word in text


def test_context_without_a_twin(bench):
    out, results = bench("context", "smoke", "--lengths", 40, "--dense-limit", 0, "--decode-tokens", 2)
    assert results["dense"] == []
    assert "dense" not in out
    assert "of the rates" not in out


def test_the_dense_twin_attends_to_everything():
    twin = dense_twin(nano(), 1000)
    assert set(twin.layer_kinds) == {"window"}
    assert twin.num_layers == nano().num_layers
    assert twin.attention.window == twin.max_context == 1000
    assert replace(twin.attention, window=128) == nano().attention


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_random_weights_are_those_of_a_new_model(precision, monkeypatch):
    monkeypatch.setattr("dsv4.device.accelerator", lambda: None)
    made = random_model(smoke(), Options(precision=precision, seed=3))
    new = dsv4.new_model(smoke(), seed=3)
    for (name, ours), theirs in zip(made.state_dict().items(), new.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs.to(ours.dtype)), name
    assert made.embed.weight.dtype == made.activation_dtype == getattr(torch, precision)
    assert not made.training


def test_random_prompts_differ_and_repeat():
    a, b = random_prompts(smoke(), 2, 50, 7)
    assert a != b
    assert random_prompts(smoke(), 1, 50, 7)[0] == a
    assert all(0 <= i < 512 for i in a + b)


def test_threads_are_set(bench, monkeypatch):
    asked = []
    monkeypatch.setattr("torch.set_num_threads", asked.append)
    bench("engine", "smoke", "--prompt-tokens", 4, "--output-tokens", 1, "--threads", 3)
    assert asked == [3]


def test_resident_bytes_are_those_of_this_process():
    before = resident_bytes()
    block = bytearray(b"x" * 2**26)
    assert len(block) + before - 2**24 < resident_bytes() < len(block) + before + 2**26


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["engine", "smok"], "path is smok, which holds no model"),
        (["engine", "smoke", "--prompt-tokens", "0"], "--prompt-tokens is 0; expected at least 1"),
        (["engine", "smoke", "--prompt-tokens", "500"], "the longest sequence has 564 tokens; expected at most 512"),
        (
            ["engine", "smoke", "--prompt-tokens", "4", "--concurrency", "4", "--requests", "3"],
            "--requests is 3; expected at least --concurrency = 4",
        ),
        (["engine", "smoke", "--prompt-tokens", "4", "--draft-tokens", "5"], "limits.draft_tokens is 5; expected"),
        (["engine", "smoke", "--prompt-tokens", "4", "--threads", "0"], "--threads is 0; expected at least 1"),
        (["engine", "smoke", "--prompt-tokens", "4", "--seed", "-1"], "--seed is -1; expected at least 0"),
        (["engine", "smoke", "--prompt-tokens", "4", "--text", "x"], "--text is x with the preset smoke"),
        (
            ["engine", "smoke", "--prompt-tokens", "4", "--json", "/nowhere/x.json"],
            "--json is /nowhere/x.json; expected its directory to exist",
        ),
        (["cache", "smoke", "--prompt-tokens", "200", "--period", "100"], "limits.prefix.period is 100; expected"),
        (
            ["cache", "smoke", "--prompt-tokens", "200", "--folder", "/nowhere"],
            "--folder is /nowhere; expected a directory that exists",
        ),
        (["cache", "smoke"], "the longest sequence has 16456 tokens; expected at most 512"),
        (["context", "smoke"], "the longest sequence has 1048576 tokens; expected at most 512"),
        (["context", "smoke", "--lengths", "17"], "--lengths has 17; expected at least 18"),
        (["context", "smoke", "--lengths"], "--lengths is empty; expected at least one length"),
        (["context", "smoke", "--lengths", "64", "--plot", "x.pdf"], "--plot is x.pdf; expected a name that ends in"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_a_model_is_made(argv, message, capsys, monkeypatch):
    monkeypatch.setattr("dsv4.model.init.initialize_", lambda *_: pytest.fail("a model was made"))
    assert main(["bench", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {message}")
    assert captured.out == ""


def test_without_matplotlib_the_error_says_what_to_install(tmp_path, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench", "context", "smoke", "--lengths", "64", "--plot", str(tmp_path / "x.svg")]) == 2
    assert "error: --plot needs matplotlib" in capsys.readouterr().err


def test_help_names_every_benchmark(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["bench", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for word in ("dsv4 bench", "engine", "cache", "context"):
        assert word in text
