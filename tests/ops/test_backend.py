"""Implementations are chosen by name, and a wrong name says which ones exist."""

import pytest

from dsv4.ops.backend import check_backend, pick


def reference():
    return "the specification"


def portable():
    return "the fast path"


@pytest.mark.parametrize("backend", ["reference", "portable"])
def test_known_names_pass(backend):
    check_backend(backend)


@pytest.mark.parametrize(("backend", "chosen"), [("reference", reference), ("portable", portable)])
def test_the_named_implementation_is_returned(backend, chosen):
    assert pick(backend, reference=reference, portable=portable) is chosen


@pytest.mark.parametrize("backend", ["", "cuda", "Portable", None])
def test_an_unknown_name_is_an_error_that_lists_the_known_ones(backend):
    with pytest.raises(ValueError, match=rf"backend is {backend!r}; expected one of reference, portable"):
        check_backend(backend)
    with pytest.raises(ValueError, match="expected one of reference, portable"):
        pick(backend, reference=reference, portable=portable)
