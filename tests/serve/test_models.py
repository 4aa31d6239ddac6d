"""What the model is called, in the words of each protocol's clients, and how a request is found in the log."""

from contextlib import ExitStack

import anthropic
import openai
import pytest

from dsv4.config.serve import ServeOptions

VERSION = {"anthropic-version": "2023-06-01"}


@pytest.fixture(params=["", "/anthropic"])
def client(request, address):
    with anthropic.Anthropic(base_url=address + request.param, api_key="none", max_retries=0) as client:
        yield client


def test_models_by_every_name(http):
    listed = http("GET", "/v1/models").json()
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == ["toy"]
    assert listed["data"][0]["context_length"] == 2048
    assert listed["models"] == listed["data"]
    assert http("GET", "/v1/models/deepseek-reasoner").json()["id"] == "deepseek-reasoner"
    assert http("GET", "/v1/models/other").status_code == 404


def test_the_official_client_of_openai_lists_models(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        (found,) = client.models.list()
        assert client.models.retrieve("toy") == found
        assert (found.id, found.object, found.created) == ("toy", "model", 1_780_000_000)


def test_the_official_client_of_anthropic_lists_models(client):
    page = client.models.list(limit=5)
    assert (page.has_more, page.first_id, page.last_id) == (False, "toy", "toy")
    (found,) = page  # asks for further pages, if there were any
    assert (found.type, found.id, found.display_name, found.lifecycle) == ("model", "toy", "toy", "active")
    assert (found.created_at.timestamp(), found.created_at.utcoffset().seconds) == (1_780_000_000, 0)
    assert (found.max_input_tokens, found.max_tokens) == (2048, 2048)
    assert client.models.retrieve("toy") == found
    assert client.models.retrieve("claude-sonnet-5").id == "claude-sonnet-5"
    with pytest.raises(anthropic.NotFoundError, match="gpt-9") as refused:
        client.models.retrieve("gpt-9")
    assert refused.value.body["error"]["type"] == "not_found_error"


def test_who_asks_is_told_by_the_header_or_the_path(http):
    plain, theirs = http("GET", "/v1/models").json(), http("GET", "/v1/models", headers=VERSION).json()
    assert plain["data"][0]["object"] == "model"
    assert theirs["data"][0] | {"type": "model", "created_at": "2026-05-28T20:26:40Z"} == theirs["data"][0]
    assert set(theirs) == {"data", "has_more", "first_id", "last_id"}
    assert http("GET", "/anthropic/v1/models").json() == theirs
    assert http("GET", "/v1/models/toy", headers=VERSION).json() == theirs["data"][0]
    assert http("GET", "/anthropic/v1/models/toy").json() == theirs["data"][0]
    wrong = http("POST", "/v1/chat/completions", json={}, headers=VERSION)
    assert (wrong.status_code, set(wrong.json())) == (400, {"error"})  # a path of OpenAI's stays one


def test_a_wrong_key_is_told_in_the_words_of_who_asks(served, tmp_path):
    (tmp_path / "keys").write_text("right")
    _, url = served(ServeOptions(key_file=str(tmp_path / "keys")))
    with ExitStack() as stack:
        theirs, ours = (
            stack.enter_context(kind(base_url=base, api_key="wrong", max_retries=0))
            for kind, base in ((anthropic.Anthropic, url), (openai.OpenAI, f"{url}/v1"))
        )
        with pytest.raises(anthropic.AuthenticationError) as refused:
            theirs.models.list()
        assert refused.value.body["type"] == "error"
        assert refused.value.request_id
        with pytest.raises(openai.AuthenticationError) as refused:
            ours.models.list()
        assert refused.value.code == "invalid_api_key"
        assert refused.value.request_id


def test_a_request_has_an_id_where_its_client_looks(client, says, http):
    """Whole, streamed and refused: in the header of Anthropic's clients, and in the one that all have."""
    asked = {"model": "toy", "max_tokens": 9, "messages": [{"role": "user", "content": "x"}]}
    says("Fine.")
    ids = [client.messages.create(**asked)._request_id, client.models.list()._request_id]
    with client.messages.stream(**asked) as stream:
        stream.until_done()
        ids.append(stream.request_id)
    with pytest.raises(anthropic.NotFoundError) as refused:
        client.messages.create(**{**asked, "model": "gpt-9"})
    ids.append(refused.value.request_id)
    assert None not in ids
    assert len(set(ids)) == 4
    found = http("POST", "/v1/messages", json=asked).headers
    assert found["request-id"] == found["x-request-id"]
    assert "request-id" not in http("GET", "/v1/models").headers
