"""Kernels are compiled once, into the cache, and what stops that is said."""

import logging
import shutil
import subprocess

import pytest
import torch

from dsv4 import native

needs_compiler = pytest.mark.skipif(not native.available(), reason="no C compiler here")


@pytest.fixture
def fresh(monkeypatch, tmp_path, tmp_path_factory):
    """A machine that has compiled nothing yet, and one source of those; the real library comes back afterwards."""
    sources = tmp_path_factory.mktemp("sources")
    for path in (native.SOURCES / "lookup.c", *native.SOURCES.glob("*.h")):
        shutil.copy(path, sources)
    monkeypatch.setattr(native, "SOURCES", sources)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for function in (native.library, native.available):
        function.cache_clear()
    yield tmp_path
    for function in (native.library, native.available):
        function.cache_clear()


@needs_compiler
def test_compiled_once(fresh, monkeypatch):
    native.library()
    (made,) = (fresh / "dsv4").iterdir()
    assert made.suffix == ".so"
    native.library.cache_clear()
    monkeypatch.setattr(native, "_compile", lambda *_: pytest.fail("compiled again"))
    native.library()


@needs_compiler
def test_new_flags_are_a_new_library(fresh, monkeypatch):
    native.library()
    native.library.cache_clear()
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-DANOTHER"))
    native.library()
    assert len(list((fresh / "dsv4").iterdir())) == 2


def test_without_a_compiler(fresh, monkeypatch, caplog):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(native.BuildError, match="no C compiler found"):
        native.library()
    with caplog.at_level(logging.WARNING):
        assert not native.available()
        assert not native.available()
    assert caplog.text.count("CPU kernels are not available, the portable path is used: no C compiler") == 1


@needs_compiler
def test_a_compiler_that_refuses(fresh, monkeypatch):
    monkeypatch.setattr(native, "FLAGS", ("-std=nonsense", *native.FLAGS))
    with pytest.raises(native.BuildError, match="nonsense"):
        native.library()
    assert list((fresh / "dsv4").iterdir()) == []


@needs_compiler
def test_a_cache_that_cannot_be_written(fresh, monkeypatch):
    (fresh / "dsv4").write_text("a file where a folder should be")
    with pytest.raises(native.BuildError, match="cannot write"):
        native.library()


@needs_compiler
def test_new_sources_are_a_new_library(fresh):
    native.library()
    native.library.cache_clear()
    with open(native.SOURCES / "lookup.c", "a") as file:
        file.write("\n")
    native.library()
    assert len(list((fresh / "dsv4").iterdir())) == 2


@needs_compiler
def test_no_warnings_from_the_compiler():
    sources = [str(path) for path in native.SOURCES.glob("*.c")]
    flags = [*filter(None, native.FLAGS), "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    subprocess.run([shutil.which("cc"), *flags, *sources], check=True)


@pytest.mark.parametrize(("dtype", "serves"), [
    (torch.float32, True), (torch.bfloat16, True), (torch.float64, False), (torch.float16, False),
])  # fmt: skip
def test_dtypes_served(dtype, serves):
    assert native.serves(torch.empty(1, dtype=dtype)) == serves
    assert not native.serves(torch.empty(1, dtype=dtype, device="meta"))
