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


@pytest.mark.parametrize("name", ["cuda", "torch.npu", "xpu:0"])
def test_the_rule_sees_names(name):
    assert MAKERS.search(name)
