"""Clients that go away: what they asked for ends within a step, and nothing is left of it."""

import random
import threading
import time
from dataclasses import replace

import httpx
import pytest

CHAT = {"model": "toy", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1500, "ignore_eos": True}
TEXT = {"model": "toy", "prompt": "x", "max_tokens": 1500, "ignore_eos": True}
SAID = {"model": "toy", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1500}
ASKED = {"model": "toy", "input": "x", "max_output_tokens": 1500}
PATHS = {
    "/v1/chat/completions": CHAT, "/v1/completions": TEXT, "/v1/messages": SAID, "/v1/responses": ASKED,
}  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_a_client_that_goes_frees_its_request(served, wire, wait_for, path, stream):
    service, url = served()
    goes_on = service.engine.stream

    def endless(prompt, sampling, **given):  # two of the protocols cannot ask for that
        return goes_on(prompt, replace(sampling, ignore_eos=True), **given)

    service.engine.stream = endless
    num_free = service.engine.pool.num_free
    num_steps = 0
    step = service.engine.step

    def counted():
        nonlocal num_steps
        num_steps += 1
        time.sleep(0.05)
        return step()

    service.engine.step = counted
    connection = wire(url)
    connection.ask("POST", path, {**PATHS[path], "stream": stream})
    wait_for(lambda: num_steps >= 3)
    assert service.admission.num_now == 1
    connection.close()
    before = num_steps
    wait_for(lambda: service.admission.num_now == 0)
    assert num_steps <= before + 3  # the one that runs, and what the machine takes to hear that the client has gone
    wait_for(lambda: service.engine.pool.num_free == num_free)
    assert service.engine.is_idle


@pytest.mark.parametrize("body", [{**CHAT, "n": 4, "stream": True}, {**CHAT, "n": 4}])
def test_all_answers_of_a_request_are_freed(served, wire, slow_down, wait_for, body):
    service, url = served()
    slow_down(service)
    num_free = service.engine.pool.num_free
    connection = wire(url)
    connection.ask("POST", "/v1/chat/completions", body)
    wait_for(lambda: service.admission.num_now == 4)
    connection.close()
    wait_for(lambda: service.admission.num_now == 0)
    wait_for(lambda: service.engine.pool.num_free == num_free)


def test_one_that_waits_is_freed_without_having_run(served, wire, slow_down, wait_for):
    service, url = served(max_requests=1)
    slow_down(service)
    first, second = wire(url), wire(url)
    first.ask("POST", "/v1/chat/completions", {**CHAT, "stream": True})
    wait_for(lambda: service.admission.num_now == 1)
    second.ask("POST", "/v1/chat/completions", CHAT)
    wait_for(lambda: service.admission.num_now == 2)
    second.close()
    wait_for(lambda: service.admission.num_now == 1)
    assert httpx.get(url + "/health").json()["requests"] == 1
    first.close()
    wait_for(lambda: service.admission.num_now == 0)


def test_many_that_come_and_go_leave_nothing(served, wait_for):
    service, url = served(max_requests=8, cache_bytes=2**21)
    num_free = service.engine.pool.num_free
    generator = random.Random(7)
    delays = [generator.random() * 0.2 for _ in range(40)]
    paths = [generator.choice(list(PATHS)) for _ in delays]

    def come_and_go(path, delay, index):
        body = {**PATHS[path], "stream": index % 3 > 0}
        try:
            with httpx.stream("POST", url + path, json=body, timeout=httpx.Timeout(30, read=delay + 0.01)) as response:
                for _ in response.iter_raw():
                    if delay < 0.1:
                        return
        except httpx.ReadTimeout:
            return

    threads = [
        threading.Thread(target=come_and_go, args=(path, delay, i))
        for i, (path, delay) in enumerate(zip(paths, delays, strict=True))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    wait_for(lambda: service.admission.num_now == 0)
    wait_for(lambda: service.engine.pool.num_free == num_free)
    assert httpx.get(url + "/health").status_code == 200
    assert "dsv4_requests_now 0.0" in httpx.get(url + "/metrics").text
