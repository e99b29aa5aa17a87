"""Promises of the page pool."""

from __future__ import annotations

import random

import pytest

from glm_jax.engine.pages import PagePool


def key(number: int) -> bytes:
    return b"%d" % number


def published(pool: PagePool, *numbers: int) -> list[int]:
    """Pages of one owner, under these keys."""
    pages = pool.allocate(len(numbers))
    for page, number in zip(pages, numbers, strict=True):
        pool.publish(page, key(number))
    return pages


def test_random_owners_never_lose_a_page_or_write_a_shared_one():
    rng = random.Random(0)
    pool = PagePool(13)
    holds: dict[int, int] = {}  # page -> the number that was written to it last
    owners: list[tuple[list[int], list[int]]] = []  # pages, and the numbers they should hold
    num_shared = 0
    for _ in range(4000):
        numbers = [rng.randrange(3) * 10 + depth for depth in range(rng.randint(1, 6))]
        shared = pool.match([key(number) for number in numbers])
        missing = len(numbers) - len(shared)
        if rng.random() < 0.5 and missing <= pool.num_free_without(shared):
            pool.acquire(shared)
            fresh = pool.allocate(missing)
            num_shared += len(shared)
            for page, number in zip(fresh, numbers[len(shared) :], strict=True):
                holds[page] = number
                if rng.random() < 0.8:
                    pool.publish(page, key(number))
            owners.append((shared + fresh, numbers))
        elif owners:
            pages, _ = owners.pop(rng.randrange(len(owners)))
            pool.release(reversed(pages))
        pool.check_integrity([pages for pages, _ in owners])
        for pages, numbers in owners:
            assert [holds[page] for page in pages] == numbers
        assert pool.num_used == len({page for pages, _ in owners for page in pages})
    assert num_shared > 500 and pool.num_evicted > 100


def test_a_released_page_is_found_again_until_its_place_is_needed():
    pool = PagePool(3)
    pages = published(pool, 1, 2)
    pool.release(reversed(pages))
    assert (pool.num_used, pool.num_free, pool.num_resting) == (0, 3, 2)
    assert pool.match([key(1), key(2), key(3)]) == pages
    pool.allocate(1)
    assert pool.match([key(1), key(2)]) == pages, "an empty page goes first"
    pool.allocate(1)
    assert pool.match([key(1), key(2)]) == pages[:1], "of a chain, the end goes first"
    assert pool.num_evicted == 1


def test_the_page_that_rested_longest_is_evicted_first():
    pool = PagePool(3)
    first, second, third = (published(pool, number) for number in (1, 2, 3))
    for pages in (first, second, third):
        pool.release(pages)
    pool.acquire(first)
    pool.release(first)
    assert pool.allocate(1) == second
    assert pool.allocate(1) == third


def test_a_shared_page_rests_only_when_its_last_owner_lets_go():
    pool = PagePool(2)
    pages = published(pool, 1)
    pool.acquire(pages)
    pool.release(pages)
    assert pool.num_used == 1
    pool.check_integrity([pages])
    pool.release(pages)
    assert pool.num_used == 0


def test_what_is_published_twice_is_kept_once():
    pool = PagePool(4)
    first, second = published(pool, 1), published(pool, 1)
    assert pool.match([key(1)]) == first
    pool.release(second)
    assert pool.num_resting == 0, "nobody would find it"
    pool.check_integrity([first])


def test_pages_that_rest_count_as_free_but_not_beside_those_that_acquire_them():
    pool = PagePool(3)
    pages = published(pool, 1, 2)
    pool.release(pages)
    assert pool.num_free_without([]) == 3
    assert pool.num_free_without(pages) == 1
    pool.acquire(pages)
    assert pool.num_free_without(pages) == 1


def test_more_pages_than_are_free_are_refused():
    pool = PagePool(4)
    pool.allocate(3)
    with pytest.raises(AssertionError):
        pool.allocate(2)


def test_releasing_a_page_twice_is_refused():
    pool = PagePool(2)
    pages = pool.allocate(1)
    pool.release(pages)
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(pages)


def test_an_unpublished_page_cannot_be_acquired():
    pool = PagePool(2)
    with pytest.raises(AssertionError, match="never published"):
        pool.acquire(pool.allocate(1))


@pytest.mark.parametrize("claims", [[[]], [[0, 1], [1]], [[0, 1, 2]], [[0, 0, 1]]])
def test_check_integrity_sees_lost_shared_and_invented_pages(claims: list[list[int]]):
    pool = PagePool(3)
    assert sorted(pool.allocate(2)) == [0, 1]
    pool.check_integrity([[0], [1]])
    with pytest.raises(AssertionError):
        pool.check_integrity(claims)
