"""A full disk: under the prefix folder answers are as ever, and under the log nothing is shown that is not in it."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dsv4
from dsv4.config.engine import PrefixLimits
from dsv4.config.sampling import Sampling
from dsv4.engine.engine import Engine
from dsv4.engine.log import recover

ROOT = Path(dsv4.__file__).parents[1]
PROMPTS = [[0, 3, 4], [0, *([5, 9, 2] * 90)], [0, 7, 7, 2]]
SAMPLING = Sampling(max_tokens=20, seed=3, ignore_eos=True)


@pytest.fixture
def whole(tiny, small):
    return [completion.token_ids for completion in Engine(tiny, small()).generate(PROMPTS, SAMPLING)]


class Disk:
    """Writes that fail while it is full."""

    def __init__(self, monkeypatch):
        self.is_full, self._real = False, {name: getattr(os, name) for name in ("write", "writev")}
        for name in self._real:
            monkeypatch.setattr(os, name, lambda *arguments, name=name: self._write(name, *arguments))

    def _write(self, name, *arguments):
        if self.is_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self._real[name](*arguments)


@pytest.fixture
def disk(monkeypatch):
    return Disk(monkeypatch)


@pytest.mark.parametrize("policy", ["full", "zero"])
def test_under_the_folder_it_is_a_warning(tiny, small, whole, disk, tmp_path, caplog, policy):
    limits = small(prefix=PrefixLimits(folder=str(tmp_path), policy=policy))
    with Engine(tiny, limits) as engine:
        disk.is_full = True
        found = engine.generate(PROMPTS, SAMPLING)
        assert [c.token_ids for c in found] == whole
        (record,) = caplog.records
        assert "prefix is not cached" in record.getMessage()
        assert "No space left on device" in record.getMessage()
        assert engine.folder.store.statistics().failed == (4 if policy == "full" else 2)
        assert list(tmp_path.glob("*.prefix")) == list(tmp_path.glob(".*.partial")) == []
        assert engine.pool.num_free == engine.pool.num_pages
        disk.is_full = False
        engine.generate([[0, *([6, 9, 2] * 90)]], SAMPLING)
        assert list(tmp_path.glob("*.prefix"))  # it is tried again
    with Engine(tiny, limits) as engine:
        found = engine.generate([[0, *([6, 9, 2] * 90)]], SAMPLING)
        assert found[0].num_cached == 256


def failure(engine):
    """What a step fails with; None for one that has nothing to log."""
    try:
        pieces = engine.step()
    except OSError as error:
        return error
    assert pieces == []
    return None


def test_under_the_log_nothing_is_shown_and_nothing_is_lost(tiny, small, whole, disk, tmp_path):
    """A step says so, as often as it is asked; once there is room it gives what it had to give, and goes on."""
    path = tmp_path / "log"
    with Engine(tiny, small(log=str(path), step_tokens=64)) as engine:
        ids = [engine.add(prompt, SAMPLING) for prompt in PROMPTS]
        shown = {id: [] for id in ids}
        num_failed = 0
        while not engine.is_idle:
            disk.is_full = True
            errors = [error for error in (failure(engine), failure(engine)) if error is not None]
            assert [(error.errno, error.filename) for error in errors] == [(errno.ENOSPC, str(path))] * len(errors)
            assert all("it is as after the last commit" in str(error) for error in errors)
            num_failed += len(errors)
            assert {one.id: one.output_ids for one in recover(path)} == shown
            disk.is_full = False
            for piece in engine.step():
                shown[piece.id] += piece.token_ids
            assert {one.id: one.output_ids for one in recover(path)} == shown
        assert num_failed > 30
        assert list(shown.values()) == whole
        assert [engine.take(id).token_ids for id in ids] == whole
    assert recover(path) == []


def test_a_request_cancelled_after_a_step_that_failed_gives_nothing_after_its_end(tiny, small, disk, tmp_path):
    path = tmp_path / "log"
    with Engine(tiny, small(log=str(path))) as engine:
        first, second = (engine.add(prompt, SAMPLING) for prompt in (PROMPTS[0], PROMPTS[2]))
        engine.step()
        disk.is_full = True
        assert failure(engine) is not None
        with pytest.raises(OSError, match="the log cannot be written"):
            engine.cancel(first)
        disk.is_full = False
        assert [piece.id for piece in engine.step()] == [second]
        assert engine.take(first).finish == "cancelled"
    assert [one.id for one in recover(path)] == [second]


def test_a_request_that_cannot_be_logged_is_not_taken_on(tiny, small, whole, disk, tmp_path):
    path = tmp_path / "log"
    with Engine(tiny, small(log=str(path))) as engine:
        first = engine.add(PROMPTS[0], SAMPLING)
        disk.is_full = True
        for call in (engine.add, lambda prompt, sampling: engine.generate([prompt, prompt], sampling)):
            with pytest.raises(OSError, match="the log cannot be written"):
                call(PROMPTS[1], SAMPLING)
        assert [r.id for r in engine.scheduler.waiting] == [first]
        disk.is_full = False
        while not engine.is_idle:
            engine.step()
        assert engine.take(first).token_ids == whole[0]
        assert engine.generate(PROMPTS[1:2], SAMPLING)[0].token_ids == whole[1]
    assert recover(path) == []


def test_closed_on_a_full_disk_it_goes_on_later(tiny, small, whole, disk, tmp_path):
    """From what was shown: the step that could not be logged is run again."""
    limits, shown = small(log=str(tmp_path / "log")), {}
    with Engine(tiny, limits) as engine:
        ids = [engine.add(prompt, SAMPLING) for prompt in PROMPTS]
        for _ in range(6):
            for piece in engine.step():
                shown.setdefault(piece.id, []).extend(piece.token_ids)
        disk.is_full = True
        with pytest.raises(OSError, match="the log cannot be written"):
            engine.step()
    disk.is_full = False
    with Engine(tiny, limits) as engine:
        assert engine.resume() == ids
        assert {id: engine.completion(id).token_ids for id in ids} == shown
        while not engine.is_idle:
            engine.step()
        assert [engine.take(id).token_ids for id in ids] == whole


def test_generating_many_fails_with_the_reason_and_the_log_has_them(tiny, small, whole, disk, tmp_path):
    limits = small(log=str(tmp_path / "log"))
    with Engine(tiny, limits) as engine:
        run, left = engine.runner.run, iter(range(9))

        def fill(*arguments):
            disk.is_full = next(left, None) is None
            return run(*arguments)

        engine.runner.run = fill
        with pytest.raises(OSError, match="the log cannot be written"):
            engine.generate(PROMPTS, SAMPLING)
        disk.is_full = False
    with Engine(tiny, limits) as engine:
        ids = engine.resume()
        while not engine.is_idle:
            engine.step()
        assert [engine.take(id).token_ids for id in ids] == whole


LIMITED = """
import resource, sys
import dsv4
from dsv4.config.engine import Limits
from dsv4.config.sampling import Sampling
from dsv4.engine.engine import Engine

model = dsv4.load_model(sys.argv[1])
with Engine(model, Limits(cache_bytes=2**21, log=sys.argv[2])) as engine:
    engine.add([0, 3, 4], Sampling(max_tokens=400, seed=3, ignore_eos=True))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    while True:
        for piece in engine.step():
            print(*piece.token_ids, flush=True)
"""


def test_a_log_that_the_system_stops_in_the_middle_of_a_line(tiny_saved, tmp_path):
    """What was printed before is what the log has, and the command that was refused names the log."""
    path = tmp_path / "log"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tiny_saved), str(path)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert f"OSError: [Errno {errno.EFBIG}] the log cannot be written (File too large)" in result.stderr
    assert str(path) in result.stderr
    (one,) = recover(path)
    assert one.output_ids == [int(token) for token in result.stdout.split()]
    assert len(one.output_ids) > 5
