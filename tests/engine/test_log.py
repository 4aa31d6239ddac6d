"""The write-ahead log: what was committed comes back, after kills, torn tails and full disks; damage is refused."""

import errno
import json
import os
import random
import subprocess
import sys
import time
import zlib

import pytest

import dsv4.engine.log as home
from dsv4.engine.log import LoggedRequest, WriteAheadLog, recover
from tests.processes import started

SAMPLING = {"temperature": 0.1 + 0.2, "stop": ["\n\n", "naïve ∂"], "seed": None, "logit_bias": [[7, -1.5]], "top_k": 0}


def request(id, prompt_ids, output_ids, sampling=SAMPLING, seed=11, **more):
    return LoggedRequest(id=id, prompt_ids=prompt_ids, sampling=sampling, seed=seed, output_ids=output_ids, **more)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tokens.log"


@pytest.fixture
def log(path):
    with WriteAheadLog(path) as log:
        yield log


def fill(log):
    """Three commits: a and b begin, c begins; c ends and is taken, and b."""
    log.append_request("a", [5, 17, 5], SAMPLING, 2**63)
    log.append_request("b", [1], {}, 0)
    log.append_tokens([("a", 3), ("b", 4)])
    log.commit()
    log.append_request("c", [2, 2], {}, 5)
    log.append_tokens([("c", 8), ("a", 129_279), ("a", 0)])
    log.commit()
    log.append_end("c", "length")
    log.append_taken("c")
    log.append_tokens([("b", 6), ("a", 9)])
    log.append_end("b", "stop")
    log.append_taken("b")
    log.commit()


