"""``dsv4 generate``: one prompt as it comes, many as JSON lines, going on from a log, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer

import dsv4
from dsv4.cli.generate import CHOICE, Choice
from dsv4.cli.main import main
from dsv4.cli.models import find_model, find_tokenizer
from dsv4.cli.prompts import read_prompts
from dsv4.cli.results import Results, partial_of, read_partial
from dsv4.config.engine import Limits
from dsv4.config.presets import smoke
from dsv4.config.sampling import Sampling
from dsv4.data.tokenizer import plain_text, train_tokenizer
from dsv4.engine.engine import Engine
from dsv4.engine.log import recover
from dsv4.eval import generate as decoding

TEXTS = [path.read_text(encoding="utf-8") for path in sorted((Path(dsv4.__file__).parent / "config").glob("*.py"))]
PROMPT = "from __future__ import \u00e9\u4f60<think>"

pytestmark = pytest.mark.usefixtures("in_process")


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


@pytest.fixture
def says(capsys):
    """What ``dsv4 generate`` prints."""

    def run(*arguments):
        capsys.readouterr()
        assert main(["generate", *map(str, arguments)]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def refuses(capsys):
    """What ``dsv4 generate`` says when it fails by the user's mistake."""

    def run(*arguments):
        capsys.readouterr()
        assert main(["generate", *map(str, arguments)]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("error: ")
        return captured.err.removeprefix("error: ").rstrip("\n")

    return run


@pytest.fixture
def stops_after(monkeypatch):
    """Let Ctrl-C come after some steps of the engine; undone, the engine runs on."""
    step = Engine.step

    def patch(num_steps):
        left = iter(range(num_steps))

        def stopping(engine):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return step(engine)

        monkeypatch.setattr(Engine, "step", stopping)

    patch.undo = lambda: monkeypatch.setattr(Engine, "step", step)
    return patch


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


# ---- which model ----


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


def test_what_is_missing_is_named(refuses, run, tmp_path):
    message = refuses("/nowhere", "--prompt", "a")
    assert message.startswith("path is /nowhere, which holds no model; expected a run with model/ or checkpoints/")
    (tmp_path / "config.json").write_text("{}")
    assert "with config.json and safetensors files" in refuses(tmp_path, "--prompt", "a")
    shutil.rmtree(run / "data")
    newest = run / "checkpoints" / "step-00000120" / "model"
    message = refuses(run, "--prompt", "a")
    assert message == f"tokenizer.json is missing; expected it in {newest} or {run / 'data'}"


# ---- one prompt ----


def test_the_likeliest_text_is_that_of_plain_decoding(finished, run, says):
    """Without half a character at its end, whatever the number of tokens."""
    tokenizer = Tokenizer.from_file(str(finished / "tokenizer.json"))
    ids = list(
        decoding.generate(
            dsv4.load_model(finished), [0, *plain_text(tokenizer).encode(PROMPT).ids], num_tokens=40, temperature=0,
            top_p=1.0, seed=0, stop_ids={1},
        )
    )  # fmt: skip
    texts = [tokenizer.decode(ids[:n]) for n in range(41)]
    half = next(n for n, text in enumerate(texts) if text.endswith("\ufffd"))
    for n in (half, 40):
        out = says(run, "--prompt", PROMPT, "--tokens", n, "--temperature", 0)
        assert out == PROMPT + texts[n].rstrip("\ufffd") + "\n"


def test_the_seed_and_the_options_are_passed_on(finished, says):
    common = ("--prompt", "def ", "--tokens", 30, "--numerics", "invariant")
    first = says(finished, *common, "--seed", 3)
    assert first == says(finished, *common, "--seed", 3)
    assert first != says(finished, *common, "--seed", 4)
    assert first != says(finished, *common, "--seed", 3, "--repetition-penalty", 1.5)
    assert first != says(finished, *common, "--seed", 3, "--precision", "bfloat16")
    assert first == says(finished, *common, "--seed", 3, "--draft-tokens", 2)
    text = first.removeprefix("def ").rstrip("\n")
    stop = text[3:5]
    assert says(finished, *common, "--seed", 3, "--stop", stop, "zzz") == f"def {text[: text.index(stop)]}\n"


def test_prefixes_are_kept_in_a_folder(finished, says, tmp_path):
    folder = tmp_path / "prefixes"
    prompt = "x = 1\n" * 80
    first = says(finished, "--prompt", prompt, "--tokens", 5, "--prefix-folder", folder)
    assert list(folder.glob("*.prefix"))
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"prompt": prompt, "max_tokens": 5}) + "\n")
    (again,) = lines(says(finished, "--prompts", file, "--prefix-folder", folder))
    assert again["num_cached"] >= 128
    assert prompt + again["text"] == first.rstrip("\n")


