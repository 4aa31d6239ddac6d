"""report.html: whole, safe to open, the same every time, and able to tell of any run with a step."""

import dataclasses
import json
import re
import sys
from html.parser import HTMLParser

import pytest

from dsv4.config.recipes import demo, smoke
from dsv4.config.train import (
    BatchConfig,
    DataConfig,
    DistillConfig,
    LossConfig,
    OptimizerConfig,
    Phase,
    RunConfig,
    StabilityConfig,
    TrainConfig,
)
from dsv4.testing.runs import write_run
from dsv4.train import plots
from dsv4.train.history import read_history
from dsv4.train.metrics import MetricsLog, read
from dsv4.train.page import COLORS, DARK, HEAT, HEAT_DARK, element, page, text
from dsv4.train.report import SECTIONS, field_docs, write_report

matplotlib = pytest.importorskip("matplotlib")

VOID = ("meta",)
HOSTILE = "</pre></script><script>alert('1')</script><img src=x onerror=alert(2)> & \"q\" \0\x1b[31m\ud800"


class Page(HTMLParser):
    """What a report holds: text by element, ids, links, and whether every element is closed in order."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.open, self.names, self.ids, self.attributes, self.texts = [], [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    @property
    def text(self):
        return " ".join(data for name, data in self.texts if name != "style")

    def count(self, name):
        return self.names.count(name)


def report(folder, config, **options):
    write_run(folder, config, **options)
    return write_report(folder).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of every phase, with a spike, resumed once."""
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, smoke(), spike_step=21, num_layers=3)
    path = folder / "metrics.jsonl"
    records = read(path)
    again = next(place for place, record in enumerate(records) if record["kind"] == "checkpoint") + 1
    records.insert(again, {**records[0], "step": records[again - 1]["step"]})
    path.unlink()
    for record in records:
        MetricsLog(path).append(record)
    return write_report(folder)


def test_the_page_is_balanced_ids_are_single_and_nothing_is_fetched(whole):
    html = whole.read_text(encoding="utf-8")
    parsed = Page(html)
    assert html.startswith("<!DOCTYPE html>\n<html lang=")
    assert len(parsed.ids) == len(set(parsed.ids))
    targets = [value[1:] for name, value in parsed.attributes if name in ("href", "xlink:href")]
    assert targets
    assert set(targets) <= set(parsed.ids)
    assert set(re.findall(r"url\(#(.*?)\)", html)) <= set(parsed.ids)
    assert not {"script", "link", "img", "iframe", "object"} & set(parsed.names)
    assert not re.search(r"@import|url\((?!#)|\ssrc=|base64", html)
    assert [p.name for p in whole.parent.iterdir() if p.suffix == ".partial"] == []


def test_every_section_has_its_plot_what_to_look_for_and_what_was_found(whole):
    parsed = Page(whole.read_text(encoding="utf-8"))
    assert parsed.count("svg") == len(SECTIONS) == 7
    for section in SECTIONS:
        assert section.key in parsed.ids
        assert section.look in parsed.text
        assert section.missing == "" or section.missing not in parsed.text
    labels = [value for name, value in parsed.attributes if name == "aria-label"]
    assert len(labels) == 7
    assert all(label in parsed.text for label in labels)


def test_the_numbers_are_those_of_the_run(whole):
    history = read_history(whole.parent)
    text = Page(whole.read_text(encoding="utf-8")).text
    bits = history.end["bits_per_byte"]
    for expected in (
        "Training smoke on stdlib",
        "smoke, 11,658,499 parameters (5.14 M used by a token), trained on 32.8 K tokens of stdlib in ",
        f"{bits:.3f} bits per byte of validation text, {2.214 - bits:.3f} below the byte 5-gram (2.214).",
        "2 threads, resumed 1 time.",
        f"from {history.steps[0]['loss']:.3f} to {history.steps[-1]['loss']:.3f} nats",
        f"1 spike, 1 rollback that took back {len(history.undone[0])} steps, anticipatory routing for 4 steps.",
        "3 switches within twice the scatter",
        "162 GFLOP/s",
        "98.5% full",
    ):
        assert expected in text, expected
    for span in history.spans:
        assert f" {span.phase.name} " in text
        assert f"{span.steps[-1]['loss']:.3f}" in text
    for word in ("spike", "anticipatory routing", "byte 5-gram 2.214", "clipped above 1", "captured", "recall"):
        assert (word, True) == (word, ("text", word) in Page(whole.read_text(encoding="utf-8")).texts)


def test_every_field_of_the_recipe_stands_with_its_provenance(whole):
    text = Page(whole.read_text(encoding="utf-8")).text
    for owner in (DataConfig, OptimizerConfig, BatchConfig, LossConfig, DistillConfig, StabilityConfig, RunConfig):
        docs = field_docs(owner)
        for field in dataclasses.fields(owner):
            assert field.name in text
            assert set(docs[field.name].replace("``", " ").split()) <= set(text.split()), field.name
    assert "Largest norm of the gradient; the indexer's own is clipped apart. V3: 1.0." in text
    assert field_docs(Phase)["sequence"] == "Tokens of a row. Report: 4K, 16K, 64K, 1M."
    assert "data" not in field_docs(TrainConfig)


