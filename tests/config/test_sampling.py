"""What a request may ask for."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from dsv4.config.sampling import Sampling

NAN, INF = float("nan"), float("inf")


def problems(**changes) -> list[str]:
    with pytest.raises(ValueError) as caught:
        replace(Sampling(), **changes)
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("max_tokens", [0, -1, 1.5, True, "8", None], "a whole number of at least 1"),
        ("temperature", [-0.1, NAN, INF, "hot", None, True], "a finite number of at least 0"),
        ("top_p", [0, -0.5, 1.01, NAN, "1"], "0 < top_p <= 1"),
        ("top_k", [-1, 2.0, False], "a whole number of at least 0"),
        ("min_p", [-0.1, 1.1, NAN, None], "0 to 1"),
        ("presence_penalty", [-2.1, 2.1, NAN, "0"], "-2 to 2"),
        ("frequency_penalty", [-2.1, 2.1, INF, None], "-2 to 2"),
        ("repetition_penalty", [0, -1.0, NAN, INF, "1"], "a finite number above 0"),
        ("logit_bias", [{5: 1.0}, [(5, 1.0)], None], "a tuple of pairs (token id, bias)"),
        ("stop", ["END", ["END"], None], "a tuple of strings"),
        ("stop_token_ids", [7, [7], None], "a tuple of token ids"),
        ("ignore_eos", [1, 0, "no", None], "True or False"),
        ("seed", [-1, 2**63, 1.0, "7", True], f"a whole number from 0 to {2**63 - 1}"),
        ("logprobs", [-1, 21, 1.0, True], "a whole number from 0 to 20"),
    ],
)
def test_a_value_that_cannot_be_is_named(name, values, expected):
    for value in values:
        assert problems(**{name: value}) == [f"sampling.{name} is {value!r}; expected {expected}"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logit_bias": ((5, 1.0), 7)}, "sampling.logit_bias[1] is 7; expected a pair (token id, bias)"),
        ({"logit_bias": ((5,),)}, "sampling.logit_bias[0] is (5,); expected a pair (token id, bias)"),
        ({"logit_bias": ((-5, 1.0),)}, "sampling.logit_bias[0][0] is -5; expected a whole number of at least 0"),
        ({"logit_bias": ((5, 100.5),)}, "sampling.logit_bias[0][1] is 100.5; expected -100 to 100"),
        ({"logit_bias": ((5, NAN),)}, "sampling.logit_bias[0][1] is nan; expected -100 to 100"),
        ({"logit_bias": ((5, 1), (5, 2))}, "sampling.logit_bias gives token 5 twice; expected each token once"),
        ({"logit_bias": (([], 1),)}, "sampling.logit_bias[0][0] is []; expected a whole number of at least 0"),
        ({"stop": ("a", "")}, "sampling.stop[1] is ''; expected a string that is not empty"),
        ({"stop": (3,)}, "sampling.stop[0] is 3; expected a string that is not empty"),
        ({"stop_token_ids": (3, -1)}, "sampling.stop_token_ids[1] is -1; expected a whole number of at least 0"),
    ],
)
def test_an_element_that_cannot_be_is_named_by_its_place(changes, message):
    assert problems(**changes) == [message]


def test_every_problem_comes_at_once():
    lines = problems(max_tokens=0, top_p=0.0, stop=("",), logit_bias=((-1, 200),), seed=-1)
    assert [line.split()[0] for line in lines] == [
        "sampling.max_tokens", "sampling.top_p", "sampling.logit_bias[0][0]", "sampling.logit_bias[0][1]",
        "sampling.stop[0]", "sampling.seed",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"max_tokens": 1, "temperature": 0, "top_p": 1e-9, "top_k": 1, "min_p": 1},
        {"presence_penalty": -2, "frequency_penalty": 2, "repetition_penalty": 1e-9},
        {"logit_bias": ((0, -100), (1, 100.0)), "stop": ("\n",), "stop_token_ids": (0,), "ignore_eos": True},
        {"seed": 0, "logprobs": 0},
        {"seed": 2**63 - 1, "logprobs": 20},
    ],
)
def test_the_outermost_values_pass(changes):
    sampling = Sampling(**changes)
    assert {name: getattr(sampling, name) for name in changes} == changes


def test_nothing_is_asked_for_by_default():
    neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    assert {name: getattr(Sampling(), name) for name in neutral} == neutral
    assert all(not getattr(Sampling(), f.name) for f in fields(Sampling) if f.name not in {*neutral, "max_tokens"})
