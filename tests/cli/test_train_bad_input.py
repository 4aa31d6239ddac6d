"""What ``dsv4 train`` refuses before anything is trained, and what that leaves behind: nothing in the way."""

from dataclasses import replace

import pytest

from dsv4.cli.main import main
from dsv4.data.tokenizer import train_tokenizer
from dsv4.testing.tiny_run import files_of, shortest, write_recipe

pytestmark = pytest.mark.usefixtures("in_process")


def with_files(folder, files):
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return str(folder)


def with_source(path, files, **data):
    config = shortest(with_files(path / "source", files))
    return str(write_recipe(path / "bad.toml", replace(config, data=replace(config.data, **data))))


def other_tokenizer(path, corpus):
    texts = (file.read_text() for file in sorted(corpus.iterdir()))
    train_tokenizer(texts, 300).save(str(path / "tokenizer.json"))
    config = shortest(corpus)
    return str(
        write_recipe(path / "bad.toml", replace(config, data=replace(config.data, tokenizer=f"{path}/tokenizer.json")))
    )


def too_small(path, finished):
    """A few texts, and a tokenizer that does not mind."""
    texts = {f"{i}.txt": f"def {'a' * i}\n".encode() for i in range(1, 9)}
    tokenizer = str(finished / "data" / "tokenizer.json")
    return with_source(path, texts, tokenizer=tokenizer, validation_fraction=0.5)


def with_text(path, corpus, change):
    text = write_recipe(path / "bad.toml", shortest(corpus)).read_text()
    changed = change(text)
    assert changed != text
    (path / "bad.toml").write_text(changed)
    return str(path / "bad.toml")


BINARY = {"a.bin": b"\x00\x01", "b.bin": b"PK\x00"}

BAD = {
    "no file": (
        lambda path, corpus, finished: with_source(path, {}),
        "data.source is {path}/source, which holds no file to read; expected files in it that are neither hidden nor",
    ),
    "no folder": (
        lambda path, corpus, finished: str(write_recipe(path / "bad.toml", shortest(path / "nowhere"))),
        "data.source is {path}/nowhere, which does not exist; expected stdlib, a folder or a file",
    ),
    "binary": (
        lambda path, corpus, finished: with_source(path, BINARY, bad_files="error"),
        "{path}/source/a.bin is binary (it has a NUL byte); expected UTF-8 text, or data.bad_files = \"skip\"",
    ),
    "only binary": (
        lambda path, corpus, finished: with_source(path, BINARY, bad_files="skip"),
        "data.source is {path}/source, which holds no usable document; expected at least one",
    ),
    "not UTF-8": (
        lambda path, corpus, finished: with_source(path, {"a.txt": b"caf\xe9"}, bad_files="error"),
        "{path}/source/a.txt is not UTF-8 (after 3 characters); expected UTF-8 text, or",
    ),
    "too few pairs": (
        lambda path, corpus, finished: with_source(
            path, {f"{i}.txt": b"a" * i for i in range(1, 9)}, validation_fraction=0.5
        ),
        "the tokenizer reached 281 of vocab_size = 512 ids; expected more text to train it on, or a smaller vocabulary",
    ),
    "less than a batch": (
        lambda path, corpus, finished: too_small(path, finished),
        "; expected at least one batch: 192 tokens, 2 rows of 96",
    ),
    "a tokenizer of another size": (
        lambda path, corpus, finished: other_tokenizer(path, corpus),
        "the tokenizer has 300 ids; expected the model's vocab_size = 512",
    ),
    "no such recipe": (
        lambda path, corpus, finished: "smok",
        "recipe is 'smok'; expected one of smoke, demo, chat, mini, mini-demo, flash, pro; did you mean smoke?",
    ),
    "no such file": (
        lambda path, corpus, finished: str(path / "no.toml"),
        "recipe file is {path}/no.toml; expected a file that exists",
    ),
    "no such field": (
        lambda path, corpus, finished: with_text(
            path, corpus, lambda text: text.replace("seed = 0", "seed = 0\nsead = 0")
        ),
        "{path}/bad.toml: recipe has 1 problem:\n  - unknown field sead; did you mean seed?",
    ),
    "no such model": (
        lambda path, corpus, finished: with_text(path, corpus, lambda text: text.replace('"smoke"', '"smokey"')),
        "preset is 'smokey'; expected one of ",
    ),
    "sparse too early": (
        lambda path, corpus, finished: with_text(
            path, corpus, lambda text: text.replace('train = "indexer"', 'train = "all"')
        ),
        "phase sparse-96: attention is 'sparse' before any phase has train = 'indexer'; expected the indexer to be",
    ),
    "rows within the window": (
        lambda path, corpus, finished: with_text(
            path, corpus, lambda text: text.replace("sequence = 48", "sequence = 16")
        ),
        "phase dense-48: sequence is 16; expected more than the model's window = 16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_and_leaves_the_folder_free(name, corpus, finished, recipe, tmp_path, fails, untrained):
    make, expected = BAD[name]
    run = tmp_path / "run"
    message = fails(make(tmp_path, corpus, finished), "--run", run)
    assert expected.format(path=tmp_path) in message
    assert not (run / "metrics.jsonl").exists()
    assert not (run / "config.json").exists()
    assert untrained == []
    assert main(["train", recipe, "--run", str(run)]) == 0  # the second try
    assert len(untrained) == 1
    assert files_of(run / "data" / "train") == files_of(finished / "data" / "train")


def test_a_wrong_option_exits_two(recipe, tmp_path, capsys, fails):
    for arguments in (
        ["train", recipe, "--run", str(tmp_path / "run"), "--optimizer.peak-rl", "1"],
        ["train", recipe, "--run", str(tmp_path / "run"), "--seed", "one"],
        ["train", recipe],
        ["train", "--resume"],
    ):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
        assert capsys.readouterr().err
    assert fails("--rum", "x") == "the first argument is --rum; expected a recipe or --resume"
    assert list(tmp_path.iterdir()) == []


def test_a_value_out_of_range_is_named(recipe, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["train", recipe, "--run", str(tmp_path / "run"), "--run.keep-checkpoints", "1"])
    assert caught.value.code == 2
    assert "run.keep_checkpoints is 1; expected at least 2" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(recipe, tmp_path, fails):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in fails(recipe, "--run", tmp_path / "file")
