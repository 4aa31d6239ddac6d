"""A full disk and a killed writer: the older checkpoints stay whole, the new one is whole or not there."""

import errno
import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError

import dsv4.checkpoint.training as home
from dsv4.checkpoint.training import list_checkpoints, load_checkpoint, save_checkpoint
from dsv4.model.transformer import Transformer
from dsv4.testing.toys import flash_like


def save(directory, step, model, keep=2, **state):
    return save_checkpoint(directory, step, model, {"momentum": torch.full((3, 7), step)}, state, keep=keep)


def steps(directory):
    return [checkpoint.step for checkpoint in list_checkpoints(directory)]


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def contents(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


# A full disk


def test_too_little_room_is_found_before_anything_is_written(run, model, monkeypatch):
    before = contents(run)
    tensors, state = {"moments": torch.zeros(1234, 567, dtype=torch.float64)}, {"text": "x" * 2**21}
    monkeypatch.setattr(home.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    monkeypatch.setattr(home, "save_model", lambda *args: pytest.fail("written"))
    with pytest.raises(OSError, match=r"the disk has 1000 bytes free; expected at least \d+ for checkpoint") as error:
        save_checkpoint(run, 130, model, tensors, state, keep=2)
    assert error.value.errno == errno.ENOSPC
    assert error.value.filename == str(run / "step-00000130")
    assert contents(run) == before
    monkeypatch.undo()
    path = save_checkpoint(run, 130, model, tensors, state, keep=2)
    needed = int(str(error.value).split("at least ")[1].split()[0])
    written = sum(len(data) for data in contents(path).values())
    assert written <= needed < written + 2**20 + 2**18


def test_just_enough_room(run, model, monkeypatch):
    needed = []
    monkeypatch.setattr(home.shutil, "disk_usage", lambda path: SimpleNamespace(free=needed[-1] if needed else 0))
    with pytest.raises(OSError, match="expected at least") as error:
        save(run, 130, model)
    needed.append(int(str(error.value).split("at least ")[1].split()[0]))
    save(run, 130, model)
    needed.append(needed[-1] - 1)
    with pytest.raises(OSError, match="expected at least"):
        save(run, 140, model)


FULL = "Error while serializing: I/O error: No space left on device (os error 28)"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), SafetensorError(FULL)], ids=repr)
@pytest.mark.parametrize("what", ["save_model", "save_file", "write_manifest"])
def test_a_disk_that_becomes_full(run, model, monkeypatch, what, error):
    before = contents(run)
    write = getattr(home, what)

    def fail(*args):
        write(*args)
        raise error

    monkeypatch.setattr(home, what, fail)
    with pytest.raises(OSError, match=r"the disk is full; expected at least \d{7} bytes free for checkpoint") as raised:
        save(run, 130, model, keep=1)
    assert raised.value.errno == errno.ENOSPC
    assert raised.value.filename == str(run / "step-00000130")
    assert raised.value.__cause__ is error
    assert contents(run) == before
    assert names(run) == ["step-00000100", "step-00000120"]
    monkeypatch.undo()
    load_checkpoint(save(run, 130, model), model)


def test_other_errors_stay_what_they_are(run, model, monkeypatch):
    def fail(*args):
        raise OSError(errno.EIO, "the disk is broken")

    monkeypatch.setattr(home, "save_file", fail)
    with pytest.raises(OSError, match="the disk is broken"):
        save(run, 130, model)
    monkeypatch.undo()
    one = torch.zeros(5)
    with pytest.raises(RuntimeError, match="share memory"):
        save_checkpoint(run, 130, model, {"one": one, "other": one}, {}, keep=2)
    assert names(run) == ["step-00000100", "step-00000120"]


# Kills


