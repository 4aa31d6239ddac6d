"""The end of a server: what runs may end, what takes too long is told so, and the process ends well."""

import json
import re
import signal
import subprocess
import sys
import threading
import time

import httpx
import pytest

import dsv4
from dsv4.data.tokenizer import num_ids
from dsv4.testing.toys import tiny_model

RUN = "import sys; from dsv4.cli.main import main; sys.exit(main(['serve', *sys.argv[1:]]))"
PATH = "/v1/chat/completions"
CHAT = {"model": "toy", "messages": [{"role": "user", "content": "x"}], "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("shutdown") / "toy"
    dsv4.save_model(tiny_model(num_ids(tokenizer), max_context=2**17), directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture
def start(model):
    """Start a server as the command does; give its process, its address, and what it has written so far."""
    processes = []

    def run(*options):
        process = subprocess.Popen(
            [sys.executable, "-c", RUN, str(model), "--port", "0", *options], stderr=subprocess.PIPE, text=True
        )
        processes.append(process)
        written, address = [], threading.Event()

        def read():
            for line in process.stderr:
                written.append(line)
                if "is a chat page" in line:
                    address.set()
            address.set()

        reader = threading.Thread(target=read)
        reader.start()
        readers.append(reader)
        assert address.wait(120)
        url = re.search(r"http://[^ ]+", "".join(written))
        assert url, "".join(written)
        for _ in range(1000):
            try:
                httpx.get(url[0] + "/health")
                break
            except httpx.ConnectError:
                time.sleep(0.05)
        return process, url[0], written

    readers = []
    yield run
    for process in processes:
        process.kill()
        process.wait()
    for reader in readers:
        reader.join()
    for process in processes:
        process.stderr.close()


def test_answers_may_end_and_nothing_new_begins(start):
    process, url, written = start("--shutdown-s", "60")
    body = {**CHAT, "stream": True, "max_tokens": 400}
    with httpx.Client(timeout=60) as client, client.stream("POST", url + PATH, json=body) as stream:
        parts = stream.iter_text()
        text = next(parts)
        process.send_signal(signal.SIGTERM)
        refused = None
        while refused is None:
            try:
                httpx.get(url + "/health")
            except httpx.TransportError as error:
                refused = error
        text += "".join(parts)
    assert text.endswith("data: [DONE]\n\n")
    assert text.count("data: ") > 50
    assert process.wait(60) == 0
    assert "Traceback" not in "".join(written), "".join(written)


def test_answers_that_take_too_long_are_told_so(start, tmp_path):
    process, url, written = start("--shutdown-s", "1", "--state", str(tmp_path / "state"))
    found = {}

    def ask(path, stream, field):
        body = {**CHAT, "input": "x", "stream": stream, field: 100_000}
        if path != PATH:
            del body["messages"], body["ignore_eos"]
            body["text"] = {"format": {"type": "json_schema", "name": "long", "schema": LONG}}
        with httpx.stream("POST", url + path, json=body, timeout=60) as response:
            found[path, stream] = (response.status_code, response.read().decode())

    threads = [
        threading.Thread(target=ask, args=args)
        for args in (
            (PATH, True, "max_tokens"), (PATH, False, "max_tokens"), ("/v1/responses", True, "max_output_tokens")
        )
    ]  # fmt: skip
    for thread in threads:
        thread.start()
    while httpx.get(url + "/health").json()["requests"] < 3:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    for thread in threads:
        thread.join(60)
    assert process.wait(60) == 0
    status, text = found[PATH, True]
    assert status == 200
    assert json.loads(text.strip().split("\n\n")[-1].removeprefix("data: "))["error"]["code"] == "server_stopping"
    status, text = found[PATH, False]
    assert status == 503
    assert json.loads(text)["error"]["code"] == "server_stopping"
    status, text = found["/v1/responses", True]
    assert status == 200
    assert json.loads(text.strip().split("data: ")[-1])["type"] == "response.failed"
    assert "Traceback" not in "".join(written), "".join(written)


LONG = {"type": "array", "items": {"type": "integer"}, "minItems": 90_000}
