"""The prefix cache on the disk: the same bytes or a miss, within its limit, whoever else uses the folder."""

import errno
import os
import random
import re
import stat
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from dsv4.engine.disk import DiskStore
from dsv4.engine.folder import LOCK
from dsv4.engine.prefix_file import HEADER_BYTES
from dsv4.engine.uses import Uses
from tests.processes import started

KEY = sha256(b"model, tokenizer, format").digest()
LARGE = 2**30
FILE_BYTES = HEADER_BYTES + 1000


def digest(number):
    return sha256(b"content %d" % number).digest()


def content(number, num_bytes=1000):
    return random.Random(number).randbytes(num_bytes)


def put(store, number, depth_tokens=128, kind="entries", num_bytes=1000):
    """Store a file of ``HEADER_BYTES`` and ``num_bytes`` whose bytes follow from its number."""
    return store.put(digest(number), kind, [content(number, num_bytes)], depth_tokens)


def holds(store, numbers, kind="entries"):
    return [number for number in numbers if store.contains(digest(number), kind)]


def files(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != LOCK)


def only_file(folder):
    (name,) = files(folder)
    return folder / name


def counted_bytes(folder):
    return int.from_bytes((folder / LOCK).read_bytes(), "little")


def assert_accounts(folder, max_bytes):
    """What the lock file says is what is there, and within the limit."""
    total = sum((folder / name).stat().st_size for name in files(folder))
    assert counted_bytes(folder) == total <= max_bytes


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "prefixes"


@pytest.fixture
def store(folder):
    return DiskStore(folder, KEY, LARGE)


# Round trips


def test_what_was_put_comes_back_also_to_another_process_run(store, folder):
    parts = [
        b"abc",
        bytearray(b""),
        memoryview(np.arange(35, dtype=np.uint8).reshape(5, 7)[1:3]),
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.zeros((0, 4), np.uint8),
        b"z" * 100_000,
    ]
    whole = b"".join(np.asarray(part).tobytes() if isinstance(part, np.ndarray) else bytes(part) for part in parts)
    assert store.get(digest(1), "entries") is None
    assert store.put(digest(1), "entries", parts, 256)
    for reader in (store, DiskStore(str(folder), KEY, LARGE)):
        payload = reader.get(digest(1), "entries")
        assert payload == whole
        assert not payload.readonly
        assert reader.get(digest(1), "state") is None
        assert reader.get(digest(2), "entries") is None
        assert reader.contains(digest(1), "entries")
        assert not reader.contains(digest(1), "state")


def test_many_buffers_are_written_in_their_order(store):
    parts = [bytes([i % 251]) * (i % 5) for i in range(3000)]
    assert store.put(digest(1), "state", parts, 0)
    assert store.get(digest(1), "state") == b"".join(parts)


def test_an_empty_payload_is_not_a_miss(store):
    assert store.put(digest(1), "state", [], 0)
    assert store.get(digest(1), "state") == b""


def test_a_payload_is_memory_of_its_own(store, folder):
    put(store, 1)
    first, second = store.get(digest(1), "entries"), store.get(digest(1), "entries")
    first[0] ^= 255
    assert second == content(1) == store.get(digest(1), "entries")
    only_file(folder).unlink()
    assert second == content(1)


@pytest.mark.parametrize("step", [1, 7, 300])
def test_short_writes_and_reads(store, monkeypatch, step):
    """A system may write or read less than it was asked for."""
    writev, preadv = os.writev, os.preadv
    monkeypatch.setattr(os, "writev", lambda d, views: writev(d, [bytes(b"".join(views)[:step])]))
    monkeypatch.setattr(os, "preadv", lambda d, views, offset: preadv(d, [views[0][:step]], offset))
    parts = [content(1, 5), content(2, 300), content(3, 1)]
    assert store.put(digest(1), "entries", parts, 128)
    assert store.get(digest(1), "entries") == b"".join(parts)


