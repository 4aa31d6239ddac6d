"""Implementations are chosen by name, and a wrong name says which ones exist."""

from typing import get_args

import pytest
import torch

from dsv4 import native
from dsv4.config import backend as asked
from dsv4.ops.backend import BackendChoice, check_backend, pick, resolve


def reference():
    return "the specification"


def portable():
    return "the fast path"


def kernel():
    return "the fast path on a CPU"


@pytest.mark.parametrize("backend", ["auto", "reference", "portable", "native"])
def test_known_names_pass(backend):
    check_backend(backend)


def test_what_can_be_asked_for_is_what_there_is():
    assert get_args(asked.BackendChoice) == get_args(BackendChoice)


@pytest.mark.parametrize(("backend", "chosen"), [("reference", reference), ("portable", portable), ("native", kernel)])
def test_the_named_implementation_is_returned(backend, chosen):
    assert pick(backend, reference=reference, portable=portable, native=kernel) is chosen


def test_an_operation_without_kernels_has_its_portable_one():
    assert pick("native", reference=reference, portable=portable) is portable


@pytest.mark.parametrize(("has_kernels", "device", "resolved"), [
    (True, "cpu", "native"), (False, "cpu", "portable"), (True, "meta", "portable"),
])  # fmt: skip
def test_auto_is_the_fastest_that_runs(monkeypatch, has_kernels, device, resolved):
    monkeypatch.setattr(native, "available", lambda: has_kernels)
    assert resolve("auto", torch.device(device)) == resolved
    assert resolve("reference", torch.device(device)) == "reference"


@pytest.mark.parametrize("backend", ["", "cuda", "Portable", None])
def test_an_unknown_name_is_an_error_that_lists_the_known_ones(backend):
    with pytest.raises(ValueError, match=rf"backend is {backend!r}; expected one of auto, reference, portable"):
        check_backend(backend)
    with pytest.raises(ValueError, match="expected one of reference, portable"):
        pick(backend, reference=reference, portable=portable)
