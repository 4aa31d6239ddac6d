"""Every kind of source, in order, and everything a source can have wrong with it."""

import json
import os
import sys
import sysconfig
from pathlib import Path

import pytest

from dsv4.config.train import DataConfig
from dsv4.data.sources import Document, documents, listing_sha256, source_files


def config(source, *, text_field="text", bad_files="error"):
    return DataConfig(
        source=str(source),
        text_field=text_field,
        bad_files=bad_files,
        tokenizer="train",
        validation_fraction=0.1,
        fim_rate=0.0,
        split_rate=0.0,
        pack_buffer=1,
    )


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# The standard library


def test_the_standard_library_comes_sorted_without_tests_and_other_peoples_packages():
    names = [file.name for file in source_files(config("stdlib"))]
    assert names == sorted(names)
    assert {"ast.py", "json/decoder.py", "collections/__init__.py"} <= set(names)
    assert all(name.endswith(".py") for name in names)
    folders = {part for name in names for part in Path(name).parts[:-1]}
    assert folders.isdisjoint({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


def test_the_standard_library_is_read_from_its_files():
    first = next(documents(config("stdlib")))
    assert (Path(sysconfig.get_path("stdlib")) / first.name).read_bytes() == first.text.encode()


# A folder


def test_a_folder_is_read_whole_in_order_of_names(tmp_path):
    write(tmp_path / "b.txt", "second")
    write(tmp_path / "a" / "z.md", "first, in a folder")
    write(tmp_path / "a.py", "between: a slash sorts after a dot")
    write(tmp_path / "Makefile", "capital letters first")
    write(tmp_path / "c" / "rows.jsonl", '{"text": "one"}\n{"text": "two"}\n')
    assert list(documents(config(tmp_path))) == [
        Document("Makefile", "capital letters first"),
        Document("a.py", "between: a slash sorts after a dot"),
        Document("a/z.md", "first, in a folder"),
        Document("b.txt", "second"),
        Document("c/rows.jsonl:1", "one"),
        Document("c/rows.jsonl:2", "two"),
    ]


def test_hidden_and_empty_files_are_passed_over(tmp_path):
    write(tmp_path / ".git" / "config", "hidden folder")
    write(tmp_path / ".env", "hidden file")
    write(tmp_path / "empty.txt", "")
    write(tmp_path / "empty.parquet", "")
    write(tmp_path / "kept.txt", "kept")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    assert list(documents(config(tmp_path))) == [Document("kept.txt", "kept")]


def test_a_text_comes_byte_for_byte(tmp_path):
    raw = "\ufeffline\r\nline\n\r\tnaïve 你好 \U0001f600 e\u0301\x0c".encode()
    write(tmp_path / "odd.txt", raw)
    (document,) = documents(config(tmp_path))
    assert document.text.encode() == raw


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"data.source is {tmp_path}, which holds no file to read"):
        documents(config(tmp_path))


def test_a_folder_without_a_usable_document_is_refused(tmp_path):
    write(tmp_path / "image.png", b"\x89PNG\0\0")
    write(tmp_path / "rows.jsonl", '\n{"text": ""}\n')
    with pytest.raises(ValueError, match=f"data.source is {tmp_path}, which holds no usable document"):
        list(documents(config(tmp_path, bad_files="skip")))


def test_a_missing_path_is_refused_before_the_first_document(tmp_path):
    with pytest.raises(ValueError, match=f"data.source is {tmp_path}/nowhere, which does not exist"):
        documents(config(tmp_path / "nowhere"))


def test_another_single_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"text\.txt; expected stdlib, a folder, a \.jsonl or a \.parquet file"):
        documents(config(write(tmp_path / "text.txt", "text")))


# Bad files

BAD = {
    "null.txt": (b"text\0text", "null.txt is binary"),
    "latin.txt": ("caf\u00e9".encode("latin-1"), "latin.txt is not UTF-8"),
    "wide.txt": ("text".encode("utf-16"), "wide.txt is binary"),
    "half.txt": ("\u4f60\u597d".encode()[:-1], "half.txt is not UTF-8"),
    "surrogate.txt": (b"\xed\xa0\x80", "surrogate.txt is not UTF-8"),
    "row.jsonl": (b'\n{"text": "caf\xe9"}\n', "row.jsonl:2 is not UTF-8"),
    "spelt.jsonl": (b'{"text": "a \\ud800 alone"}\n', "spelt.jsonl:1 is not UTF-8"),
    "zero.jsonl": (b'{"text": "a \\u0000"}\n', "zero.jsonl:1 is binary"),
}


@pytest.mark.parametrize(("name", "raw", "message"), [(name, *case) for name, case in BAD.items()])
def test_a_bad_file_is_named(name, raw, message, tmp_path):
    write(tmp_path / "a.txt", "fine")
    write(tmp_path / name, raw)
    found = documents(config(tmp_path))
    assert next(found).name == "a.txt"
    with pytest.raises(ValueError, match=f"{tmp_path}/{message}"):
        next(found)