def test_hostile_text_stays_text(tmp_path):
    config = dataclasses.replace(
        smoke(),
        data=dataclasses.replace(smoke().data, source="<b>here</b>"),
        phases=tuple(
            dataclasses.replace(phase, name=f"{name}{number}")
            for number, (phase, name) in enumerate(
                zip(smoke().phases, ("<i>a</i>&", "$x$ \\frac", 'id="p" #1f5fa8', "url(#a)"), strict=True)
            )
        ),
    )
    write_run(tmp_path, config, max_steps=30)
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"kind": "sample", "step": 30, "prompt": HOSTILE, "text": "then " + HOSTILE})
    html = write_report(tmp_path).read_text(encoding="utf-8")
    parsed = Page(html)
    assert not {"script", "img", "i"} & set(parsed.names)
    shown = HOSTILE.replace("\0", "\ufffd").replace("\x1b", "\ufffd").replace("\ud800", "\ufffd")
    assert ("b", shown) in parsed.texts
    assert ("pre", "then " + shown) in parsed.texts
    assert "Training smoke on <b>here</b>" in parsed.text
    for phase in config.phases[:3]:
        assert ("td", phase.name) in parsed.texts
        assert ("text", phase.name) in parsed.texts


def test_the_same_run_gives_the_same_bytes_whatever_matplotlib_is_set_to(whole, monkeypatch):
    before = whole.read_bytes()
    for name in [name for name in sys.modules if name.startswith("matplotlib.pyplot")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it now fails
    theirs = {"font.size": 31, "axes.labelpad": 30, "lines.markeredgewidth": 4, "svg.fonttype": "path"}
    with matplotlib.rc_context(theirs):
        write_report(whole.parent)
        assert {name: matplotlib.rcParams[name] for name in theirs} == theirs
    assert whole.read_bytes() == before


def test_a_run_of_one_step_without_validation(tmp_path):
    text = Page(report(tmp_path, smoke(), max_steps=1, validate=False)).text
    for expected in (
        "; no validation was made.",
        "not finished: 2% of the planned 32.8 K tokens",
        "Only one phase was run: there is no switch.",
        "No step trained or measured an indexer.",
        "The run wrote no samples.",
        "of 8.19 K",  # a phase that was not reached
    ):
        assert expected in text, expected


def test_a_run_without_experts_or_baseline(tmp_path):
    write_run(tmp_path, smoke(), max_steps=9, num_layers=0)
    path = tmp_path / "metrics.jsonl"
    lines = [line for line in path.read_text().splitlines(keepends=True) if '"baseline"' not in line]
    path.write_text("".join(lines))
    parsed = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "The model has no routed layer." in parsed.text
    assert "5-gram" not in parsed.text
    assert re.search(r"bits per byte\. No spike\.", parsed.text)


def test_a_run_of_the_indexer_alone(tmp_path):
    config = dataclasses.replace(smoke(), phases=smoke().phases[1:2])
    text = Page(report(tmp_path, config)).text
    assert "only the indexer was trained, at 0.001." in text
    assert "Captured: 0.1" in text


def test_of_many_samples_the_last_and_the_first_are_open(whole):
    parsed = Page(whole.read_text(encoding="utf-8"))
    steps = [int(data.split()[-1]) for name, data in parsed.texts if name == "h3" and data.startswith("After step")]
    assert steps[0] == max(steps)
    assert steps[-1] == min(steps)
    assert steps[1:-1] == sorted(steps[1:-1])
    assert ("summary", f"Samples of {len(steps) - 2} steps between") in parsed.texts


@pytest.mark.parametrize(
    "tokens",
    [(40_000, 900, 900, 5_000, 900, 20_000, 900, 900), (10_000, 4_000, 86_000)],
    ids=["some of one step", "the second above the third, in the way of the first"],
)
def test_names_of_phases_touch_neither_each_other_nor_a_mark(tmp_path, tokens):
    """Measured on the drawn figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    phases = tuple(
        dataclasses.replace(smoke().phases[0], name=f"phase-{'long' * ((number + 2) % 3)}-{number}", tokens=length)
        for number, length in enumerate(tokens)
    )
    write_run(tmp_path, dataclasses.replace(smoke(), phases=phases), validate=False)
    with matplotlib.rc_context(matplotlib.rcParamsDefault):
        figure = plots.loss(read_history(tmp_path))
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        notes = [child for child in figure.axes[0].get_children() if isinstance(child, matplotlib.text.Annotation)]
        names = [note.get_window_extent() for note in notes if note.get_text().startswith("phase-")]
        marks = [note.arrow_patch.get_window_extent() for note in notes if note.arrow_patch]
    assert len(names) == len(marks) == len(tokens)
    for place, name in enumerate(names):
        assert not any(name.overlaps(other) for other in names[:place])
        assert not any(name.x0 < mark.x0 < name.x1 and mark.y1 > name.y0 + 1 for mark in marks)


def test_without_matplotlib_the_error_says_what_to_install(whole, monkeypatch):
    before = whole.read_bytes()
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"the report needs matplotlib, .*; expected: pip install 'dsv4\[plot\]'"):
        write_report(whole.parent)
    assert whole.read_bytes() == before


def test_every_colour_has_one_for_the_dark(whole):
    assert COLORS.keys() == DARK.keys()
    assert len(HEAT) == len(HEAT_DARK) == len(plots.HEAT_LEVELS)
    html = whole.read_text(encoding="utf-8")
    drawn = set(re.findall(r"#[0-9a-f]{6}\b", html[html.index("</style>") :]))
    assert drawn <= {"#000000"}  # what matplotlib writes where nothing is painted


def test_elements_escape_text_and_only_text():
    assert element("p", "a < b", element("b", "&"), title='"') == '<p title="&quot;">a &lt; b<b>&amp;</b></p>'
    assert text("\x00\t\n\x85") == "\ufffd\t\n\ufffd"
    assert Page(page("a < b", element("p", "x"))).texts[1] == ("title", "a < b")


def test_the_demo_recipe_is_drawn(tmp_path):
    html = report(tmp_path, demo(), spike_step=60)
    assert Page(html).count("svg") == 7
    assert len(html) < 1_000_000
    config = json.loads((tmp_path / "config.json").read_text())
    assert all(f">{phase['name']}<" in html for phase in config["phases"])
