"""Who owns which page: allocation, sharing by key, eviction.

Knows neither sequences nor what a page holds: callers present page ids, counts and keys.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class PagePool:
    """The host's account of the pages of the cache.

    A page has owners, or rests: empty, or still holding what its key names. Owners publish pages
    that are complete and will not be written again; whoever needs the same content acquires the
    page in place of computing its own. A published page that its last owner releases rests until
    somebody acquires it or its place is needed; those that rest longest are evicted first.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.num_evicted = 0
        self._empty = list(reversed(range(num_pages)))
        self._num_owners = [0] * num_pages
        self._key: list[bytes | None] = [None] * num_pages
        self._page: dict[bytes, int] = {}
        self._resting: OrderedDict[int, None] = OrderedDict()  # published, longest resting first

    @property
    def num_free(self) -> int:
        """Pages nobody owns, whatever they still hold."""
        return len(self._empty) + len(self._resting)

    @property
    def num_used(self) -> int:
        """Pages that have an owner."""
        return self.num_pages - self.num_free

    @property
    def num_resting(self) -> int:
        """Pages nobody owns that hold what their key names."""
        return len(self._resting)

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """The pages that hold the contents of the leading keys, as many as there are."""
        pages = []
        for key in keys:
            page = self._page.get(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def num_free_without(self, pages: Iterable[int]) -> int:
        """num_free once these pages are acquired."""
        return self.num_free - sum(page in self._resting for page in pages)

    def acquire(self, pages: Iterable[int]) -> None:
        """Adds an owner to published pages."""
        for page in pages:
            assert self._key[page] is not None, f"page {page} was never published"
            if not self._num_owners[page]:
                del self._resting[page]
            self._num_owners[page] += 1

    def allocate(self, num_pages: int) -> list[int]:
        """Takes pages for one owner to write; ask num_free first."""
        assert num_pages <= self.num_free, (num_pages, self.num_free)
        pages = [self._empty.pop() if self._empty else self._evict() for _ in range(num_pages)]
        for page in pages:
            self._num_owners[page] = 1
        return pages

    def publish(self, page: int, key: bytes) -> None:
        """Offers an owned page to others, unless another page already holds the same."""
        assert self._num_owners[page], f"page {page} is published without an owner"
        if self._page.setdefault(key, page) == page:
            self._key[page] = key

    def release(self, pages: Iterable[int]) -> None:
        """Gives up one owner's pages; of those that then rest, the first are evicted first."""
        for page in pages:
            assert self._num_owners[page], f"page {page} is released twice"
            self._num_owners[page] -= 1
            if self._num_owners[page]:
                continue
            if self._key[page] is None:
                self._empty.append(page)
            else:
                self._resting[page] = None

    def check_integrity(self, owned: Iterable[Sequence[int]]) -> None:
        """Checks the account against the pages that each owner says it has.

        Raises:
          AssertionError: a page is lost, owned by more than say so, owned and free, or misnamed.
        """
        num_owners = [0] * self.num_pages
        for pages in owned:
            assert len(pages) == len(set(pages)), f"owned twice by one: {sorted(pages)}"
            for page in pages:
                num_owners[page] += 1
        assert num_owners == self._num_owners, (num_owners, self._num_owners)
        free = {*self._empty, *self._resting}
        assert len(free) == self.num_free == num_owners.count(0), (free, num_owners)
        assert not any(num_owners[page] for page in free), (free, num_owners)
        assert not any(self._key[page] for page in self._empty), self._empty
        assert all(self._key[page] for page in self._resting), self._resting
        assert all(self._key[page] == key for key, page in self._page.items()), self._page
        num_named = self.num_pages - self._key.count(None)
        assert num_named == len(self._page), (num_named, self._page)

    def _evict(self) -> int:
        page, _ = self._resting.popitem(last=False)
        key = self._key[page]
        assert key is not None
        del self._page[key]
        self._key[page] = None
        self.num_evicted += 1
        return page
