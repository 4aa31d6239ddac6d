"""Files appear whole or not at all."""

import pytest

from dsv4.config.files import write_then_rename


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("old")

    def fail(partial):
        partial.write_text("half")
        raise ValueError("no room")

    with pytest.raises(ValueError, match="no room"):
        write_then_rename(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_name_holds_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("old")

    def write(partial):
        partial.write_text("new")
        assert path.read_text() == "old"

    write_then_rename(path, write)
    assert path.read_text() == "new"
