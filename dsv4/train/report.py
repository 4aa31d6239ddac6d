"""report.html: a run told from its ``config.json`` and ``metrics.jsonl`` alone, in one file that needs nothing else."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path

from dsv4.config.files import write_then_rename
from dsv4.config.train import Phase, TrainConfig
from dsv4.train import findings, plots
from dsv4.train.history import FIT_STEPS, History, Span, read_history
from dsv4.train.metrics import Record
from dsv4.train.page import Html, element, join, page, plot, table
from dsv4.train.words import count, duration, plural


@dataclass(frozen=True, kw_only=True)
class Section:
    """A plot, what to look for in it, what was found, and what to say in a run that has nothing to draw."""

    key: str
    title: str
    look: str
    draw: plots.Plot
    found: Callable[[History], str | None]
    missing: str = ""


SECTIONS = (
    Section(
        key="loss",
        title="Loss",
        look="A fall that flattens, no jump where a phase begins (dotted), and validation below the baseline (dashed). "
        "Bits per byte compare models of any tokenizer; lower is better.",
        draw=plots.loss,
        found=findings.loss,
    ),
    Section(
        key="switches",
        title="Across the switches",
        look="The loss on either side of each change of phase, in nats. A line is fitted to the "
        f"{FIT_STEPS} steps nearest on each side; the jump is between their ends at the switch, and matters where it "
        "is well above the scatter of one step.",
        draw=plots.switches,
        found=findings.switches,
        missing="Only one phase was run: there is no switch.",
    ),
    Section(
        key="indexer",
        title="Indexer",
        look="Captured is the share of the way from uniform guessing (0) to the attention itself (1), in KL; recall "
        "is the share of the attention's heaviest entries that the indexer picks. Both rise in the warm-up and must "
        "hold once attention is sparse.",
        draw=plots.indexer,
        found=findings.indexer,
        missing="No step trained or measured an indexer.",
    ),
    Section(
        key="experts",
        title="Expert load",
        look="1 is perfect balance. Layers begin uneven and settle; one that does not sends most tokens to few "
        "experts. An MTP block is the last row, empty where it did not run.",
        draw=plots.experts,
        found=findings.experts,
        missing="The model has no routed layer.",
    ),
    Section(
        key="gradients",
        title="Gradients",
        look="A calm band below the dashed line. A slow rise announces trouble; the indexer's norm is its own.",
        draw=plots.gradients,
        found=findings.gradients,
    ),
    Section(
        key="schedule",
        title="Schedule",
        look="Warm-up, plateau and cosine of the learning rate; the indexer's warm-up has a rate of its own.",
        draw=plots.schedule,
        found=findings.schedule,
    ),
    Section(
        key="speed",
        title="Speed and memory",
        look="Level lines within a phase, and memory that does not creep.",
        draw=plots.speed,
        found=findings.speed,
    ),
)


def write_report(run: Path) -> Path:
    """Write ``run``/report.html and return its path. The same run gives the same bytes.

    Raises ``ValueError`` if ``run`` is not the folder of a run with at least one step, or matplotlib is missing.
    """
    plots.check_matplotlib()
    html = render(read_history(run))
    path = run / "report.html"
    write_then_rename(path, lambda partial: _write(partial, html))
    return path


def render(history: History) -> Html:
    """Return the report as one HTML document."""
    model, source = history.starts[-1]["model"], history.recipe.data.source
    links = [("phases", "Phases"), *((s.key, s.title) for s in SECTIONS), ("samples", "Samples"), ("recipe", "Recipe")]
    return page(
        f"{model} on {source}: training report",
        element("h1", f"Training {model} on {source}"),
        element("p", findings.headline(history), class_="lead"),
        element("p", _circumstances(history), class_="quiet"),
        _tiles(history),
        element("nav", *(element("a", title, href=f"#{key}") for key, title in links)),
        _heading("phases", "Phases"),
        _phases(history),
        *(_section(section, history) for section in SECTIONS),
        _heading("samples", "Samples"),
        _samples(history),
        _heading("recipe", "Recipe"),
        _recipe(history.recipe),
    )


def _write(path: Path, html: str) -> None:
    path.write_text(html, encoding="utf-8", newline="\n")


def _heading(key: str, title: str) -> Html:
    return element("h2", title, id=key)


def _circumstances(history: History) -> str:
    first, resumed = history.starts[0], len(history.starts) - 1
    parts = [
        f"Started {first['time'].replace('T', ' ')}",
        f"torch {first['torch']}",
        plural(first["threads"], "thread"),
    ]
    if resumed:
        parts.append(f"resumed {plural(resumed, 'time')}")
    planned = sum(phase.tokens for phase in history.recipe.phases)
    if history.end is None:
        parts.append(f"not finished: {history.tokens / planned:.0%} of the planned {count(planned)} tokens")
    return ", ".join(parts) + "."


def _tiles(history: History) -> Html:
    bits, none = history.bits_per_byte, ("-", "none was made")
    tiles = [
        ("Validation", *(none if bits is None else (f"{bits:.3f}", "bits per byte"))),
        *((baseline["name"], f"{baseline['bits_per_byte']:.3f}", "bits per byte") for baseline in history.baselines),
        ("Tokens", count(history.tokens), plural(history.steps[-1]["step"], "step")),
        ("Parameters", count(history.starts[-1]["parameters_total"]),
         f"{count(history.starts[-1]['parameters_activated'])} used by a token"),
        ("Time", duration(history.seconds), "in training steps"),
    ]  # fmt: skip
    return element(
        "dl", *(element("div", element("dt", a), element("dd", b, element("small", c))) for a, b, c in tiles)
    )


def _phases(history: History) -> Html:
    head = ("phase", "trains", "attention", "row", "steps", "tokens", "loss, first step", "last", "bits/byte", "time")
    rows = [_phase_row(span) for span in history.spans]
    done = {span.phase.name for span in history.spans}
    rows += [
        (phase.name, phase.train, phase.attention, f"{phase.sequence:,}", "0", f"of {count(phase.tokens)}", *[""] * 4)
        for phase in history.recipe.phases
        if phase.name not in done
    ]
    return table(head, rows, "numbers", first_number=3)


def _phase_row(span: Span) -> tuple[str, ...]:
    phase = span.phase
    return (
        phase.name,
        phase.train,
        phase.attention,
        f"{phase.sequence:,}",
        f"{len(span.steps):,}",
        count(span.tokens) if span.tokens >= phase.tokens else f"{count(span.tokens)} of {count(phase.tokens)}",
        f"{span.steps[0]['loss']:.3f}",
        f"{span.steps[-1]['loss']:.3f}",
        f"{span.validations[-1]['bits_per_byte']:.3f}" if span.validations else "-",
        duration(sum(step["seconds"] for step in span.steps)),
    )


def _section(section: Section, history: History) -> Html:
    heading, found = _heading(section.key, section.title), section.found(history)
    if found is None:
        return join(heading, element("p", section.missing))
    drawing = plots.svg(section.draw, history)
    assert drawing is not None
    return join(
        heading,
        element("p", section.look, class_="look"),
        element("p", found),
        element("figure", plot(drawing, section.key, found)),
    )


def _samples(history: History) -> Html:
    if not history.samples:
        return element("p", "The run wrote no samples.")
    steps = [(step, list(samples)) for step, samples in groupby(history.samples, key=lambda sample: sample["step"])]
    shown = [_step_samples(step, samples) for step, samples in steps]
    if len(shown) > 2:  # the last and the first stay open
        summary = element("summary", f"Samples of {plural(len(shown) - 2, 'step')} between")
        shown = [shown[-1], element("details", summary, *shown[1:-1]), shown[0]]
    return join(element("p", "Prompts in bold; what follows is the model's.", class_="look"), *shown)


def _step_samples(step: int, samples: list[Record]) -> Html:
    texts = [element("pre", element("b", sample["prompt"]), sample["text"]) for sample in samples]
    return join(element("h3", f"After step {step:,}"), *texts)


def _recipe(recipe: TrainConfig) -> Html:
    """Every field with its value and what its own docstring says of it; a table for each part."""
    own, parts = [], []
    docs = field_docs(TrainConfig)
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        if field.name == "phases":
            parts += [element("h3", "phases"), _recipe_phases(recipe.phases)]
        elif dataclasses.is_dataclass(value):
            parts += [element("h3", field.name), element("p", _code(inspect.getdoc(value) or ""), class_="look")]
            parts.append(_fields(value))
        else:
            own.append((element("code", field.name), _value(value), _code(docs.get(field.name, ""))))
    return join(table(("field", "value", "what it is"), own, "words"), *parts)


def _fields(part: object) -> Html:
    docs = field_docs(type(part))
    rows = [
        (element("code", name), _value(getattr(part, name)), _code(docs.get(name, "")))
        for name in part.__dataclass_fields__  # pyright: ignore[reportAttributeAccessIssue]
    ]
    return table(("field", "value", "what it is"), rows, "words")


def _recipe_phases(phases: tuple[Phase, ...]) -> Html:
    docs = field_docs(Phase)
    names = [field.name for field in dataclasses.fields(Phase)]
    rows = [[_value(getattr(phase, name)) for name in names] for phase in phases]
    notes = [
        element("p", element("code", name), ": ", _code(docs[name]), class_="look") for name in names if name in docs
    ]
    return join(table(names, rows, "numbers"), *notes)


def field_docs(owner: type) -> dict[str, str]:
    """Return the docstring below each field of a class, read from its source."""
    definition = ast.parse(inspect.getsource(owner)).body[0]
    assert isinstance(definition, ast.ClassDef)
    docs = {}
    for field, below in pairwise(definition.body):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            docs[ast.unparse(field.target)] = inspect.cleandoc(str(below.value.value)).replace("\n", " ")
    return docs


def _code(text: str) -> Html:
    """Turn ``this`` into code, and escape the rest."""
    pieces = re.split("``(.*?)``", text)
    return join(*(element("code", piece) if place % 2 else piece for place, piece in enumerate(pieces)))


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, tuple):
        return ", ".join(_value(each) for each in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