def test_both_kinds_and_several_keys_share_a_folder(store, folder):
    other = DiskStore(folder, KEY[::-1], LARGE)
    put(store, 1)
    assert not other.contains(digest(1), "entries")
    assert other.put(digest(1), "entries", [b"other"], 128)
    assert store.put(digest(1), "state", [b"state"], 128)
    assert store.get(digest(1), "entries") == content(1)
    assert store.get(digest(1), "state") == b"state"
    assert other.get(digest(1), "entries") == b"other"
    assert store.statistics().num_files == other.statistics().num_files == 3


def test_statistics(store, folder):
    put(store, 1)
    put(store, 1)  # is there: not written again
    put(store, 2, num_bytes=50)
    store.get(digest(1), "entries")
    store.get(digest(1), "entries")
    store.get(digest(3), "entries")
    store.contains(digest(4), "entries")
    found = store.statistics()
    assert (found.hits, found.misses, found.wrong_files) == (2, 1, 0)
    assert found.bytes_written == found.bytes_held == 1050 + 2 * HEADER_BYTES
    assert found.bytes_read == 2 * (1000 + HEADER_BYTES)
    assert found.num_files == 2
    (folder / "notes.txt").write_text("not counted")
    again = DiskStore(folder, KEY, LARGE).statistics()
    assert (again.num_files, again.bytes_held, again.bytes_written) == (2, found.bytes_held, 0)


def test_a_written_file_has_its_name_only_when_it_is_whole(store, folder, monkeypatch):
    writev, seen = os.writev, []

    def note(descriptor, views):
        seen.append(files(folder))
        return writev(descriptor, views)

    monkeypatch.setattr(os, "writev", note)
    put(store, 1)
    pattern = rf"\.{re.escape(only_file(folder).name)}\.{os.getpid()}\.\d+\.partial"
    assert [bool(re.fullmatch(pattern, *names)) for names in seen] == [True]


def test_fsync_brings_the_file_and_then_its_name_to_the_disk(folder, monkeypatch):
    synced, fsync = [], os.fsync

    def note(descriptor):
        fsync(descriptor)
        synced.append(os.fstat(descriptor))

    monkeypatch.setattr(os, "fsync", note)
    put(DiskStore(folder, KEY, LARGE), 1)
    assert synced == []
    put(DiskStore(folder, KEY, LARGE, fsync=True), 2)
    assert [stat.S_ISDIR(found.st_mode) for found in synced] == [False, True]
    assert synced[0].st_size == HEADER_BYTES + 1000
    assert synced[1].st_ino == folder.stat().st_ino


# A caller's mistakes


def test_refusals(folder, tmp_path):
    store = DiskStore(folder, KEY, LARGE)
    for key in (b"", bytes(65)):
        with pytest.raises(ValueError, match=f"key has {len(key)} bytes; expected 1 to 64"):
            DiskStore(folder, key, LARGE)
        with pytest.raises(ValueError, match=f"content_hash has {len(key)} bytes; expected 1 to 64"):
            store.get(key, "entries")
    with pytest.raises(ValueError, match="max_bytes is 0; expected at least 1"):
        DiskStore(folder, KEY, 0)
    with pytest.raises(ValueError, match="kind is 'ring'; expected one of"):
        store.put(digest(1), "ring", [b""], 0)
    with pytest.raises(ValueError, match="depth_tokens is -1; expected 0 or more"):
        store.put(digest(1), "state", [b""], -1)
    with pytest.raises(ValueError, match=r"payload\[1\] has strides \(10,\); expected a contiguous buffer"):
        store.put(digest(1), "state", [b"", np.zeros((4, 10), np.uint8)[:, 0]], 0)
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=r"folder is .*file.*; expected a folder"):
            DiskStore(place, KEY, LARGE)
    assert store.statistics().num_files == 0


@pytest.mark.parametrize("size", [1, 63, 64])
def test_digests_of_any_size_are_kept_apart(tmp_path, size):
    store = DiskStore(tmp_path, bytes(size), LARGE)
    for first in (0, 1):
        assert store.put(bytes([first]) + bytes(size - 1), "entries", [bytes([first])], 128)
    assert store.put(bytes(1), "state", [b"one"], 128)
    for first in (0, 1):
        assert store.get(bytes([first]) + bytes(size - 1), "entries") == bytes([first])


