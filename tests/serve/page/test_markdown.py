"""Markdown to elements: the same at once and in pieces, harmless whatever a model writes, and quick."""

import random

import pytest

# Renders each text at once; with `isPiecewise` also grown letter by letter, giving the first difference found.
RENDER = """async ([texts, isPiecewise]) => {
    const { LiveMarkdown } = await import("/page/markdown.js");
    return texts.map((text) => {
        const whole = document.createElement("div");
        new LiveMarkdown(whole).push(text);
        if (!isPiecewise) return whole.innerHTML;
        const grown = document.createElement("div");
        const live = new LiveMarkdown(grown);
        for (const letter of text) live.push(letter);
        return grown.innerHTML === whole.innerHTML ? null : [text, grown.innerHTML, whole.innerHTML];
    });
}"""


def link(url, text):
    return f'<a href="{url}" title="{url}" target="_blank" rel="noopener noreferrer">{text}</a>'


def code(text, language="text"):
    bar = f'<div class="code-bar"><span>{language}</span><button type="button" class="quiet">Copy</button></div>'
    pre = f'<pre tabindex="0" role="region" aria-label="Code, {language}"><code>{text}</code></pre>'
    return f'<div class="code">{bar}{pre}</div>'


CASES = {
    "plain": "<p>plain</p>",
    "one\ntwo\n\nthree": "<p>one<br>two</p><p>three</p>",
    "# A *b* #\n###### C": "<h3>A <em>b</em></h3><h6>C</h6>",
    "#tag": "<p>#tag</p>",
    "**a** __b__ *c* _d_ ***e*** ~~f~~": (
        "<p><strong>a</strong> <strong>b</strong> <em>c</em> <em>d</em> <em><strong>e</strong></em> <del>f</del></p>"
    ),
    "**a *b* c**": "<p><strong>a <em>b</em> c</strong></p>",
    "2*3*4 and 2 * 3 * 4, snake_case_name, ~5": "<p>2*3*4 and 2 * 3 * 4, snake_case_name, ~5</p>",
    "**open and *open": "<p>**open and *open</p>",
    r"\*a\* \q": r"<p>*a* \q</p>",
    "`a*b*` ``c`d`` `open": "<p><code>a*b*</code> <code>c`d</code> `open</p>",
    "[a *b*](https://e.org/x_(y)?q=1 'T')": f"<p>{link('https://e.org/x_(y)?q=1', 'a <em>b</em>')}</p>",
    "see https://e.org/a_b_c. (http://e.org/)": (
        f"<p>see {link('https://e.org/a_b_c', 'https://e.org/a_b_c')}. ({link('http://e.org/', 'http://e.org/')})</p>"
    ),
    "<https://e.org/>": f"<p>{link('https://e.org/', 'https://e.org/')}</p>",
    "![cat](https://e.org/c.png)": f"<p>{link('https://e.org/c.png', 'cat')}</p>",
    "[https://a.org](https://b.org)": f"<p>{link('https://b.org/', 'https://a.org')}</p>",
    "[a](b.html) [c](ftp://d) [e]": "<p>[a](b.html) [c](ftp://d) [e]</p>",
    "- a\n- b\n  - c\n\n    more\n- d": (
        "<ul><li><p>a</p></li><li><p>b</p><ul><li><p>c</p><p>more</p></li></ul></li><li><p>d</p></li></ul>"
    ),
    "3. a\n4. b\n   - c": '<ol start="3"><li>a</li><li>b<ul><li>c</li></ul></li></ol>',
    "text\n- a\nlazy\n\nafter": "<p>text</p><ul><li>a<br>lazy</li></ul><p>after</p>",
    "in 1968\n2020. was": "<p>in 1968<br>2020. was</p>",
    "1. a\n\n       b = 1\n2. c": '<ol start="1"><li><p>a</p><p>b = 1</p></li><li><p>c</p></li></ol>',
    "> a\n> - b\n\nc": "<blockquote><p>a</p><ul><li>b</li></ul></blockquote><p>c</p>",
    "a\n\n---\n* * *": "<p>a</p><hr><hr>",
    "```py\nif a < b:\n\n\tc()\n```\nd": code("if a &lt; b:\n\n\tc()", "py") + "<p>d</p>",
    "~~~\n```\n~~~": code("```"),
    "```\nopen *a*": code("open *a*"),
    "- x\n  ```\n  y\n  ```": f"<ul><li>x{code('y')}</li></ul>",
}


@pytest.fixture
def render(page):
    return lambda *texts, is_piecewise=False: page.evaluate(RENDER, [texts, is_piecewise])


def test_cases(render):
    """What comes out of what."""
    assert dict(zip(CASES, render(*CASES), strict=True)) == CASES


def test_table(render):
    """Sides by class, short rows filled, escaped bars kept, and a box of its own to scroll in."""
    (html,) = render("| a | b | c |\n|:--|--:|:-:|\n| 1 | x\\|y | `z` |\n| 2 |\nafter")
    row = '<tr><td class="">1</td><td class="right">x|y</td><td class="center"><code>z</code></td></tr>'
    assert row in html
    assert '<tr><td class="">2</td><td class="right"></td><td class="center"></td></tr>' in html
    assert html.startswith('<div class="table" tabindex="0" role="region" aria-label="Table"><table><thead><tr><th')
    assert html.endswith("</table></div><p>after</p>")
    assert render("a | b\n--- | --- | ---") == ["<p>a | b<br>--- | --- | ---</p>"]