def no_sync(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


# What comes back


def test_a_log_that_is_not_there_has_nothing_to_resume(path):
    assert recover(path) == []
    assert not path.exists()
    with WriteAheadLog(path) as log:
        assert log.found == []
    assert recover(path) == []


def test_an_empty_file_is_an_empty_log(path):
    path.touch()
    assert recover(path) == []
    with WriteAheadLog(path) as log:
        fill(log)
    assert [r.id for r in recover(path)] == ["a"]


def test_unfinished_requests_come_back_with_their_tokens(log, path):
    fill(log)
    assert recover(path) == [request("a", [5, 17, 5], [3, 129_279, 0, 9], seed=2**63)]


def test_requests_come_back_in_the_order_they_came(log, path):
    for id in "zmab":
        log.append_request(id, [1], {}, 0)
    log.append_end("m", "cancelled")
    log.append_taken("m")
    log.append_request("m", [4], {}, 1)  # an id is free once its request was taken
    log.commit()
    assert [r.id for r in recover(path)] == ["z", "a", "b", "m"]
    assert recover(path)[-1].prompt_ids == [4]


def test_a_request_that_ended_comes_back_until_it_is_taken(log, path):
    log.append_request("a", [1], {}, 0)
    log.append_request("b", [2], {}, 0, salt="0aff", has_mask=True)
    log.append_tokens([("a", 5), ("b", 6)])
    log.append_end("a", "length")
    log.append_end("b", "error", "request b: its mask raised KeyError(3)")
    log.commit()
    wanted = [
        request("a", [1], [5], {}, 0, finish="length"),
        request("b", [2], [6], {}, 0, salt="0aff", has_mask=True, finish="error", error="request b: its mask raised "
                "KeyError(3)"),
    ]  # fmt: skip
    assert recover(path) == wanted
    log.close()
    with WriteAheadLog(path) as again:
        assert again.found == wanted == recover(path)
        assert "a" in again
        again.append_taken("a")
        assert "a" not in again
        assert recover(path) == wanted  # it was not committed
        again.append_request("c", [3], {}, 0)
        again.commit()
        assert [r.id for r in recover(path)] == ["b", "c"]
        again.append_taken("b")
        again.append_end("c", "cancelled")
    assert recover(path) == [request("c", [3], [], {}, 0, finish="cancelled")]  # closing has committed these


def test_closing_commits_no_tokens(log, path):
    """Of a step that failed in between, they may lack the end that comes with them."""
    log.append_request("a", [1], {}, 0)
    log.append_request("b", [1], {}, 0)
    log.commit()
    log.append_end("b", "cancelled")
    log.append_tokens([("a", 5)])
    log.close()
    assert recover(path) == [request("a", [1], [], {}, 0), request("b", [1], [], {}, 0)]


def test_closing_on_a_full_disk_is_a_warning(log, path, monkeypatch, caplog):
    log.append_request("a", [1], {}, 0)
    log.append_end("a", "cancelled")
    log.commit()

    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    log.append_taken("a")
    monkeypatch.setattr(os, "write", fail)
    monkeypatch.setattr(os, "ftruncate", fail)
    log.close()
    assert str(path) in caplog.text
    monkeypatch.undo()
    assert [r.id for r in recover(path)] == ["a"]
    WriteAheadLog(path).close()  # it is nobody's


def test_log_probabilities_come_back_with_their_tokens(log, path):
    """To the bit, also through a log that was made shorter."""
    first, second = (-0.1 - 0.2, [(3, -0.1 - 0.2), (9, -2.0)]), (-1e-300, [])
    log.append_request("a", [1], {"logprobs": 2}, 0)
    log.append_request("b", [1], {}, 0)
    log.append_tokens([("a", 3, first), ("b", 4)])
    log.append_tokens([("a", 5, second)])
    log.commit()
    lists = [[first[0], [[3, first[0]], [9, -2.0]]], [-1e-300, []]]
    wanted = [request("a", [1], [3, 5], {"logprobs": 2}, 0, logprobs=lists), request("b", [1], [4], {}, 0)]
    assert recover(path) == wanted
    log.close()
    WriteAheadLog(path).close()
    assert recover(path) == wanted


def test_what_is_not_committed_is_not_there(log, path):
    fill(log)
    before = path.read_bytes()
    log.append_tokens([("a", 1)])
    log.append_end("a", "stop")
    assert path.read_bytes() == before
    log.close()
    assert recover(path)[0].output_ids == [3, 129_279, 0, 9]


def test_other_integers_and_tuples_are_written_as_numbers_and_lists(log, path):
    numpy = pytest.importorskip("numpy")
    log.append_request("a", numpy.arange(3), {"stop": ("x", ("y",))}, numpy.int64(4))
    log.append_tokens([("a", numpy.int32(6))])
    log.commit()
    assert recover(path) == [request("a", [0, 1, 2], [6], {"stop": ["x", ["y"]]}, 4)]


def test_strange_ids_and_texts_come_back(log, path):
    id, sampling = '\n"\\ 00000018 ∂\x00', {"stop": ["\n", "\x85\u2028", "\U0001f600"]}
    log.append_request(id, [1], sampling, 0)
    log.append_tokens([(id, 2)])
    log.commit()
    log.append_tokens([(id, 3)])
    log.commit()
    assert path.read_bytes().isascii()
    assert path.read_bytes().count(b"\n") == 3
    assert recover(path) == [request(id, [1], [2, 3], sampling, 0)]


# Opening again


def test_opening_keeps_what_was_not_taken_alone_and_goes_on_with_it(log, path):
    fill(log)
    log.close()
    with WriteAheadLog(path) as again:
        assert again.found == [request("a", [5, 17, 5], [3, 129_279, 0, 9], seed=2**63)]
        assert path.read_bytes().count(b"\n") == 2
        again.append_tokens([("a", 1)])
        again.append_request("b", [7], {}, 1)
        again.commit()
    assert recover(path) == [
        request("a", [5, 17, 5], [3, 129_279, 0, 9, 1], seed=2**63),
        request("b", [7], [], {}, 1),
    ]
    with WriteAheadLog(path) as again:
        for id in "ab":
            again.append_end(id, "stop")
            again.append_taken(id)
        again.commit()
    with WriteAheadLog(path):
        assert path.read_bytes().count(b"\n") == 1


def test_a_long_log_is_rewritten_while_in_use(path, monkeypatch):
    no_sync(monkeypatch)
    monkeypatch.setattr(home, "_LONG_BYTES", 2000)
    with WriteAheadLog(path) as log:
        log.append_request("stays", [1, 2], {}, 0)
        written = []
        for step in range(1000):
            log.append_request(f"r{step}", [step], {}, 0)
            log.append_tokens([("stays", step), (f"r{step}", 0)])
            log.append_end(f"r{step}", "stop")
            log.append_taken(f"r{step}")
            log.commit()
            written.append(step)
            if step % 50 == 0:
                assert recover(path) == [request("stays", [1, 2], written, {}, 0)]
        assert path.stat().st_size < 12_000  # it holds 5 KB of unfinished tokens
    assert recover(path) == [request("stays", [1, 2], written, {}, 0)]


def test_without_room_to_rewrite_it_the_log_stays_long(path, monkeypatch, caplog):
    monkeypatch.setattr(home, "_LONG_BYTES", 200)
    with WriteAheadLog(path) as log:
        log.append_request("a", [1], {}, 0)
        log.commit()

        def fail(*args):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(home, "write_then_rename", fail)
        for step in range(40):
            log.append_tokens([("a", step)])
            log.commit()
        assert 1 <= len(caplog.records) < 6
        assert str(path) in caplog.text
        assert recover(path)[0].output_ids == list(range(40))
        monkeypatch.undo()
        for step in range(40, 80):
            log.append_tokens([("a", step)])
            log.commit()
    assert recover(path)[0].output_ids == list(range(80))


# On the disk before it is shown


def test_a_commit_is_on_the_disk_when_it_returns(log, path, monkeypatch):
    sizes, fsync = [], os.fsync

    def note(descriptor):
        fsync(descriptor)
        assert os.path.samestat(os.fstat(descriptor), path.stat())
        sizes.append(path.stat().st_size)

    monkeypatch.setattr(os, "fsync", note)
    fill(log)
    assert len(sizes) == 3
    assert sizes[-1] == path.stat().st_size
    log.commit()  # nothing to write, nothing to wait for
    assert len(sizes) == 3


def test_a_rewritten_log_is_on_the_disk_before_it_has_its_name(log, path, monkeypatch):
    fill(log)
    log.close()
    events, fsync, rename = [], os.fsync, home.Path.replace

    def note_sync(descriptor):
        events.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def note_rename(partial, target):
        events.append((partial.stat().st_ino, target))
        return rename(partial, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(home.Path, "replace", note_rename)
    with WriteAheadLog(path):
        new = path.stat().st_ino
        assert events == [new, (new, path), path.parent.stat().st_ino]


# Torn tails


def test_a_tail_torn_anywhere_is_dropped(log, path, caplog, monkeypatch):
    fill(log)
    log.close()
    whole = path.read_bytes()
    begin = whole.rindex(b"\n", 0, -1) + 1
    before = [request("a", [5, 17, 5], [3, 129_279, 0], seed=2**63), request("b", [1], [4], {}, 0)]
    before.append(request("c", [2, 2], [8], {}, 5))
    no_sync(monkeypatch)
    for end in range(begin, len(whole)):
        path.write_bytes(whole[:end])
        caplog.clear()
        assert recover(path) == before, end
        assert len(caplog.records) == (end > begin)
        with WriteAheadLog(path) as again:
            again.append_tokens([("b", end)])
            again.commit()
        assert recover(path)[1].output_ids == [4, end]


@pytest.mark.parametrize("filler", [b"\0", b"\xff", b"7"], ids=repr)
def test_a_tail_whose_bytes_never_arrived_is_dropped(log, path, filler):
    """After a power failure a file may have its length and not its contents."""
    fill(log)
    log.close()
    whole = path.read_bytes()
    begin = whole.rindex(b"\n", 0, -1) + 1
    for end in range(begin, len(whole)):
        path.write_bytes(whole[:end] + filler * (len(whole) - end))
        assert [r.id for r in recover(path)] == ["a", "b", "c"], end


def test_every_cut_of_the_whole_log_gives_the_last_commit_before_it(log, path):
    states, sizes = [recover(path)], [path.stat().st_size]
    log.append_request("a", [1], {}, 0)
    for token in range(5):
        log.append_tokens([("a", token)])
        log.commit()
        states.append(recover(path))
        sizes.append(path.stat().st_size)
    log.close()
    whole = path.read_bytes()
    for end in range(sizes[0], len(whole) + 1):
        path.write_bytes(whole[:end])
        assert recover(path) == states[max(i for i, size in enumerate(sizes) if size <= end)]


# Damage


def test_a_flipped_bit_anywhere_before_the_last_line_is_refused(log, path):
    fill(log)
    log.close()
    whole = path.read_bytes()
    starts = [0, *(i + 1 for i, byte in enumerate(whole) if byte == ord("\n"))]
    for index in range(starts[-2]):
        line = max(start for start in starts if start <= index)
        for bit in {5, index % 8} if index - line < 18 else {index % 8}:  # 5: a to f as capitals say the same
            spoilt = bytearray(whole)
            spoilt[index] ^= 1 << bit
            path.write_bytes(spoilt)
            with pytest.raises(ValueError) as error:
                recover(path)
            at = index if whole[index] == ord("\n") else line
            assert str(path) in str(error.value)
            assert f"at byte {at};" in str(error.value) or line == 0, (index, bit)


def test_a_flipped_bit_in_the_last_line_changes_no_token(log, path):
    fill(log)
    good = [recover(path)]
    log.close()
    whole = path.read_bytes()
    begin = whole.rindex(b"\n", 0, -1) + 1
    path.write_bytes(whole[:begin])
    good.append(recover(path))
    for index in range(begin, len(whole)):
        for bit in {5, index % 8}:
            spoilt = bytearray(whole)
            spoilt[index] ^= 1 << bit
            path.write_bytes(spoilt)
            try:
                assert recover(path) == good[1]
            except ValueError as error:
                assert f"at byte {begin};" in str(error)  # noqa: PT017 (a line break in the middle of it)


@pytest.mark.parametrize("kept", [slice(10), slice(18), slice(10, None), slice(-1), slice(-3, None)], ids=repr)
def test_a_line_that_lost_a_part_is_refused(log, path, kept):
    fill(log)
    log.close()
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][kept] + lines[2] + lines[3])
    with pytest.raises(ValueError, match=f"damaged at byte {len(lines[0] + lines[1]) - 1 if kept.stop == -1 else 43};"):
        recover(path)


