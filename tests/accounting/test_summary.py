"""The summary, and that no account needs torch."""

import subprocess
import sys
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

import dsv4
from dsv4.accounting import flops
from dsv4.accounting.cost import total_flops
from dsv4.accounting.summary import compact_pattern, summarize
from dsv4.config.presets import flash, nano, pro


def test_summary_of_nano():
    summary = summarize(nano(), (128, 4096))
    assert summary.layers == {"window": 2, "csa": 2, "hca": 1}
    assert [at.context for at in summary.at_context] == [128, 4096]
    assert summary.at_context[1].decode.flops == total_flops(flops.decode(nano(), 4096))
    assert summary.at_context[1].prefill.flops == total_flops(flops.prefill(nano(), 4096)) / 4096
    assert summary.training.flops == total_flops(flops.training(nano(), 4096)) / 4096
    assert summary.training_tokens == 4096


def test_patterns():
    assert compact_pattern(flash().layer_kinds) == "window x2, (csa hca) x20, csa"
    assert compact_pattern(pro().layer_kinds) == "hca x2, (csa hca) x29, csa"
    assert compact_pattern(("csa",)) == "csa"
    assert compact_pattern(()) == ""


@given(st.lists(st.sampled_from(["window", "csa", "hca"]), max_size=20))
def test_a_pattern_can_be_read_back(kinds):
    expanded = []
    for part in compact_pattern(kinds).split(", ") if kinds else []:
        unit, _, count = part.partition(" x")
        expanded += unit.strip("()").split() * int(count or 1)
    assert expanded == kinds


def test_configs_and_accounts_import_no_torch():
    code = (
        "import sys, dsv4.config.load, dsv4.accounting.summary, dsv4.accounting.efficiency\n"
        "print([name for name in ('torch', 'numpy', 'safetensors', 'rich', 'tyro') if name in sys.modules])"
    )
    root = Path(dsv4.__file__).parent.parent
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
