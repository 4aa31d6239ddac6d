"""A conversation: streaming, thinking, stop, retry, what is sent, what is kept, and what goes wrong."""

import threading

import pytest
from playwright.sync_api import expect
from starlette.responses import JSONResponse

USAGE = {
    "prompt_tokens": 120,
    "completion_tokens": 31,
    "prompt_cache_hit_tokens": 96,
    "prompt_cache_miss_tokens": 24,
    "completion_tokens_details": {"reasoning_tokens": 12},
}


def ask(page, text):
    page.get_by_label("Your message").fill(text)
    page.keyboard.press("Enter")


def finished(page):
    expect(page.locator("#stop")).to_be_hidden()


def test_streams_thinking_then_the_answer(page, server):
    """Thinking is open while it comes and closes when the answer begins; text shows before the end."""
    thought, said = threading.Event(), threading.Event()
    server.answers.append(
        [
            server.delta(role="assistant", reasoning_content=""),
            *server.thinks("First I add.\n"),
            thought,
            *server.says("It is **forty-two**"),
            said,
            *server.says(", surely."),
            *server.ends(**USAGE),
        ]
    )
    ask(page, "What is 17 + 25?")
    thinking = page.locator(".thinking")
    expect(thinking).to_have_attribute("open", "")
    expect(page.locator(".thoughts")).to_have_text("First I add.")
    expect(page.locator(".waiting")).to_be_hidden()
    thought.set()
    expect(page.locator(".text strong")).to_have_text("forty-two")
    expect(thinking).not_to_have_attribute("open", "")
    expect(page.locator(".text")).to_have_attribute("aria-busy", "true")
    expect(page.locator("#stop")).to_be_visible()
    said.set()
    finished(page)
    expect(page.locator(".text")).to_have_text("It is forty-two, surely.")
    expect(page.locator(".text")).to_have_attribute("aria-busy", "false")
    expect(page.get_by_role("status")).to_have_text("The answer is complete.")
    thinking.locator("summary").click()
    expect(page.locator(".thoughts")).to_be_visible()


def test_an_empty_thought_opens_no_block(page, server):
    """A first chunk with empty thinking is how a server begins, not a thought; nothing is shown but the waiting."""
    gate = threading.Event()
    server.answers.append(
        [server.delta(role="assistant", reasoning_content="", content=""), gate, *server.says("Yes."), *server.ends()]
    )
    ask(page, "Yes?")
    expect(page.locator(".waiting")).to_be_visible()
    gate.set()
    finished(page)
    expect(page.locator(".thinking")).to_be_hidden()


def test_figures(page, server):
    """From the usage and the clock: tokens, rate, time to the first, cache."""
    gate = threading.Event()
    server.answers.append([*server.says("One"), gate, *server.says(" two"), *server.ends(**USAGE)])
    page.clock.install()
    page.clock.pause_at("2031-01-01")
    ask(page, "Count")
    expect(page.locator("article.answer.running")).to_have_count(1)
    page.wait_for_function("document.querySelector('.waiting')")
    page.clock.run_for(100)
    expect(page.locator(".text")).to_have_text("One")
    page.clock.run_for(2900)
    gate.set()
    finished(page)
    texts = page.locator(".figures span").all_text_contents()
    assert texts[0] == "31 tokens, 12 thinking"
    assert texts[1].endswith("tokens/s")
    assert 30 / 3.1 - 0.1 <= float(texts[1].split()[0]) <= 30 / 2.9 + 0.1  # 30 tokens after the first, in three seconds
    assert texts[2].startswith("first after ")
    assert texts[3] == "prompt 120, 96 from cache"


@pytest.mark.parametrize(
    ("label", "thinking", "effort"), [("Off", "disabled", None), ("High", "enabled", "high"), ("Max", "enabled", "max")]
)
def test_effort(page, server, label, thinking, effort):
    """Each position of the switch, as the request says it; it is there again after a reload."""
    server.answers.append([*server.says("Yes."), *server.ends()])
    page.locator("#effort").get_by_text(label).click()
    page.reload()
    ask(page, "Yes?")
    finished(page)
    request = server.requests[0]
    assert (request["thinking"], request.get("reasoning_effort")) == ({"type": thinking}, effort)


