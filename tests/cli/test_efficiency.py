"""What ``dsv4 efficiency`` prints and draws."""

import json
import sys

import pytest

from dsv4.cli.main import main


def test_table_ends_with_figure_one(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["efficiency"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    flops, kv = [line for line in lines if line[:1] == ["1M"]]
    assert [word for word in flops if word.endswith("%")] == ["27%", "10%"]
    assert [word for word in kv if word.endswith("%")] == ["10%", "7%"]
    assert len([line for line in lines if line[:1] == ["4K"]]) == 2
    assert len([line for line in lines if "2.0%" in line]) == 2


def test_json(capsys):
    assert main(["efficiency", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["context"] for row in rows][:2] == [4096, 8192]
    assert rows[-1]["v32"]["kv_bytes"] == 48_068 * 1048576
    assert round(rows[-1]["pro"]["flops_share"], 2) == 0.27
    assert round(rows[-1]["flash"]["kv_share"], 2) == 0.07


def test_svg_says_what_the_table_says_and_is_the_same_every_time(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    first, second = tmp_path / "a.svg", tmp_path / "b.svg"
    assert main(["efficiency", "--plot", str(first)]) == 0
    assert main(["efficiency", "--plot", str(second)]) == 0
    assert first.read_bytes() == second.read_bytes()
    text = first.read_text()
    for word in ("V3.2", "V4-Pro  27%", "V4-Flash  10%", "V4-Pro  10%", "V4-Flash  7%", "tokens of context"):
        assert f">{word}<" in text, word
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.svg", "b.svg"]


def test_png(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "plot.png"
    assert main(["efficiency", "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_error_says_what_to_install(tmp_path, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["efficiency", "--plot", str(tmp_path / "plot.svg")]) == 2
    captured = capsys.readouterr()
    assert "error: --plot needs matplotlib" in captured.err
    assert "pip install 'dsv4[plot]'" in captured.err
    assert captured.out == ""  # refused before the table
