"""Pages: who uses which, what is free, and which goes first."""

from __future__ import annotations

import random

import pytest

from dsv4.engine.pages import PagePool, pages_of


def kept_pool(num_pages: int) -> tuple[PagePool, list[int]]:
    """A pool, and the list of pages that it gives away though they were kept, as it grows."""
    pool, forgotten = PagePool(num_pages), []

    def forget(page):
        forgotten.append(page)
        pool.unmark(page)

    pool.forget = forget
    return pool, forgotten


def take(pool: PagePool, n: int) -> list[int]:
    pages = pool.take(n)
    assert pages is not None
    pool.assert_consistent()
    return pages


def keep(pool: PagePool, pages: list[int]) -> None:
    for page in pages:
        pool.mark(page)
    pool.release_all(pages)
    pool.assert_consistent()


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (127, 1), (128, 1), (129, 2), (2**20, 8192)])
def test_tokens_take_whole_pages(tokens, pages):
    assert pages_of(tokens) == pages


def test_all_or_none_are_given():
    pool = PagePool(5)
    first = take(pool, 3)
    assert pool.take(3) is None
    assert pool.num_free == 2
    second = take(pool, 2)
    assert sorted(first + second) == [0, 1, 2, 3, 4]
    assert pool.num_free == 0
    assert pool.take(0) == []
    assert pool.take(1) is None


def test_a_page_is_free_when_its_last_user_releases_it():
    pool = PagePool(2)
    (page,) = take(pool, 1)
    pool.share(page)
    pool.share(page)
    assert pool.users(page) == 3
    for left in (2, 1):
        pool.release(page)
        assert (pool.users(page), pool.num_free) == (left, 1)
    pool.release(page)
    assert (pool.users(page), pool.num_free, pool.num_kept) == (0, 2, 0)
    pool.assert_consistent()


def test_a_marked_page_is_kept_and_used_again():
    pool, forgotten = kept_pool(3)
    pages = take(pool, 2)
    keep(pool, pages)
    assert (pool.num_free, pool.num_kept) == (3, 2)
    pool.share(pages[0])
    assert (pool.num_free, pool.num_kept, pool.is_kept(pages[0])) == (2, 1, False)
    assert sorted(take(pool, 2)) == sorted({0, 1, 2} - {pages[0]})  # the one in use stays
    assert pool.take(1) is None
    assert forgotten == [pages[1]]


def test_free_pages_go_before_kept_ones_and_of_these_the_oldest():
    pool, forgotten = kept_pool(6)
    a, b = take(pool, 2), take(pool, 2)
    keep(pool, b)
    keep(pool, a)
    take(pool, 2)
    assert forgotten == []
    take(pool, 3)
    assert forgotten == [b[1], b[0], a[1]]  # the deepest of each first


def test_a_use_makes_a_page_the_newest():
    pool, forgotten = kept_pool(4)
    a, b = take(pool, 2), take(pool, 2)
    keep(pool, a)
    keep(pool, b)
    pool.share(a[0])
    pool.release(a[0])
    take(pool, 4)
    assert forgotten == [a[1], b[1], b[0], a[0]]


def test_an_unmarked_page_is_free_at_once_or_when_released():
    pool, forgotten = kept_pool(2)
    kept, used = take(pool, 2)
    pool.mark(used)
    keep(pool, [kept])
    pool.unmark(kept)
    pool.unmark(used)
    assert (pool.num_free, pool.num_kept) == (1, 0)
    pool.release(used)
    assert (pool.num_free, pool.num_kept) == (2, 0)
    take(pool, 2)
    assert forgotten == []


def test_one_page_given_away_may_free_others():
    """What follows a forgotten page is of no use either, and the index says so."""
    pool, forgotten = kept_pool(3)
    pages = take(pool, 3)
    keep(pool, pages)

    def forget_all(page):
        forgotten.append(page)
        for each in pages:
            pool.unmark(each)

    pool.forget = forget_all
    assert len(take(pool, 2)) == 2
    assert len(forgotten) == 1
    assert (pool.num_free, pool.num_kept) == (1, 0)


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="num_pages is 0; expected at least 1"):
        PagePool(0)
    pool = PagePool(2)
    with pytest.raises(ValueError, match="n is -1; expected 0 or more"):
        pool.take(-1)
    for call in (pool.release, pool.share, pool.mark):
        with pytest.raises(AssertionError, match="page 0 "):
            call(0)
    (page,) = take(pool, 1)
    pool.release(page)
    with pytest.raises(AssertionError, match=f"page {page} has no user"):
        pool.release(page)


def test_any_sequence_of_uses_agrees_with_a_list_of_users():
    """The model: users of each page as a list, marks as a set, kept pages in the order of their last release."""
    rng = random.Random(1)
    pool, forgotten = kept_pool(7)
    users, marked, order = [0] * 7, set(), []
    for _ in range(20_000):
        page = rng.randrange(7)
        match rng.choice(["take", "share", "release", "release", "mark", "unmark"]):
            case "take":
                n = rng.randrange(4)
                free = [p for p in range(7) if not users[p]]
                pages = pool.take(n)
                assert (pages is None) == (n > len(free))
                if pages is not None:
                    gone = order[: max(0, n - (len(free) - len(order)))]
                    assert forgotten == gone
                    order = order[len(gone) :]
                    marked -= set(gone)
                    assert set(gone) <= set(pages) <= set(free) - set(order)
                    for taken in pages:
                        users[taken] = 1
                forgotten.clear()
            case "share" if users[page] or page in order:
                pool.share(page)
                users[page] += 1
                order = [p for p in order if p != page]
            case "release" if users[page]:
                pool.release(page)
                users[page] -= 1
                order += [page] if page in marked and not users[page] else []
            case "mark" if users[page]:
                pool.mark(page)
                marked.add(page)
            case "unmark":
                pool.unmark(page)
                marked.discard(page)
                order = [p for p in order if p != page]
        pool.assert_consistent()
        assert [pool.users(p) for p in range(7)] == users
        assert (pool.num_free, pool.num_kept) == (users.count(0), len(order))
        assert {p for p in range(7) if pool.is_marked(p)} == marked
        assert {p for p in range(7) if pool.is_kept(p)} == set(order)