# ---- many prompts ----


def test_many_prompts_are_lines_in_their_order(finished, says, tmp_path):
    """Each is as if alone, with the seed of its line; blank lines count, but are no prompts."""
    file = tmp_path / "prompts.txt"
    file.write_text("def \n\nimport a\ndef \n", encoding="utf-8")
    common = ("--tokens", 12, "--numerics", "invariant")
    found = lines(says(finished, "--prompts", file, *common, "--seed", 5, "--concurrency", 2))
    assert [result["id"] for result in found] == ["line-1", "line-3", "line-4"]
    assert [result["prompt"] for result in found] == ["def ", "import a", "def "]
    assert found[0]["text"] != found[2]["text"]
    for result, seed in zip(found, (5, 7, 8), strict=True):
        alone = says(finished, "--prompt", result["prompt"], *common, "--seed", seed)
        assert alone.rstrip("\n") == (result["prompt"] + result["text"]).rstrip("\ufffd").rstrip("\n")
        assert len(result["token_ids"]) == 12
        assert result["finish"] == "length"
        assert result["num_prompt_tokens"] > 1
        assert "num_drafted" not in result
        assert "logprobs" not in result


def test_a_line_of_json_may_ask_for_something_else(finished, says, tmp_path):
    file = tmp_path / "prompts.jsonl"
    own = [
        {"prompt": "def ", "max_tokens": 3},
        {"prompt": "import ", "temperature": 0, "stop": ["\n"], "logit_bias": [[70, -100]], "stop_token_ids": [71]},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in own))
    short, greedy = lines(says(finished, "--prompts", file, "--tokens", 9, "--logprobs", 2, "--draft-tokens", 1))
    assert len(short["token_ids"]) == 3
    assert len(greedy["token_ids"]) <= 9
    assert short["num_drafted"] >= short["num_accepted"] >= 0
    assert len(short["logprobs"]) == 3
    assert [len(one["top"]) for one in short["logprobs"]] == [2, 2, 2]
    likeliest = [one["top"][0][1] for one in greedy["logprobs"]]
    assert [one["chosen"] for one in greedy["logprobs"]] == likeliest


def test_output_goes_to_a_file(finished, says, tmp_path):
    file, output = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    file.write_text("a\nb\nc\n")
    arguments = ("--prompts", file, "--tokens", 5)
    expected = says(finished, *arguments)
    assert says(finished, *arguments, "--output", output) == ""
    assert output.read_text(encoding="utf-8") == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "prompts.txt"]


def test_sampling_of_each_line(tmp_path):
    base = Sampling(max_tokens=7, seed=10)
    text = tmp_path / "a.txt"
    text.write_text('{"prompt": "x"}\n \nb  \n')
    first, second = read_prompts(text, base)
    assert (first.line, first.text, first.sampling) == (1, '{"prompt": "x"}', base)
    assert (second.line, second.text, second.sampling) == (3, "b  ", replace(base, seed=12))
    own = tmp_path / "a.jsonl"
    own.write_text('{"prompt": "x", "seed": 1, "logit_bias": [[3, 0.5]]}\n{"prompt": "y\\nz", "top_p": 0.5}')
    first, second = read_prompts(own, base)
    assert first.sampling == replace(base, seed=1, logit_bias=((3, 0.5),))
    assert (second.text, second.sampling) == ("y\nz", replace(base, seed=11, top_p=0.5))


def test_results_wait_for_those_before_them(capsys):
    results = Results(None, ["a", "b", "c"])
    assert results.add({"id": "b"}) == []
    assert capsys.readouterr().out == ""
    assert results.add({"id": "a"}) == ["a", "b"]
    assert capsys.readouterr().out == '{"id": "a"}\n{"id": "b"}\n'
    results.add({"id": "c", "text": "\u00e9"})
    assert capsys.readouterr().out == '{"id": "c", "text": "\u00e9"}\n'


