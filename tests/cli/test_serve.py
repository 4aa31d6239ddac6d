"""``dsv4 serve``: a process that answers until it is told to stop, and what it refuses before it loads anything."""

import re
import signal
import socket
import subprocess
import sys
from dataclasses import replace

import httpx
import pytest

import dsv4
from dsv4.cli.main import main
from dsv4.config.presets import smoke
from dsv4.data.tokenizer import train_tokenizer
from tests.processes import started


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a finished model that nobody trained."""
    directory = tmp_path_factory.mktemp("serve") / "talker" / "model"
    directory.parent.mkdir()
    config = replace(smoke(), vocab_size=300)
    dsv4.save_model(dsv4.new_model(config, seed=5), directory)
    texts = ["def add(a, b):\n    return a + b\n", "The colour of the sky is blue, and so is the sea.\n"] * 30
    train_tokenizer(iter(texts), 300).save(str(directory / "tokenizer.json"))
    return directory.parent


def test_it_answers_until_it_is_stopped(run):
    command = [sys.executable, "-m", "dsv4", "serve", str(run), "--port", "0", "--precision", "float32"]
    with started(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        line = server.stderr.readline()
        (address,) = re.findall(r"talker: (http://127\.0\.0\.1:\d+) is a chat page", line)
        with httpx.Client(base_url=address, timeout=120) as client:
            assert client.get("/health").json()["model"] == "talker"
            assert "<html" in client.get("/").text
            ask = {"model": "talker", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
            answer = client.post("/v1/chat/completions", json=ask).json()
            assert answer["usage"]["completion_tokens"] <= 5
            assert answer["choices"][0]["finish_reason"] in ("length", "stop")
            counted = 'dsv4_http_requests_total{path="/v1/chat/completions",status="200"} 1.0'
            assert counted in client.get("/metrics").text
        server.send_signal(signal.SIGTERM)
        rest = server.stderr.read()
        assert server.wait(60) == 0
        assert "/v1/chat/completions 200" in rest
        assert "hi" not in rest.split()  # no prompts in the log


@pytest.fixture
def refused(run, capsys):
    """What ``dsv4 serve`` says when it does not start."""

    def ask(*options):
        assert main(["serve", str(run), *options]) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        return error

    return ask


def test_a_port_in_use_is_told_before_the_model_is_loaded(refused, monkeypatch):
    monkeypatch.setattr("dsv4.cli.serve.build_service", None)  # would be called with it
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen at 127.0.0.1, port {port}" in refused("--port", str(port))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--host", "0.0.0.0"], "serve.host is '0.0.0.0' without a key_file"),
        (["--port", "70000"], "serve.port is 70000"),
        (["--keep-alive-s", "0"], "serve.keep_alive_s is 0"),
        (["--max-waiting", "-1"], "serve.max_waiting is -1"),
    ],
)
def test_bad_options(capsys, run, options, words):
    assert main(["serve", str(run), *options]) == 2
    assert words in capsys.readouterr().err


def test_a_key_file_must_have_keys(refused, tmp_path):
    assert "key_file is nowhere" in refused("--key-file", "nowhere", "--port", "0")
    (tmp_path / "keys").write_text("\n \n")
    assert "holds no key" in refused("--key-file", str(tmp_path / "keys"), "--port", "0")


def test_missing_packages_are_named(refused, monkeypatch):
    monkeypatch.setattr("dsv4.cli.serve.PACKAGES", ("fastapi", "no_such_package"))
    assert "needs no_such_package; expected pip install 'dsv4[serve]'" in refused()
