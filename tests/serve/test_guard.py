"""The door: keys, whose name a request is for, what is written about it, and what it may be made of."""

import asyncio
import hmac
import logging
from contextlib import asynccontextmanager

import httpx
import pytest
from anthropic import Anthropic, AuthenticationError
from openai import AuthenticationError as OpenAIAuthenticationError
from openai import OpenAI

from dsv4.config.serve import ServeOptions
from dsv4.serve.app import create_app

CHAT = {"model": "toy", "messages": [{"role": "user", "content": "the weather"}], "max_tokens": 2}
PATH = "/v1/chat/completions"
KEYS = "first-key\n\n  second-key \n"


@pytest.fixture
def key_file(tmp_path):
    path = tmp_path / "keys"
    path.write_text(KEYS)
    return str(path)


@pytest.fixture
def client(make_service):
    """Call an application in this process: ``client(options, *requests)`` gives their answers."""

    @asynccontextmanager
    async def opened(options):
        service = make_service(options)
        transport = httpx.ASGITransport(app=create_app(service), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as http:
            yield http
        assert service.admission.num_now == 0
        service.engine.close()

    def call(options, *requests):
        async def run():
            async with opened(options) as http:
                return [await http.request(method, path, **given) for method, path, given in requests]

        return asyncio.run(run())

    return call


# ---- keys ----


def test_a_key_opens_the_door_in_both_headers(client, key_file):
    options = ServeOptions(key_file=key_file)
    good = [{"authorization": "Bearer first-key"}, {"authorization": "bearer second-key"}, {"x-api-key": "second-key"}]
    bad = [
        {}, {"authorization": "Bearer first"}, {"authorization": "Bearer first-key2"}, {"x-api-key": ""},
        {"authorization": "first-key"}, {"x-api-key": "  "}, {"authorization": "Bearer f\u00fcrst"},
    ]  # fmt: skip
    asked = [("GET", "/v1/models", {"headers": {k: v.encode() for k, v in one.items()}}) for one in good + bad]
    found = client(options, *asked)
    assert [one.status_code for one in found] == [200] * len(good) + [401] * len(bad)
    assert found[-1].headers["www-authenticate"] == "Bearer"
    assert found[-1].json()["error"]["code"] == "invalid_api_key"


def test_only_the_page_and_health_are_open(client, key_file):
    paths = ("/", "/health", "/page/../v1/models", "/metrics", "/openapi.json", "/v1/models", "/tokenize", "/nothing")
    found = client(ServeOptions(key_file=key_file), *[("GET", path, {}) for path in paths])
    assert [one.status_code for one in found] == [200, 200, 401, 401, 401, 401, 401, 401]


def test_all_keys_are_compared_whichever_is_right(client, key_file, monkeypatch):
    compared = []

    def compare(one, other):
        compared.append((len(one), len(other)))
        return hmac.__dict__["_real"](one, other)

    monkeypatch.setitem(hmac.__dict__, "_real", hmac.compare_digest)
    monkeypatch.setattr("dsv4.serve.guard.hmac.compare_digest", compare)
    for key in ("first-key", "second-key", "x"):
        client(ServeOptions(key_file=key_file), ("GET", "/v1/models", {"headers": {"x-api-key": key}}))
    assert compared == [(32, 32)] * 6  # two for each request, of one length whatever was sent


def test_the_official_clients_know_a_wrong_key(served, key_file):
    _, url = served(ServeOptions(key_file=key_file))
    with (
        OpenAI(base_url=url + "/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(OpenAIAuthenticationError),
    ):
        client.models.list()
    with Anthropic(base_url=url, api_key="wrong", max_retries=0) as client, pytest.raises(AuthenticationError):
        client.messages.count_tokens(model="toy", messages=[{"role": "user", "content": "x"}])
    with Anthropic(base_url=url, api_key="second-key", max_retries=0) as client:
        assert client.messages.count_tokens(model="toy", messages=[{"role": "user", "content": "x"}]).input_tokens > 0


@pytest.mark.parametrize(
    ("text", "wrong"),
    [(None, "expected a file that exists"), (" \n\n", "holds no key"), ("schl\u00fcssel", "not ASCII")],
)
def test_a_key_file_that_is_none_stops_the_start(make_service, tmp_path, text, wrong):
    path = tmp_path / "keys"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=wrong):
        create_app(make_service(ServeOptions(key_file=str(path))))


# ---- whose name a request is for ----


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost", 200), ("LocalHost:80", 200), ("127.0.0.1:8000", 200), ("[::1]:8000", 200), ("192.168.1.5:8000", 200),
     ("evil.example", 403), ("evil.example:8000", 403), ("127.0.0.1.evil.example", 403), ("localhost.evil.com", 403)],
)  # fmt: skip
def test_without_keys_another_sites_name_is_refused(client, host, status):
    (found,) = client(ServeOptions(), ("GET", "/v1/models", {"headers": {"host": host}}))
    assert found.status_code == status


