import pytest

from dsv4.text.markup import LONGEST_TAG, Tag, find_mark, read_tag
from dsv4.text.tokens import DSML


def read(text, is_all=False):
    return read_tag(text, 0, is_all=is_all)


def test_marks_and_what_may_become_one():
    assert find_mark(f"ab<c<{DSML}", 1) == (4, True)
    assert find_mark("a</think>", 0) == (1, True)
    assert find_mark("a</think", 0) == (1, False)
    assert find_mark(f"a<{DSML[:-1]}", 0) == (1, False)
    assert find_mark("a<b", 0) == (3, False)
    assert find_mark("<a<", 1) == (2, False)
    assert find_mark("", 0) == (0, False)


def test_tags_as_they_are_meant():
    assert read(f"<{DSML}tool_calls>x") == Tag(text=f"<{DSML}tool_calls>", kind="block", closes=False)
    assert read(f"</{DSML}parameter>") == Tag(text=f"</{DSML}parameter>", kind="parameter", closes=True)
    text = f'<{DSML}invoke name="a>b">'
    assert read(text + '">') == Tag(text=text, kind="call", closes=False, name="a>b")
    for value in (True, False):
        text = f'<{DSML}parameter name="k" string="{str(value).lower()}">'
        assert read(text) == Tag(text=text, kind="parameter", closes=False, name="k", is_string=value)
    assert read("</think>") == Tag(text="</think>", kind="think", closes=True)


@pytest.mark.parametrize(
    ("text", "kind", "name", "is_string"),
    [
        (f"<{DSML}toolcalls >", "block", "", None),
        (f"<{DSML}Function_Calls>", "block", "", None),
        (f"<{DSML}param name='k' string=TRUE>", "parameter", "k", True),
        (f'<{DSML}parameter string="false"  name = "k" type="int">', "parameter", "k", False),
        (f'<{DSML}parameter name="k">', "parameter", "k", None),
        (f'<{DSML}parameter name="a"b" string="true">', "parameter", 'a"b', True),
        (f'<{DSML}invoke name="a"b">', "call", 'a"b', None),
        (f"<{DSML}invoke>", "unknown", "", None),
        (f"<{DSML}other>", "unknown", "", None),
    ],
)
def test_tags_that_are_not_quite_right(text, kind, name, is_string):
    tag = read(text + "x")
    assert tag
    assert (tag.text, tag.kind, tag.name, tag.is_string) == (text, kind, name, is_string)
    for end in range(len(DSML) + 1, len(text)):
        assert read(text[:end]) is None


def test_a_tag_ends_as_soon_as_it_can():
    text = f'<{DSML}parameter name="a">'
    assert read(f'{text}x" string="true">') == Tag(text=text, kind="parameter", closes=False, name="a")


def test_no_tags_are_told_as_soon_as_can_be():
    mark = f"<{DSML}"
    no_tag = Tag(text=mark, kind="unknown", closes=False)
    assert read(mark) is None
    assert read(mark, is_all=True) == no_tag
    for text in (f"{mark} ", f"{mark}invoke,", f'{mark}invoke name="x\n{mark}', mark + "a" * (LONGEST_TAG - len(mark))):
        assert read(text[:-1]) is None
        assert read(text) == no_tag
