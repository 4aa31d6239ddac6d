"""From a source to a prepared directory: the same text back, made once, made again when something changed."""

import json
import os
import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from tokenizers import Tokenizer

from dsv4.config.presets import nano
from dsv4.config.train import DataConfig
from dsv4.data import prepare as module
from dsv4.data.prepare import prepare
from dsv4.data.split import SPLITS
from dsv4.data.store import TokenStore
from dsv4.data.tokenizer import load_tokenizer, plain_text, token_bytes, train_tokenizer

VOCAB = 320
MODEL = replace(nano(), vocab_size=VOCAB)
WORDS = ["red", "green", "blue", "<think>", "caf\u00e9", "\u4f60\u597d", "12345", "self.width", "\n        ", "\r\n"]


def texts(count=60):
    rng = random.Random(11)
    return {f"{index:03d}.txt": " ".join(rng.choices(WORDS, k=5 + index)) for index in range(count)}


@pytest.fixture
def source(tmp_path):
    """A folder of 60 texts, one of them twice."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name, text in texts().items():
        (folder / name).write_bytes(text.encode())
    (folder / "copy.txt").write_bytes(texts()["007.txt"].encode())
    return folder


@pytest.fixture
def config(source):
    return DataConfig(
        source=str(source),
        text_field="text",
        bad_files="error",
        tokenizer="train",
        validation_fraction=0.2,
        fim_rate=0.1,
        split_rate=0.1,
        pack_buffer=4,
    )


@pytest.fixture
def target(tmp_path):
    return tmp_path / "run" / "data"


@pytest.fixture(autouse=True)
def _run_folder(target):
    target.parent.mkdir()


def decoded(target):
    """The texts of each split, decoded from the stores."""
    tokenizer = load_tokenizer(str(target / "tokenizer.json"))
    stores = {split: TokenStore.open(target, split) for split in SPLITS}
    return {
        split: [tokenizer.decode(store.document(index).tolist()) for index in range(store.num_documents)]
        for split, store in stores.items()
    }


def stamps(target):
    return {path.relative_to(target).as_posix(): path.stat().st_mtime_ns for path in target.rglob("*")}


def content(target):
    """Every file but the record, which knows the times of the source's files."""
    files = [path for path in sorted(target.rglob("*")) if path.is_file() and path.name != "prepared.json"]
    return {path.relative_to(target).as_posix(): path.read_bytes() for path in files}


# What is written


def test_every_text_comes_back_once_on_one_side_in_the_order_of_the_source(config, target):
    made = prepare(config, MODEL, target)
    found = decoded(target)
    assert sorted(found["train"] + found["validation"]) == sorted(texts().values())
    order = {text: name for name, text in texts().items()}
    for split in SPLITS:
        names = [order[text] for text in found[split]]
        assert names == sorted(names)
    assert made.duplicates == 1
    assert (made.skipped, made.skipped_names) == (0, ())


def test_the_counts_are_those_of_the_text(config, target):
    made = prepare(config, MODEL, target)
    tokenizer = load_tokenizer(str(made.tokenizer))
    sizes = token_bytes(tokenizer)
    for split, size in (("train", made.train), ("validation", made.validation)):
        store = TokenStore.open(target, split)
        store.verify()
        assert size.documents == store.num_documents > 0
        assert size.tokens == store.num_tokens == sum(len(store.document(i)) for i in range(store.num_documents))
        assert size.text_bytes == store.num_bytes == sum(len(text.encode()) for text in decoded(target)[split])
        assert size.text_bytes == sum(int(sizes[store.document(i)].sum()) for i in range(store.num_documents))


def test_a_text_that_spells_a_special_token_has_none(config, target):
    prepare(config, MODEL, target)
    tokenizer = load_tokenizer(str(target / "tokenizer.json"))
    assert any("<think>" in text for text in texts().values())
    for split in SPLITS:
        store = TokenStore.open(target, split)
        tokens = np.concatenate([store.document(index) for index in range(store.num_documents)])
        assert set(tokens.tolist()).isdisjoint(tokenizer.get_added_tokens_decoder())


def test_the_tokenizer_learns_from_the_training_split_alone(config, target):
    prepare(config, MODEL, target)
    again = train_tokenizer(iter(decoded(target)["train"]), VOCAB)
    assert Tokenizer.from_file(str(target / "tokenizer.json")).to_str() == again.to_str()
    other = train_tokenizer(iter(texts().values()), VOCAB)
    assert other.to_str() != again.to_str()