# Wrong files


def assert_miss(store, path, caplog, reason, *, is_removed, number=1):
    """Looking a spoilt file up is a miss and one warning that names it, and putting it again repairs it."""
    before = store.statistics()
    caplog.clear()
    assert store.get(digest(number), "entries") is None
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert str(path) in record.getMessage()
    assert re.search(reason, record.getMessage()), record.getMessage()
    assert path.exists() is not is_removed
    after = store.statistics()
    assert (after.misses - before.misses, after.wrong_files - before.wrong_files) == (1, 1)
    assert put(store, number)
    assert store.get(digest(number), "entries") == content(number)
    assert len(caplog.records) == 1


def test_a_file_cut_anywhere(store, folder, caplog):
    put(store, 1)
    path = only_file(folder)
    whole = path.read_bytes()
    for end in [*range(0, HEADER_BYTES, 5), HEADER_BYTES, HEADER_BYTES + 1, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:end])
        assert_miss(store, path, caplog, f"it has {end} bytes; expected", is_removed=True)
    path.write_bytes(whole + b"\0")
    assert_miss(store, path, caplog, f"it has {len(whole) + 1} bytes; expected {len(whole)}", is_removed=True)
    assert_accounts(folder, LARGE)


def test_a_flipped_bit_anywhere(store, folder, caplog):
    put(store, 1)
    path = only_file(folder)
    whole = path.read_bytes()
    for index in [*range(HEADER_BYTES + 5), 500, 999, len(whole) - 1]:
        spoilt = bytearray(whole)
        spoilt[index] ^= 1 << index % 8
        path.write_bytes(spoilt)
        is_version = 8 <= index < 12
        reason = "payload|header|begins with" if not is_version else r"its format version is \d+; expected 1"
        assert_miss(store, path, caplog, reason, is_removed=not is_version)


def test_zeros_in_place_of_a_file(store, folder, caplog):
    """What a power failure may leave of a file that was not synced."""
    put(store, 1)
    path = only_file(folder)
    path.write_bytes(bytes(path.stat().st_size))
    assert_miss(store, path, caplog, "it begins with", is_removed=True)


def test_an_older_version(store, folder, caplog):
    put(store, 1)
    path = only_file(folder)
    whole = path.read_bytes()
    path.write_bytes(whole[:8] + b"\0\0\0\0" + b"another header" * 9)
    reason = "its format version is 0; expected 1"
    with path.open("ab") as file:
        file.write(whole)
    assert_miss(store, path, caplog, reason, is_removed=False)
    assert path.read_bytes() == whole
    assert_accounts(folder, LARGE)


def test_a_file_of_another_model(store, folder, caplog):
    other = DiskStore(folder, KEY[::-1], LARGE)
    put(other, 1)
    foreign = only_file(folder)
    put(store, 1)
    (path,) = (folder / name for name in files(folder) if name != foreign.name)
    foreign.replace(path)
    reason = f"its key is {KEY[::-1].hex()}; expected {KEY.hex()}"
    assert not store.contains(digest(1), "entries")
    assert_miss(store, path, caplog, reason, is_removed=False)


def test_a_file_of_another_hash_or_kind(store, folder, caplog):
    put(store, 2)
    second = only_file(folder)
    put(store, 1)
    (path,) = (folder / name for name in files(folder) if name != second.name)
    second.replace(path)
    assert_miss(store, path, caplog, f"its content hash is {digest(2).hex()}; expected", is_removed=False)
    path.unlink()
    put(store, 1, kind="state")
    only_file(folder).replace(path)
    assert_miss(store, path, caplog, "its kind is state; expected entries", is_removed=False)


def test_contains_warns_of_a_wrong_file_too(store, folder, caplog):
    put(store, 1)
    path = only_file(folder)
    path.write_bytes(path.read_bytes()[:-1])
    assert not store.contains(digest(1), "entries")
    assert len(caplog.records) == 1
    assert files(folder) == []


