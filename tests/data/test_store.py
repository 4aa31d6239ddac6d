"""Token stores: what is written comes back, and what is spoilt is named."""

import json
import shutil

import numpy as np
import pytest

from dsv4.data.manifest import MANIFEST, OFFSETS, read_manifest
from dsv4.data.store import TokenStore
from dsv4.data.writer import TokenWriter

LENGTHS = [3, 1, 7, 2, 6, 13, 4, 1]  # at most 8 tokens a shard: 3 1 | 7 | 2 6 | 13 | 4 1
SHARDS = [(2, 4), (1, 7), (2, 8), (1, 13), (2, 5)]  # documents, tokens


def documents(vocab_size):
    numbers = np.random.default_rng(3)
    return [numbers.integers(0, vocab_size, length) for length in LENGTHS]


def write_store(directory, split="train", *, vocab_size=300, shard_tokens=8):
    (directory / split).mkdir(parents=True)
    with TokenWriter(
        directory / split, vocab_size=vocab_size, tokenizer_sha256="abc", shard_tokens=shard_tokens
    ) as writer:
        for number, tokens in enumerate(documents(vocab_size)):
            writer.append(tokens.tolist(), 10 + number)
        return writer.finish()


@pytest.fixture
def root(tmp_path):
    """A prepared directory with a training split of five shards."""
    write_store(tmp_path)
    return tmp_path


def change_manifest(root, change):
    path = root / "train" / MANIFEST
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


# Round trips


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(300, "uint16"), (65536, "uint16"), (65537, "uint32"), (129280, "uint32")]
)
def test_documents_come_back_from_several_shards(vocab_size, dtype, tmp_path):
    write_store(tmp_path, "validation", vocab_size=vocab_size)
    store = TokenStore.open(tmp_path, "validation")
    store.verify()
    assert (store.num_documents, store.num_tokens, store.num_bytes) == (8, 37, sum(range(10, 18)))
    for index, expected in enumerate(documents(vocab_size)):
        found = store.document(index)
        assert found.dtype == dtype
        assert found.tolist() == expected.tolist()


def test_a_document_is_a_read_only_view_of_the_file(root):
    store = TokenStore.open(root, "train")
    view = store.document(4)
    assert type(view) is np.ndarray
    assert np.shares_memory(view, store.shards[2])
    assert view.base is not None
    assert not view.flags.writeable


def test_shards_hold_whole_documents_and_at_most_so_many_tokens(root):
    manifest = read_manifest(root / "train")
    assert [(shard.documents, shard.tokens) for shard in manifest.shards] == SHARDS
    assert [shard.file.size_bytes for shard in manifest.shards] == [2 * tokens for _, tokens in SHARDS]


def test_the_files_are_raw_and_little_endian(root):
    raw = b"".join(path.read_bytes() for path in sorted((root / "train").glob("*.bin")))
    assert np.frombuffer(raw, "<u2").tolist() == np.concatenate(documents(300)).tolist()
    offsets = np.load(root / "train" / OFFSETS, allow_pickle=False)
    assert offsets.tolist() == [0, *np.cumsum(LENGTHS)]


def test_how_a_store_is_cut_into_shards_does_not_show(root, tmp_path):
    write_store(tmp_path / "whole", shard_tokens=1000)
    one, many = TokenStore.open(tmp_path / "whole", "train"), TokenStore.open(root, "train")
    assert (len(one.shards), len(many.shards)) == (1, 5)
    for index in range(many.num_documents):
        assert one.document(index).tolist() == many.document(index).tolist()


@pytest.mark.parametrize("index", [-1, 8, 100])
def test_a_document_that_is_not_there_is_named(index, root):
    with pytest.raises(ValueError, match=f"document is {index}; expected 0 <= document < 8"):
        TokenStore.open(root, "train").document(index)


def test_an_unknown_split_is_named(root):
    with pytest.raises(ValueError, match="split is 'test'; expected one of train, validation"):
        TokenStore.open(root, "test")  # pyright: ignore[reportArgumentType]


# What is spoilt


def test_a_store_that_was_never_finished_is_refused(tmp_path):
    (tmp_path / "train").mkdir()
    with TokenWriter(tmp_path / "train", vocab_size=300, tokenizer_sha256="abc") as writer:
        writer.append([1, 2], 2)
    with pytest.raises(ValueError, match=f"token store {tmp_path}/train has no manifest.json"):
        TokenStore.open(tmp_path, "train")


@pytest.mark.parametrize("name", ["tokens-00000.bin", "tokens-00004.bin", OFFSETS])
def test_a_missing_file_is_named(name, root):
    (root / "train" / name).unlink()
    with pytest.raises(ValueError, match=f"{root}/train/{name} is missing"):
        TokenStore.open(root, "train")