def test_a_given_tokenizer_is_used(config, target, tmp_path):
    given = train_tokenizer(iter(["another text, and another, with other words"] * 2), 290)
    given.save(str(tmp_path / "given.json"))
    prepare(replace(config, tokenizer=str(tmp_path / "given.json")), replace(MODEL, vocab_size=290), target)
    assert Tokenizer.from_file(str(target / "tokenizer.json")).to_str() == given.to_str()
    assert sorted(text for found in decoded(target).values() for text in found) == sorted(texts().values())


def test_batches_do_not_show(config, target, tmp_path, monkeypatch):
    prepare(config, MODEL, target)
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 1)
    prepare(config, MODEL, tmp_path / "run" / "other")
    assert content(target) == content(tmp_path / "run" / "other")


def test_no_more_than_a_batch_of_documents_is_held(config, target, monkeypatch):
    """The stores are written while the source is still being read."""
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 200)
    events = []
    read, append = module.documents, module.TokenWriter.append

    def reading(*arguments):
        for document in read(*arguments):
            events.append("read")
            yield document

    def appending(*arguments):
        events.append("write")
        append(*arguments)

    monkeypatch.setattr(module, "documents", reading)
    monkeypatch.setattr(module.TokenWriter, "append", appending)
    prepare(config, MODEL, target)
    second_pass = events[61:]
    held = [second_pass[:end].count("read") - second_pass[:end].count("write") for end in range(len(second_pass))]
    assert max(held) < 30  # all at once would be 61


def test_progress_counts_documents_of_both_passes(config, target):
    calls = []
    prepare(config, MODEL, target, progress=lambda stage, count: calls.append((stage, count)))
    assert calls[:60] == [("tokenizer", count) for count in range(1, 61)]
    assert calls[60:] == [("encode", 60)]


