"""The README's commands and code run as they stand."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_python_block_runs(tmp_path):
    (code,) = blocks("python")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "nano-checkpoint" / "config.json").is_file()


def commands() -> list[list[str]]:
    lines = [line.split("#")[0].strip() for line in "".join(blocks("bash")).splitlines()]
    return [shlex.split(line) for line in lines if line]


@pytest.mark.parametrize("command", [c for c in commands() if c[0].endswith("dsv4")], ids=" ".join)
def test_every_dsv4_command_runs(command):
    done = subprocess.run(
        [sys.executable, "-m", "dsv4", *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_every_make_target_named_in_the_documents_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"`?make ([a-z-]+)`?", document.read_text(encoding="utf-8")):
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"{document.name} names make {target}"


def test_ci_runs_the_readmes_test_command():
    assert ["make", "test"] in commands()
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize("document", ["README.md", "NOTATION.md", "CONTRIBUTING.md", "docs/tour.md", "docs/speed.md"])
def test_every_link_and_path_in_a_document_exists(document):
    path = ROOT / document
    text = path.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (path.parent / link).exists(), f"{document} links to {link}"
    for name in re.findall(r"`((?:dsv4|tests|bench|docs)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), f"{document} names {name}"