def test_with_keys_a_server_may_have_any_name(client, key_file):
    headers = {"host": "models.example", "x-api-key": "first-key"}
    (found,) = client(ServeOptions(key_file=key_file), ("GET", "/v1/models", {"headers": headers}))
    assert found.status_code == 200


def test_no_other_site_may_read_unless_it_is_asked_for(client, key_file):
    ask = {"origin": "https://a.example", "access-control-request-method": "POST"}
    post = ("POST", PATH, {"json": CHAT, "headers": {"origin": "https://a.example"}})
    closed = client(ServeOptions(), ("OPTIONS", PATH, {"headers": ask}), post)
    assert closed[0].status_code == 405
    assert not [name for one in closed for name in one.headers if name.startswith("access-control")]
    other = {**ask, "origin": "https://b.example"}
    options = ServeOptions(cors_origins=("https://a.example",), key_file=key_file)
    asked, refused, read = client(
        options, ("OPTIONS", PATH, {"headers": ask}), ("OPTIONS", PATH, {"headers": other}), post
    )
    assert asked.status_code == 200
    assert asked.headers["access-control-allow-origin"] == "https://a.example"
    assert "access-control-allow-origin" not in refused.headers
    assert read.status_code == 401  # and the page can read that
    assert read.headers["access-control-allow-origin"] == "https://a.example"


# ---- what is written about it ----


@pytest.mark.parametrize("logs_prompts", [False, True])
def test_logs_have_no_prompts_unless_asked(client, caplog, logs_prompts):
    caplog.set_level(logging.DEBUG)
    options = ServeOptions(logs_prompts=logs_prompts)
    body = {**CHAT, "messages": [{"role": "user", "content": "qwertyuiop"}]}
    kind = {"content-type": "text/qwertyuiop"}
    found = client(
        options, ("POST", PATH, {"json": body}), ("POST", "/v1/messages", {"json": body}),
        ("POST", PATH, {"json": {**body, "temperature": 9}}), ("POST", PATH, {"content": b"x", "headers": kind}),
        ("GET", "/v1/models/qwertyuiop?q=qwertyuiop", {"headers": {"x-api-key": "qwertyuiop"}}),
    )  # fmt: skip
    assert [one.status_code for one in found] == [200, 200, 400, 415, 404]
    logged = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("dsv4"))
    assert PATH in logged
    assert ("qwertyuiop" in logged) == logs_prompts
    assert found[0].headers["x-request-id"] in logged


def test_paths_that_are_none_are_counted_as_one(client):
    *_, found = client(
        ServeOptions(), ("GET", "/secret-path", {}), ("POST", "/v1/other", {"json": {}}),
        ("GET", "/v1/models/secret-name", {}), ("GET", "/health", {}), ("GET", "/metrics", {}),
    )  # fmt: skip
    lines = [line for line in found.text.splitlines() if line.startswith("dsv4_http_requests_total")]
    assert sorted(lines) == [
        'dsv4_http_requests_total{path="/health",status="200"} 1.0',
        'dsv4_http_requests_total{path="other",status="404"} 3.0',
    ]


def test_an_answer_is_counted_before_it_is_out(make_service):
    """Its client may ask at once how many there were."""
    service, counted = make_service(ServeOptions()), []
    scope = {
        "type": "http", "http_version": "1.1", "method": "GET", "scheme": "http", "path": "/health",
        "raw_path": b"/health", "root_path": "", "query_string": b"", "headers": [], "client": None, "server": None,
    }  # fmt: skip

    async def nothing():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        counted.append(b'path="/health",status="200"} 1.0' in service.metrics.text())

    asyncio.run(create_app(service)(scope, nothing, send))
    assert counted == [False, True]
    service.engine.close()


# ---- paths ----

STRANGE = ("../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/etc/passwd", "//etc/passwd", "%2fetc%2fpasswd",
           "%00", "app.js%00.css", "..\\..\\etc\\passwd", "%5c..%5cetc", "....//etc/passwd", "%c0%ae%c0%ae/x", "~root",
           "resp_0123456789abcdef01234567%0a", "resp_..%2f0123456789abcdef01234", "a" * 5000)  # fmt: skip


