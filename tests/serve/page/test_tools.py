"""The tools that run in the page, and the rounds in which a model uses them."""

import pytest
from playwright.sync_api import expect

RUN = """async ([expression, call, settings]) => {
    const tools = await import("/page/tools.js");
    return call ? tools.runTool(call, settings) : tools.calculate(expression);
}"""

SUMS = [
    ("17 + 25", "42"),
    ("2*3+4*5", "26"),
    ("2 + 3 * (4 - 1) / 2", "6.5"),
    ("10 - 4 - 3", "3"),
    ("48 / 4 / 3", "4"),
    ("17 % 5 * 2", "4"),
    ("2 ^ 3 ^ 2", "512"),
    ("2 ** -1", "0.5"),
    ("-2 ^ 2", "-4"),
    ("(-2) ^ 2", "4"),
    ("--3 + +4", "7"),
    ("0.1 + 0.2", "0.3"),
    (".5 * 1e3", "500"),
    ("6 \u00d7 7 \u00f7 2 \u2212 1", "20"),
    ("1_000 * 3", "3000"),
    ("1 / 0", "error: division by zero"),
    ("5 % (2 - 2)", "error: division by zero"),
    ("(-8) ^ 0.5", "error: the result is not a finite number"),
    ("9 ^ 999", "error: the result is not a finite number"),
    ("(1 + 2", "error: a bracket is not closed"),
    ("1 +", "error: the expression ends too early"),
    ("", "error: the expression ends too early"),
    ("1 2", "error: unexpected 2"),
    ("1,000 + 1", "error: unexpected ,"),
    ("alert(1)", "error: unexpected a"),
    ("constructor", "error: unexpected c"),
    ("(" * 300, "error: the expression ends too early"),
    ("1" * 501, "error: more than 500 characters"),
]


@pytest.fixture
def run(page):
    return lambda expression=None, call=None, **settings: page.evaluate(RUN, [expression, call, settings])


def test_calculator(run):
    """Precedence, signs, mistakes; never a name, so never code."""
    assert [(text, run(text)) for text, _ in SUMS] == SUMS


TABLE = "tea = 3.50\n Capital of France=Paris \nno line\n= nothing\nurl = a=b\ntea = 9"
CALLS = [
    ("lookup", '{"key": " TEA "}', "3.50"),
    ("lookup", '{"key": "capital of france"}', "Paris"),
    ("lookup", '{"key": "url"}', "a=b"),
    ("lookup", '{"key": "coffee"}', "not found"),
    ("lookup", '{"key": ""}', "not found"),
    ("lookup", "[]", "not found"),
    ("lookup", "null", "not found"),
    ("lookup", '{"key": ', "error: the arguments are not JSON"),
    ("calculator", '{"expression": "2+3"}', "5"),
    ("calculator", "", "error: the expression ends too early"),
    ("clock", "{}", "error: there is no tool clock"),
    ("toString", "{}", "error: there is no tool toString"),
    ("", "{}", "error: there is no tool without a name"),
]


def test_calls(run):
    """By name and JSON; what is wrong with a call is its result, for the model to read."""
    results = [
        (name, text, run(call={"name": name, "arguments": text}, names=["lookup", "calculator"], table=TABLE))
        for name, text, _ in CALLS
    ]
    assert results == CALLS


def test_clock(page, run):
    """The browser's own date and time."""
    page.clock.set_fixed_time("2031-03-05T04:05:06")
    given = page.evaluate("[new Date().getHours(), new Date().getDate()].join()")
    assert given == "4,5"
    assert run(call={"name": "clock", "arguments": ""}, names=["clock"], table="") == "Wednesday 2031-03-05 04:05:06"


def choose(page, *names):
    page.get_by_role("button", name="Options").click()
    for name in names:
        page.get_by_label(name).check()


