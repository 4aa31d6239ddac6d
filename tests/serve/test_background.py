"""Background responses: fetched later, kept apart by key, and made to their end whatever becomes of the server."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest

import dsv4
from dsv4.accounting.cache import page_bytes
from dsv4.config.sampling import Sampling
from dsv4.config.serve import ServeOptions
from dsv4.engine.log import recover
from dsv4.serve.app import create_app
from dsv4.serve.background import Background
from dsv4.serve.errors import ApiError
from dsv4.serve.responses_records import Record, Records
from dsv4.serve.responses_request import ResponsesRequest
from dsv4.serve.service import salt_of
from dsv4.text.tokens import DSML

ROOT = Path(dsv4.__file__).parents[1]
SCHEMA = {
    "type": "object", "properties": {"a": {"type": "string", "minLength": 60, "maxLength": 70}}, "required": ["a"],
    "additionalProperties": False,
}  # fmt: skip


def asked(schema=SCHEMA, **fields):
    text = {"format": {"type": "json_schema", "name": "a", "schema": schema}}
    return {
        "model": "toy",
        "input": "Say.",
        "background": True,
        "reasoning": {"effort": "none"},
        "text": text,
        **fields,
    }


def request_of(**fields):
    return ResponsesRequest.model_validate(asked(**fields))


def new_id(number):
    return f"resp_{number:024x}"


def told(response):
    """What a response says, without what differs from run to run."""
    items = [{k: v for k, v in item.items() if k not in ("id", "call_id")} for item in response["output"]]
    return response["status"], items, response["usage"]["output_tokens"]


class Forced:
    """A mask that lets a model say one text, slowly if it must."""

    def __init__(self, tokenizer, text, eos, size, pause=0.0):
        self._ids, self._size, self._pause = [*tokenizer.encode(text, add_special_tokens=False).ids, eos], size, pause

    def __call__(self, output):
        time.sleep(self._pause)
        allowed = np.zeros(self._size, bool)
        allowed[self._ids[len(output)]] = True
        return allowed


@pytest.fixture
def state(tmp_path):
    return tmp_path / "state"


@pytest.fixture
def make(make_service, state):
    """Make a service with a folder for its state, as many in turn as a test wants."""
    state.mkdir()
    made = []

    def make(max_waiting=3, **limits):
        given = {"log": str(state / "tokens.log"), "numerics": "invariant", "max_requests": 2, **limits}
        made.append(make_service(ServeOptions(state=str(state), max_waiting=max_waiting), **given))
        return made[-1]

    yield make
    for service in made:
        service.engine.close()


@pytest.fixture
def service(make):
    return make()


@pytest.fixture
def force(monkeypatch):
    def force(service, text, pause=0.0):
        size = service.engine.model.config.vocab_size
        mask = Forced(service.tokenizer, text, service.eos, size, pause)
        monkeypatch.setattr(service, "_mask", lambda *_, **__: mask)

    return force


@asynccontextmanager
async def serving(service):
    """Background responses from the start of a server to its stop."""
    background = Background(service)
    await background.start()
    try:
        yield background
    finally:
        await background.stop()
        service.engine.close()


async def ended(background, id, key=""):
    async with asyncio.timeout(120):
        while (found := await background.get(id, key))["status"] in ("queued", "in_progress"):
            await asyncio.sleep(0.01)
        if id in background._runs:
            await background._runs[id].task
    return found


async def until(is_true):
    async with asyncio.timeout(120):
        while not is_true():
            await asyncio.sleep(0.005)


def logged(state):
    return {one.id: one for one in recover(state / "tokens.log")}


def whole(service, *requests):
    """What requests give without any interruption."""

    async def run():
        async with serving(service) as background:
            for number, request in enumerate(requests):
                await background.add(request, key="", id=new_id(number), created=1)
            return [told(await ended(background, new_id(number))) for number in range(len(requests))]

    return asyncio.run(run())


# ---- over HTTP ----


def test_the_official_client_polls(address, service, state):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
        found = client.responses.create(**asked(), extra_body={"seed": 3}, metadata={"a": "b"})
        assert (found.status, found.background, found.output, found.usage) == ("queued", True, [], None)
        while found.status in ("queued", "in_progress"):
            time.sleep(0.02)
            found = client.responses.retrieve(found.id)
        assert (found.status, found.metadata) == ("completed", {"a": "b"})
        assert 60 <= len(json.loads(found.output_text)["a"]) <= 70
        assert found.usage.output_tokens > 20
        assert client.responses.cancel(found.id).output_text == found.output_text
        client.responses.delete(found.id)
        with pytest.raises(openai.NotFoundError, match="there is no response"):
            client.responses.retrieve(found.id)
    assert list((state / "responses").iterdir()) == []
    assert service.admission.num_now == 0


def test_the_official_client_cancels(address, service, state, force):
    force(service, "</think>One, two, three and so on", pause=0.1)
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
        found = client.responses.create(**asked())
        while client.responses.retrieve(found.id).status != "in_progress":
            time.sleep(0.01)
        assert service.admission.num_now == 1
        ended = client.responses.cancel(found.id)
        assert ended.status == "cancelled"
        assert ended.completed_at is None
        assert "One, two, three and so on".startswith(ended.output_text)
        assert len(ended.output_text) < 20
        assert client.responses.retrieve(found.id) == ended
        again = client.responses.create(**asked())
        assert httpx.delete(f"{address}/v1/responses/{again.id}", timeout=60).json() == {
            "id": again.id, "object": "response", "deleted": True,
        }  # fmt: skip
        assert [path.stem for path in (state / "responses").iterdir()] == [found.id]
    assert service.engine.is_idle
    assert service.admission.num_now == 0


@pytest.mark.parametrize(
    ("fields", "message"), [({"stream": True}, "with stream"), ({"store": False}, "store is false with background")]
)
def test_what_background_excludes(http, fields, message):
    answer = http("POST", "/v1/responses", json=asked(**fields))
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_without_a_folder_there_is_no_background(make_service):
    service = make_service()

    async def run():
        background = Background(service)
        await background.start()
        with pytest.raises(ApiError, match="no folder for it; expected one started with --state") as refused:
            await background.add(request_of(), key="", id=new_id(1), created=1)
        assert refused.value.status == 400
        with pytest.raises(ApiError, match="there is no response"):
            await background.get(new_id(1), "")

    asyncio.run(run())
    service.engine.close()


def test_a_folder_needs_a_log(make_service, tmp_path):
    service = make_service(ServeOptions(state=str(tmp_path)))
    with pytest.raises(ValueError, match="the engine has no log; expected limits"):
        create_app(service)
    service.engine.close()


@pytest.mark.parametrize("id", ["..%2Ftokens", "resp_1", new_id(1) + "%0A", new_id(0xABC).upper(), "%2E%2E", new_id(1)])
def test_an_id_is_never_a_path(http, state, id):
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/cancel")):
        answer = http(method, f"/v1/responses/{id}{path}")
        assert answer.status_code in (404, 405), answer.text
    assert (state / "tokens.log").exists()
    assert http("GET", f"/v1/responses/{new_id(1)}?stream=true").status_code == 400


# ---- in one process ----


def test_calls_and_thinking_of_the_background(service, force):
    call = (
        f'<{DSML}invoke name="f">\n<{DSML}parameter name="city" string="true">Oslo</{DSML}parameter>\n</{DSML}invoke>'
    )
    force(service, f"Hm.</think>I call.\n\n<{DSML}tool_calls>\n{call}\n</{DSML}tool_calls>")
    tool = {
        "type": "function",
        "name": "f",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    }

    async def run():
        async with serving(service) as background:
            request = request_of(tools=[tool], reasoning={"effort": "high"}, user="u")
            await background.add(request, key="", id=new_id(1), created=5)
            return await ended(background, new_id(1))

    found = asyncio.run(run())
    assert (found["status"], found["created_at"]) == ("completed", 5)
    assert [item["type"] for item in found["output"]] == ["reasoning", "message", "function_call"]
    assert json.loads(found["output"][2]["arguments"]) == {"city": "Oslo"}
    assert found["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
    assert service.memory._known == {("u", found["output"][2]["call_id"]): "Hm."}
    assert b'dsv4_finished_total{reason="tool_calls"} 1.0' in service.metrics.text()


def test_others_cannot_see_it(service):
    async def run():
        async with serving(service) as background:
            await background.add(request_of(), key="a", id=new_id(1), created=1)
            for action in (background.get, background.cancel, background.delete):
                with pytest.raises(ApiError) as refused:
                    await action(new_id(1), "b")
                assert refused.value.status == 404
            assert (await ended(background, new_id(1), "a"))["status"] == "completed"
            await until(lambda: not background._runs)
            for action in (background.get, background.cancel, background.delete):
                with pytest.raises(ApiError) as refused:
                    await action(new_id(1), "b")
                assert refused.value.status == 404
            assert (await background.get(new_id(1), "a"))["status"] == "completed"

    asyncio.run(run())


def test_there_is_an_end_to_how_many_run(service, force):
    force(service, "</think>And so on, again and again", pause=0.02)

    async def run():
        async with serving(service) as background:
            for number in range(5):  # two run, three wait
                await background.add(request_of(), key="", id=new_id(number), created=1)
            await until(lambda: service.admission.num_now == 5)
            with pytest.raises(ApiError, match="5 requests are running or waiting") as refused:
                await background.add(request_of(), key="", id=new_id(5), created=1)
            assert refused.value.status == 429

    asyncio.run(run())


def test_a_stopped_server_makes_no_more_steps(service, force):
    """Also where the loop goes on: what made the steps is ended, and does not fail for want of a thread."""
    force(service, "</think>And so on, again and again", pause=0.02)

    async def run():
        async with serving(service) as background:
            await background.add(request_of(), key="", id=new_id(1), created=1)
            await until(lambda: background._runs[new_id(1)].status == "in_progress")
        driver = service.engine._streams._driver
        await asyncio.wait([driver])
        assert driver.cancelled()

    asyncio.run(run())


@pytest.mark.parametrize("has_log", [True, False], ids=["log", "no log"])
def test_a_stopped_server_goes_on_where_it_was(make, state, has_log):
    """One that ran, and one that waited; with the log from where they were, without it from the beginning."""
    requests = [
        request_of(seed=3, user="u"),
        request_of(seed=4, reasoning={"effort": "high"}),
        request_of(seed=5, text=None),
    ]
    quiet = whole(make(max_requests=1, log=str(state / "other.log")), *requests)
    (state / "responses").rename(state / "others")
    service = make(max_requests=1)

    async def begun():
        async with serving(service) as background:
            for number, request in enumerate(requests):
                await background.add(request, key="k", id=new_id(number), created=number)
            await until(lambda: len(service.engine.completion(new_id(0)).token_ids) > 5)
            assert (await background.get(new_id(0), "k"))["status"] == "in_progress"
            assert (await background.get(new_id(1), "k"))["status"] == "queued"

    asyncio.run(begun())
    left = logged(state)
    assert [one.finish for one in left.values()] == [None] * 3
    assert 5 < len(left[new_id(0)].output_ids) < quiet[0][2]
    assert [one.salt for one in left.values()] == [salt_of("u").hex(), "", ""]
    if not has_log:
        (state / "tokens.log").unlink()
    again = make(max_requests=1, max_waiting=0)  # what was let in once is not refused

    async def resumed():
        async with serving(again) as background:
            runs = background._runs
            assert [run.prepared.mask is not None for run in runs.values()] == [True, True, False]
            return [told(await ended(background, new_id(number), "k")) for number in range(3)]

    assert asyncio.run(resumed()) == quiet
    assert logged(state) == {}


def test_a_seed_is_chosen_once(make, state):
    """A request without one has the same answer when it begins anew."""
    service = make()
    id = new_id(1)

    async def run(background):
        return told(await ended(background, id))

    async def first():
        async with serving(service) as background:
            await background.add(request_of(temperature=1.5), key="", id=id, created=1)
            return await run(background)

    found = asyncio.run(first())
    records = Records(state / "responses")
    record = records.read(id)
    assert record is not None
    records.write(replace(record, response=None))

    async def second():
        async with serving(make()) as background:
            return await run(background)

    assert asyncio.run(second()) == found


def test_a_prompt_is_made_once(make, state):
    """What was put back into it is not known any more when the server starts again."""
    service, prompt = make(), [0, 5, 9, 7]
    Records(state / "responses").write(
        Record(id=new_id(1), key="", created=1, request=asked(), prompt_ids=prompt, seed=3)
    )

    async def run():
        async with serving(service) as background:
            await until(lambda: not service.engine.is_idle)
            assert logged(state)[new_id(1)].prompt_ids == prompt
            return await ended(background, new_id(1))

    found = asyncio.run(run())
    assert (found["status"], found["usage"]["input_tokens"]) == ("completed", len(prompt))


def test_an_end_is_not_told_before_it_is_stored(service, monkeypatch):
    """Another start would tell it with other ids."""
    write, seen = Records.write, []

    async def run():
        async with serving(service) as background:

            def watched(records, record):
                write(records, record)
                seen.extend(run.now["status"] for run in background._runs.values())

            monkeypatch.setattr(Records, "write", watched)
            await background.add(request_of(user="u"), key="", id=new_id(1), created=1)
            found = await ended(background, new_id(1))
            assert await background.get(new_id(1), "") == found

    asyncio.run(run())
    assert seen == ["in_progress"]


def test_an_end_that_was_not_stored_is_found_again(make, state, monkeypatch, caplog):
    service, write = make(), Records.write

    def full(records, record):
        if record.response is not None:
            raise OSError(28, "No space left on device")
        write(records, record)

    async def first():
        async with serving(service) as background:
            await background.add(request_of(seed=3), key="", id=new_id(1), created=1)
            found = await ended(background, new_id(1))
            assert await background.get(new_id(1), "") == found  # from memory
            return told(found)

    monkeypatch.setattr(Records, "write", full)
    found = asyncio.run(first())
    assert "cannot be stored: [Errno 28]" in caplog.text
    assert logged(state)[new_id(1)].finish == "stop"
    monkeypatch.setattr(Records, "write", write)

    async def second():
        async with serving(make()) as background:
            return told(await ended(background, new_id(1)))

    assert asyncio.run(second()) == found
    assert logged(state) == {}


def test_what_cannot_be_stored_can_be_deleted(service, state, monkeypatch):
    write = Records.write

    def full(records, record):
        if record.response is not None:
            raise OSError(28, "No space left on device")
        write(records, record)

    monkeypatch.setattr(Records, "write", full)

    async def run():
        async with serving(service) as background:
            await background.add(request_of(seed=3), key="", id=new_id(1), created=1)
            await ended(background, new_id(1))
            await background.delete(new_id(1), "")
            with pytest.raises(ApiError, match="there is no response"):
                await background.get(new_id(1), "")

    asyncio.run(run())
    assert logged(state) == {}
    assert list((state / "responses").iterdir()) == []


def test_what_the_log_has_of_others_is_forgotten(make, state):
    """A request whose client has gone, with a mask; and one whose end was stored just before a kill."""
    service = make()
    prompt, stored = [0, 5, 7], {"id": new_id(2), "status": "completed"}
    service.engine.add(prompt, Sampling(max_tokens=9), id="request-of-a-client", mask=lambda _: None)
    service.engine.add(prompt, Sampling(max_tokens=9), id=new_id(2))
    service.engine.close()
    record = Record(id=new_id(2), key="", created=1, request=asked(), prompt_ids=prompt, seed=1, response=stored)
    records = Records(state / "responses")
    records.write(record)
    again = make()

    async def run():
        async with serving(again) as background:
            assert again.engine.is_idle
            assert background._runs == {}
            assert await background.get(new_id(2), "") == stored

    asyncio.run(run())
    assert logged(state) == {}


def test_a_record_that_is_not_understood_fails(make, state, caplog):
    service = make()
    records = Records(state / "responses")
    unknown = {"key": "", "created": 1, "prompt_ids": [0, 5], "seed": 1}
    records.write(Record(id=new_id(1), request={"model": "toy"}, **unknown))
    records.write(Record(id=new_id(2), request={**asked(), "reasoning": {"effort": "huge"}}, **unknown))
    (state / "responses" / f"{new_id(3)}.json").write_text("{")
    service.engine.add([0, 5], Sampling(max_tokens=9), id=new_id(2), mask=lambda _: None)
    service.engine.close()

    async def run():
        async with serving(make()) as background:
            found = [await background.get(new_id(number), "") for number in (1, 2)]
            with pytest.raises(ApiError, match="there is no response"):
                await background.get(new_id(3), "")
            return found

    found = asyncio.run(run())
    assert [one["status"] for one in found] == ["failed"] * 2
    assert "effort is 'huge'" in found[1]["error"]["message"]
    assert f"the record of response {new_id(3)} cannot be read" in caplog.text
    assert logged(state) == {}


@pytest.mark.parametrize(
    ("fewer", "reason"), [("cache_bytes", "pages; expected at most the cache's 1"), ("max_context", "is too long")]
)
def test_what_does_not_fit_any_more_fails_and_the_others_go_on(make, state, slow_down, fewer, reason):
    """A server that has less room than the one before it starts all the same."""
    service = make()
    short = {"text": None, "max_output_tokens": 40}
    requests = [request_of(seed=3, **short), request_of(seed=4, input="Say. " * 60), request_of(seed=5, **short)]
    room = {"max_context": 120, "cache_bytes": page_bytes(service.engine.model.config, "float32")}

    async def begun():
        async with serving(service) as background:
            for number, request in enumerate(requests):
                await background.add(request, key="", id=new_id(number), created=1)
            run = background._runs[new_id(1)]
            await until(lambda: len(logged(state)) == 3 and run.status == "in_progress")

    async def resumed():
        async with serving(make(**{fewer: room[fewer]})) as background:
            return [await ended(background, new_id(number)) for number in range(3)]

    slow_down(service)
    asyncio.run(begun())
    assert [one.finish for one in logged(state).values()] == [None] * 3
    found = asyncio.run(resumed())
    assert [one["status"] in ("completed", "incomplete") for one in found] == [True, False, True]
    assert (found[1]["status"], found[1]["output"]) == ("failed", [])
    assert reason in found[1]["error"]["message"]
    assert logged(state) == {}


@pytest.mark.parametrize(
    ("text", "message"), [("</think>no", "no token can follow"), (None, "the engine has stopped: the step broke")]
)
def test_failures(service, state, monkeypatch, text, message):
    def broken(*_):
        raise RuntimeError("the mask broke" if text else "the step broke")

    if text is None:
        monkeypatch.setattr(service.engine.runner, "run", broken)
    else:
        monkeypatch.setattr(service, "_mask", lambda *_, **__: broken)

    async def run():
        async with serving(service) as background:
            await background.add(request_of(), key="", id=new_id(1), created=1)
            found = await ended(background, new_id(1))
            await until(lambda: not background._runs)
            return found

    found = asyncio.run(run())
    assert (found["status"], found["output"]) == ("failed", [])
    assert message in found["error"]["message"]
    assert service.admission.num_now == 0
    assert logged(state) == {}


# ---- a process that dies ----


LONG = {**SCHEMA, "properties": {"a": {"type": "string", "minLength": 700, "maxLength": 710}}}


@asynccontextmanager
async def process(model, state, errors):
    """The command in a process of its own, until it is gone; its address."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    options = ["--port", "0", "--state", state, "--name", "toy", "--numerics", "invariant", "--precision", "float32"]
    options += ["--concurrency", "2", "--cache-bytes", 2**21]
    command = [sys.executable, "-m", "dsv4", "serve", model, *options]
    with errors.open("w") as file:
        child = subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment, stderr=file)
    try:
        await until(lambda: "is a chat page" in errors.read_text() or child.poll() is not None)
        assert child.poll() is None, errors.read_text()
        yield child, errors.read_text().split(" ")[1]
    finally:
        if child.poll() is None:
            child.kill()
        child.wait()