def test_put_replaces_a_wrong_file_in_silence(store, folder, caplog):
    put(store, 1)
    path = only_file(folder)
    path.write_bytes(b"short")
    assert put(store, 1)
    assert store.get(digest(1), "entries") == content(1)
    for text in (b"", bytes(FILE_BYTES)):
        path.write_bytes(text)
        assert put(store, 1)
        assert_accounts(folder, LARGE)
    assert caplog.records == []
    assert store.put(digest(1), "entries", [b"another length"], 128)
    assert store.get(digest(1), "entries") == b"another length"
    assert_accounts(folder, LARGE)


def make_link(path):
    target = path.with_name("elsewhere")
    path.rename(target)
    path.symlink_to(target)


def make_folder(path):
    path.unlink()
    path.mkdir()


def make_pipe(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("make", [make_link, make_folder, make_pipe])
def test_what_is_no_file_is_a_miss_and_left_alone(store, folder, caplog, make):
    put(store, 1)
    path = only_file(folder)
    make(path)
    mode = path.lstat().st_mode
    assert store.get(digest(1), "entries") is None
    assert len(caplog.records) == 1
    assert str(path) in caplog.text
    assert path.lstat().st_mode == mode
    assert put(store, 1) is not path.is_dir()
    assert (store.get(digest(1), "entries") == content(1)) is not path.is_dir()
    assert [name for name in files(folder) if name.endswith(".partial")] == []


@pytest.mark.parametrize(
    ("number", "is_removed"), [(errno.EIO, True), (errno.EACCES, False), (errno.EMFILE, False), (errno.ENOMEM, False)]
)
@pytest.mark.parametrize("call", ["open", "preadv"])
def test_a_file_that_cannot_be_read(store, folder, caplog, monkeypatch, call, number, is_removed):
    put(store, 1)
    path = only_file(folder)

    def fail(*args):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        assert store.get(digest(1), "entries") is None
    assert len(caplog.records) == 1
    assert str(path) in caplog.text
    assert os.strerror(number) in caplog.text
    assert path.exists() is not (is_removed and call == "preadv")
    assert put(store, 1)
    assert store.get(digest(1), "entries") == content(1)


def test_a_folder_that_went_away(store, folder, caplog):
    put(store, 1)
    only_file(folder).unlink()
    (folder / LOCK).unlink()
    folder.rmdir()
    assert store.get(digest(1), "entries") is None
    assert caplog.records == []
    assert put(store, 1) is False
    assert len(caplog.records) == 1
    folder.mkdir()
    assert put(store, 1)
    assert_accounts(folder, LARGE)


def test_a_damaged_file_that_was_replaced_meanwhile_is_kept(store, folder, monkeypatch):
    put(store, 1)
    path = only_file(folder)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"\0")
    warn = store._warn

    def replace_it(name, error):
        warn(name, error)
        path.with_name("new").write_bytes(whole)
        path.with_name("new").replace(path)

    monkeypatch.setattr(store, "_warn", replace_it)
    assert store.get(digest(1), "entries") is None
    assert store.get(digest(1), "entries") == content(1)


# A full disk


