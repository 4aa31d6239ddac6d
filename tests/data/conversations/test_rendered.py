"""Conversations in a prepared directory: each side its own, once, and as they are asked."""

from dataclasses import replace

import pytest

from dsv4.config.presets import nano
from dsv4.config.recipes import chat
from dsv4.data.conversations.generate import conversation
from dsv4.data.conversations.rendered import num_conversations, recipe_sha256, rendered
from dsv4.data.prepare import prepare
from dsv4.data.prompt import PromptTokenizer
from dsv4.data.store import TokenStore
from dsv4.data.tokenizer import load_tokenizer, train_tokenizer
from dsv4.text.tokens import BOS, EOS

VOCAB = 320
MODEL = replace(nano(), vocab_size=VOCAB)


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer((rendered(conversation("train", i, 0.1)).text for i in range(40)), VOCAB).save(str(path))
    return path


@pytest.fixture
def config(tokenizer_file):
    return replace(chat().data, tokenizer=str(tokenizer_file), num_conversations=300, validation_fraction=0.1)


def test_a_store_holds_what_is_rendered_without_its_ends(config, tmp_path):
    made = prepare(config, MODEL, tmp_path / "data")
    tokenizer = load_tokenizer(str(made.tokenizer))
    prompts, ends = PromptTokenizer(tokenizer), [tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)]
    for split, count in (("train", 300), ("validation", 30)):
        store = TokenStore.open(tmp_path / "data", split)
        stored = {tuple(store.document(i).tolist()) for i in range(store.num_documents)}
        wanted = set()
        for index in range(count):
            ids = prompts.ids(rendered(conversation(split, index, 0.1)))
            assert [ids[0], ids[-1]] == ends
            wanted.add(tuple(ids[1:-1]))
        assert stored == wanted
        assert store.num_documents == len(stored)  # equal ones once
    assert made.duplicates == 330 - made.train.documents - made.validation.documents


def test_equal_ones_count_once(config, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "dsv4.data.conversations.rendered.conversation",
        lambda side, index, *rest: conversation(side, index // 2, *rest),
    )
    made = prepare(replace(config, num_conversations=20), MODEL, tmp_path / "data")
    assert (made.train.documents, made.validation.documents, made.duplicates) == (10, 1, 11)


def test_bytes_are_those_of_the_text_alone(config, tmp_path):
    prepare(replace(config, num_conversations=1), MODEL, tmp_path / "data")
    prompt = rendered(conversation("train", 0, 0.1))
    num_bytes = sum(len(part.encode()) for part in prompt.parts if isinstance(part, str))
    assert TokenStore.open(tmp_path / "data", "train").num_bytes == num_bytes


def test_they_are_made_again_when_they_would_be_others(config, tmp_path, monkeypatch):
    calls = []
    for changed in (config, config, replace(config, num_conversations=299), replace(config, validation_fraction=0.2)):
        calls.append([])
        prepare(changed, MODEL, tmp_path / "data", progress=lambda *call: calls[-1].append(call))
    assert [bool(made) for made in calls] == [True, False, True, True]
    before = recipe_sha256(config)
    monkeypatch.setattr("dsv4.data.conversations.rendered.VERSION", 0)
    assert recipe_sha256(config) != before


def test_validation_has_its_share_and_at_least_one(config):
    assert num_conversations(config) == {"train": 300, "validation": 30}
    assert num_conversations(replace(config, num_conversations=2)) == {"train": 2, "validation": 1}
