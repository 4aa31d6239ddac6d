"""Checkpoints written as a stream: readable files, the same bytes after any interruption, nothing half written."""

import errno
import fcntl
import json
import os
import weakref
import zlib
from dataclasses import replace
from itertools import groupby

import pytest
import torch
from safetensors import safe_open

import dsv4
from dsv4.accounting.tensors import inventory, num_shards, shard_name, total_bytes
from dsv4.checkpoint.manifest import Entry
from dsv4.checkpoint.stream import PROGRESS, _is, write_stream
from dsv4.checkpoint.tensor_file import DTYPES
from dsv4.config.load import load_config
from dsv4.model.transformer import Transformer
from dsv4.testing.toys import flash_like

INDEX = "model.safetensors.index.json"
TOY = flash_like()
CONFIG = replace(
    TOY,
    hidden_size=64,
    layer_kinds=("window", "csa", "hca"),
    moe=replace(TOY.moe, num_experts=3, experts_per_token=2, expert_dim=96, num_hash_layers=1),
    storage="fp4",
)
SHARDS = {n: list(members) for n, members in groupby(inventory(CONFIG), key=lambda spec: spec.shard)}
NAMES = [shard_name(n, len(SHARDS)) for n in SHARDS]
FILES = {"tokenizer.json": b"{}", "encoding/tests/one.txt": b"one"}