def test_everything_is_on_the_disk_before_it_has_its_name(model, tmp_path, monkeypatch):
    save(tmp_path, 1, model, keep=1)
    synced, events = set(), []
    fsync, rename = os.fsync, Path.rename

    def note_sync(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        events.append(("sync", os.fstat(descriptor).st_ino))
        fsync(descriptor)

    def note_rename(path, target):
        events.append((path.name, Path(target).name))
        inside = [path, *path.rglob("*")]
        if path.name == ".step-00000002.partial":
            assert len(inside) == 17
            assert {entry.stat().st_ino for entry in inside} <= synced
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "rename", note_rename)
    save(tmp_path, 2, model, keep=1)
    assert events[-3:] == [
        (".step-00000002.partial", "step-00000002"),
        ("sync", tmp_path.stat().st_ino),
        ("step-00000001", ".step-00000001.partial"),
    ]


WRITER = '''
"""Save checkpoints of the toy in a forked child: one, dying at an event of the interpreter, or one after another."""
import os, signal, sys
from dataclasses import replace
from pathlib import Path

import torch
from dsv4.checkpoint.training import list_checkpoints, save_checkpoint
from dsv4.testing.toys import flash_like, toy_model

config = flash_like()
moe = replace(config.moe, num_hash_layers=1)
model = toy_model(replace(config, layer_kinds=("window", "csa"), mtp_kinds=(), moe=moe))
directory = Path(sys.argv[1])
EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.listdir")


def die_at(number):
    left = [number]

    def hook(event, args):
        if event in EVENTS:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


@torch.no_grad()
def save():
    step = max([checkpoint.step for checkpoint in list_checkpoints(directory)], default=0) + 1
    for parameter in model.parameters():
        parameter.fill_(step)
    save_checkpoint(directory, step, model, {"moment": torch.full((300, 70), step)}, {"step": step}, keep=2)
    print("saved", step, flush=True)


torch.set_num_threads(1)
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        if line.strip() == "loop":
            while True:
                save()
        die_at(int(line))
        save()
        os._exit(0)
    print("child", child, flush=True)
    print("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
'''


@pytest.fixture
def writer(tmp_path):
    """A process that forks savers, and the folder they save to."""
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.stdin.close()


def ask(process, line):
    process.stdin.write(f"{line}\n")
    process.stdin.flush()
    return int(answer(process, "child"))


def answer(process, word):
    found, value = process.stdout.readline().split()
    assert found == word
    return int(value)


def assert_all_whole(directory):
    """Every checkpoint that has a name loads, and is of one step throughout."""
    config = flash_like()
    moe = replace(config.moe, num_hash_layers=1)
    model = Transformer(replace(config, layer_kinds=("window", "csa"), mtp_kinds=(), moe=moe))
    for checkpoint in list_checkpoints(directory):
        tensors, state = load_checkpoint(checkpoint.path, model)
        assert state == {"step": checkpoint.step}
        assert torch.equal(tensors["moment"], torch.full((300, 70), checkpoint.step))
        assert all((parameter == checkpoint.step).all() for parameter in model.parameters())


def test_kill_at_any_moment(writer, tmp_path):
    chance = random.Random(11)
    for _ in range(12):
        child = ask(writer, "loop")
        last = [answer(writer, "saved") for _ in range(chance.randint(1, 4))][-1]
        time.sleep(chance.uniform(0, 0.03))
        os.kill(child, 9)
        while (line := writer.stdout.readline().split())[0] == "saved":
            last = int(line[1])
        assert line == ["ended", "-9"]
        found = steps(tmp_path)
        assert found[-1] in (last, last + 1)
        assert last in found
        assert len(found) >= min(2, last)
        assert_all_whole(tmp_path)


def test_kill_at_every_event(writer, tmp_path):
    """At each file opened, renamed or removed in turn, until a save comes to its end."""
    for number in range(1, 1000):
        before = steps(tmp_path)
        ask(writer, number)
        line = writer.stdout.readline().split()
        if line[0] == "saved":
            line = writer.stdout.readline().split()
        found = steps(tmp_path)
        new = max(before, default=0) + 1
        assert set(before[-1:]) <= set(found) <= {*before, new}
        assert len(found) >= min(2, len(before))
        assert_all_whole(tmp_path)
        if line == ["ended", "0"]:
            break
        assert line == ["ended", "-9"]
    assert number > 40
    assert names(tmp_path) == [f"step-{step:08d}" for step in (new - 1, new)]