def test_a_round(page, server):
    """Call, result, answer: all shown, and the history carries thinking, calls and results, in the calls' order."""
    server.answers += [
        [
            *server.thinks("I look it up."),
            *server.calls("lookup", '{"key": "tea"}'),
            *server.calls("calculator", '{"expression": "2*3"}', index=1),
            *server.ends("tool_calls"),
        ],
        [*server.thinks("Now I know."), *server.says("Tea is 3.50."), *server.ends()],
        [*server.says("Yes."), *server.ends()],
    ]
    choose(page, "Calculator", "Lookup in this table")
    page.get_by_label("Lookup table").fill("tea = 3.50")
    page.get_by_label("Your message").fill("Price of tea?")
    page.keyboard.press("Enter")
    expect(page.locator(".answer .text")).to_have_text(["", "Tea is 3.50."])
    expect(page.locator(".call strong")).to_have_text(["lookup", "calculator"])
    expect(page.locator(".call pre")).to_have_text(['{ "key": "tea" }', '{ "expression": "2*3" }'])
    expect(page.locator(".result code")).to_have_text(["3.50", "6"])
    expect(page.locator(".thinking[open]")).to_have_count(0)
    expect(page.locator("#options")).to_be_hidden()
    page.reload()
    expect(page.locator(".result code")).to_have_text(["3.50", "6"])
    page.get_by_label("Your message").fill("Sure?")
    page.keyboard.press("Enter")
    expect(page.locator(".answer .text")).to_have_text(["", "Tea is 3.50.", "Yes."])
    assert [tool["function"]["name"] for tool in server.requests[0]["tools"]] == ["calculator", "lookup"]
    parameters = server.requests[0]["tools"][1]["function"]["parameters"]
    assert (parameters["required"], parameters["properties"]["key"]["type"]) == (["key"], "string")
    call = {"id": "call_lookup_0", "type": "function", "function": {"name": "lookup", "arguments": '{"key": "tea"}'}}
    sums = {"name": "calculator", "arguments": '{"expression": "2*3"}'}
    first = [
        {"role": "user", "content": "Price of tea?"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "I look it up.",
            "tool_calls": [call, {"id": "call_calculator_1", "type": "function", "function": sums}],
        },
        {"role": "tool", "tool_call_id": "call_lookup_0", "content": "3.50"},
        {"role": "tool", "tool_call_id": "call_calculator_1", "content": "6"},
    ]
    answer = {"role": "assistant", "content": "Tea is 3.50.", "reasoning_content": "Now I know."}
    assert server.requests[1]["messages"] == first
    assert server.requests[2]["messages"] == [*first, answer, {"role": "user", "content": "Sure?"}]


def test_retry_drops_the_rounds(page, server):
    """The last answer is everything since the question."""
    server.answers += [
        [*server.calls("lookup", '{"key": "tea"}'), *server.ends("tool_calls")],
        [*server.says("One."), *server.ends()],
        [*server.says("Two."), *server.ends()],
    ]
    choose(page, "Lookup in this table")
    page.get_by_label("Your message").fill("Price?")
    page.keyboard.press("Enter")
    expect(page.locator(".answer .text")).to_have_text(["", "One."])
    page.get_by_role("button", name="Retry").click()
    expect(page.locator(".answer .text")).to_have_text(["Two."])
    assert server.requests[2]["messages"] == [{"role": "user", "content": "Price?"}]


def test_four_rounds_and_no_more(page, server):
    """A model that only ever calls is stopped, and every call has a result, so that the history stays valid."""
    server.answers += [[*server.calls("clock", "{}"), *server.ends("tool_calls")] for _ in range(9)]
    choose(page, "Clock")
    page.get_by_label("Your message").fill("Time?")
    page.keyboard.press("Enter")
    expect(page.get_by_text("asked for tools again and again")).to_be_visible()
    expect(page.locator("#stop")).to_be_hidden()
    assert len(server.requests) == 5
    expect(page.locator(".result code")).to_have_count(5)
    expect(page.locator(".result code").last).to_have_text("error: not run, 4 rounds were")


def test_half_a_call_is_not_run(page, server):
    """One that was stopped or cut at the length: no result, and it is not sent again."""
    server.answers += [
        [*server.calls("clock", "{"), *server.ends("length")],
        [*server.says("Yes."), *server.ends()],
    ]
    choose(page, "Clock")
    page.get_by_label("Your message").fill("Time?")
    page.keyboard.press("Enter")
    expect(page.get_by_text("Cut off: the length limit was reached.")).to_be_visible()
    page.get_by_label("Your message").fill("Well?")
    page.keyboard.press("Enter")
    expect(page.locator(".answer .text").last).to_have_text("Yes.")
    expect(page.locator(".result code")).to_have_count(0)
    assert [message["content"] for message in server.requests[1]["messages"]] == ["Time?", "Well?"]


def test_an_example_brings_its_tool(page, server):
    """What asks for the table switches the lookup on, and the table that comes with the page has the answer."""
    server.answers += [
        [*server.calls("lookup", '{"key": "price of tea"}'), *server.ends("tool_calls")],
        [*server.says("3 euros."), *server.ends()],
    ]
    page.get_by_role("button", name="Look up the price of tea.").click()
    expect(page.locator(".result code")).to_have_text("3 euros")
    expect(page.locator(".answer .text").last).to_have_text("3 euros.")