def test_a_partial_file_is_gone_on_with(tmp_path):
    path = tmp_path / "out.jsonl"
    results = Results(path, ["line-1", "line-2", "line-12"])
    results.add({"id": "line-12"})
    results.add({"id": "line-1"})
    results.close()
    assert not path.exists()
    with partial_of(path).open("a") as file:
        file.write('{"id": "line-2", "te')  # a kill came here
    assert [result["id"] for result in read_partial(path)] == ["line-12", "line-1"]
    again = Results(path, ["line-1", "line-2"], goes_on=True)  # the log says that the first is not finished
    assert [result["id"] for result in read_partial(path)] == ["line-12"]
    again.add({"id": "line-2"})
    again.add({"id": "line-1", "new": True})
    again.finish()
    assert lines(path.read_text()) == [{"id": "line-1", "new": True}, {"id": "line-2"}, {"id": "line-12"}]
    assert [file.name for file in tmp_path.iterdir()] == ["out.jsonl"]
    Results(path, ["line-1"]).close()
    assert read_partial(path) == []  # a new run begins anew


# ---- a log ----


def test_a_stopped_prompt_goes_on_from_its_log(finished, says, stops_after, tmp_path, capsys):
    log = tmp_path / "log"
    common = ("--prompt", "def ", "--tokens", 20, "--numerics", "invariant", "--seed", 3)
    whole = says(finished, *common)
    stops_after(8)
    with pytest.raises(SystemExit) as caught:
        main(["generate", str(finished), *map(str, common), "--log", str(log)])
    assert caught.value.code == 130
    captured = capsys.readouterr()
    assert whole.startswith(captured.out.rstrip("\n"))
    assert captured.out != whole
    assert f"stopped; --log {log} --resume goes on" in captured.err
    stops_after.undo()
    assert says(finished, "--resume", "--log", log, "--numerics", "invariant") == whole
    assert says(finished, "--resume", "--log", log) == ""
    assert "holds nothing that is unfinished" not in whole


def test_a_stopped_batch_goes_on_with_its_file(finished, says, stops_after, refuses, tmp_path, capsys):
    file, log, output = tmp_path / "prompts.jsonl", tmp_path / "log", tmp_path / "out.jsonl"
    own = [{"prompt": text, "max_tokens": n} for text, n in (("def ", 25), ("import ", 3), ("x", 25), ("a = ", 30))]
    file.write_text("".join(json.dumps(line) + "\n" for line in own))
    mode = ("--numerics", "invariant", "--concurrency", 3)
    whole = says(finished, "--prompts", file, *mode)
    stops_after(10)
    begun = ("--prompts", str(file), *map(str, mode), "--log", str(log), "--output", str(output))
    with pytest.raises(SystemExit):
        main(["generate", str(finished), *begun])
    captured = capsys.readouterr()
    assert f"what was finished is in {partial_of(output)}" in captured.err
    assert [result["id"] for result in read_partial(output)] == ["line-2"]
    stops_after.undo()
    message = refuses(finished, *begun)
    assert message.startswith(f"--log is {log}, which holds 3 unfinished; expected --resume")
    assert says(finished, "--resume", "--log", log, "--output", output, *mode) == ""

    def kept(text):  # entries are found in memory at other places
        return [{name: value for name, value in line.items() if name != "num_cached"} for line in lines(text)]

    assert kept(output.read_text(encoding="utf-8")) == kept(whole)


