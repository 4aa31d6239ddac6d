"""How the page looks and is used: contrast, a phone's width, the keyboard alone, names, dark and light, copying."""

import threading

import pytest
from playwright.sync_api import expect

MARKDOWN = """# One
Text with `code`, *emphasis* and a [link](https://e.org/).

###### Small heading

- item

> quote

| a | b |
|---|---|
| 1 | 2 |

```python
def f(): return 1
```
"""
WIDE = f"""{"word" * 60}

`{"code" * 60}` https://e.org/{"path/" * 60}

```
{"long line " * 60}
```

| {" | ".join(f"column {i}" for i in range(12))} |
|{"---|" * 12}
| {" | ".join("cell" * 4 for _ in range(12))} |

- {"item" * 50}
  - > {"quote" * 50}
"""
USAGE = {"prompt_tokens": 9, "completion_tokens": 5, "prompt_cache_hit_tokens": 4}
PHONE = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True}

# Each visible piece of text with less contrast than 4.5 : 1 to what lies under it, by the formula of WCAG 2. Colours
# are read from a canvas, so that every way to write one counts.
CONTRAST = """() => {
    const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
    const paint = (colours) => {
        canvas.clearRect(0, 0, 1, 1);
        for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
        return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
    };
    const light = (colours) => {
        const [r, g, b] = paint(colours).map((part) => part / 255)
            .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    const found = [];
    let count = 0;
    while (texts.nextNode()) {
        const node = texts.currentNode.parentElement;
        const isText = texts.currentNode.data.trim() && node.checkVisibility() && !node.closest(".hidden, :disabled");
        if (!isText) continue;
        count += 1;
        const grounds = [];
        for (let up = node; up; up = up.parentElement) grounds.unshift(getComputedStyle(up).backgroundColor);
        const two = [light(grounds), light([...grounds, getComputedStyle(node).color])].sort((a, b) => b - a);
        const ratio = (two[0] + 0.05) / (two[1] + 0.05);
        if (ratio < 4.5) found.push([texts.currentNode.data.slice(0, 30), node.className, ratio]);
    }
    return [count, found];
}"""
# Elements of which a part lies outside the window or, in the composer, outside its card; what scrolls in a box of its
# own may be wider than the box.
OUTSIDE = """() => [...document.querySelectorAll("body *")].filter((node) => {
    if (!node.checkVisibility() || node.closest(".hidden, pre, .table, svg, .segments input")) return false;
    const { left, right, width } = node.getBoundingClientRect();
    const card = node.closest(".card")?.getBoundingClientRect() ?? { left: 0, right: innerWidth };
    return width && (left < card.left - 0.5 || right > card.right + 0.5);
}).map((node) => node.outerHTML.slice(0, 80))"""
WIDTHS = """() => ({
    page: [document.documentElement, document.getElementById("list")].map((node) => node.scrollWidth),
    isWide: [...document.querySelectorAll(".text :is(pre, .table)")].map((node) => node.scrollWidth > node.clientWidth),
})"""
SIZES = """() => [...document.querySelectorAll("textarea, input:not([type=radio], [type=checkbox])")]
    .map((node) => parseFloat(getComputedStyle(node).fontSize))"""
NAMELESS = """() => [...document.querySelectorAll("button, input, textarea, [tabindex]")]
    .filter((node) => !node.ariaLabel && !node.textContent.trim() && !node.labels?.length)
    .map((node) => node.outerHTML)"""


def converse(page, server, text):
    """One of everything: a tool's round, thinking, Markdown, a failure."""
    server.answers += [
        [*server.thinks("Hm."), *server.calls("clock", '{"a": 1}'), *server.ends("tool_calls", **USAGE)],
        [*server.thinks("So."), *server.says(text, 40), *server.ends(**USAGE)],
        [*server.says("One"), {"error": {"message": "Out of pages."}}],
    ]
    for question in ("What time is it?", "Go on"):
        page.get_by_label("Your message").fill(question)
        page.keyboard.press("Enter")
        expect(page.locator("#stop")).to_be_hidden()
    for summary in page.locator("summary:visible").all():
        summary.click()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(open_page, server, scheme):
    """AA for every text there is, in both sets of colours."""
    page = open_page(color_scheme=scheme)
    assert page.evaluate(CONTRAST)[1] == []
    converse(page, server, MARKDOWN)
    page.get_by_role("button", name="Options").click()
    page.evaluate("document.getElementById('key-form').hidden = false")
    count, found = page.evaluate(CONTRAST)
    assert found == []
    assert count > 40
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number)")
    assert (min(ground) > 200) if scheme == "light" else (max(ground) < 60)


def test_the_switch_of_colours(open_page):
    """It turns, stays after a reload without a flash, and back at the system's own it follows the system again."""
    page = open_page(color_scheme="light")
    dark = page.get_by_role("button", name="Dark colours")
    ground = "getComputedStyle(document.body).backgroundColor"
    light_ground = page.evaluate(ground)
    expect(dark).to_have_attribute("aria-pressed", "false")
    dark.click()
    dark_ground = page.evaluate(ground)
    assert dark_ground != light_ground
    page.route("**/app.js", lambda route: route.abort())
    page.reload()
    assert page.evaluate(ground) == dark_ground  # before and without the modules, which come after the first paint
    page.unroute("**/app.js")
    page.reload()
    expect(dark).to_have_attribute("aria-pressed", "true")
    dark.click()
    assert page.evaluate(ground) == light_ground
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(ground) == dark_ground
    expect(dark).to_have_attribute("aria-pressed", "true")