def test_damage_changes_nothing_on_the_disk_and_leaves_the_log_free(log, path):
    fill(log)
    log.close()
    spoilt = path.read_bytes().replace(b"[5, 17, 5]", b"[5, 18, 5]")
    path.write_bytes(spoilt)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"damaged at byte 43.*Move it away to start with an empty log"):
            WriteAheadLog(path)
    assert path.read_bytes() == spoilt
    path.rename(path.with_name("aside"))
    with WriteAheadLog(path) as again:
        assert again.found == []


@pytest.mark.parametrize("text", [b"# a file of the user\n", b"{", b"\0" * 100, b"00000002 "], ids=repr)
def test_another_file_is_refused_and_left_alone(path, text):
    path.write_bytes(text)
    with pytest.raises(ValueError, match=r"begins with .*; expected a log, which begins with"):
        WriteAheadLog(path)
    assert path.read_bytes() == text


def line(events):
    text = json.dumps(events).encode()
    return b"%08x %08x %b\n" % (len(text), zlib.crc32(text), text)


def test_another_version_is_refused(path):
    path.write_bytes(line([["log", {"format": 1}]]))
    with pytest.raises(ValueError, match=r'begins with \[\["log", {"format": 1}\]\]; expected .*"format": 2'):
        WriteAheadLog(path)


