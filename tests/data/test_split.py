"""Duplicates leave, and a text's side depends on the text alone."""

import random

import pytest

from dsv4.data.sources import Document
from dsv4.data.split import split_documents

TEXTS = [f"document number {index}" for index in range(2000)]


def sides(texts, fraction=0.1):
    found = [Document(f"name {index}", text) for index, text in enumerate(texts)]
    return {document.text: split for split, document in split_documents(found, fraction)}


def test_the_first_of_equal_texts_is_kept():
    found = [
        Document("a", "one"),
        Document("b", "two"),
        Document("c", "one"),
        Document("d", "One"),
        Document("e", "one"),
    ]
    duplicates = []
    kept = [document for _, document in split_documents(found, 0.3, duplicates.append)]
    assert [document.name for document in kept] == ["a", "b", "d"]
    assert duplicates == ["c", "e"]


def test_a_side_depends_on_neither_order_nor_the_other_documents():
    all_sides = sides(TEXTS)
    shuffled = random.Random(5).sample(TEXTS, 700)
    assert sides(shuffled) == {text: all_sides[text] for text in shuffled}


def test_a_larger_fraction_only_adds_to_validation():
    small, large = sides(TEXTS, 0.1), sides(TEXTS, 0.3)
    assert all(large[text] == "validation" for text in TEXTS if small[text] == "validation")


@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.5])
def test_validation_gets_its_share(fraction):
    share = sum(side == "validation" for side in sides(TEXTS, fraction).values()) / len(TEXTS)
    assert abs(share - fraction) < 4 * (fraction * (1 - fraction) / len(TEXTS)) ** 0.5  # four standard deviations


def test_the_ends_of_the_fraction():
    assert set(sides(TEXTS, 0.0).values()) == {"train"}


def test_sides_are_the_same_on_every_machine_and_for_ever():
    assert [index for index, text in enumerate(TEXTS) if sides([text], 0.01)[text] == "validation"] == VALIDATION


VALIDATION = [
    2,
    152,
    199,
    234,
    608,
    611,
    727,
    919,
    1132,
    1184,
    1250,
    1257,
    1282,
    1360,
    1459,
    1494,
    1552,
    1590,
    1881,
    1886,
    1933,
]