def test_a_phone(open_page, server):
    """Nothing at 360 pixels sticks out: no sideways scrolling, whatever a model writes; wide things scroll alone."""
    page = open_page(**PHONE)
    assert page.evaluate(OUTSIDE) == []
    converse(page, server, WIDE)
    page.get_by_role("button", name="Options").click()
    page.get_by_label("Lookup in this table").check()
    assert page.evaluate(OUTSIDE) == []
    assert page.evaluate(WIDTHS) == {"page": [360, 360], "isWide": [True, True]}
    assert min(page.evaluate(SIZES)) >= 16  # smaller, and some phones zoom in on a field


def test_keyboard_alone(page, server):
    """Every control is reached by Tab, in reading order, and shows that it is; the switch moves by arrows."""
    server.answers.append([*server.says("```\nx\n```", 20), *server.ends()])
    expect(page.get_by_label("Your message")).to_be_focused()
    page.keyboard.type("Hello")
    page.keyboard.press("Enter")
    expect(page.locator("#stop")).to_be_hidden()
    page.get_by_role("button", name="New chat").focus()
    names, rings = [], []
    for _ in range(11):
        look = "((n) => [n.id || n.value || n.textContent, getComputedStyle(n).outlineStyle])(document.activeElement)"
        name, ring = page.evaluate(look)
        names.append(name)
        rings.append(ring)
        page.keyboard.press("Tab")
    controls = ["new", "theme", "list", "Copy", "x", "Copy", "Retry", "prompt", "high", "options-button", "send"]
    assert names == controls
    without_ring = [name for name, ring in zip(names, rings, strict=True) if ring == "none"]
    assert without_ring == ["prompt"]  # its card shows the focus
    page.get_by_role("button", name="Options").focus()
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("ArrowRight")
    expect(page.locator("input[value=max]")).to_be_checked()
    ring = "getComputedStyle(document.querySelector('input[value=max] + span')).outlineStyle"
    assert page.evaluate(ring) == "solid"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_role("group", name="Options")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("group", name="Options")).to_be_hidden()
    expect(page.get_by_role("button", name="Options")).to_be_focused()


def test_focus_stays_when_buttons_change(page, server):
    """Send becomes Stop and Stop becomes Send under the reader's finger."""
    gate = threading.Event()
    server.answers.append([gate, *server.says("Yes."), *server.ends()])
    page.get_by_label("Your message").fill("Hello")
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_role("button", name="Stop")).to_be_focused()
    gate.set()
    expect(page.get_by_role("button", name="Send")).to_be_focused()


def test_names(page, server):
    """Whatever can be reached says what it is."""
    converse(page, server, MARKDOWN)
    assert page.evaluate(NAMELESS) == []
    assert page.locator(".text").first.get_attribute("aria-live") == "polite"


@pytest.mark.parametrize("has_clipboard", [True, False])
def test_copy(open_page, server, has_clipboard):
    """Code and whole answers, also where a page from another machine over plain http has no clipboard object."""
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    pasted = "navigator.clipboard.readText()"
    if not has_clipboard:
        page.evaluate(
            "window.board = navigator.clipboard; Object.defineProperty(navigator, 'clipboard', {value: undefined})"
        )
        pasted = "board.readText()"
    server.answers.append([*server.says("**A**\n\n```\nx = 1\n```", 30), *server.ends()])
    page.get_by_label("Your message").fill("Hello")
    page.keyboard.press("Enter")
    expect(page.locator("#stop")).to_be_hidden()
    page.locator(".code").get_by_role("button", name="Copy").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate(pasted) == "x = 1"
    page.locator("footer").get_by_role("button", name="Copy").click()
    expect(page.get_by_role("button", name="Copied")).to_have_count(2)
    assert page.evaluate(pasted) == "**A**\n\n```\nx = 1\n```"


def test_follows_unless_the_reader_has_scrolled_up(page, server):
    """At the end the list stays there as the answer grows; further up it stays where the reader is."""
    first, second = threading.Event(), threading.Event()
    lines = "".join(f"line {i}\n\n" for i in range(60))
    server.answers.append([*server.says(lines, 50), first, *server.says(lines, 50), second, *server.says("End.")])
    page.get_by_label("Your message").fill("Hello")
    page.keyboard.press("Enter")
    expect(page.get_by_text("line 59")).to_be_in_viewport()
    page.get_by_role("main").evaluate("(list) => { list.scrollTop = 200; }")
    expect(page.get_by_role("button", name="Latest")).to_be_visible()
    first.set()
    expect(page.get_by_text("line 59")).to_have_count(2)
    assert page.get_by_role("main").evaluate("(list) => list.scrollTop") == 200
    page.get_by_role("button", name="Latest").click()
    expect(page.get_by_text("line 59").last).to_be_in_viewport()
    expect(page.get_by_role("button", name="Latest")).to_be_hidden()
    page.get_by_role("button", name="Options").click()
    expect(page.get_by_text("line 59").last).to_be_in_viewport()
    second.set()
    expect(page.get_by_text("End.")).to_be_in_viewport()


def test_a_long_answer_stays_quick(page, server):
    """A block that is done is not built again: its elements are the same ones to the end."""
    gate = threading.Event()
    text = "".join(f"Paragraph {i} with **bold** and `code`.\n\n```py\nx = {i}\n```\n\n" for i in range(100))
    server.answers.append([*server.says(text[:900], 300), gate, *server.says(text[900:], 300), *server.ends()])
    page.get_by_label("Your message").fill("Hello")
    page.keyboard.press("Enter")
    expect(page.get_by_text("Paragraph 9")).to_be_visible()
    page.evaluate("window.kept = document.querySelectorAll('.text > *').item(3)")
    gate.set()
    expect(page.locator("#stop")).to_be_hidden()
    expect(page.locator(".text > *")).to_have_count(200)
    assert page.evaluate("window.kept === document.querySelectorAll('.text > *').item(3)")
