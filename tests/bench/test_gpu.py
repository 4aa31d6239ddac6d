"""The benchmark of kernels and the list of proved ones, as far as a machine without a GPU can tell."""

import json
from importlib import import_module

import pytest
import torch

from bench.gpu import __main__ as bench
from bench.gpu import measure, prove
from bench.gpu.case import Case
from dsv4.device import CPU
from dsv4.ops.backend import PROVED

LIMITS = measure.Ceilings(bytes_per_s=1e9, flops_per_s=1e12)


def add(dtype=torch.float32):
    x = torch.randn(100, dtype=dtype)
    return lambda: (x + 1, [x.argsort()])


def case(**changed):
    twins = {"portable": add, "compiled": add}
    return Case(**{"kernel": "room.add", "shape": "tiny", "make": add, "num_bytes": 800, "twins": twins, **changed})


# ---- kernels and their proofs ----


def test_every_kernel_has_tests_that_prove_it():
    pytest.importorskip("triton")
    rooms = prove.kernels_of_rooms()
    assert len(rooms) > 12
    for room, kernels in rooms.items():
        tests = "".join(path.read_text(encoding="utf-8") for path in prove.tests_of(room))
        for kernel in kernels:
            module, function = kernel.split(":")
            assert callable(getattr(import_module(f"dsv4.ops.{module}"), function)), kernel
            assert function in tests, f"{kernel} is in no test"


def test_what_is_proved_is_there_and_says_where_and_when():
    proved = json.loads(PROVED.read_text(encoding="utf-8"))
    assert proved.keys() <= prove.names()
    assert all(found.keys() == {"device", "date", "torch", "triton"} for found in proved.values())


@pytest.mark.parametrize("main", [bench.main, prove.main])
def test_without_an_accelerator_nothing_is_measured_or_proved(main, monkeypatch):
    for module in (bench, prove):
        monkeypatch.setattr(module, "accelerator", lambda: None)
    before = PROVED.read_bytes()
    with pytest.raises(SystemExit, match="no accelerator here"):
        main()
    assert PROVED.read_bytes() == before


# ---- cases ----


def test_the_cases():
    pytest.importorskip("triton")
    found = bench.cases(bench.ROOMS)
    names = [one.name for one in found]
    assert len(set(names)) == len(names)
    rooms = {path.name for path in (prove.ROOT / "dsv4/ops").iterdir()}
    for one in found:
        assert prove.room_of(one) in rooms, one.name
        assert one.num_bytes > 0
    assert all(prove.true_shapes(room) for room in ("attend", "compress", "experts", "index", "mhc"))


@pytest.mark.parametrize("room", bench.ROOMS)
def test_each_room_says_what_it_measures(room):
    pytest.importorskip("triton")
    assert import_module(f"bench.gpu.{room}").__doc__


# ---- measuring ----


def test_a_case_is_timed_beside_its_twins():
    found = measure.measure(case(flops=10**9, mark=0.5), LIMITS, CPU, group_s=0.001)
    assert found["bound"] == "flops"
    assert found["share"] == pytest.approx(1e-3 / found["seconds"])
    assert found["twins"].keys() == {"portable", "compiled"}
    assert measure.measure(case(), LIMITS, CPU, group_s=0.001)["bound"] == "bytes"


def test_a_twin_without_room_is_told():
    def full():
        raise torch.OutOfMemoryError

    found = measure.measure(case(twins={"portable": full, "compiled": add}), LIMITS, CPU, group_s=0.001)
    assert found["twins"]["portable"] == "out of memory"
    assert "portable out of memory; compiled " in bench.line(found | {"error": 0.0, "same_bits": True})


def test_a_kernel_is_held_to_its_twin_on_the_same_numbers():
    assert measure.check(case(), CPU) == {"error": 0.0, "same_bits": True}
    assert measure.check(case(twins={"portable": lambda: add(torch.float64)}), CPU)["error"] > 0

    def wrong():
        x = torch.randn(100)
        return lambda: (x + 1.5, [x.argsort()])

    assert 0.1 < measure.check(case(make=wrong), CPU)["error"] < 0.5
    assert not measure.check(case(make=lambda: lambda: (torch.rand(100), [torch.arange(100)])), CPU)["same_bits"]


def test_without_a_twin_there_is_nothing_to_compare():
    assert measure.check(case(twins={}), CPU) == {"error": None, "same_bits": True}
    assert not prove.agrees(case(twins={}), CPU)
    found = measure.measure(case(twins={}), LIMITS, CPU, group_s=0.001)
    assert "no twin; not compared" in bench.line(found | {"error": None, "same_bits": True})


def test_choices_that_differ_count():
    def picks(shift):
        return lambda: lambda: torch.arange(10) + shift

    assert measure.check(case(make=picks(1), twins={"portable": picks(0)}), CPU)["error"] == 1.0


def test_what_is_not_the_same_twice_is_not_proved(monkeypatch):
    assert prove.agrees(case(), CPU)
    assert not prove.agrees(case(make=lambda: lambda: (torch.rand(100), [torch.arange(100)])), CPU)


def test_ceilings():
    found = measure.ceilings(CPU, copy_bytes=2**16, product=64)
    assert found.bytes_per_s > 1e6
    assert found.flops_per_s > 1e6
    assert found.floor_s(case(num_bytes=int(found.bytes_per_s))) == pytest.approx(1, rel=1e-6)


def test_the_picture(tmp_path):
    found = [measure.measure(case(mark=mark), LIMITS, CPU, group_s=0.001) for mark in (None, 0.75)]
    bench.draw(tmp_path / "gpu.svg", found, "a GPU")
    assert "room.add, tiny" in (tmp_path / "gpu.svg").read_text() or (tmp_path / "gpu.svg").stat().st_size > 3000
