"""The Python of docs/engine.md runs, on a small model in the place of the demo's."""

import re
from pathlib import Path

import dsv4
from dsv4.config.presets import smoke
from dsv4.model.init import new_model

TEXT = (Path(dsv4.__file__).parent.parent / "docs" / "engine.md").read_text(encoding="utf-8")


def test_the_python_block_runs(monkeypatch, capsys):
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    asked = []

    def load_model(path):
        asked.append(path)
        return new_model(smoke()).requires_grad_(False)

    monkeypatch.setattr(dsv4, "load_model", load_model, raising=False)
    exec(compile(block, "docs/engine.md", "exec"), {})
    assert asked == ["runs/demo/model"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all(line.split()[0] in ("stop", "length") for line in lines)
