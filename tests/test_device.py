"""One file asks about accelerators, and nothing names one."""

import ast
import re
from pathlib import Path

import pytest
import torch

from dsv4 import device

ROOT = Path(__file__).parents[1]
MAKERS = re.compile(r"\b(cuda|hip|rocm|npu|xpu|mps)\b")  # as torch calls devices


def sources():
    return [path for room in ("dsv4", "bench") for path in sorted((ROOT / room).rglob("*.py"))]


def test_no_other_file_asks_about_accelerators():
    asking = [path.relative_to(ROOT).as_posix() for path in sources() if "torch.accelerator" in path.read_text()]
    assert asking == ["dsv4/device.py"]


def test_nothing_names_an_accelerator():
    """Neither as a string, nor as a module of torch."""
    found = []
    for path in sources():
        if path.name == "compiled.py":  # tells a compiler what to compile for, on a machine without it
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            name = node.value if isinstance(node, ast.Constant) else getattr(node, "attr", None)
            is_doc = isinstance(name, str) and ("\n" in name or " " in name)
            if isinstance(name, str) and not is_doc and MAKERS.search(name):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {name}")
    assert found == []


def test_a_cpu_alone(monkeypatch):
    monkeypatch.setattr(device, "accelerator", lambda: None)
    assert device.best() == torch.device("cpu")
    assert not device.is_accelerator(torch.device("cpu"))
    device.wait(torch.device("cpu"))
    assert device.peak_memory_bytes(torch.device("cpu")) > 10**7


def test_what_is_there_is_asked(monkeypatch):
    """What the accelerator is called makes no difference."""
    asked = []
    other = torch.device("privateuseone", 0)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: other)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: asked.append(device))
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda device: 12)
    assert device.accelerator() == device.best() == other
    assert device.is_accelerator(other)
    device.wait(other)
    assert asked == [other]
    assert device.peak_memory_bytes(other) == 12


def test_a_graph_is_captured_on_a_stream_of_its_own(monkeypatch):
    done = []

    class Entered:
        def __init__(self, name, *given, **named):
            self.name, self.given = name, (*given, *named.values())

        def __enter__(self):
            done.append((self.name, *self.given))

        def __exit__(self, *error):
            done.append(f"{self.name} ends")

    other = torch.device("privateuseone", 0)
    monkeypatch.setattr(torch, "Stream", lambda *given: Entered("stream", *given))
    monkeypatch.setattr(torch.accelerator, "Graph", lambda **given: Entered("graph", **given))
    graph, result = device.capture(lambda: done.append("run") or 3, other)
    assert done == [("stream", other), ("graph", "thread_local"), "run", "graph ends", "stream ends"]
    assert (graph.name, result) == ("graph", 3)


@pytest.mark.parametrize(("error", "has"), [(None, True), (RuntimeError("Graph is not supported"), False)])
def test_some_accelerators_have_graphs(monkeypatch, error, has):
    def make():
        if error:
            raise error

    device.has_graphs.cache_clear()
    assert not device.has_graphs(torch.device("cpu"))
    monkeypatch.setattr(torch.accelerator, "Graph", make)
    assert device.has_graphs(torch.device("privateuseone", 0)) == has
    monkeypatch.delattr(torch.accelerator, "Graph")
    device.has_graphs.cache_clear()
    assert not device.has_graphs(torch.device("privateuseone", 0))
    device.has_graphs.cache_clear()


def test_memory_that_torch_keeps_is_given_back(monkeypatch):
    done = []
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: done.append("emptied"))
    monkeypatch.setattr(device, "accelerator", lambda: None)
    device.empty_cache()
    assert done == []
    monkeypatch.setattr(device, "accelerator", lambda: torch.device("privateuseone", 0))
    device.empty_cache()
    assert done == ["emptied"]


def test_a_device_without_a_name_is_called_as_torch_calls_it():
    assert device.name_of(torch.device("cpu")) == "cpu"


@pytest.mark.parametrize("name", ["cuda", "torch.npu", "xpu:0"])
def test_the_rule_sees_names(name):
    assert MAKERS.search(name)
