"""``dsv4 report``: what it prints, and what it refuses."""

import subprocess
import sys
from pathlib import Path

import pytest

import dsv4
from dsv4.cli.main import main
from dsv4.config.recipes import smoke
from dsv4.testing.runs import write_run

pytest.importorskip("matplotlib")


def test_it_prints_the_outcome_and_the_path(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    write_run(tmp_path, smoke(), num_layers=2)
    assert main(["report", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("smoke, 11,658,499 parameters (5.14 M used by a token), trained on 32.8 K tokens of")
    assert lines[0].endswith(" below the byte 5-gram (2.214).")
    assert [line.split()[:2] for line in lines if line.split()[:1] == ["sparse-64"]] == [["sparse-64", "8"]]
    assert lines[-1] == str(tmp_path / "report.html")
    assert (tmp_path / "report.html").is_file()


def test_a_folder_that_is_no_run_is_named(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.err == (f"error: run is {tmp_path}, which has no config.json; expected the folder of a run\n")
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_log_is_named_with_its_line(tmp_path, capsys):
    write_run(tmp_path, smoke(), max_steps=2)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], "oops\n", *lines[2:]]))
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {path}, line 3: ")


def test_it_needs_no_torch(tmp_path):
    write_run(tmp_path, smoke(), max_steps=3)
    code = (
        "import sys\n"
        "from dsv4.cli.main import main\n"
        f"assert main(['report', {str(tmp_path)!r}]) == 0\n"
        "print([name for name in ('torch', 'matplotlib.pyplot') if name in sys.modules])"
    )
    root = Path(dsv4.__file__).parent.parent
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"
