"""Who owns which page: reservation, allocation, release.

Knows neither sequences nor what a page holds: callers present page ids and counts.
"""

from __future__ import annotations

from collections.abc import Iterable


class PagePool:
    """The host's account of the pages of the cache.

    A reservation is a promise of a number of pages; allocation turns part of it into page ids.
    Reserving the worst case before the first allocation means that `allocate` cannot fail.
    `release` says that one owner is done with its pages, not that they are free from then on:
    whether a page then rests in the free list is the pool's own affair.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(reversed(range(num_pages)))
        self._is_used = bytearray(num_pages)
        self._num_reserved = 0

    @property
    def num_free(self) -> int:
        """Pages nobody owns, promised ones included."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Pages that have an owner."""
        return self.num_pages - len(self._free)

    @property
    def num_reserved(self) -> int:
        """Pages promised but not yet allocated."""
        return self._num_reserved

    def can_reserve(self, num_pages: int) -> bool:
        """Whether so many pages can be promised on top of all promises made."""
        return num_pages <= len(self._free) - self._num_reserved

    def reserve(self, num_pages: int) -> None:
        """Promises pages; ask `can_reserve` first."""
        assert self.can_reserve(num_pages), (num_pages, self.num_free, self._num_reserved)
        self._num_reserved += num_pages

    def allocate(self, num_pages: int) -> list[int]:
        """Takes pages out of an earlier reservation and returns their ids."""
        assert 0 < num_pages <= self._num_reserved, (num_pages, self._num_reserved)
        self._num_reserved -= num_pages
        pages = [self._free.pop() for _ in range(num_pages)]
        for page in pages:
            self._is_used[page] = True
        return pages

    def release(self, pages: Iterable[int], num_unallocated: int) -> None:
        """Gives up an owner's pages, and what is left of its reservation."""
        assert num_unallocated <= self._num_reserved, (num_unallocated, self._num_reserved)
        self._num_reserved -= num_unallocated
        for page in pages:
            assert self._is_used[page], f"page {page} is released twice"
            self._is_used[page] = False
            self._free.append(page)

    def check_integrity(self, owned: Iterable[Iterable[int]]) -> None:
        """Checks the account against the pages that each owner says it has.

        Raises:
          AssertionError: a page is lost, owned twice, owned and free, or promised twice.
        """
        pages = [page for owner in owned for page in owner]
        assert len(pages) == len(set(pages)), f"owned twice: {sorted(pages)}"
        assert sorted(pages + self._free) == list(range(self.num_pages)), (pages, self._free)
        assert all(self._is_used[page] for page in pages), pages
        assert sum(self._is_used) == len(pages), (sum(self._is_used), len(pages))
        assert 0 <= self._num_reserved <= self.num_free, (self._num_reserved, self.num_free)
