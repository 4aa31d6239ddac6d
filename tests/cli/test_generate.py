"""``dsv4 generate``: which model and tokenizer a path stands for, and text in whole characters."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import dsv4
from dsv4.cli.generate import find_model, find_tokenizer, generate, pieces
from dsv4.config.presets import smoke
from dsv4.data.tokenizer import plain_text, train_tokenizer
from dsv4.eval import generate as decoding

TEXTS = [path.read_text(encoding="utf-8") for path in sorted((Path(dsv4.__file__).parent / "config").glob("*.py"))]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished model with its tokenizer."""
    directory = tmp_path_factory.mktemp("run") / "model"
    dsv4.save_model(dsv4.new_model(smoke(), seed=5), directory)
    train_tokenizer(iter(TEXTS), smoke().vocab_size).save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture
def run(finished, tmp_path):
    """A run that was stopped: two checkpoints, the tokenizer with the data, and a config.json that is no model's."""
    run = tmp_path / "stopped"
    for step in (9, 120):
        shutil.copytree(finished, run / "checkpoints" / f"step-{step:08d}" / "model")
        (run / "checkpoints" / f"step-{step:08d}" / "model" / "tokenizer.json").unlink()
    (run / "data").mkdir()
    shutil.copy(finished / "tokenizer.json", run / "data")
    (run / "config.json").write_text("{}")
    return run


def test_a_path_stands_for_the_finished_model_or_the_newest_checkpoint(finished, run):
    newest = run / "checkpoints" / "step-00000120" / "model"
    assert find_model(finished) == finished
    assert find_model(run) == newest == find_model(newest.parent) == find_model(newest)
    older = run / "checkpoints" / "step-00000009"
    assert find_model(older) == older / "model"
    shutil.copytree(finished, run / "model")
    assert find_model(run) == run / "model"


def test_the_tokenizer_is_the_models_or_the_runs(finished, run):
    assert find_tokenizer(finished) == finished / "tokenizer.json"
    assert find_tokenizer(find_model(run)) == run / "data" / "tokenizer.json"
    shutil.copytree(finished, run / "model")
    (run / "model" / "tokenizer.json").unlink()
    assert find_tokenizer(run / "model") == run / "data" / "tokenizer.json"


def test_what_is_missing_is_named(finished, run, tmp_path):
    with pytest.raises(ValueError, match=r"path is /nowhere, which holds no model; expected a run with model/ or"):
        generate(Path("/nowhere"), "a")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds no model; expected .* with config\.json and safetensors files"):
        generate(tmp_path, "a")
    shutil.rmtree(run / "data")
    newest = run / "checkpoints" / "step-00000120" / "model"
    with pytest.raises(ValueError, match=rf"tokenizer\.json is missing; expected it in {newest} or {run / 'data'}"):
        generate(run, "a")


def test_the_text_printed_is_that_of_the_tokens(finished, run, capsys):
    prompt = "from __future__ import \u00e9\u4f60<think>"
    generate(run, prompt, tokens=40, temperature=1.0, top_p=0.9, seed=2)
    model = dsv4.load_model(finished)
    tokenizer = Tokenizer.from_file(str(finished / "tokenizer.json"))
    ids = list(
        decoding.generate(
            model, [0, *plain_text(tokenizer).encode(prompt).ids], num_tokens=40, temperature=1.0, top_p=0.9, seed=2,
            stop_ids={1},
        )
    )  # fmt: skip
    assert capsys.readouterr().out == prompt + tokenizer.decode(ids).rstrip("\ufffd") + "\n"


def byte_tokenizer():
    """Every token is one byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def test_characters_come_whole():
    tokenizer = byte_tokenizer()
    text = "h\u00e9 \u4f60\n\U0001f600 e\u0301!"
    ids = tokenizer.encode(text).ids
    assert len(ids) == len(text.encode()) > len(text)
    assert list(pieces(tokenizer, ids)) == [*text, ""]
    cut = tokenizer.encode("ab\U0001f600").ids[:-1]
    assert list(pieces(tokenizer, cut)) == ["a", "b", ""]


def test_bytes_that_are_no_text_hold_nothing_up():
    tokenizer = byte_tokenizer()
    whole = tokenizer.encode("\U0001f600a").ids
    garbage = [whole[0], whole[2], whole[4], *whole]  # half a character, a letter, then a whole one
    assert list(pieces(tokenizer, garbage)) == ["\ufffda", "\U0001f600", "a", ""]
