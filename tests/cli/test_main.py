"""The command: help, errors, exit codes."""

import subprocess
import sys
from pathlib import Path

import pytest

import dsv4
from dsv4.cli.main import main

ROOT = Path(dsv4.__file__).parent.parent


def test_help_names_every_verb(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for word in ("inspect", "efficiency", "Print sizes and costs", "Compare V4 with V3.2"):
        assert word in text


def test_help_of_a_verb_is_plain(capsys):
    with pytest.raises(SystemExit):
        main(["inspect", "--help"])
    text = capsys.readouterr().out
    assert "MODEL" in text
    assert "--context TOKENS" in text
    assert "--json" in text
    assert "--no-json" not in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["inspect", "flsh"],
            "error: preset is 'flsh'; expected one of flash, pro, flash-base, pro-base, mini, nano, smoke, nano-1m, ",
        ),
        (["inspect", "nano", "--context", "4097"], "error: --context is 4097; expected 1 to 4096,"),
        (["inspect", "nano", "--context", "0"], "error: --context is 0; expected 1 to 4096,"),
        (
            ["inspect", "/nowhere/config.json"],
            "error: config file is /nowhere/config.json; expected a file that exists",
        ),
        (["efficiency", "--plot", "x.pdf"], "error: --plot is x.pdf; expected a name that ends in .svg or .png"),
        (
            ["efficiency", "--plot", "/nowhere/x.svg"],
            "error: --plot is /nowhere/x.svg; expected its directory to exist",
        ),
    ],
)
def test_user_errors_are_one_line_and_exit_two(argv, message, capsys):
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(message)
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_a_wrong_option_exits_two(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["inspect", "nano", "--contxt", "5"])
    assert caught.value.code == 2
    assert "contxt" in capsys.readouterr().err


def test_inspect_starts_without_torch():
    code = (
        "import sys, io, contextlib\n"
        "from dsv4.cli.main import main\n"
        "with contextlib.redirect_stdout(io.StringIO()) as out:\n"
        "    assert main(['inspect', 'flash']) == 0\n"
        "assert '284,332,240,471' in out.getvalue()\n"
        "print([name for name in ('torch', 'numpy', 'matplotlib', 'safetensors') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_module_runs_and_returns_the_exit_code():
    command = [sys.executable, "-m", "dsv4", "inspect", "nanoo"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "did you mean nano?" in result.stderr
    assert "Traceback" not in result.stderr
