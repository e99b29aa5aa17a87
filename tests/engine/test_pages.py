"""Promises of the page pool."""

from __future__ import annotations

import random

import pytest

from glm_jax.engine.pages import PagePool


def test_random_owners_never_share_or_lose_a_page():
    rng = random.Random(0)
    pool = PagePool(13)
    owners: list[tuple[list[int], int]] = []  # pages, and what is left of the reservation
    for _ in range(2000):
        wanted = rng.randint(1, 6)
        if rng.random() < 0.5 and pool.can_reserve(wanted):
            pool.reserve(wanted)
            owners.append(([], wanted))
        elif owners:
            pages, left = owners.pop(rng.randrange(len(owners)))
            if left and rng.random() < 0.7:
                taken = rng.randint(1, left)
                owners.append((pages + pool.allocate(taken), left - taken))
            else:
                pool.release(pages, left)
        pool.check_integrity(pages for pages, _ in owners)
        assert pool.num_used == sum(len(pages) for pages, _ in owners)
        assert pool.num_reserved == sum(left for _, left in owners)


def test_a_promise_is_kept_whatever_others_ask_for():
    pool = PagePool(4)
    pool.reserve(3)
    assert not pool.can_reserve(2)
    pool.reserve(1)
    assert len(set(pool.allocate(3))) == 3
    assert pool.num_free == pool.num_reserved == 1


def test_more_than_was_promised_is_refused():
    pool = PagePool(4)
    pool.reserve(1)
    with pytest.raises(AssertionError):
        pool.allocate(2)


def test_releasing_a_page_twice_is_refused():
    pool = PagePool(2)
    pool.reserve(1)
    pages = pool.allocate(1)
    pool.release(pages, 0)
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(pages, 0)


@pytest.mark.parametrize("claims", [[[]], [[0, 1], [1]], [[0, 1, 2]]])
def test_check_integrity_sees_lost_shared_and_invented_pages(claims: list[list[int]]):
    pool = PagePool(3)
    pool.reserve(2)
    assert sorted(pool.allocate(2)) == [0, 1]
    pool.check_integrity([[0], [1]])
    with pytest.raises(AssertionError):
        pool.check_integrity(claims)