def test_two_processes_write_the_same_bytes(config, target, tmp_path):
    prepare(config, MODEL, target)
    code = (
        "import sys\n"
        "from dataclasses import replace\n"
        "from dsv4.config.presets import nano\n"
        "from dsv4.config.train import DataConfig\n"
        "from dsv4.data.prepare import prepare\n"
        f"prepare({config!r}, replace(nano(), vocab_size={VOCAB}), {str(tmp_path / 'run' / 'other')!r})\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert content(target) == content(tmp_path / "run" / "other")
    assert (target / "prepared.json").read_bytes() == (tmp_path / "run" / "other" / "prepared.json").read_bytes()


# Made once


def test_what_is_there_is_kept(config, target):
    made = prepare(config, MODEL, target)
    before = stamps(target)
    calls = []
    again = prepare(config, MODEL, target, progress=lambda *call: calls.append(call))
    assert again == made
    assert stamps(target) == before
    assert calls == []


def test_options_of_the_loader_do_not_matter(config, target):
    prepare(config, MODEL, target)
    before = stamps(target)
    prepare(replace(config, fim_rate=0.5, split_rate=0.9, pack_buffer=99), MODEL, target)
    prepare(config, replace(MODEL, hidden_size=512), target)
    assert stamps(target) == before


@pytest.mark.parametrize(
    "change",
    [{"validation_fraction": 0.3}, {"bad_files": "skip"}, {"text_field": "body"}],
)
def test_another_option_makes_it_again(change, config, target):
    prepare(config, MODEL, target)
    before = stamps(target)
    prepare(replace(config, **change), MODEL, target)
    assert stamps(target) != before


def test_another_vocabulary_makes_it_again(config, target):
    prepare(config, MODEL, target)
    prepare(config, replace(MODEL, vocab_size=300), target)
    assert load_tokenizer(str(target / "tokenizer.json")).get_vocab_size() == 300
    assert sorted(text for found in decoded(target).values() for text in found) == sorted(texts().values())


def test_another_source_makes_it_again_and_no_text_changes_sides(config, source, target):
    prepare(config, MODEL, target)
    before = decoded(target)
    (source / "000.txt").unlink()
    (source / "zzz.txt").write_text("something new")
    prepare(config, MODEL, target)
    after = decoded(target)
    gone = texts()["000.txt"]
    for split in SPLITS:
        assert set(after[split]) - {"something new"} == set(before[split]) - {gone}


SPOILED = ["tokenizer.json", "prepared.json", "train/manifest.json", "train/tokens-00000.bin", "validation/offsets.npy"]


@pytest.mark.parametrize("name", SPOILED)
@pytest.mark.parametrize("how", ["missing", "cut short", "empty object"])
def test_a_half_written_or_spoilt_directory_is_made_again(name, how, config, target):
    made = prepare(config, MODEL, target)
    whole = content(target)
    path = target / name
    if how == "missing":
        path.unlink()
    elif how == "cut short":
        os.truncate(path, path.stat().st_size // 2)
    else:
        path.write_text("{}")
    assert prepare(config, MODEL, target) == made
    assert content(target) == whole


def test_what_a_killed_run_left_is_cleared_away(config, target):
    for folder in (target.with_name(".data.partial"), target):
        (folder / "train").mkdir(parents=True)
        (folder / "train" / "tokens-00000.bin").write_bytes(b"half")
    prepare(config, MODEL, target)
    assert os.listdir(target.parent) == ["data"]
    assert sorted(os.listdir(target)) == ["prepared.json", "tokenizer.json", "train", "validation"]


def test_a_failure_leaves_the_old_directory_as_it_was(config, source, target):
    prepare(config, MODEL, target)
    before = stamps(target)
    (source / "zzz.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=f"{source}/zzz.txt is not UTF-8"):
        prepare(config, MODEL, target)
    assert stamps(target) == before
    assert os.listdir(target.parent) == ["data"]


@pytest.mark.parametrize("name", ["notes.txt", "train/notes.txt", "train/deeper/tokens-00000.bin", "weights"])
def test_a_directory_with_other_files_is_refused_and_left_alone(name, config, target):
    path = target / name
    path.parent.mkdir(parents=True)
    path.write_text("dear")
    foreign = "train/deeper" if "deeper" in name else name
    with pytest.raises(ValueError, match=f"directory is {target}, which holds {foreign}; expected only prepared data"):
        prepare(config, MODEL, target)
    assert path.read_text() == "dear"


# What cannot be prepared


def test_skipped_texts_are_counted_and_named(config, source, target):
    for index in range(25):
        (source / f"bad{index:02d}").write_bytes(b"\0")
    made = prepare(replace(config, bad_files="skip"), MODEL, target)
    assert made.skipped == 25
    assert made.skipped_names == tuple(f"bad{index:02d}" for index in range(20))
    assert prepare(replace(config, bad_files="skip"), MODEL, target) == made
    assert json.loads((target / "prepared.json").read_text())["skipped"] == 25


@pytest.mark.parametrize("tokenizer", ["train", "given"])
def test_a_split_without_a_document_is_refused(tokenizer, config, source, target, tmp_path):
    train_tokenizer(iter(texts().values()), VOCAB).save(str(tmp_path / "given.json"))
    given = replace(config, tokenizer="train" if tokenizer == "train" else str(tmp_path / "given.json"))
    with pytest.raises(ValueError, match=r"of its 60 documents, none falls in the validation split at .* = 0\.0"):
        prepare(replace(given, validation_fraction=0.0), MODEL, target)
    found = {split: text for text, split in sides(config).items()}
    for path in source.iterdir():
        path.unlink()
    (source / "one.txt").write_text(found["validation"])
    with pytest.raises(ValueError, match="too small: of its 1 documents, none falls in the train split"):
        prepare(given, MODEL, target)
    assert not target.exists()


def sides(config):
    documents = module.documents(config)
    return {document.text: split for split, document in module.split_documents(documents, config.validation_fraction)}


def test_a_tokenizer_of_another_size_is_refused_before_the_source_is_read(config, target, tmp_path):
    train_tokenizer(iter(texts().values()), VOCAB).save(str(tmp_path / "given.json"))
    wrong = replace(config, tokenizer=str(tmp_path / "given.json"), source=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=f"has {VOCAB} ids; expected the model's vocab_size = 4096"):
        prepare(wrong, nano(), target)


def test_a_model_with_other_ids_is_refused(config, target):
    with pytest.raises(ValueError, match="has id 0; expected the model's bos_token_id = 2"):
        prepare(config, replace(MODEL, bos_token_id=2), target)


def test_a_corpus_too_small_for_the_vocabulary_is_refused(config, target):
    with pytest.raises(ValueError, match=r"reached \d+ of vocab_size = 4096"):
        prepare(config, nano(), target)
    assert os.listdir(target.parent) == []


def test_a_directory_without_a_parent_and_a_file_are_refused(config, tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist; expected an existing parent"):
        prepare(config, MODEL, tmp_path / "nowhere" / "data")
    (tmp_path / "file").write_text("text")
    with pytest.raises(ValueError, match="which is a file; expected a directory"):
        prepare(config, MODEL, tmp_path / "file")


def test_plain_text_is_what_encodes(config, target):
    """Encoding a text again gives the ids of the store."""
    prepare(config, MODEL, target)
    plain = plain_text(load_tokenizer(str(target / "tokenizer.json")))
    store = TokenStore.open(target, "train")
    for index, text in enumerate(decoded(target)["train"]):
        assert store.document(index).tolist() == plain.encode(text).ids
