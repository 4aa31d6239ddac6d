"""Small talk: every question has one reply, and what the model does not know it says."""

from collections import defaultdict

from dsv4.data.conversations.draw import Draw
from dsv4.data.conversations.talk import ABLE, OTHER, SAID, SELF, UNKNOWN, draw_talk


def drawn(count=600, **options):
    return [draw_talk(Draw("train", index, 0.1), **options) for index in range(count)]


def test_a_question_has_one_reply():
    replies = defaultdict(set)
    for said in drawn():
        replies[said.question].add(said.answer)
    assert all(len(found) == 1 for found in replies.values())
    assert {SELF, ABLE, UNKNOWN} < {answer for found in replies.values() for answer in found}
    questions = [question for asked, _ in SAID for question in asked]
    assert len(set(questions)) == len(questions)
    assert not set(questions) & set(OTHER)


def test_what_it_does_not_know_can_be_left_out():
    assert 200 < sum(said.answer == UNKNOWN for said in drawn()) < 340
    assert all(said.answer != UNKNOWN for said in drawn(other=False))


def test_every_blank_is_filled():
    assert all("{" not in said.question for said in drawn())