NONSENSE = [
    [["tokens", [["x", 1]]]],
    [["end", "x", "stop", None]],
    [["taken", "x"]],
    [["request", {"id": "x"}]],
    [["other"]],
    [["tokens", 5]],
    7,
]


@pytest.mark.parametrize("events", NONSENSE, ids=repr)
def test_a_commit_that_makes_no_sense_is_refused(log, path, events):
    log.close()
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + line(events))
    with pytest.raises(ValueError, match=f"commit at byte {size} that makes no sense"):
        recover(path)


# A caller's mistakes


def test_refusals(log, path):
    fill(log)
    with pytest.raises(ValueError, match="request id is 'a'; expected one that is not in the log, or was taken"):
        log.append_request("a", [1], {}, 0)
    with pytest.raises(ValueError, match="request id is 'b'; expected one that is in the log"):
        log.append_tokens([("a", 1), ("b", 2)])
    with pytest.raises(ValueError, match="request id is 'x'"):
        log.append_end("x", "stop")
    with pytest.raises(ValueError, match="request id is 'a'; expected one that has ended and was not taken"):
        log.append_taken("a")
    for sampling in ({"a": float("nan")}, {"a": object()}, {1: 2}, {"a": {"b": {3: 4}}}, {"a": {5}}):
        with pytest.raises(ValueError, match=r"sampling is .*; expected what JSON gives back"):
            log.append_request("x", [1], sampling, 0)
    before = path.read_bytes()
    log.append_tokens([])
    log.commit()
    assert path.read_bytes() == before  # nothing of what was refused


