"""What an engine may use."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dsv4.config.engine import Limits, PrefixLimits


def problems(start, **changes) -> list[str]:
    with pytest.raises(ValueError) as caught:
        replace(start, **changes)
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("max_requests", [0, 1.0, True, None], "a whole number of at least 1"),
        ("step_tokens", [0, -8, "2048"], "a whole number of at least 1"),
        ("max_context", [1, 0, 4096.0], "a whole number of at least 2"),
        ("cache_bytes", [0, 1e9, None], "a whole number of at least 1"),
        ("cache_format", ["fp8", None, 4], "one of float32, bfloat16, packed, packed-fp8, auto"),
        ("numerics", ["exact", None], "one of fast, invariant"),
        ("draft_tokens", [-1, 5, 1.0, None], "a whole number from 0 to 4"),
        ("prefix", [None, True], "PrefixLimits"),
        ("log", ["", 3], "a path or None"),
    ],
)
def test_a_limit_that_cannot_be_is_named(name, values, expected):
    for value in values:
        assert problems(Limits(), **{name: value}) == [f"limits.{name} is {value!r}; expected {expected}"]


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("memory", [1, None], "True or False"),
        ("state_every", [-128, 128.0], "a whole number of at least 0"),
        ("state_every", [1, 127, 200], "a multiple of 128, the tokens of a page"),
        ("state_bytes", [0, 1e6], "a whole number of at least 1"),
        ("folder", ["", 3], "a path or None"),
        ("folder_bytes", [0, "10G"], "a whole number of at least 1"),
        ("policy", ["none", None], "one of full, periodic, zero"),
        ("period", [0, 127, 8192.0], "a whole number of at least 128"),
        ("period", [129, 8191], "a multiple of 128, the tokens of a page"),
    ],
)
def test_a_limit_of_prefixes_that_cannot_be_is_named(name, values, expected):
    for value in values:
        lines = problems(PrefixLimits(), **{name: value})
        assert lines == [f"limits.prefix.{name} is {value!r}; expected {expected}"]


def test_problems_come_together():
    lines = problems(Limits(), max_requests=0, cache_format="fp8", numerics="exact", log="")
    assert [line.split()[0] for line in lines] == [
        "limits.max_requests", "limits.cache_format", "limits.numerics", "limits.log",
    ]  # fmt: skip
    lines = problems(PrefixLimits(), state_every=1, folder="", period=1)
    assert [line.split()[0] for line in lines] == [
        "limits.prefix.state_every", "limits.prefix.folder", "limits.prefix.period",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "names", "because"),
    [
        ({"memory": False, "state_every": 128}, ["state_every"], "with memory = False; expected 0"),
        ({"memory": False, "state_bytes": 1}, ["state_bytes"], "with memory = False; expected 268435456"),
        ({"memory": False, "folder": "here"}, ["folder"], "with memory = False; expected None"),
        (
            {"folder_bytes": 1, "policy": "zero", "period": 128},
            ["folder_bytes", "policy", "period"],
            "with folder = None; expected",
        ),
        ({"folder": "here", "policy": "zero", "period": 128}, ["period"], "with policy = 'zero'; expected 8192"),
        ({"folder": "here", "policy": "full", "period": 128}, ["period"], "with policy = 'full'; expected 8192"),
    ],
)
def test_an_option_that_another_switches_off_is_refused(changes, names, because):
    lines = problems(PrefixLimits(), **changes)
    assert [line.split()[0].removeprefix("limits.prefix.") for line in lines] == names
    assert all(because in line and line.endswith("it would have no effect") for line in lines)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"memory": False},
        {"state_every": 128, "state_bytes": 1},
        {"folder": "here", "folder_bytes": 1, "policy": "periodic", "period": 128},
        {"folder": "here", "policy": "zero"},
        {"folder": "here", "policy": "full"},
    ],
)
def test_options_that_have_an_effect_pass(changes):
    prefix = PrefixLimits(**changes)
    assert {name: getattr(prefix, name) for name in changes} == changes


@pytest.mark.parametrize(("draft_tokens", "least"), [(0, 3), (1, 6), (4, 15)])
def test_a_step_has_room_for_every_decoding_request(draft_tokens, least):
    assert Limits(max_requests=3, draft_tokens=draft_tokens, step_tokens=least).step_tokens == least
    (line,) = problems(Limits(), max_requests=3, draft_tokens=draft_tokens, step_tokens=least - 1)
    assert line.startswith(
        f"limits.step_tokens is {least - 1}; expected at least max_requests x (1 + draft_tokens) = {least}"
    )


def test_the_outermost_values_pass():
    limits = Limits(max_requests=1, step_tokens=5, max_context=2, cache_bytes=1, draft_tokens=4, log="log")
    assert (limits.max_context, limits.draft_tokens) == (2, 4)