def test_request(page, server):
    """The whole request, with instructions and a temperature."""
    server.answers.append([*server.says("Yes."), *server.ends()])
    page.get_by_role("button", name="Options").click()
    page.get_by_label("Instructions").fill("Be brief.")
    page.get_by_label("Temperature").fill("0.3")
    expect(page.get_by_role("button", name="Options (2)")).to_be_visible()
    page.get_by_label("Your message").fill("Two")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("lines")
    page.get_by_role("button", name="Send").click()
    finished(page)
    assert server.requests == [
        {
            "model": "nano-chat",
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Two\nlines"}],
            "thinking": {"type": "enabled"},
            "reasoning_effort": "high",
            "temperature": 0.3,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]


def test_json(page, server):
    """By the keyboard alone: asked for, kept over a reload, shown as the code that it is, and off again."""
    text = '{"a": "*x* _y_",\n "b": ["<i>"]}'
    server.answers += [[*server.says(text), *server.ends()], [*server.says("*Yes*"), *server.ends()]]
    page.get_by_role("button", name="Options").focus()
    page.keyboard.press("Enter")
    page.get_by_label("JSON object").focus()
    page.keyboard.press("Space")
    expect(page.get_by_role("button", name="Options (1)")).to_be_visible()
    page.reload()
    ask(page, "What is it?")
    finished(page)
    assert server.requests[0]["response_format"] == {"type": "json_object"}
    expect(page.locator(".text pre code")).to_have_text(text)
    expect(page.locator(".text em")).to_have_count(0)
    page.get_by_role("button", name="Options (1)").click()
    page.get_by_label("JSON object").uncheck()
    ask(page, "Is it?")
    finished(page)
    assert "response_format" not in server.requests[1]
    assert server.requests[1]["messages"][1] == {"role": "assistant", "content": text}
    expect(page.locator(".text em")).to_have_text("Yes")
    page.reload()
    expect(page.locator(".text pre code")).to_have_text(text)  # each answer in the form it was asked for


@pytest.mark.parametrize("how", ["key", "button"])
def test_stop(page, server, how):
    """The server is told, the text so far stays and counts as said, and the next question works."""
    server.answers += [[*server.says("One two"), threading.Event()], [*server.says("Four"), *server.ends()]]
    ask(page, "Count")
    expect(page.locator(".text")).to_have_text("One two")
    if how == "key":
        page.keyboard.press("Escape")
    else:
        page.get_by_role("button", name="Stop").click()
    finished(page)
    expect(page.locator(".problem", has_text="Stopped.")).to_be_visible()
    ask(page, "Go on")
    finished(page)
    assert server.num_left == 1
    said = [(message["role"], message["content"]) for message in server.requests[1]["messages"]]
    assert said == [("user", "Count"), ("assistant", "One two"), ("user", "Go on")]


def test_stopped_in_thought_is_not_sent(page, server):
    """An answer without any text is no message."""
    server.answers += [[*server.thinks("Hm"), threading.Event()], [*server.says("Yes"), *server.ends()]]
    ask(page, "Think")
    expect(page.locator(".thoughts")).to_have_text("Hm")
    page.keyboard.press("Escape")
    finished(page)
    ask(page, "Again")
    finished(page)
    assert [message["content"] for message in server.requests[1]["messages"]] == ["Think", "Again"]


def test_retry(page, server):
    """Only the last answer can be had again, from the same messages."""
    for text in ("One", "Two", "Three"):
        server.answers.append([*server.thinks("Hm."), *server.says(text), *server.ends()])
    ask(page, "First")
    finished(page)
    ask(page, "Second")
    finished(page)
    expect(page.get_by_role("button", name="Retry")).to_have_count(1)
    page.get_by_role("button", name="Retry").click()
    expect(page.locator(".answer .text")).to_have_text(["One", "Three"])
    finished(page)
    assert server.requests[2]["messages"] == server.requests[1]["messages"]
    assert server.requests[1]["messages"][1] == {"role": "assistant", "content": "One", "reasoning_content": "Hm."}


def test_reload_keeps_and_new_chat_forgets(page, server):
    """The conversation lasts as long as the tab."""
    server.answers.append([*server.thinks("Hm."), *server.says("- a\n- b"), *server.ends(**USAGE)])
    ask(page, "List")
    finished(page)
    before = page.locator("#list").aria_snapshot()
    page.reload()
    expect(page.locator(".answer li")).to_have_text(["a", "b"])
    assert page.locator("#list").aria_snapshot() == before
    page.get_by_role("button", name="New chat").click()
    expect(page.locator("article")).to_have_count(0)
    page.reload()
    expect(page.get_by_text("What can I do for you?")).to_be_visible()


def test_left_while_streaming(page, server):
    """A reload in the middle keeps what had come."""
    server.answers.append([*server.says("One two"), threading.Event()])
    ask(page, "Count")
    expect(page.locator(".text")).to_have_text("One two")
    page.reload()
    expect(page.locator(".text")).to_have_text("One two")
    expect(page.locator(".problem", has_text="Stopped.")).to_be_visible()


def test_key(open_page, server):
    """A server that wants a key gets it, for this tab, and the refused question is asked again."""
    server.key = "sesame"
    server.answers.append([*server.says("Welcome."), *server.ends()])
    page = open_page()
    expect(page.get_by_label("This server asks for a key")).to_be_focused()
    ask(page, "Hello")
    expect(page.locator(".failed")).to_have_text("The key is missing or wrong.")
    page.get_by_label("This server asks for a key").fill("sesame")
    page.keyboard.press("Enter")
    expect(page.locator(".text")).to_have_text("Welcome.")
    expect(page.locator("#key-form")).to_be_hidden()
    page.reload()
    expect(page.get_by_text("nano-chat")).to_be_visible()
    assert "sesame" not in page.evaluate("Object.values(localStorage).join()")


REFUSALS = [
    (JSONResponse({"error": {"message": "Too long."}}, 400), "Too long."),
    (JSONResponse({"error": {"message": "Busy."}}, 429, {"Retry-After": "7"}), "Busy. (try again in 7 s)"),
    (JSONResponse("?", 500), "The server answered 500."),
]
CUTS = [
    ([], "The connection ended before the answer did."),
    ([{"error": {"message": "Out of pages."}}], "Out of pages."),
    (["data: {nonsense\n\n"], "The server sent something that is not JSON."),
]


@pytest.mark.parametrize(("answer", "message"), REFUSALS + CUTS)
def test_failures(page, server, answer, message):
    """Said in words at the answer, under the text that came before, and Retry gets another."""
    is_cut = isinstance(answer, list)
    server.answers += [[*server.says("One"), *answer] if is_cut else answer, [*server.says("Better."), *server.ends()]]
    ask(page, "Hello")
    expect(page.locator(".answer .failed")).to_have_text(message)
    expect(page.locator(".text")).to_have_text("One" if is_cut else "")
    page.get_by_role("button", name="Retry").click()
    expect(page.locator(".text")).to_have_text("Better.")
    expect(page.locator(".answer .problem")).to_be_hidden()


def test_unreachable(page):
    """No server at all."""
    page.context.set_offline(True)
    ask(page, "Hello")
    expect(page.locator(".answer .failed")).to_have_text("The server cannot be reached.")


def test_cut_at_the_length(page, server):
    """The reader is told."""
    server.answers.append([*server.says("One two"), *server.ends("length")])
    ask(page, "Count")
    expect(page.locator(".answer .problem")).to_have_text("Cut off: the length limit was reached.")


def test_events_however_they_are_cut(page, server):
    """Comments, CRLF, several data lines, letters of several bytes: one event after another."""
    first = '{"choices": [{"delta":\ndata: {"content": "h\u00e9, \u4f60\u597d"}}]}'
    server.answers.append(
        [": hi\r\n\r\n", f"event: x\r\ndata:{first}\r\n\r\n".replace("\ndata", "\r\ndata"), *server.ends()]
    )
    ask(page, "Hello")
    finished(page)
    expect(page.locator(".text")).to_have_text("h\u00e9, \u4f60\u597d")
