"""Token prefix -> pages. A tree whose edges are pages of tokens, so that a prefix is found to the token.

A node is one page: `tokens` are the ones whose keys and values it holds. Full nodes may have children; a node that is not full is a
leaf. What a sequence shares of a page that it will write further is copied by the caller ("copy on write").
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

from inference_pio.engine.page_pool import PagePool


@dataclass(eq=False)
class Node:
    tokens: tuple[int, ...]
    page: int
    parent: Node | None
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)   # by tokens
    used: int = 0


class Match(NamedTuple):
    """The longest cached prefix: whole pages, and the first `partial` tokens of one more page."""

    pages: list[int]
    partial_page: int
    partial: int


class RadixCache:
    """Holds one reference on the page of every node."""

    def __init__(self, pool: PagePool, page_size: int):
        self._pool, self._page_size = pool, page_size
        self._root = Node((), 0, None)
        self._clock = count(1)
        self._nodes: set[Node] = set()

    @property
    def pages(self) -> int:
        """Pages in the tree, in use by sequences or not."""
        return len(self._nodes)

    @property
    def evictable(self) -> int:
        """Pages that only the tree holds. May be asked by any thread: the list is made in one go."""
        return sum(self._pool.references(node.page) == 1 for node in list(self._nodes))

    def match(self, tokens: Sequence[int]) -> Match:
        """The longest prefix of tokens in the tree. It gives no references: hold the pages before anything else is done."""
        size, node, at, pages = self._page_size, self._root, 0, []
        now = next(self._clock)
        while True:
            child = node.children.get(tuple(tokens[at:at + size]))
            if child is None or len(child.tokens) < size:
                break
            child.used = now
            pages.append(child.page)
            node, at = child, at + size
        best, most = None, 0
        rest = tuple(tokens[at:at + size])
        for child in node.children.values():
            common = _common(child.tokens, rest)
            if common > most:
                best, most = child, common
        if best is None:
            return Match(pages, 0, 0)
        best.used = now
        return Match(pages, best.page, most)

    def insert(self, tokens: Sequence[int], pages: Sequence[int]) -> None:
        """tokens are cached in pages, which the caller holds. What the tree has already stays as it is."""
        size, node, now = self._page_size, self._root, next(self._clock)
        for index, page in enumerate(pages):
            part = tuple(tokens[index * size:(index + 1) * size])
            if not part:
                return
            child = node.children.get(part) or self._grow(node, part, page)
            if child is None:
                child = Node(part, page, node)
                node.children[part] = child
                self._nodes.add(child)
                self._pool.hold(page)
            child.used = now
            if len(part) < size:
                return
            node = child

    def _grow(self, node: Node, part: tuple[int, ...], page: int) -> Node | None:
        """The leaf of the same page, when its sequence has written it further since."""
        for child in node.children.values():
            if child.page == page and part[:len(child.tokens)] == child.tokens:
                del node.children[child.tokens]
                child.tokens = part
                node.children[part] = child
                return child
        return None

    def evict(self, wanted: int) -> int:
        """Drop the leaves that were used longest ago and that no sequence holds, until `wanted` pages are free; how many were dropped."""
        leaves = [(node.used, id(node), node) for node in self._nodes if not node.children and self._pool.references(node.page) == 1]
        heapq.heapify(leaves)
        dropped = 0
        while leaves and dropped < wanted:
            _, _, node = heapq.heappop(leaves)
            del node.parent.children[node.tokens]
            self._nodes.remove(node)
            self._pool.release(node.page)
            dropped += 1
            parent = node.parent
            if parent is not self._root and not parent.children and self._pool.references(parent.page) == 1:
                heapq.heappush(leaves, (parent.used, id(parent), parent))
        return dropped

    def clear(self) -> None:
        self.evict(len(self._nodes))


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    n = 0
    for x, y in zip(a, b):
        if x != y:
            return n
        n += 1
    return n