@pytest.mark.parametrize("name", ["tokens-00000.bin", "tokens-00003.bin", OFFSETS])
@pytest.mark.parametrize("by", [-1, 1])
def test_a_file_of_another_size_is_named(name, by, root):
    path = root / "train" / name
    raw = path.read_bytes()
    path.write_bytes(raw[:by] if by < 0 else raw + b"\0")
    with pytest.raises(ValueError, match=f"{path} has {len(raw) + by} bytes; expected {len(raw)}"):
        TokenStore.open(root, "train")


@pytest.mark.parametrize("name", ["tokens-00005.bin", "notes.txt", ".hidden"])
def test_a_foreign_file_is_named(name, root):
    (root / "train" / name).write_bytes(b"")
    with pytest.raises(ValueError, match=f"token store {root}/train holds {name}, which its manifest does not name"):
        TokenStore.open(root, "train")


@pytest.mark.parametrize("name", ["tokens-00001.bin", OFFSETS])
def test_changed_content_of_the_same_size_is_found_by_its_hash(name, root):
    path = root / "train" / name
    raw = bytearray(path.read_bytes())
    raw[-9] ^= 1  # of the offsets, the last but one: shape and end still fit
    path.write_bytes(raw)
    store = TokenStore.open(root, "train")
    with pytest.raises(ValueError, match=f"{path} has sha256 [0-9a-f]*; expected [0-9a-f]*"):
        store.verify()


def test_offsets_of_another_kind_are_named(root):
    path = root / "train" / OFFSETS

    def replace_offsets(array):
        np.save(path, array, allow_pickle=True)
        change_manifest(root, lambda data: data["offsets"].update(size_bytes=path.stat().st_size))

    replace_offsets(np.zeros(8, np.int64))
    with pytest.raises(ValueError, match=rf"{path} is \[8\] int64; expected \[9\] int64"):
        TokenStore.open(root, "train")
    replace_offsets(np.zeros(9, np.float64))
    with pytest.raises(ValueError, match=rf"{path} is \[9\] float64; expected \[9\] int64"):
        TokenStore.open(root, "train")
    replace_offsets(np.arange(9))
    with pytest.raises(ValueError, match=f"{path} ends at 8; expected the store's 37 tokens"):
        TokenStore.open(root, "train")
    replace_offsets(np.array([{"a": "pickle"}], object))
    with pytest.raises(ValueError, match=f"{path} cannot be read"):
        TokenStore.open(root, "train")


def test_offsets_are_never_unpickled(root):
    """numpy takes a file that is not an array for a pickle, if it may; this one would make a folder."""
    path = root / "train" / OFFSETS
    trap = root / "unpickled"
    path.write_bytes(f"cos\nmkdir\n(V{trap}\ntR.".encode())
    change_manifest(root, lambda data: data["offsets"].update(size_bytes=path.stat().st_size))
    with pytest.raises(ValueError, match=f"{path} cannot be read"):
        TokenStore.open(root, "train")
    assert not trap.exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "\udcff"])
def test_a_manifest_that_is_not_an_object_is_named(text, root):
    path = root / "train" / MANIFEST
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=f"{path} is "):
        TokenStore.open(root, "train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("tokens"), "missing field tokens"),
        (lambda data: data.update(extra=1), "unknown field extra"),
        (lambda data: data.update(format=2), "format is 2; expected 1"),
        (lambda data: data.update(documents=-8), "documents is -8; expected an integer, 0 or more"),
        (lambda data: data.update(documents=9), "documents is 9; expected 8, the sum over the shards"),
        (lambda data: data.update(tokens="37"), "tokens is '37'; expected an integer"),
        (lambda data: data.update(tokens=38), "tokens is 38; expected 37, the sum over the shards"),
        (lambda data: data.update(dtype="float32"), "dtype is 'float32'; expected uint16 or uint32"),
        (lambda data: data.update(dtype="uint32"), "tokens-00000.bin has 8 bytes; expected 16 for 4 tokens of uint32"),
        (lambda data: data.update(shards={}), "shards is {}; expected a list"),
        (lambda data: data["shards"][2].pop("file"), r"missing field shards\[2\].file"),
        (lambda data: data["shards"][1].update(tokens=None), r"shards\[1\].tokens is None; expected an integer"),
        (lambda data: data["shards"].insert(1, 5), r"missing field shards\[1\].tokens"),
        (lambda data: data["offsets"].update(sha256=7), "offsets.sha256 is 7; expected a string"),
        (
            lambda data: data["shards"][3]["file"].update(name="../other.bin"),
            "name is '../other.bin'; expected 'tokens-00003.bin'",
        ),
    ],
)
def test_whatever_is_wrong_in_a_manifest_is_named(change, message, root):
    change_manifest(root, change)
    with pytest.raises(ValueError, match=message):
        TokenStore.open(root, "train")


def test_a_copy_of_a_store_opens_elsewhere(root, tmp_path):
    copy = shutil.copytree(root / "train", tmp_path / "copy" / "validation")
    store = TokenStore.open(copy.parent, "validation")
    store.verify()
    assert store.document(5).tolist() == documents(300)[5].tolist()