@pytest.mark.parametrize("has_file", [True, False])
def test_answers_that_were_not_written_come_with_the_rest(finished, says, refuses, tmp_path, monkeypatch, has_file):
    """The kill comes between a token's commit and the line of its answer, where an answer was lost once and for all."""
    file, log, output = tmp_path / "prompts.jsonl", tmp_path / "log", tmp_path / "out.jsonl"
    own = [{"prompt": text, "max_tokens": n} for text, n in (("def ", 12), ("import ", 3), ("x", 5), ("a = ", 9))]
    file.write_text("".join(json.dumps(line) + "\n" for line in own))
    mode = ("--numerics", "invariant", "--concurrency", 4)
    whole = says(finished, "--prompts", file, *mode, "--logprobs", 1)
    place = ("--output", output) if has_file else ()
    add, left = Results.add, iter(range(2))

    def killed(results, result):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return add(results, result)

    monkeypatch.setattr(Results, "add", killed)
    begun = ("--prompts", file, *mode, "--logprobs", 1, "--log", log, *place)
    with pytest.raises(SystemExit):
        main(["generate", str(finished), *map(str, begun)])
    monkeypatch.setattr(Results, "add", add)
    kept = 2 if has_file else 0  # on stdout, lines wait for those before them
    held = f"1 unfinished and {3 - kept} finished and not given to anyone"
    assert refuses(finished, *begun).startswith(f"--log is {log}, which holds {held}; expected --resume")
    assert len(read_partial(output)) == kept
    again = says(finished, "--resume", "--log", log, *place, *mode)
    answers = [
        [{name: value for name, value in line.items() if name != "num_cached"} for line in lines(text)]
        for text in (output.read_text(encoding="utf-8") if has_file else again, whole)
    ]
    assert answers[0] == answers[1]
    assert recover(log) == []


def test_a_prompt_whose_answer_was_not_printed_is_printed(finished, says, tmp_path):
    log = tmp_path / "log"
    whole = says(finished, "--prompt", "def ", "--tokens", 9, "--seed", 3)
    model, tokenizer = dsv4.load_model(finished), Tokenizer.from_file(str(finished / "tokenizer.json"))
    with Engine(model, Limits(cache_bytes=2**21, log=str(log)), tokenizer=tokenizer) as engine:
        engine.add("def ", Sampling(max_tokens=9, temperature=0.8, top_p=0.95, seed=3), id="prompt")
        while not engine.is_idle:
            engine.step()
    assert says(finished, "--resume", "--log", log) == whole
    assert recover(log) == []