def test_bad_files_are_skipped_and_told_where_asked(tmp_path):
    for name, (raw, _) in BAD.items():
        write(tmp_path / name, raw)
    write(tmp_path / "a.txt", "fine")
    write(tmp_path / "mixed.jsonl", b'{"text": "\xff"}\n{"text": "fine too", "other": "\xff"}\n')
    skipped = []
    found = list(documents(config(tmp_path, bad_files="skip"), skipped.append))
    assert found == [Document("a.txt", "fine"), Document("mixed.jsonl:2", "fine too")]
    assert skipped == [
        "half.txt", "latin.txt", "mixed.jsonl:1", "null.txt", "row.jsonl:2", "spelt.jsonl:1", "surrogate.txt",
        "wide.txt", "zero.jsonl:1",
    ]  # fmt: skip


# JSONL


def test_jsonl_gives_a_document_a_line_from_the_field_named(tmp_path):
    rows = [{"body": "caf\u00e9\n", "text": "no"}, {"body": ""}, {"body": "\U0001f600"}]
    path = write(tmp_path / "rows.jsonl", "\n\n".join(json.dumps(row) for row in rows))
    assert list(documents(config(path, text_field="body"))) == [
        Document("rows.jsonl:1", "caf\u00e9\n"),
        Document("rows.jsonl:5", "\U0001f600"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"body": "x"}', r"has the fields \['body'\]; expected data.text_field = 'text'"),
        ('{"text": 3}', "field 'text' is a int; expected a string"),
        ('{"text": null}', "field 'text' is a NoneType; expected a string"),
        ('["x"]', "is a list; expected an object"),
        ('{"text": "x"', "is not JSON"),
        ("text", "is not JSON"),
    ],
)
@pytest.mark.parametrize("bad_files", ["error", "skip"])
def test_a_wrong_line_names_file_and_line_and_is_never_skipped(line, message, bad_files, tmp_path):
    path = write(tmp_path / "rows.jsonl", f'{{"text": "fine"}}\n\n{line}\n')
    found = documents(config(path, bad_files=bad_files))
    next(found)
    with pytest.raises(ValueError, match=f"{path}, line 3:? {message}"):
        next(found)


# Parquet


@pytest.fixture
def write_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    def write_table(rows, kind="string", name="rows.parquet"):
        column = pyarrow.array(rows, getattr(pyarrow, kind)())
        parquet.write_table(pyarrow.table({"id": list(range(len(rows))), "body": column}), tmp_path / name)
        return tmp_path / name

    return write_table


@pytest.mark.parametrize("kind", ["string", "large_string"])
def test_parquet_gives_a_document_a_row_from_the_field_named(kind, write_parquet):
    rows = [f"row {index} caf\u00e9" for index in range(600)]  # more than are read at a time
    path = write_parquet([*rows[:1], "", *rows[1:]], kind)
    found = list(documents(config(path, text_field="body")))
    assert [document.text for document in found] == rows
    assert [document.name for document in found][:2] == ["rows.parquet:1", "rows.parquet:3"]


def test_parquet_and_text_are_read_from_one_folder(write_parquet, tmp_path):
    write_parquet(["in a table"])
    write(tmp_path / "a.txt", "beside it")
    found = list(documents(config(tmp_path, text_field="body")))
    assert found == [Document("a.txt", "beside it"), Document("rows.parquet:1", "in a table")]


def test_what_is_wrong_with_parquet_is_named(write_parquet, tmp_path):
    path = write_parquet(["one", None, "three"])
    with pytest.raises(ValueError, match=rf"{path} has the fields \['id', 'body'\]; expected data.text_field = 'text'"):
        list(documents(config(path)))
    with pytest.raises(ValueError, match=f"{path}: field 'id' is a int64; expected a string"):
        list(documents(config(path, text_field="id")))
    with pytest.raises(ValueError, match=f"{path}, row 2: field 'body' is null"):
        list(documents(config(path, text_field="body")))
    broken = write(tmp_path / "broken.parquet", b"not a table")
    with pytest.raises(ValueError, match=f"{broken} cannot be read as Parquet"):
        list(documents(config(broken)))
    broken.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=f"{broken} cannot be read as Parquet"):
        list(documents(config(broken)))


def test_a_bad_row_of_parquet_is_named_or_skipped(write_parquet):
    path = write_parquet(["fine", "nul \0", "fine too"])
    with pytest.raises(ValueError, match=f"{path}:2 is binary"):
        list(documents(config(path, text_field="body")))
    skipped = []
    found = documents(config(path, text_field="body", bad_files="skip"), skipped.append)
    assert [document.text for document in found] == ["fine", "fine too"]
    assert skipped == ["rows.parquet:2"]


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "rows.parquet", b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=rf"{path} is Parquet, which needs pyarrow; .*dsv4\[parquet\]"):
        list(documents(config(path)))


# The listing


def test_the_listing_changes_with_names_sizes_and_times_and_with_nothing_else(tmp_path):
    path = write(tmp_path / "pile" / "a.txt", "text")
    one = config(tmp_path / "pile")
    hashes = [listing_sha256(one)]
    assert listing_sha256(config(f"{tmp_path}/pile/../pile")) == hashes[0]
    write(tmp_path / "pile" / ".hidden", "text")
    assert listing_sha256(one) == hashes[0]

    os.utime(path, ns=(0, 1))
    hashes.append(listing_sha256(one))
    path.write_text("texts")
    os.utime(path, ns=(0, 1))
    hashes.append(listing_sha256(one))
    path.rename(path.with_name("b.txt"))
    hashes.append(listing_sha256(one))
    write(tmp_path / "pile" / "c.txt", "text")
    hashes.append(listing_sha256(one))
    assert len(set(hashes)) == 5
