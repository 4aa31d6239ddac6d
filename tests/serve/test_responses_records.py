"""The files of background responses."""

import os

import pytest

from dsv4.serve.responses_records import Record, Records


def new_id(number):
    return f"resp_{number:024x}"


def test_only_ids_reach_the_folder(tmp_path):
    records = Records(tmp_path / "responses")
    (tmp_path / "x.json").write_text("{}")
    assert records.read("../x") is None
    with pytest.raises(AssertionError, match="expected resp_ and 24 digits"):
        records.remove("../x")


def test_the_oldest_ends_go_first(tmp_path):
    records = Records(tmp_path / "responses", max_finished=2)
    common = {"key": "", "created": 1, "request": {}, "prompt_ids": [], "seed": 1}
    for number in (4, 1, 3, 2):
        records.write(Record(id=new_id(number), response={} if number != 4 else None, **common))
        os.utime(tmp_path / "responses" / f"{new_id(number)}.json", ns=(0, 1000 - number))
    records.prune({new_id(4)})
    assert sorted(path.stem for path in (tmp_path / "responses").iterdir()) == [new_id(number) for number in (1, 2, 4)]


def test_no_one_else_may_read_the_records(tmp_path):
    Records(tmp_path / "responses")
    assert (tmp_path / "responses").stat().st_mode & 0o777 == 0o700