def test_killed_and_stopped_and_started_again(make, state, tmp_path):
    """kill -9 amid answers, then SIGTERM, then none: the answers are those of a server that is left in peace."""
    bodies = [asked(LONG, seed=3), asked(LONG, seed=4, reasoning={"effort": "high"}), asked(seed=5, text=None)]
    service = make(log=str(tmp_path / "other.log"))
    quiet = whole(service, *map(ResponsesRequest.model_validate, bodies))
    (state / "responses").rename(tmp_path / "others")
    dsv4.save_model(service.engine.model, tmp_path / "model")
    service.tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))

    async def output_tokens(least, ids, child):
        def grown():
            assert child.poll() is None
            found = logged(state) if (state / "tokens.log").exists() else {}
            return sum(len(one.output_ids) for id, one in found.items() if id in ids) >= least

        await until(grown)

    async def run():
        async with httpx.AsyncClient(timeout=60) as client:
            async with process(tmp_path / "model", state, tmp_path / "errors-1") as (child, address):
                posted = [await client.post(f"{address}/v1/responses", json=body) for body in bodies]
                ids = [answer.json()["id"] for answer in posted]
                await output_tokens(30, ids, child)
                child.kill()
            assert child.returncode == -signal.SIGKILL
            left = logged(state)
            assert [left[id].finish for id in ids[:2]] == [None] * 2
            before = sum(len(left[id].output_ids) for id in ids if id in left)
            async with process(tmp_path / "model", state, tmp_path / "errors-2") as (child, address):
                await output_tokens(before + 30, ids, child)
                child.send_signal(signal.SIGTERM)
                await until(lambda: child.poll() is not None)
            assert child.returncode in (0, -signal.SIGTERM)
            assert "Traceback" not in (tmp_path / "errors-2").read_text()
            assert [logged(state)[id].finish for id in ids[:2]] == [None] * 2
            async with process(tmp_path / "model", state, tmp_path / "errors-3") as (child, address):
                found = []
                for id in ids:
                    while (now := (await client.get(f"{address}/v1/responses/{id}")).json())["status"] in (
                        "queued", "in_progress",
                    ):  # fmt: skip
                        await asyncio.sleep(0.05)
                    found.append(told(now))
            return found

    assert asyncio.run(run()) == quiet
