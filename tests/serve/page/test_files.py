"""The files of the page: all there, all served, nothing inline and nothing from elsewhere."""

import re
from importlib import resources

import pytest

from dsv4.serve.page import CONTENT_SECURITY_POLICY, page_files

TEXTS = {path: content.decode() for path, (content, _) in page_files().items()}


def test_every_file_of_the_folder_is_served():
    """And nothing else is."""
    folder = resources.files("dsv4.serve.page")
    names = {item.name for item in folder.iterdir() if item.is_file() and not item.name.endswith((".py", ".pyc"))}
    assert {path.rpartition("/")[2] or "index.html" for path in TEXTS} == names


def test_every_file_that_is_named_is_there():
    """What the page loads and what modules import."""
    named = {f"/{name}" for name in re.findall(r'(?:src|href)="([^"]+)"', TEXTS["/"])}
    for text in TEXTS.values():
        named |= {f"/page/{name}" for name in re.findall(r'^import .* from "\./([^"]+)";', text, re.MULTILINE)}
    assert named == set(TEXTS) - {"/"}


def test_media_types():
    """A browser refuses a module or a style sheet under another type."""
    types = {path: media_type.partition(";")[0] for path, (_, media_type) in page_files().items()}
    expected = {"": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    assert types == {path: expected[path.partition(".")[2]] for path in types}


def test_nothing_inline():
    """The policy would refuse it: no style attribute, no handler attribute, no script or style with a body."""
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)|javascript:", TEXTS["/"])
    assert "unsafe" not in CONTENT_SECURITY_POLICY
    assert CONTENT_SECURITY_POLICY.startswith("default-src 'none';")


@pytest.mark.parametrize("path", [path for path in TEXTS if path.endswith(".js")])
def test_text_never_becomes_markup_or_code(path):
    """None of the doors through which a string turns into elements or runs."""
    doors = r"innerHTML|outerHTML|insertAdjacent|document\.write|DOMParser|\beval\b|new Function|setHTML|srcdoc"
    assert not re.search(doors, TEXTS[path])