def test_an_answer_that_ends_with_an_error_says_so(finished, says, refuses, tmp_path, capsys):
    """Here by a penalty under which no logit is a number."""
    file = tmp_path / "prompts.jsonl"
    own = [{"prompt": "def ", "repetition_penalty": 1e-310}, {"prompt": "x"}]
    file.write_text("".join(json.dumps(line) + "\n" for line in own))
    bad, good = lines(says(finished, "--prompts", file, "--tokens", 3))
    assert (bad["finish"], bad["token_ids"]) == ("error", [])
    assert bad["error"].startswith("request line-1: the largest logit is")
    assert (good["finish"], "error" in good) == ("length", False)
    assert main(["generate", str(finished), "--prompt", "def ", "--repetition-penalty", "1e-310"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "def \n"
    assert captured.err.startswith("error: request prompt: the largest logit is")


def test_a_file_that_was_not_renamed_is(finished, says, tmp_path):
    """The kill came when all had ended."""
    log, output = tmp_path / "log", tmp_path / "out.jsonl"
    says(finished, "--prompt", "a", "--tokens", 2, "--log", log)
    results = Results(output, ["line-1"])
    results.add({"id": "line-1"})
    results.close()
    says(finished, "--resume", "--log", log, "--output", output)
    assert lines(output.read_text()) == [{"id": "line-1"}]


def test_requests_of_another_program_are_resumed(finished, says, tmp_path):
    log = tmp_path / "log"
    model, tokenizer = dsv4.load_model(finished), Tokenizer.from_file(str(finished / "tokenizer.json"))
    limits = Limits(cache_bytes=2**21, log=str(log))
    with Engine(model, limits, tokenizer=tokenizer) as engine:
        engine.add("def ", Sampling(max_tokens=6, seed=1))
        engine.add("x", Sampling(max_tokens=4, seed=1))
        for _ in range(3):
            engine.step()
    found = lines(says(finished, "--resume", "--log", log))
    assert [(result["id"], len(result["token_ids"])) for result in found] == [("request-0", 6), ("request-1", 4)]


# ---- what is refused ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "of --prompt, --prompts and --resume, none are given; expected exactly one"),
        (
            ("--prompt", "a", "--prompts", "{file}"),
            "of --prompt, --prompts and --resume, --prompt and --prompts are given; expected exactly one",
        ),
        (("--prompt", "a", "--output", "x"), "--output is x with --prompt; expected --prompts"),
        (("--prompt", "a", "--logprobs", "1"), "--logprobs is 1 with --prompt; expected --prompts"),
        (("--prompts", "/nowhere"), "--prompts is /nowhere; expected a file that exists"),
        (("--prompts", "{file}", "--output", "/nowhere/x"), "--output is /nowhere/x; expected its directory to exist"),
        (("--prompt", "a", "--log", "/nowhere/x"), "--log is /nowhere/x; expected its directory to exist"),
        (("--resume",), "--resume is given without --log; expected the log that is to be resumed"),
        (("--resume", "--log", "{missing}"), "--log is {missing}; expected a file that exists, to resume from"),
        (
            ("--resume", "--log", "{file}", "--tokens", "3", "--top-k", "2"),
            "--tokens, --top-k and --resume are given; expected none of the first",
        ),
        (("--prompt", "a", "--log", "{file}"), "{file} begins with b'a\\nb\\n'; expected a log"),
        (("--prompt", "a", "--tokens", "0"), "sampling.max_tokens is 0; expected a whole number of at least 1"),
        (("--prompt", "a", "--top-p", "0"), "sampling.top_p is 0.0; expected 0 < top_p <= 1"),
        (("--prompt", "a", "--stop", ""), "sampling.stop[0] is ''; expected a string that is not empty"),
        (("--prompt", "a", "--concurrency", "0"), "limits.max_requests is 0; expected"),
        (("--prompt", "a", "--draft-tokens", "5"), "limits.draft_tokens is 5; expected"),
        (("--prompt", "a", "--prefix-folder", "{file}"), "folder is {file}; expected a folder"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, message, finished, refuses, tmp_path):
    file, missing = tmp_path / "prompts.txt", tmp_path / "missing"
    file.write_text("a\nb\n")
    names = {"file": str(file), "missing": str(missing)}
    found = refuses(finished, *(argument.format_map(names) for argument in arguments))
    assert found.startswith(message.format_map(names))
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".lock") == ["prompts.txt"]


def test_a_prompt_that_cannot_run_stops_all_before_any_does(finished, refuses, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a\n" + "x y " * 600 + "\n")
    message = refuses(finished, "--prompts", file, "--output", tmp_path / "out.jsonl")
    assert message.startswith(f"{file}, line 2: request line-2: the prompt has ")
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]
    log = tmp_path / "log"
    refuses(finished, "--prompts", file, "--log", log)
    assert recover(log) == []  # what was added before the bad one is not left to be resumed
    assert "expected fewer than the context of 512" in refuses(finished, "--prompt", "x y " * 600)
    assert "pages; expected at most" in refuses(
        finished, "--prompt", "x y " * 100, "--cache-bytes", 40000, "--tokens", 100
    )


def test_every_bad_line_is_told(refuses, finished, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '{"prompt": "a"}\n{"prompt": \n[1]\n{"text": "a"}\n{"prompt": "a", "tokens": 3}\n'
        '{"prompt": "a", "top_p": 2, "stop": "x"}\n{"prompt": 5}\n'
    )
    found = refuses(finished, "--prompts", file).splitlines()
    assert [line.removeprefix(f"{file}, ").split(";")[0] for line in found] == [
        "line 2: Expecting value: line 1 column 12 (char 11)",
        "line 3: the line holds a list",
        "line 4: prompt is None",
        "line 5: unknown tokens",
        "line 6: sampling.top_p is 2",
        "line 6: sampling.stop is 'x'",
        "line 7: prompt is 5",
    ]
    file.write_text("\n \n")
    assert refuses(finished, "--prompts", file) == f"--prompts is {file}, which has no prompt; expected one a line"
    file.write_bytes(b"\xff\xfe")
    assert "which is not UTF-8" in refuses(finished, "--prompts", file)


def test_the_defaults_are_those_of_the_help():
    assert Choice() == CHOICE
    assert (CHOICE.tokens, CHOICE.temperature, CHOICE.top_p, CHOICE.seed) == (200, 0.8, 0.95, 0)
