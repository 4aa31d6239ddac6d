"""HTML of the report: elements that escape what they hold, one stylesheet, and plots set into the page.

The page loads nothing from anywhere. Colours are CSS variables, so that plots and text follow the reader's light or
dark setting; on paper it is always light.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

COLORS: dict[str, str] = {  # a plot is drawn in these; blue and orange are told apart by colour-blind readers too
    "ink": "#20242b",
    "muted": "#667080",
    "rule": "#dfe3e8",
    "blue": "#1f5fa8",
    "orange": "#c85a11",
    "red": "#b3123f",
    "band": "#e3eefb",
}
DARK: dict[str, str] = {
    "ink": "#e4e7ec",
    "muted": "#98a2b0",
    "rule": "#333a44",
    "blue": "#74b0f4",
    "orange": "#f2a05e",
    "red": "#ff7d9c",
    "band": "#1d3048",
}
HEAT = ("#eef3f9", "#d3e2f2", "#b0cce8", "#85b1dc", "#5a93cb", "#3574b5", "#1c5596", "#0b3563")
HEAT_DARK = ("#1b2330", "#1e3450", "#214a76", "#28639f", "#3a80c4", "#5c9fe0", "#8fc0f2", "#cfe4fb")

CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # what HTML may not hold


class Html(str):
    """Markup. Any other string is escaped where it enters an element."""


def element(name: str, *children: str, **attributes: str) -> Html:
    """Return ``<name attributes>children</name>``; ``class_`` stands for ``class``."""
    marks = "".join(f' {key.rstrip("_")}="{text(value)}"' for key, value in attributes.items())
    return Html(f"<{name}{marks}>{join(*children)}</{name}>")


def join(*children: str) -> Html:
    """Put children next to each other."""
    return Html("".join(child if isinstance(child, Html) else text(child) for child in children))


def text(value: str) -> Html:
    """Escape a string; control characters become U+FFFD."""
    return Html(html.escape(CONTROL.sub("\ufffd", value)))


def table(head: Sequence[str], rows: Sequence[Sequence[str]], class_: str, *, first_number: int = 99) -> Html:
    """Return a table; columns from ``first_number`` on are set to the right."""

    def line(kind: str, cells: Sequence[str]) -> Html:
        sides = ("left" if place < first_number else "right" for place in range(len(cells)))
        return element("tr", *(element(kind, cell, class_=side) for cell, side in zip(cells, sides, strict=True)))

    body = element("tbody", *(line("td", row) for row in rows))
    return element("div", element("table", element("thead", line("th", head)), body, class_=class_), class_="wide")


def plot(svg: str, name: str, label: str) -> Html:
    """Set the text of an SVG file into the page: ``name`` keeps its ids apart, ``label`` is read out in its place."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>\s*", "", body, flags=re.DOTALL)
    body = re.sub(r"<[^>]+>", lambda tag: _themed(tag[0], name), body)
    return Html(body.replace("<svg", f'<svg role="img" aria-label="{text(label)}"', 1))


def _themed(tag: str, name: str) -> str:
    """One tag of a plot: its ids made the plot's own, its size the page's, its colours variables."""
    if tag.startswith("<svg"):
        tag = re.sub(r' (width|height)="[^"]*"', "", tag)
    tag = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", tag)
    for key, color in COLORS.items():
        tag = tag.replace(color, f"var(--{key})")
    for level, color in enumerate(HEAT):
        tag = tag.replace(color, f"var(--heat-{level})")
    return tag


def page(title: str, *body: str) -> Html:
    """Return the whole document."""
    head = join(
        Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        element("title", title),
        element("style", Html(STYLE)),
    )
    document = element("html", element("head", head), element("body", element("main", *body)), lang="en")
    return Html(f"<!DOCTYPE html>\n{document}\n")


def _variables(colors: dict[str, str], heat: Sequence[str]) -> str:
    names = {**colors, **{f"heat-{level}": color for level, color in enumerate(heat)}}
    return "".join(f"--{name}:{color};" for name, color in names.items())


STYLE = (
    ":root{color-scheme:light dark;--page:#fff;--soft:#f5f7f9;"
    + _variables(COLORS, HEAT)
    + "}\n@media screen and (prefers-color-scheme:dark){:root{--page:#14171c;--soft:#1b2027;"
    + _variables(DARK, HEAT_DARK)
    + "}}\n"
    + """\
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
  "Helvetica Neue",Arial,sans-serif;-webkit-text-size-adjust:100%}
main{max-width:60rem;margin:0 auto;padding:3rem 1.5rem 4rem}
h1{font-size:1.9rem;line-height:1.2;letter-spacing:-.015em;margin:0 0 .6rem}
h2{font-size:1.2rem;margin:3.2rem 0 .5rem;padding-top:1.1rem;border-top:1px solid var(--rule)}
h3{font-size:.95rem;margin:1.6rem 0 .4rem}
p{margin:.4rem 0;max-width:46rem}
.lead{font-size:1.1rem}
.look,.quiet,figcaption{color:var(--muted)}
a{color:var(--blue);text-decoration:none}
a:hover{text-decoration:underline}
nav{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;margin:1.6rem 0 0;font-size:.9rem}
dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:1px;margin:1.6rem 0 0;
  border:1px solid var(--rule);border-radius:8px;overflow:hidden}
dl>div{box-shadow:0 0 0 1px var(--rule);padding:.7rem .9rem}
dt{color:var(--muted);font-size:.82rem}
dd{margin:0;font-size:1.3rem;font-weight:600;font-variant-numeric:tabular-nums;letter-spacing:-.01em}
dd small{display:block;font-size:.78rem;font-weight:400;color:var(--muted);letter-spacing:0}
.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.88rem;margin:.6rem 0}
th{text-align:left;font-weight:600;color:var(--muted);font-size:.8rem;vertical-align:bottom}
th,td{padding:.38rem .9rem .38rem 0;border-bottom:1px solid var(--rule)}
td{vertical-align:top}
.numbers{font-variant-numeric:tabular-nums}
.numbers td,.numbers th{white-space:nowrap}
.right{text-align:right;padding:.38rem 0 .38rem .9rem}
.words td:nth-child(1){white-space:nowrap;width:13rem}
.words td:nth-child(2){white-space:nowrap;width:10rem;font-variant-numeric:tabular-nums}
.words td:nth-child(3){color:var(--muted)}
figure{margin:1rem 0 0;overflow-x:auto}
figure svg{display:block;width:100%;min-width:36rem;height:auto}
figure svg text{font-family:inherit!important}
code{font:.92em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre{margin:.5rem 0 1rem;padding:.9rem 1rem;background:var(--soft);border-radius:8px;overflow-x:auto;
  white-space:pre-wrap;overflow-wrap:anywhere;font:.82rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre b{color:var(--blue)}
summary{cursor:pointer;color:var(--muted);font-size:.9rem}
@media print{
  body{font-size:10pt}
  main{max-width:none;padding:0}
  nav{display:none}
  h2,h3,.look,.look+p{break-after:avoid}
  figure,tr,pre,dl{break-inside:avoid}
}
"""
)
