"""Tensors of a safetensors file as views of its mapping or read into memory."""

import gc
import json
import os

import pytest
import torch
from safetensors.torch import save_file

from dsv4.checkpoint.tensor_file import DTYPES, StoredTensor, TensorFile

TENSORS = {
    "a": torch.arange(30, dtype=torch.float32).view(5, 6),
    "b": torch.randn(7, 3).bfloat16(),
    "c": torch.arange(4),
    "codes": torch.arange(-6, 5, dtype=torch.int8),
    "fp8": torch.randn(4).to(torch.float8_e4m3fn),
    "scale": torch.tensor([1.0, 0.5]).to(torch.float8_e8m0fnu),
}


@pytest.fixture
def path(tmp_path):
    save_file(TENSORS, tmp_path / "some.safetensors", metadata={"format": "pt"})
    return tmp_path / "some.safetensors"


def bits(tensor):
    return tensor.view(torch.uint8)


def write(path, entries, data):
    """A file with this header, as another program might write it."""
    header = json.dumps(entries).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


@pytest.mark.parametrize("name", TENSORS)
def test_a_view_a_read_and_a_load_are_the_tensor(path, name):
    file, wanted = TensorFile(path), TENSORS[name]
    read, loaded = torch.zeros_like(wanted), torch.zeros_like(wanted)
    file.read_(name, read)
    file.load_(name, loaded)
    for got in (file.view(name), read, loaded):
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
        assert torch.equal(bits(got), bits(wanted))


def test_what_it_holds(path):
    found = TensorFile(path).tensors
    assert found.keys() == TENSORS.keys()
    for name, (dtype, shape, begin, end) in found.items():
        assert (DTYPES[dtype], shape) == (TENSORS[name].dtype, TENSORS[name].shape)
        assert end - begin == TENSORS[name].nbytes


def test_a_read_goes_on_where_the_system_stopped(path, monkeypatch):
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: whole(fd, [buffers[0][:7]], at))
    out = torch.zeros(5, 6)
    TensorFile(path).read_("a", out)
    assert torch.equal(out, TENSORS["a"])
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with pytest.raises(OSError, match=f"file {path} ended within a; expected 120 bytes more"):
        TensorFile(path).read_("a", out)


def test_a_load_casts(path):
    out = torch.zeros(5, 6, dtype=torch.bfloat16)
    TensorFile(path).load_("a", out)
    assert torch.equal(out, TENSORS["a"].bfloat16())


def test_what_is_written_to_a_view_stays_here(path):
    before, file = path.read_bytes(), TensorFile(path)
    view = file.view("a")
    view.fill_(3.0)
    assert (file.view("a") == 3.0).all()
    again = torch.zeros(5, 6)
    file.read_("a", again)
    assert torch.equal(again, TENSORS["a"])
    assert path.read_bytes() == before


def test_views_share_one_mapping_and_outlive_their_file(path):
    file = TensorFile(path)
    header = file.tensors
    a, b = file.view("a"), file.view("b")
    assert b.data_ptr() - a.data_ptr() == header["b"].begin - header["a"].begin
    file.close()
    del file
    gc.collect()
    path.unlink()
    assert torch.equal(a, TENSORS["a"])


def test_a_tensor_between_elements_is_copied(tmp_path):
    numbers = torch.randn(3)
    entries = {
        "odd": {"dtype": "I8", "shape": [1], "data_offsets": [0, 1]},
        "numbers": {"dtype": "F32", "shape": [3], "data_offsets": [1, 13]},
    }
    path = write(tmp_path / "odd.safetensors", entries, b"\x07" + numbers.numpy().tobytes())
    file = TensorFile(path)
    assert file.tensors["numbers"] == StoredTensor("F32", (3,), path.stat().st_size - 12, path.stat().st_size)
    view = file.view("numbers")
    assert view.data_ptr() % 4 == 0
    assert torch.equal(view, numbers)


def test_a_file_larger_than_memory_is_mapped(tmp_path):
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    size = 2 * memory
    entries = {"a": {"dtype": "I8", "shape": [size], "data_offsets": [0, size]}}
    path = write(tmp_path / "huge.safetensors", entries, b"")
    try:
        os.truncate(path, path.stat().st_size + size)  # a hole
    except OSError:
        pytest.skip("this disk has no files so large, not even empty ones")
    view = TensorFile(path).view("a")
    assert view.shape == (size,)
    assert view[0] == view[-1] == 0


def test_descriptors_are_closed(path):
    def count():
        gc.collect()
        return len(os.listdir("/dev/fd"))

    before = count()
    file = TensorFile(path)
    assert count() == before + 1
    file.close()
    file.close()
    assert count() == before
    for _ in range(3):
        TensorFile(path)
    assert count() == before


@pytest.mark.parametrize("how", ["written", "cut", "longer"])
def test_a_file_that_changes_is_an_error(path, how):
    file, out = TensorFile(path), torch.zeros(5, 6)
    file.read_("a", out)
    if how == "written":
        content = path.read_bytes()
        path.write_bytes(content[:-1] + b"\xff")
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))  # a clock may tick slower than we write
    else:
        os.truncate(path, path.stat().st_size + (1 if how == "longer" else -1))
    with pytest.raises(OSError, match=f"file {path} has changed since it was opened; expected it to stay as it was"):
        file.read_("a", out)


def test_a_file_that_is_replaced_is_not_the_one_that_was_opened(path):
    file, out = TensorFile(path), torch.zeros(5, 6)
    save_file({"a": torch.zeros(5, 6)}, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)
    file.read_("a", out)
    assert torch.equal(out, TENSORS["a"])


@pytest.mark.parametrize("data", [b"", b"\x00", b"\xff" * 8, b"{" * 100, (2**40).to_bytes(8, "little") + b"{}"])
def test_what_is_no_such_file_is_an_error(tmp_path, data):
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(ValueError, match=f"file {tmp_path / 'x'} cannot be read as safetensors"):
        TensorFile(tmp_path / "x")
    with pytest.raises(ValueError, match=f"file {tmp_path / 'y'} cannot be read as safetensors"):
        TensorFile(tmp_path / "y")