def test_a_closed_log_is_refused(log):
    log.close()
    for call in (lambda: log.append_request("a", [], {}, 0), lambda: log.append_tokens([]), log.commit):
        with pytest.raises(ValueError, match="is closed"):
            call()
    log.close()


def test_places_that_cannot_be_a_log(tmp_path):
    with pytest.raises(ValueError, match=r"folder of log is .*none; expected an existing folder"):
        WriteAheadLog(tmp_path / "none" / "log")
    (tmp_path / "taken").mkdir()
    with pytest.raises(ValueError, match="taken is no file"):
        WriteAheadLog(tmp_path / "taken")


# One owner


def test_a_second_owner_is_refused(log, path):
    fill(log)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"{path} is in use by process {os.getpid()}; expected one process at a time"):
        WriteAheadLog(path)
    code = f"from dsv4.engine.log import WriteAheadLog; WriteAheadLog({str(path)!r})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert f"ValueError: log {path} is in use by process {os.getpid()}" in result.stderr
    assert path.read_bytes() == before
    log.append_tokens([("a", 1)])
    log.commit()
    log.close()
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
    assert recover(path)[0].output_ids[-1] == 1


def test_what_a_killed_owner_left_is_removed(log, path):
    log.close()
    for name in (f".{path.name}.{os.getpid()}.partial", f".{path.name}.1.partial"):
        path.with_name(name).write_bytes(b"half")
    path.with_name(".other.1.partial").touch()
    with WriteAheadLog(path):
        names = sorted(entry.name for entry in path.parent.iterdir())
    assert names == [".other.1.partial", path.name, f"{path.name}.lock"]


# A full disk


