"""Which pages of the KV cache, or slots of recurrent states, are free, and how many hold on to the others."""

from __future__ import annotations


class PagePool:
    """Pages first .. count - 1 with reference counts. Page 0 of the KV cache is never given out: padding rows write there."""

    def __init__(self, count: int, first: int = 1):
        if count <= first:
            raise ValueError(f"a pool needs more than {first} pages, not {count}")
        self.count, self.first = count, first
        self._free = list(range(count - 1, first - 1, -1))
        self._references = [0] * count

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def usable(self) -> int:
        return self.count - self.first

    def take(self) -> int:
        """A free page with one reference. IndexError if there is none: ask `free` first."""
        page = self._free.pop()
        self._references[page] = 1
        return page

    def hold(self, page: int) -> None:
        if self._references[page] < 1:
            raise ValueError(f"page {page} is free")
        self._references[page] += 1

    def release(self, page: int) -> None:
        if self._references[page] < 1:
            raise ValueError(f"page {page} is free already")
        self._references[page] -= 1
        if self._references[page] == 0:
            self._free.append(page)

    def references(self, page: int) -> int:
        return self._references[page]