PARTS = [
    *(
        "a",
        "b c",
        "1",
        " ",
        "  ",
        "    ",
        "\n",
        "\n",
        "\n",
        "\n\n",
        "\t",
        "*",
        "**",
        "_",
        "~~",
        "`",
        "```",
        "```\n",
        "~~~",
    ),
    *(
        "- ",
        "* ",
        "+ ",
        "1. ",
        "2) ",
        "# ",
        "## ",
        "> ",
        "|",
        "|-|-|\n",
        "a|b\n",
        "---",
        "[",
        "](",
        ")",
        "![",
        "<",
        "!",
    ),
    *("https://e.org/", "\\", "-", "#", "\r\n", "&amp;", "<b>", "\u4f60", "(", "x", "---|---\n"),
]


def test_in_pieces(render):
    """Letter by letter gives the very elements of the whole text, for the cases and for a thousand random texts."""
    rng = random.Random(0)
    texts = ["".join(rng.choices(PARTS, k=rng.randint(2, 40))) for _ in range(1000)]
    assert [difference for difference in render(*CASES, *texts, is_piecewise=True) if difference] == []


HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "<script>alert(1)</script>",
    "<svg/onload=alert(1)>",
    "[a](javascript:alert(1)) [b](JaVaScRiPt:alert(1)) [c]( javascript:alert(1))",
    "[d](java\tscript:alert(1)) [e](data:text/html,<script>alert(1)</script>) [f](vbscript:x)",
    "![g](javascript:alert(1)) <javascript:alert(1)> [h](&#106;avascript:alert(1)) [i](//e.org) [j](\\\\e.org)",
    '[k](https://e.org/"onmouseover="alert(1)) https://e.org/"onmouseover=alert(1)',
    '```"><img src=x onerror=alert(1)>\n</code><img src=x onerror=alert(1)>\n```',
    "| <img src=x onerror=alert(1)> | b |\n|--|--|\n| <iframe src=javascript:alert(1)> | d |",
    "# <style>*{display:none}</style>\n- <form action=https://e.org><button>\n> <a href=javascript:alert(1)>x</a>",
]
DANGER = """() => ({
    elements: document.querySelectorAll("#list :is(img, script, svg, iframe, style, form, object, input)").length,
    handlers: [...document.querySelectorAll("#list *")].flatMap((node) => node.getAttributeNames())
        .filter((name) => name.startsWith("on") || name === "style").length,
    links: [...document.querySelectorAll("#list a")]
        .filter((a) => !/^https?:$/.test(a.protocol) || !a.relList.contains("noopener")).length,
})"""


def test_hostile_text_stays_text(page, server):
    """In each place where a model, a tool, a server or a reader can put it. The page's fixture sees dialogs and
    requests; nothing is made of it, and it can be read as it was written."""
    text = "\n\n".join(HOSTILE)
    image = HOSTILE[0]
    server.answers += [
        [
            *server.thinks(text, 50),
            *server.says(text, 50),
            *server.calls(image, f'{{"key": "{image}"}}'),
            *server.ends("tool_calls"),
        ],
        [*server.says("Yes."), {"error": {"message": text}}],
    ]
    page.get_by_label("Your message").fill(text)
    page.keyboard.press("Enter")
    page.locator(".answer .failed").wait_for()
    for a in page.locator("#list a").all():
        a.dispatch_event("mouseover")
    page.reload()
    page.locator(".answer .failed").wait_for()
    assert page.evaluate(DANGER) == {"elements": 0, "handlers": 0, "links": 0}
    for place in (
        ".question p",
        ".thoughts",
        ".answer >> .text >> nth=0",
        ".call strong",
        ".call pre",
        ".result",
        ".failed",
    ):
        assert image in page.locator(place).first.text_content()


LONG = 40_000
ENDLESS = [
    "*",
    "*a",
    "_a ",
    "**a _b ",
    "[",
    "![",
    "[a](",
    "](",
    "`",
    "`a``",
    "<",
    "\\",
    "> ",
    "- ",
    "1. ",
    " ",
    "|",
    "|-",
    "#",
    "#\u2028",
]
ENDLESS += [
    "~~a",
    "[a](https://e.org/",
    "https://",
    "[](\t",
    "*a*",
    "**a*",
    "  - a\n",
    "a|b\n-|-\n",
    "```\n",
    "](https://e.org) [",
    "\n",
]


NESTED = "*a **b _c ~~d [e " * 2000 + "](https://e.org) f~~ g_ h** i* " * 2000
TICKS = " ".join("`" * size for size in range(1, 280))  # no run has a partner

MEASURE = """async (text) => {
    const { LiveMarkdown } = await import("/page/markdown.js");
    const root = document.createElement("div");
    const begin = performance.now();
    new LiveMarkdown(root).push(text);
    const took = performance.now() - begin;
    let depth = 0;
    for (let level = [root]; level.length; depth++) level = level.flatMap((node) => [...node.childNodes]);
    return [took, depth];
}"""


def test_no_text_holds_the_page_up(page):
    """Forty thousand letters of anything: no quadratic work (which takes tens of seconds), no endless nesting."""
    texts = {part: (part * LONG)[:LONG] for part in ENDLESS} | {"nested": NESTED, "ticks": TICKS}
    figures = {part: page.evaluate(MEASURE, text) for part, text in texts.items()}
    assert {part: took for part, (took, _) in figures.items() if took > 1500} == {}
    assert {part: depth for part, (_, depth) in figures.items() if depth > 100} == {}