@pytest.mark.parametrize("room", [0, 100, HEADER_BYTES, 900])
def test_a_full_disk(store, folder, caplog, monkeypatch, room):
    put(store, 1)
    before = files(folder)
    left, writev = [room], os.writev

    def short(descriptor, views):
        if left[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        num_bytes = writev(descriptor, [b"".join(views)[: left[0]]])
        left[0] -= num_bytes
        return num_bytes

    with monkeypatch.context() as patch:
        patch.setattr(os, "writev", short)
        for number in (2, 3, 2):
            assert put(store, number) is False
            assert files(folder) == before
            left[0] = room
    (record,) = caplog.records  # of three failures
    assert str(folder) in record.getMessage()
    assert "No space left on device" in record.getMessage()
    assert store.statistics().failed == 3
    assert_accounts(folder, LARGE)
    assert store.get(digest(1), "entries") == content(1)
    assert put(store, 2)
    assert_accounts(folder, LARGE)
    monkeypatch.setattr(os, "writev", short)
    assert put(store, 3) is False
    assert len(caplog.records) == 2  # a new failure is said again


@pytest.mark.parametrize("call", ["ftruncate", "fsync", "pwrite"])
def test_other_steps_of_a_put_that_fail(folder, caplog, monkeypatch, call):
    store = DiskStore(folder, KEY, LARGE, fsync=True)
    put(store, 1)
    before = files(folder)
    whole = getattr(os, call)

    def fail(*args):
        monkeypatch.setattr(os, call, whole)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    assert put(store, 2) is False
    assert len(caplog.records) == 1
    assert files(folder) == before
    assert_accounts(folder, LARGE)
    assert put(store, 2)


FULL_DISK = """
import logging, sys
from pathlib import Path
from dsv4.engine.disk import DiskStore
logging.basicConfig(stream=sys.stdout, format="%(levelname)s")
folder = Path(sys.argv[1])
store = DiskStore(folder, b"key", 2**30)
put = [store.put(b"%d" % i, "entries", [bytes([i]) * 100_000], 128) for i in range(20)]
kept = [i for i in range(20) if store.get(b"%d" % i, "entries") == bytes([i]) * 100_000]
print(put.index(False), kept == list(range(put.index(False))), any(put[put.index(False):]))
print([path.name for path in folder.iterdir() if path.name.endswith(".partial")])
print(store.statistics().bytes_held == int.from_bytes((folder / ".lock").read_bytes(), "little"))
"""


def test_a_disk_that_is_really_full(tmp_path):
    mount = 'mount -t tmpfs -o size=1m none "$0" && exec "$@"'
    command = ["unshare", "-rm", "sh", "-c", mount, str(tmp_path)]
    try:
        subprocess.run([*command, "true"], check=True, capture_output=True, timeout=60)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a small disk cannot be mounted here: {error}")
    command += [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.split("\n") == ["WARNING", "10 True False", "[]", "True", ""]


# The limit


def test_the_limit_holds_at_every_moment(folder, monkeypatch):
    limit = 10 * FILE_BYTES
    store = DiskStore(folder, KEY, limit)
    writev = os.writev

    def check(descriptor, views):
        assert_accounts(folder, limit)  # the new one included, which has its length from the start
        return writev(descriptor, views)

    monkeypatch.setattr(os, "writev", check)
    chance = random.Random(3)
    for number in range(300):
        put(store, number, depth_tokens=128 * chance.randrange(5), num_bytes=chance.randrange(1500))
        assert_accounts(folder, limit)
    assert store.statistics().evicted > 100
    assert store.statistics().bytes_held > limit / 2


def test_a_file_larger_than_the_limit_is_declined(folder, caplog):
    store = DiskStore(folder, KEY, FILE_BYTES)
    assert put(store, 1)
    for number in (2, 3):
        assert put(store, number, num_bytes=1001) is False
    assert holds(store, [1]) == [1]
    (record,) = caplog.records
    assert f"would have {FILE_BYTES + 1} bytes; expected at most max_bytes = {FILE_BYTES}" in record.getMessage()
    assert store.statistics().declined == 2


def test_a_lower_limit_is_kept_from_the_start(folder):
    store = DiskStore(folder, KEY, LARGE)
    for number in range(10):
        put(store, number, depth_tokens=128 * (number + 1))
    smaller = DiskStore(folder, KEY, 4 * FILE_BYTES)
    assert holds(smaller, range(10)) == [0, 1, 2, 3]
    assert_accounts(folder, 4 * FILE_BYTES)
    assert smaller.statistics().evicted == 6


def test_a_long_prefix_keeps_its_start(folder):
    """Of a prefix that does not fit, the start stays, and no page is written to be removed."""
    store = DiskStore(folder, KEY, 16 * FILE_BYTES)
    stored = [put(store, page, depth_tokens=128 * (page + 1)) for page in range(40)]
    assert stored == [True] * 16 + [False] * 24
    assert holds(store, range(40)) == list(range(16))
    found = store.statistics()
    assert (found.evicted, found.declined, found.bytes_written) == (0, 24, 16 * FILE_BYTES)


def test_a_refused_page_costs_no_look_at_the_folder(folder, monkeypatch):
    store = DiskStore(folder, KEY, 16 * FILE_BYTES)
    for page in range(17):
        put(store, page, depth_tokens=128 * (page + 1))
    monkeypatch.setattr(store._folder, "scan", lambda: pytest.fail("looked at the folder"))
    for page in range(17, 40):
        assert put(store, page, depth_tokens=128 * (page + 1)) is False


def test_restoring_a_long_prefix_leaves_its_end_the_first_to_go(folder):
    """A restore reads from the start, which makes the start the least recently used."""
    store = DiskStore(folder, KEY, 32 * FILE_BYTES)
    for page in range(32):
        put(store, page, depth_tokens=128 * (page + 1))
    for page in range(32):
        assert store.get(digest(page), "entries")
    for number in range(100, 108):
        put(store, number, depth_tokens=0)
    kept = holds(store, range(32))
    assert kept == list(range(len(kept)))
    assert 20 <= len(kept) < 32


def test_short_and_often_used_prefixes_stay(folder):
    """A stream of long prompts, each used once, does not drive out the system prompt that all of them begin with."""
    store = DiskStore(folder, KEY, 40 * FILE_BYTES)
    system = range(4)
    for prompt in range(50):
        for page in system:
            if store.get(digest(page), "entries") is None:
                put(store, page, depth_tokens=128 * (page + 1))
        for page in range(4, 24):
            put(store, 1000 * (prompt + 1) + page, depth_tokens=128 * (page + 1))
    assert holds(store, system) == list(system)
    assert store.statistics().hits == 4 * 49
    latest = holds(store, [50_000 + page for page in range(4, 24)])
    assert latest == [50_000 + page for page in range(4, 4 + len(latest))]
    assert len(latest) > 10  # what is new gets in


def test_a_former_favourite_goes_at_last(folder):
    store = DiskStore(folder, KEY, 10 * FILE_BYTES)
    put(store, 0, depth_tokens=128)
    for _ in range(1000):
        store.get(digest(0), "entries")
    for number in range(1, 30):
        put(store, number, depth_tokens=128)
    assert holds(store, [0])
    for number in range(30, 900):
        put(store, number, depth_tokens=128)
    assert not holds(store, [0])


def test_finding_what_is_put_again_counts_as_a_use(folder):
    """A prefix found in memory is not read from the disk, only put again."""
    store = DiskStore(folder, KEY, 10 * FILE_BYTES)
    for number in range(10):
        put(store, number)
    for _ in range(3):
        put(store, 2)
    for number in range(10, 30):
        put(store, number)
    assert holds(store, range(10)) == [2]


def test_the_order_of_uses_outlives_the_process(folder):
    store = DiskStore(folder, KEY, LARGE)
    for number in range(10):
        put(store, number)
    paths = {number: next(folder.glob(f"*{digest(number).hex()}*")) for number in range(10)}
    for number, path in paths.items():
        os.utime(path, ns=(10**18, 10**18 + number * 10**9))
    store = DiskStore(folder, KEY, LARGE)
    for number in (3, 0):
        store.get(digest(number), "entries")
    assert paths[0].stat().st_mtime_ns > 10**18 + 10**11
    smaller = DiskStore(folder, KEY, 4 * FILE_BYTES)
    assert holds(smaller, range(10)) == [0, 3, 8, 9]


def test_eviction_takes_broken_files_first_and_tolerates_vanished_ones(folder, monkeypatch):
    store = DiskStore(folder, KEY, 10 * FILE_BYTES)
    for number in range(10):
        put(store, number)
    path = next(folder.glob(f"*{digest(9).hex()}*"))
    path.write_bytes(b"x" * FILE_BYTES)
    store = DiskStore(folder, KEY, 10 * FILE_BYTES)
    assert put(store, 10)
    assert not path.exists()
    assert holds(store, range(9)) == list(range(1, 9))  # and one more, so that the next needs no look at all of them
    unlink = Path.unlink

    def vanish(path, missing_ok=False):
        unlink(path)
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", vanish)
    assert all(put(store, number) for number in range(11, 14))
    assert store.statistics().evicted >= 4
    assert_accounts(folder, 10 * FILE_BYTES)


def test_files_that_others_removed_make_room(folder):
    store = DiskStore(folder, KEY, 10 * FILE_BYTES)
    for number in range(10):
        put(store, number)
    for name in files(folder)[:5]:
        (folder / name).unlink()
    for number in range(10, 15):
        assert put(store, number)
    assert store.statistics().evicted == 0
    assert_accounts(folder, 10 * FILE_BYTES)


def test_a_lock_file_that_was_removed_or_spoilt_is_written_anew(store, folder):
    put(store, 1)
    for text in (b"", b"123", b"123456789"):
        (folder / LOCK).write_bytes(text)
        put(store, 1, kind="state", num_bytes=100 + len(text))
        assert_accounts(folder, LARGE)
        assert len((folder / LOCK).read_bytes()) == 8
    (folder / LOCK).unlink()
    put(store, 2)
    assert_accounts(folder, LARGE)


# Scores


def test_scores_by_hand():
    uses = Uses({"old": 5, "new": 9, "b": 7})
    assert uses.clock == 3
    uses.refresh({"old": 5, "new": 9, "b": 7}, {"old": 0, "new": 64, "b": 320}.__getitem__)
    assert [uses.score(name) for name in ("old", "b", "new")] == [2 + 0, 1 + 10, 0 + 2]
    uses.clock += 10
    uses.add_hit("b", 100, 320)
    uses.add_new("c", 101, 96)
    uses.clock += 4
    assert [uses.score(name) for name in ("old", "b", "new", "c")] == [16, (4 + 10) / 2, 16, 4 + 3]
    assert uses.new_score(96) == 3
    for _ in range(100):
        uses.add_hit("b", 102, 320)
    assert uses.score("b") == 10 / 65


def test_what_other_processes_write_or_use_is_new():
    uses = Uses({"a": 1, "b": 2})
    uses.clock = 50
    uses.refresh({"a": 1, "b": 9, "c": 8}, lambda name: 32)
    assert [uses.score(name) for name in "abc"] == [50, (0 + 1) / 2, 1]
    uses.refresh({"a": 1}, lambda name: pytest.fail("is known"))
    with pytest.raises(KeyError):
        uses.score("b")


# Killed writers


def test_what_a_killed_writer_left_is_removed_and_a_live_ones_is_not(store, folder):
    put(store, 1)
    name = only_file(folder).name
    dead = [f".{name}.{pid}.17.partial" for pid in (2**22 + 1, 1, os.getpid())]  # numbers are used again
    for partial in dead:
        (folder / partial).write_bytes(bytes(5000))
    others = [f".{name}.partial", "x.1.2.partial", f".{name}.1.2.partial.bak"]
    for other in others:
        (folder / other).write_bytes(b"of the user")
    with store._folder.new_file(name, 3000, 128) as descriptor:
        (live,) = set(files(folder)) - {name, *dead, *others}
        again = DiskStore(folder, KEY, LARGE)
        assert set(files(folder)) == {name, live, *others}
        assert again.statistics().bytes_held == FILE_BYTES + 3000 == counted_bytes(folder)
        os.write(descriptor, b"x")
    assert set(files(folder)) == {name, *others}
    assert (folder / name).stat().st_size == 3000


KILLED = """
import os, sys, time
from dsv4.engine.disk import DiskStore
number, writev = 0, os.writev


def write_a_part(descriptor, views):
    time.sleep(0.0005)
    return writev(descriptor, [bytes(views[0])[:10_000]])


os.writev = write_a_part
store = DiskStore(sys.argv[1], b"key", 300_000)
print("ready", flush=True)
while True:
    number += 1
    data = [b"%08d" % number] * (number % 4000)
    store.put(b"hash %d" % (number % 40), "entries", data, 128 * (number % 7))
    got = store.get(b"hash %d" % (number * 7 % 40), "entries")
    assert got is None or bytes(got) == bytes(got[:8]) * (len(got) // 8)
"""


def test_kill_at_any_moment(folder):
    chance = random.Random(2)
    for _ in range(10):
        with started([sys.executable, "-c", KILLED, str(folder)], stdout=subprocess.PIPE) as killed:
            assert killed.stdout.readline() == b"ready\n"
            time.sleep(chance.uniform(0, 0.1))
            killed.kill()
        assert killed.returncode == -9
        store = DiskStore(folder, b"key", 300_000)
        assert not any(name.endswith(".partial") for name in files(folder))
        assert_accounts(folder, 300_000)
        for number in range(40):
            got = store.get(b"hash %d" % number, "entries")
            assert got is None or bytes(got) == bytes(got[:8]) * (len(got) // 8)
        assert store.statistics().wrong_files == 0


# Several processes

SHARING = """
import logging, random, sys
from pathlib import Path
from dsv4.engine.disk import DiskStore
logging.basicConfig(stream=sys.stdout)
chance, limit = random.Random(int(sys.argv[2])), 200_000
store = DiskStore(sys.argv[1], b"key", limit)
print("ready", flush=True)
sys.stdin.readline()
for _ in range(1200):
    number = chance.randrange(60)
    data = bytes([number]) * (number * 150)
    if chance.random() < 0.5:
        store.put(b"%d" % number, "entries", [data[:100], data[100:]], 128 * (number % 9))
    else:
        got = store.get(b"%d" % number, "entries")
        assert got is None or got == data, number
    if chance.random() < 0.05:
        assert int.from_bytes((Path(sys.argv[1]) / ".lock").read_bytes(), "little") <= limit
        assert store.statistics().failed == 0
found = store.statistics()
print(found.hits, found.misses, found.evicted, found.wrong_files, found.failed)
"""


def test_processes_share_a_folder(folder):
    command = [sys.executable, "-c", SHARING, str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*command, str(seed)], **pipes) for seed in range(3)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    for output in outputs:
        hits, misses, evicted, wrong_files, failed = map(int, output.split())
        assert hits > 100
        assert misses > 10
        assert evicted > 10
        assert (wrong_files, failed) == (0, 0)
    assert_accounts(folder, 200_000)
    assert not any(name.endswith(".partial") for name in files(folder))


PUT = """
import sys
from dsv4.engine.disk import DiskStore
store = DiskStore(sys.argv[1], b"key", 2**30)
print("ready", flush=True)
sys.stdin.readline()
print(store.put(b"hash", "entries", [b"payload"], 128))
"""


def test_a_put_waits_for_another_process_that_holds_the_lock(store, folder):
    with subprocess.Popen(
        [sys.executable, "-c", PUT, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        with store._folder._lock():
            process.stdin.write("go\n")
            process.stdin.flush()
            time.sleep(0.3)
            assert process.poll() is None
            assert files(folder) == []
        assert process.stdout.readline() == "True\n"
    assert len(files(folder)) == 1
    assert_accounts(folder, LARGE)


def test_a_file_another_store_uses_stays(folder):
    """Its uses are known by the modification time alone."""
    ours, theirs = (DiskStore(folder, KEY, 10 * FILE_BYTES) for _ in range(2))
    for number in range(10):
        put(ours, number, depth_tokens=128)
    for number in range(10, 40):
        assert theirs.get(digest(0), "entries") == content(0)
        time.sleep(0.005)  # file systems count time in ticks
        put(ours, number, depth_tokens=128)
    assert holds(ours, range(10)) == [0]


def test_the_same_file_put_by_two_stores_at_once_is_counted_once(folder):
    first, second = (DiskStore(folder, KEY, LARGE) for _ in range(2))
    put(first, 2)
    with first._folder.new_file(only_file(folder).name, 500, 128):
        assert put(second, 1)
        assert second.put(digest(2), "entries", [b"another"], 128) is False  # the same name of one thread
    assert len(files(folder)) == 2
    assert_accounts(folder, LARGE)