@pytest.mark.parametrize("folder", ["/page/", "/v1/responses/", "/v1/models/", "/"])
def test_no_path_leads_into_the_file_system(make_service, served, wire, tmp_path, monkeypatch, folder):
    state = tmp_path / "state"
    state.mkdir()
    _, url = served(ServeOptions(state=str(state)), log=str(state / "tokens.log"))
    connection = wire(url)
    connection.ask("GET", "/health")  # what a server reads when it starts is read now
    connection.until(b"}")
    opened = []
    monkeypatch.setattr("pathlib.Path.open", lambda path, *_, **__: opened.append(path))
    monkeypatch.setattr("pathlib.Path.read_text", lambda path, *_, **__: opened.append(path))
    for strange in STRANGE:
        for method in ("GET", "DELETE"):
            connection.ask(method, folder + strange)
            head, _, _ = connection.until(b"}}").partition(b"\r\n")
            assert head.split()[1] in (b"404", b"405"), strange
    assert opened == []


# ---- what it may be made of ----

DEEP = b'{"a":' * 3000 + b"1" + b"}" * 3000
MESSAGE = b'{"model":"toy","max_tokens":1,"messages":[{"role":"user","content":"x"}],"%b}'
ODD = {
    b'tools":[{"type":"function","function":{"name":"f","parameters":{"a":NaN}}}]': "NaN",
    b'unknown":-Infinity': "Infinity",
    b'unknown":1e999': "too large",
    b'unknown":' + b"9" * 5000: "digits",
    b'unknown":' + DEEP: "nested",
    b'unknown":"\\ud800"': "surrogate",
    b'temperature":1e308': "less than or equal",
    b'max_tokens":' + b"9" * 400: "max_tokens",
    b'temperature":' + b"9" * 400: "temperature",
    b'user":"\xff\xfe"': "UTF-8",
    b'user":"\x01"': "control character",
    b'seed":1e3000': "too large",
}


@pytest.mark.parametrize(("field", "told"), ODD.items(), ids=[str(i) for i in range(len(ODD))])
def test_what_is_no_json_is_refused(http, field, told):
    found = http("POST", PATH, content=MESSAGE % field, headers={"content-type": "application/json"})
    assert found.status_code == 400
    assert told in found.json()["error"]["message"]


def test_depth_that_python_can_read_fails_as_politely(http):
    kind = {"content-type": "application/json"}
    for depth in (100, 200, 300, 400):
        parameters = b'{"properties":{"a":' * depth + b"{}" + b"}}" * depth
        tool = b'{"type":"function","name":"f","function":{"name":"f","strict":true,"parameters":%b},"parameters":%b}'
        body = b'{"model":"toy","max_tokens":1,"messages":[{"role":"user","content":"x"}],"input":"x","tools":[%b]}'
        for path in (PATH, "/v1/responses"):
            found = http("POST", path, content=body % (tool % (parameters, parameters)), headers=kind)
            assert found.status_code == 400 or depth < 200


def test_the_last_of_two_equal_names_counts(http):
    found = http("POST", "/tokenize", content=b'{"text":"a","text":"bb"}', headers={"content-type": "application/json"})
    assert found.json() == http("POST", "/tokenize", json={"text": "bb"}).json()


@pytest.mark.parametrize("body", [b"", b"null", b"[]", b'"x"', b"{", b"\x00", b"{}{}", '{"text":"x"}'.encode("utf-16")])
def test_what_is_no_request_is_refused(http, body):
    for path in (PATH, "/v1/messages", "/v1/responses", "/v1/completions", "/tokenize"):
        found = http("POST", path, content=body, headers={"content-type": "application/json"})
        assert found.status_code == 400
        assert found.json()["error"]["message"]


def test_text_parts_hold_text(http):
    body = {**CHAT, "messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}
    assert http("POST", PATH, json=body).status_code == 400


def test_what_a_program_got_wrong_is_an_error_of_the_server(client, make_service, monkeypatch, caplog):
    def fail(*_):
        raise KeyError("a mistake of ours")

    monkeypatch.setattr("dsv4.serve.app.model_list", fail)
    (found,) = client(ServeOptions(), ("GET", "/v1/models", {}))
    assert found.status_code == 500
    assert "mistake" not in found.text
    assert found.headers["x-request-id"] in found.json()["error"]["message"]
    assert "a mistake of ours" in caplog.text
