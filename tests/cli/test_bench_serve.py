"""``dsv4 bench serve``: a whole measurement of a small model, and the tokenizer that it makes up."""

import json

import pytest

from dsv4.cli.bench_serve import made_up_tokenizer
from dsv4.cli.main import main
from dsv4.data.tokenizer import num_ids
from dsv4.text.tokens import EOS

pytestmark = pytest.mark.usefixtures("in_process")


@pytest.mark.parametrize("size", [300, 129_280])
def test_a_made_up_tokenizer_has_text_for_every_id(size):
    tokenizer = made_up_tokenizer(size)
    assert num_ids(tokenizer) == tokenizer.get_vocab_size() == size
    assert tokenizer.token_to_id(EOS) == 1
    assert tokenizer.decode([size - 1]) != ""
    text = "abc \u00e9\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_both_sides_are_measured(tmp_path, capsys):
    options = [
        "--concurrency",
        "1",
        "3",
        "--prompt-tokens",
        "40",
        "--output-tokens",
        "6",
        "--rounds",
        "1",
        "--requests",
        "2",
    ]
    assert main(["bench", "serve", "smoke", *options, "--json", str(tmp_path / "serve.json")]) == 0
    found = json.loads((tmp_path / "serve.json").read_text())
    assert [case["streams"] for case in found["cases"]] == [1, 3]
    for case in found["cases"]:
        assert case["throughput_ratio"] > 0
        assert 0 < case["to_engine_ms"] < case["added_to_request_ms"] < 60_000
        for side in ("engine", "server"):
            assert case[side]["tokens_per_second"] > 0
            assert 0 < case[side]["first_token_ms"] < 60_000
            assert case[side]["loop_token_us"] > 0
    out = capsys.readouterr().out
    assert "1 stream: a request takes" in out
    assert "3 streams: a request takes" in out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rounds", "0"], "--rounds is 0"),
        (["--concurrency", "0"], "--concurrency is 0"),
        (["--requests", "0"], "--requests is 0"),
        (["--output-tokens", "3"], "--output-tokens is 3"),
        (["--prompt-tokens", "8"], "--prompt-tokens is 8"),
        (["--prompt-tokens", "600"], "the longest sequence"),
    ],
)
def test_bad_options(capsys, options, words):
    assert main(["bench", "serve", "smoke", *options]) == 2
    assert words in capsys.readouterr().err
