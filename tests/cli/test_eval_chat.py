"""``dsv4 eval chat``: a model that knows every answer has them all, and one that knows none has none."""

import json
from dataclasses import replace

import pytest

from dsv4.cli import eval_chat as module
from dsv4.cli.main import main
from dsv4.config.recipes import load_recipe
from dsv4.config.toml import to_dict
from dsv4.data.tokenizer import load_tokenizer
from dsv4.engine.engine import Engine
from dsv4.engine.outputs import Completion
from dsv4.text.encode import assistant_text
from dsv4.text.tokens import SPECIAL_TOKENS

pytestmark = pytest.mark.usefixtures("in_process")

KINDS = ("arithmetic", "tools", "json", "echo", "talk")


@pytest.fixture
def knowing(monkeypatch):
    """Let the engine write what was wanted, but for those questions it is told to get wrong."""
    wanted, wrong = [], set()
    original = module._ask

    def ask(engine, asked, directory):
        wanted.extend(asked)
        return original(engine, asked, directory)

    def generate(self, prompts, sampling):
        assert sampling.temperature == 0
        assert len(prompts) == len(wanted)
        made = []
        for question in wanted:
            ids = []
            text = assistant_text(question.wanted, thinking=question.thinking)
            parts = ["no"] if question.part in wrong else text.parts
            for part in parts:
                if isinstance(part, str):
                    ids += self.tokenizer.encode(part, add_special_tokens=False).ids
                else:
                    ids.append(self.tokenizer.token_to_id(part.text))
            made.append(Completion(id="x", prompt_ids=[], token_ids=ids))
        return made

    monkeypatch.setattr(module, "_ask", ask)
    monkeypatch.setattr(Engine, "generate", generate)
    return wrong


def run(finished, tmp_path, *options):
    path = tmp_path / "counts.json"
    assert main(["eval", "chat", str(finished), "--num", "3", "--json", str(path), *options]) == 0
    return {(one["kind"], one["part"], one["thinking"]): one for one in json.loads(path.read_text())}


def test_every_kind_is_asked_with_thinking_and_without(finished, tmp_path, knowing, capsys):
    counts = run(finished, tmp_path)
    assert {kind for kind, _, _ in counts} == set(KINDS)
    assert all(one["count"] == one["valid"] == one["right"] > 0 for one in counts.values())
    for kind, part, thinking in counts:
        if kind != "arithmetic":  # products are asked for with thinking alone
            assert counts[kind, part, not thinking]["count"] == counts[kind, part, thinking]["count"]
    shown = capsys.readouterr().out
    for line in ("arithmetic", "the call is right", "the object is right", "100.0%"):
        assert line in shown
    assert "wanted:" not in shown


def test_wrong_answers_are_counted_and_shown(finished, tmp_path, knowing, capsys):
    knowing.add("object")
    counts = run(finished, tmp_path, "--mistakes", "1")
    assert all((one["right"] == 0) == (part == "object") for (_, part, _), one in counts.items())
    shown = capsys.readouterr().out
    assert shown.count("wanted: ") == 2
    assert shown.count("got: no") == 1  # without thinking; with it the thought never ends
    assert "JSON, with thinking: " in shown


def test_a_model_that_knows_nothing(finished, tmp_path, monkeypatch):
    """The engine as it is; its context has no room for tools."""
    monkeypatch.setattr(module, "MAX_TOKENS", 3)
    monkeypatch.setattr("dsv4.data.conversations.generate.KINDS", ("arithmetic", "talk"))
    counts = run(finished, tmp_path)
    assert {kind for kind, _, _ in counts} == {"arithmetic", "talk"}
    assert sum(one["right"] for one in counts.values()) == 0


def test_held_out_facts_are_those_of_the_run(finished, tmp_path):
    standard = load_recipe("chat").data.validation_fraction
    assert module._held_out(finished) == standard  # a run on texts
    folder = tmp_path / "run"
    folder.mkdir()
    config = replace(load_recipe("chat"), data=replace(load_recipe("chat").data, validation_fraction=0.03125))
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    (folder / "metrics.jsonl").touch()
    assert module._held_out(folder) == module._held_out(folder / "model") == 0.03125


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num", "0"], "--num is 0; expected at least 1"),
        (["--mistakes", "-1"], "--mistakes is -1; expected 0 or more"),
        (["--json", "/nowhere/a.json"], "--json is /nowhere/a.json; expected its directory to exist"),
    ],
)
def test_bad_options(finished, capsys, options, message):
    assert main(["eval", "chat", str(finished), *options]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_a_model(tmp_path, capsys):
    assert main(["eval", "chat", str(tmp_path)]) == 2
    assert "holds no model" in capsys.readouterr().err


def test_the_tokenizer_of_a_run_has_every_special_token(finished):
    tokenizer = load_tokenizer(str(finished / "model" / "tokenizer.json"))
    assert all(tokenizer.token_to_id(token) is not None for token in SPECIAL_TOKENS)