@pytest.mark.parametrize("room", [0, 1, 17, 30])
def test_a_full_disk_loses_nothing_that_was_committed(log, path, monkeypatch, room):
    fill(log)
    before = path.read_bytes()
    left, write = [room], os.write

    def short(descriptor, data):
        if left[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        num_bytes = write(descriptor, bytes(data)[: left[0]])
        left[0] -= num_bytes
        return num_bytes

    monkeypatch.setattr(os, "write", short)
    log.append_tokens([("a", 77)])
    for _ in range(2):
        with pytest.raises(
            OSError, match=r"cannot be written \(No space left on device\); it is as after the last"
        ) as e:
            log.commit()
        assert e.value.errno == errno.ENOSPC
        assert e.value.filename == str(path)
        assert path.read_bytes() == before
        left[0] = room
    log.append_end("a", "cancelled")
    log.append_taken("a")
    monkeypatch.undo()
    log.append_request("d", [3], {}, 0)
    log.commit()  # all that was appended since the last one
    assert b'["tokens", [["a", 77]]], ["end", "a", "cancelled", null], ["taken", "a"]' in path.read_bytes()
    assert [r.id for r in recover(path)] == ["d"]


def test_a_disk_that_fails_to_sync(log, path, monkeypatch):
    fill(log)
    before = path.read_bytes()

    def fail(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    log.append_tokens([("a", 77)])
    with pytest.raises(OSError, match="Input/output error"):
        log.commit()
    assert path.read_bytes() == before
    monkeypatch.undo()
    log.commit()
    assert recover(path)[0].output_ids[-1] == 77


def test_a_failed_commit_that_cannot_be_cut_off_closes_the_log(log, path, monkeypatch):
    fill(log)

    def fail(*args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    monkeypatch.setattr(os, "ftruncate", fail)
    log.append_tokens([("a", 77)])
    with pytest.raises(OSError, match="cannot be written"):
        log.commit()
    monkeypatch.undo()
    with pytest.raises(ValueError, match="is closed"):
        log.commit()
    with WriteAheadLog(path) as again:
        assert [r.id for r in again.found] == ["a"]


def is_open(descriptor):
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def open_descriptors():
    return [descriptor for descriptor in range(1000) if is_open(descriptor)]


def test_opening_on_a_full_disk(log, path, monkeypatch):
    fill(log)
    log.close()
    before = path.read_bytes()

    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    opened = open_descriptors()
    monkeypatch.setattr(os, "write", fail)
    with pytest.raises(OSError, match=r"No space left on device.*it is as before") as error:
        WriteAheadLog(path)
    assert open_descriptors() == opened
    assert error.value.filename == str(path)
    assert path.read_bytes() == before
    assert sorted(entry.name for entry in path.parent.iterdir()) == [path.name, f"{path.name}.lock"]
    monkeypatch.undo()
    with WriteAheadLog(path) as again:
        assert [r.id for r in again.found] == ["a"]


LIMITED = """
import resource, sys
from dsv4.engine.log import WriteAheadLog
with WriteAheadLog(sys.argv[1]) as log:
    log.append_request("a", [1], {}, 0)
    log.commit()
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
    for token in range(10000):
        log.append_tokens([("a", token)])
        try:
            log.commit()
        except OSError as error:
            print(token, error.filename)
            break
"""


def test_a_file_that_the_system_stops_in_the_middle_of_a_line(path):
    result = subprocess.run([sys.executable, "-c", LIMITED, str(path)], capture_output=True, timeout=60, check=True)
    token, name = result.stdout.decode().split()
    assert name == str(path)
    assert recover(path)[0].output_ids == list(range(int(token)))
    assert 4900 < path.stat().st_size < 5000


# Kills

WRITER = '''
"""Go on with the tokens of a log, in short and slow writes, and say what is committed."""
import os, random, sys, time
from dsv4.engine.log import WriteAheadLog
import dsv4.engine.log as home

home._LONG_BYTES = 500
write = os.write


def write_a_part(descriptor, data):
    time.sleep(0.0005)
    return write(descriptor, bytes(data[:17]))


os.write = write_a_part
chance = random.Random(int(sys.argv[2]))
with WriteAheadLog(sys.argv[1]) as log:
    lengths = {request.id: len(request.output_ids) for request in log.found}
    next_id = int(sys.argv[3])
    while True:
        if len(lengths) < 3:
            log.append_request(str(next_id), [next_id] * (next_id % 5), {"n": next_id}, next_id)
            lengths[str(next_id)] = 0
            next_id += 1
        ids = [id for id in lengths for _ in range(chance.randint(0, 2))]
        tokens = []
        for id in ids:
            tokens.append((id, int(id) * 1000 + lengths[id]))
            lengths[id] += 1
        log.append_tokens(tokens)
        if chance.random() < 0.1:
            ended = chance.choice(list(lengths))
            log.append_end(ended, "stop")
            log.append_taken(ended)
            del lengths[ended]
        log.commit()
        print(next_id, *(f"{id}:{length}" for id, length in lengths.items()), flush=True)
'''


def committed(line):
    next_id, *lengths = line.split()
    return int(next_id), {id: int(length) for id, length in (pair.split(":") for pair in lengths)}


def test_kill_at_any_moment(path):
    chance, next_id = random.Random(5), 0
    for round in range(12):
        command = [sys.executable, "-c", WRITER, str(path), str(round), str(next_id)]
        with started(command, stdout=subprocess.PIPE, text=True) as killed:
            first = killed.stdout.readline()
            time.sleep(chance.uniform(0, 0.1))
            killed.kill()
            lines = [first, *killed.stdout]
        told = committed(next(line for line in reversed(lines) if line.endswith("\n")))
        found = recover(path)
        for r in found:
            number = int(r.id)
            assert r.prompt_ids == [number] * (number % 5)
            assert (r.sampling, r.seed) == ({"n": number}, number)
            assert r.output_ids == [number * 1000 + i for i in range(len(r.output_ids))]
        lengths = {r.id: len(r.output_ids) for r in found}
        kept = told[1].keys() & lengths.keys()
        # At most the one commit that was under way is ahead of what was told: it ends at most one request.
        assert len(told[1]) - len(kept) <= 1
        assert all(told[1][id] <= lengths[id] <= told[1][id] + 2 for id in kept)
        assert all(int(id) == told[0] for id in lengths.keys() - kept)
        next_id = max([told[0], *(int(id) + 1 for id in lengths)])
    assert next_id > 3
