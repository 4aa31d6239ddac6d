"""``dsv4 chat``: what is typed, what is printed, and the tools."""

import io
from dataclasses import replace
from datetime import datetime

import pytest

import dsv4
from dsv4.cli.chat_tools import calculate, read_table, run_tool
from dsv4.cli.main import main
from dsv4.config.presets import smoke
from dsv4.data.tokenizer import train_tokenizer
from dsv4.engine.engine import Engine
from dsv4.engine.outputs import Completion, Piece
from dsv4.text.tokens import DSML

pytestmark = pytest.mark.usefixtures("in_process")

NOW = datetime(2026, 1, 2, 3, 4, 5)
TEXTS = ["def add(a, b):\n    return a + b\n", "The colour of the sky is blue, and so is the sea.\n"] * 30
CALL = (
    f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="lookup">\n'
    f'<{DSML}parameter name="key" string="true">sky</{DSML}parameter>\n</{DSML}invoke>\n</{DSML}tool_calls>'
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("chat") / "model"
    dsv4.save_model(dsv4.new_model(replace(smoke(), max_context=2048), seed=5), directory)
    tokenizer = train_tokenizer(iter(TEXTS), 300)
    vocabulary = smoke().vocab_size
    tokenizer.add_tokens([f"<filler-{i}>" for i in range(vocabulary - 300)])
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture
def typed(model, monkeypatch, capsys):
    """Type lines into ``dsv4 chat``; return what it prints."""

    def run(*lines, options=()):
        capsys.readouterr()
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        code = main(["chat", str(model), "--max-tokens", "3", *options])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def says(monkeypatch):
    """Let the model say these texts, one after the other; return the prompts that it was given."""

    def say(*texts):
        asked, left = [], iter(texts)

        async def stream(self, prompt, sampling=None, *, salt=b"", mask=None):
            asked.append((self.tokenizer.decode(list(prompt), skip_special_tokens=False), sampling))
            ids = self.tokenizer.encode(next(left), add_special_tokens=False).ids
            id = f"said-{len(asked)}"
            self._ended[id] = Completion(id=id, prompt_ids=list(prompt))
            yield Piece(id=id, token_ids=(*ids, self.model.config.eos_token_id), text="", finish="stop")

        monkeypatch.setattr(Engine, "stream", stream)
        return asked

    return say


def test_a_conversation_goes_on(typed, says):
    asked = says("Well.</think>Blue.", "Still.</think>Yes, blue.")
    code, out, _ = typed("What colour is the sky?", "Sure?")
    assert code == 0
    assert "Well." in out
    assert "Blue." in out
    assert "</think>" not in out
    assert "Blue.<" in asked[1][0]
    assert asked[1][0].endswith("Sure?<\uff5cAssistant\uff5c><think>")
    assert [sampling.seed for _, sampling in asked] == [0, 1]


def test_effort_and_a_new_conversation(typed, says):
    asked = says("Blue.", "Hm.</think>Red.")
    typed("first?", "/new", "/effort max", "second?", options=["--effort", "off"])
    assert asked[0][0].endswith("</think>")
    assert "first?" not in asked[1][0]
    assert "Think for as long as it helps." in asked[1][0]


def test_an_answer_is_tried_again_with_another_seed(typed, says):
    asked = says("a</think>One.", "b</think>Two.")
    typed("go?", "/retry", options=["--seed", "9"])
    assert asked[0][0] == asked[1][0]
    assert [sampling.seed for _, sampling in asked] == [9, 10]


def test_tools_are_run_and_their_results_read(typed, says, tmp_path):
    asked = says("Look.</think>" + CALL, "So.</think>It is blue.")
    (tmp_path / "table.txt").write_text("Sky = blue\nsea=green\n")
    _, out, _ = typed("/tools on", "colour?", options=["--table", str(tmp_path / "table.txt")])
    assert 'lookup {"key": "sky"} = blue' in out
    assert "It is blue." in out
    assert "<tool_result>blue</tool_result>" in asked[1][0]
    assert "<think>Look.</think>" in asked[1][0]


def test_a_model_with_its_own_words(typed):
    code, out, _ = typed("hello", "/help", "/effort utmost", "/quit", "never asked")
    assert code == 0
    assert "3 tokens" in out
    assert "/effort off|high|max" in out
    assert "effort is 'utmost'; expected one of off, high, max" in out


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--effort", "utmost"], "effort is 'utmost'"), (["--table", "none.txt"], "--table is none.txt")],
)
def test_bad_options(typed, options, words):
    code, _, err = typed(options=options)
    assert code == 2
    assert words in err


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1 + 2 * 3", "7"),
        ("(1 + 2) ^ 3", "27"),
        ("-7 % 4", "1"),
        ("0.1 + 0.2", "0.3"),
        ("2 ** 0.5", "1.41421356237"),
        ("1 / 0", "error: division by zero"),
        ("__import__('os')", "error: __import__('os') is no arithmetic"),
        ("True + 1", "error: True is no arithmetic"),
        ("9 ** 9 ** 9", "error: 9 ** 387420489 is too large"),
        ("(-8) ** 0.5", "error: -8 ** 0.5 is no real number"),
        ("1e308 * 10", "error: the result is no finite number"),
        ("'a' * 3", "error: 'a' is no arithmetic"),
    ],
)
def test_the_calculator(expression, value):
    assert calculate(expression) == value


@pytest.mark.parametrize("expression", ["1" * 300, "(" * 150, "", "1 +"])
def test_what_is_no_expression_is_told(expression):
    assert calculate(expression).startswith("error: ")


def test_calls_that_are_wrong_have_a_result_too():
    table = read_table("Sky = blue\nno line\n a=b=c ")
    assert table == {"sky": "blue", "a": "b=c"}
    assert run_tool("clock", "", table=table, now=NOW) == "Friday 2026-01-02 03:04:05"
    assert run_tool("lookup", '{"key": " SKY "}', table=table, now=NOW) == "blue"
    assert run_tool("lookup", "{}", table=table, now=NOW) == "not found"
    assert run_tool("lookup", "{", table=table, now=NOW) == "error: the arguments are no JSON"
    assert run_tool("lookup", "[]", table=table, now=NOW) == "error: the arguments are no object"
    assert run_tool("fly", "{}", table=table, now=NOW) == "error: there is no tool fly"
