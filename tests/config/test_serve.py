"""Options of a server: what is refused before anything starts."""

import subprocess
import sys

import pytest

from dsv4.config.serve import ServeOptions, is_loopback

WRONG = [
    ({"host": ""}, "serve.host is ''; expected an address"),
    ({"port": -1}, "serve.port is -1; expected"),
    ({"port": 65536}, "serve.port is 65536; expected"),
    ({"port": True}, "serve.port is True; expected"),
    ({"max_waiting": -1}, "serve.max_waiting is -1; expected"),
    ({"max_per_key": -1}, "serve.max_per_key is -1; expected"),
    ({"max_body_bytes": 0}, "serve.max_body_bytes is 0; expected"),
    ({"body_timeout_s": 0}, "serve.body_timeout_s is 0; expected a positive number of seconds"),
    ({"request_timeout_s": -1.0}, "serve.request_timeout_s is -1.0; expected a positive number of seconds"),
    ({"keep_alive_s": float("nan")}, "serve.keep_alive_s is nan; expected a positive number of seconds"),
    ({"shutdown_s": float("inf")}, "serve.shutdown_s is inf; expected a positive number of seconds"),
    ({"shutdown_s": "5"}, "serve.shutdown_s is '5'; expected a positive number of seconds"),
    ({"key_file": 5}, "serve.key_file is 5; expected"),
    ({"key_file": ""}, "serve.key_file is ''; expected"),
    ({"state": ""}, "serve.state is ''; expected"),
    ({"logs_prompts": 1}, "serve.logs_prompts is 1; expected"),
    ({"cors_origins": "https://a.example"}, "serve.cors_origins is 'https://a.example'; expected"),
    ({"cors_origins": ("a.example",)}, "serve.cors_origins holds 'a.example'; expected"),
    ({"cors_origins": ("https://a.example/",)}, "serve.cors_origins holds 'https://a.example/'; expected"),
]


@pytest.mark.parametrize(("given", "told"), WRONG)
def test_what_is_wrong_is_told(given, told):
    with pytest.raises(ValueError) as caught:
        ServeOptions(**given)
    assert told in str(caught.value)


def test_all_that_is_wrong_is_told_at_once():
    with pytest.raises(ValueError) as caught:
        ServeOptions(port=-1, keep_alive_s=0, max_waiting=-5)
    assert all(name in str(caught.value) for name in ("serve.port", "serve.keep_alive_s", "serve.max_waiting"))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.com", "8.8.8.8", "127.0.0.1.example.com"])
def test_others_are_let_in_only_with_keys(host):
    with pytest.raises(ValueError, match="without a key_file"):
        ServeOptions(host=host)
    assert ServeOptions(host=host, key_file="keys").host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.5.5.5", "::1", "localhost"])
def test_this_machine_alone_needs_no_keys(host):
    assert is_loopback(host)
    assert ServeOptions(host=host).key_file is None


def test_origins_are_those_that_browsers_send():
    origins = ("https://a.example", "http://localhost:3000", "*")
    assert ServeOptions(cors_origins=origins).cors_origins == origins


def test_options_need_neither_torch_nor_a_web_server():
    code = (
        "import sys, dsv4.config.serve; print(sorted({'torch', 'fastapi', 'uvicorn', 'starlette'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