def tensor_of(spec):
    """Bytes that hang on the name alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(spec.name.encode()))
    flat = torch.randint(0, 100, (spec.num_bytes,), dtype=torch.uint8, generator=generator)
    return flat.view(DTYPES[spec.dtype]).view(spec.shape)


class Make:
    """Gives every tensor. asked: the files so far. at: (file, tensor), where it fails."""

    def __init__(self, at=None, error=None):
        self.asked, self.at, self.error = [], at, error or RuntimeError("stopped here")

    def __call__(self, specs):
        self.asked.append(specs[0].shard)
        for number, spec in enumerate(specs):
            if (spec.shard, number) == self.at:
                raise self.error
            yield spec, tensor_of(spec)


def write(directory, make=None, key="toy", config=CONFIG, **options):
    make = make or Make()
    write_stream(directory, config, make, key=key, files=FILES, **options)
    return make


def content(directory):
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole") / "toy"
    write(directory)
    return directory


@pytest.fixture
def cut_off(tmp_path):
    """Where a write stopped in the third file: its folder beside the target."""
    with pytest.raises(RuntimeError, match="stopped here"):
        write(tmp_path / "toy", Make(at=(3, 5)))
    return tmp_path / ".toy.partial"


# What is written


def test_a_reader_finds_every_tensor(whole):
    found = {}
    for n, name in enumerate(NAMES, start=1):
        with safe_open(whole / name, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            for tensor in file.keys():  # noqa: SIM118 - not a dict
                found[tensor] = file.get_tensor(tensor)
            assert {spec.name for spec in SHARDS[n]} == set(file.keys())
    for spec in inventory(CONFIG):
        got, wanted = found[spec.name], tensor_of(spec)
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype), spec.name
        assert torch.equal(got.view(torch.uint8), wanted.view(torch.uint8)), spec.name


def test_every_dtype_is_among_them():
    assert {spec.dtype for spec in inventory(CONFIG)} == set(DTYPES)


def test_tensors_lie_in_the_order_of_the_inventory(whole):
    data = (whole / NAMES[2]).read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    header = json.loads(data[8 : 8 + length])
    assert list(header) == ["__metadata__", *(spec.name for spec in SHARDS[3])]
    end = 0
    for spec in SHARDS[3]:
        begin, end = end, end + spec.num_bytes
        assert header[spec.name]["data_offsets"] == [begin, end]
    assert len(data) == 8 + length + end


def test_the_other_files(whole):
    assert sorted(content(whole)) == sorted([*NAMES, INDEX, "config.json", *FILES])
    assert load_config(whole) == CONFIG
    assert (whole / "encoding/tests/one.txt").read_bytes() == b"one"


def test_index_and_config_are_those_of_a_saved_model(tmp_path):
    model = Transformer(replace(CONFIG, storage="bfloat16"), weight_dtype=torch.bfloat16)
    dsv4.save_model(model, tmp_path / "saved")
    write(tmp_path / "streamed", config=replace(CONFIG, storage="bfloat16"))
    for name in (INDEX, "config.json"):
        assert (tmp_path / "streamed" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()


def test_bytes_and_strided_tensors_are_as_good(whole, tmp_path):
    def make(specs):
        for spec in specs:
            tensor = tensor_of(spec)
            if spec.dtype in ("I8", "F8_E4M3", "F8_E8M0"):
                yield spec, tensor.view(torch.uint8)
            elif tensor.dim() == 2:
                yield spec, tensor.T.contiguous().T
            else:
                yield spec, tensor

    write(tmp_path / "toy", make)
    assert content(tmp_path / "toy") == content(whole)


def test_repeated_runs_give_the_same_bytes(whole, tmp_path):
    write(tmp_path / "again")
    assert content(tmp_path / "again") == content(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again"]


def test_what_was_written_is_not_held(tmp_path):
    alive, most = weakref.WeakSet(), 0

    def make(specs):
        nonlocal most
        for spec in specs:
            tensor = tensor_of(spec)
            alive.add(tensor)
            most = max(most, len(alive))
            yield spec, tensor
            del tensor

    write(tmp_path / "toy", make)
    assert most <= 2  # one is made while the one before it waits to be let go


def test_progress_is_told_to_the_last_byte(tmp_path):
    told = []
    write(tmp_path / "toy", tell=lambda done, total: told.append((done, total)))
    total = total_bytes(inventory(CONFIG))
    assert told[-1] == (total, total)
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert len(told) == len(inventory(CONFIG))


# Interrupted


def test_nothing_of_a_write_that_stopped_looks_like_a_checkpoint(cut_off):
    assert sorted(path.name for path in cut_off.iterdir()) == sorted([*NAMES[:2], PROGRESS])
    assert [path.name for path in cut_off.parent.iterdir()] == [cut_off.name]
    with pytest.raises(ValueError, match=r"expected one that holds a config\.json"):
        dsv4.load_model(cut_off)


def test_whole_files_are_kept(cut_off, whole):
    stamps = {name: (cut_off / name).stat().st_mtime_ns for name in NAMES[:2]}
    told = []
    make = write(cut_off.parent / "toy", tell=lambda done, total: told.append(done))
    assert make.asked == list(SHARDS)[2:]
    assert told[0] == total_bytes(SHARDS[1])
    assert told[1] == total_bytes(SHARDS[1] + SHARDS[2])
    target = cut_off.parent / "toy"
    assert {name: (target / name).stat().st_mtime_ns for name in stamps} == stamps
    assert content(target) == content(whole)
    assert not cut_off.exists()


@pytest.mark.parametrize(
    "change", [{"key": "other"}, {"config": replace(CONFIG, norm_eps=1e-5)}], ids=["key", "config"]
)
def test_another_key_or_config_starts_again(cut_off, change):
    make = write(cut_off.parent / "toy", **change)
    assert make.asked == list(SHARDS)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"format": 1}', b"\xff", None], ids=repr)
def test_progress_that_cannot_be_read_starts_again(cut_off, whole, text):
    (cut_off / PROGRESS).unlink() if text is None else (cut_off / PROGRESS).write_bytes(text)
    assert write(cut_off.parent / "toy").asked == list(SHARDS)
    assert content(cut_off.parent / "toy") == content(whole)


@pytest.mark.parametrize("damage", ["changed", "shorter", "gone"])
def test_a_file_that_differs_is_made_again(cut_off, whole, damage):
    path = cut_off / NAMES[1]
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(data[:-1] if damage == "shorter" else data[:-1] + bytes([data[-1] ^ 1]))
    assert write(cut_off.parent / "toy").asked == [2, *list(SHARDS)[2:]]
    assert content(cut_off.parent / "toy") == content(whole)


def test_what_a_killed_process_left_is_removed(cut_off, whole):
    for name in (f".{NAMES[2]}.partial", f".{PROGRESS}.17.partial", NAMES[3], INDEX, "config.json"):
        (cut_off / name).write_bytes(b"half")
    (cut_off / "encoding").mkdir()
    (cut_off / "encoding" / ".one.txt.17.partial").write_bytes(b"half")
    assert write(cut_off.parent / "toy").asked == list(SHARDS)[2:]
    assert content(cut_off.parent / "toy") == content(whole)


def test_two_processes_do_not_write_at_once(cut_off):
    before = content(cut_off)
    descriptor = os.open(cut_off, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    make = Make()
    with pytest.raises(ValueError, match="is being written by another process; expected one at a time"):
        write(cut_off.parent / "toy", make)
    os.close(descriptor)
    assert make.asked == []
    assert content(cut_off) == before
    write(cut_off.parent / "toy")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_disk_that_is_full_in_the_third_file(tmp_path, whole):
    partial = tmp_path / ".toy.partial"
    first_two = total_bytes(SHARDS[1] + SHARDS[2])

    def fill(done, total):
        if done == first_two:  # the next file is opened after this
            (partial / f".{NAMES[2]}.partial").symlink_to("/dev/full")

    with pytest.raises(OSError) as caught:
        write(tmp_path / "toy", tell=fill)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(partial / NAMES[2])
    assert "the disk is full" in str(caught.value)
    assert sorted(content(partial)) == sorted([*NAMES[:2], PROGRESS])
    assert write(tmp_path / "toy").asked == list(SHARDS)[2:]
    assert content(tmp_path / "toy") == content(whole)


@pytest.mark.parametrize("full", [NAMES[2], "tokenizer.json", INDEX, "config.json"])
def test_a_disk_that_is_full_when_bytes_are_flushed(tmp_path, whole, monkeypatch, full):
    flush = os.fsync

    def fsync(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if os.path.basename(path).removeprefix(".").startswith(full):
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError) as caught:
        write(tmp_path / "toy")
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path / ".toy.partial" / full)
    assert not (tmp_path / "toy").exists()
    monkeypatch.undo()
    assert write(tmp_path / "toy").asked == (list(SHARDS)[2:] if full == NAMES[2] else [])
    assert content(tmp_path / "toy") == content(whole)


def test_another_error_of_the_system_stays_what_it_is(tmp_path):
    with pytest.raises(PermissionError, match=r"no$"):
        write(tmp_path / "toy", Make(at=(2, 3), error=PermissionError(errno.EACCES, "no")))


# Refused


@pytest.mark.parametrize("name", ["toy", "toy/notes.txt"])
def test_a_directory_in_use(tmp_path, name):
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "notes.txt").write_text("mine")
    make = Make()
    with pytest.raises(ValueError, match="exists and is not empty; expected a new or empty one"):
        write(tmp_path / name, make)
    assert make.asked == []
    assert [path.name for path in tmp_path.rglob("*")] == ["toy", "notes.txt"]


def test_an_empty_directory_may_be_there(tmp_path, whole):
    (tmp_path / "toy").mkdir()
    write(tmp_path / "toy")
    assert content(tmp_path / "toy") == content(whole)


def test_a_parent_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="does not exist; expected an existing parent"):
        write(tmp_path / "no" / "toy")
    assert not list(tmp_path.iterdir())


def test_a_disk_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "toy")
    with pytest.raises(ValueError, match="where a disk is mounted; expected a directory inside it"):
        write(tmp_path / "toy")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["../one", "/one", "", "a/../b", "config.json", INDEX, PROGRESS, NAMES[0]])
def test_a_file_that_is_not_one_of_the_others(tmp_path, name):
    with pytest.raises(ValueError, match=r"files holds .* expected paths inside the directory"):
        write_stream(tmp_path / "toy", CONFIG, Make(), key="toy", files={name: b""})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda made: made[:-1], "make gives nothing; expected embed.weight"),
        (lambda made: made * 2, "make gives embed.weight; expected no more tensors in its file"),
        (
            lambda made: [(replace(made[0][0], name="head.weight"), made[0][1])],
            "make gives head.weight; expected embed.weight",
        ),
        (
            lambda made: [(made[0][0], made[0][1].T)],
            "embed.weight is made with shape [64, 101]; expected [101, 64]",
        ),
        (
            lambda made: [(made[0][0], made[0][1].half())],
            "embed.weight is made with dtype torch.float16; expected torch.bfloat16",
        ),
        (
            lambda made: [(made[0][0], made[0][1].view(torch.uint8))],
            "embed.weight is made with shape [101, 128]; expected [101, 64]",
        ),
    ],
    ids=["too few", "too many", "another", "shape", "dtype", "bytes"],
)
def test_a_tensor_that_is_not_what_was_asked_for(tmp_path, change, message):
    with pytest.raises(ValueError) as caught:
        write(tmp_path / "toy", lambda specs: iter(change([(spec, tensor_of(spec)) for spec in specs])))
    assert str(caught.value) == message
    assert sorted(content(tmp_path)) == [f".toy.partial/{PROGRESS}"]


def test_a_file_is_what_its_note_says(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    entry = Entry(num_bytes=3, sha256="ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
    assert _is(path, entry)
    assert not _is(path, replace(entry, num_bytes=4))
    assert not _is(tmp_path / "no", entry)


def test_there_are_as_many_files_as_the_config_has():
    assert len(SHARDS) == num_shards(CONFIG) == 6
