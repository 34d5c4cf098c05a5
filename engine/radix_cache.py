"""Token prefix -> pages and checkpoints. A tree whose edges are pages of tokens, so that a prefix is found to the token.

A node is one page: `tokens` are the ones whose keys and values it holds. Full nodes may have children; a node that is not full is a
leaf. What a sequence shares of a page that it will write further is copied by the caller ("copy on write").

For a model with recurrent layers, a prefix is usable up to its deepest checkpoint: the slot that holds the state behind some token.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

from inference_pio.engine.page_pool import PagePool


@dataclass(eq=False)
class Checkpoint:
    slot: int
    used: int


@dataclass(eq=False)
class Node:
    tokens: tuple[int, ...]
    page: int
    parent: Node | None
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)   # by tokens
    used: int = 0
    checkpoints: dict[int, Checkpoint] = field(default_factory=dict)      # by how many of `tokens` lie before


class Match(NamedTuple):
    """The longest prefix that can be taken up: whole pages, and the first `partial` tokens of one more page. slot: the state behind it,
    or -1. known: tokens whose keys and values are cached; what of them lies behind the prefix has no state to go on from."""

    pages: list[int]
    partial_page: int
    partial: int
    known: int
    slot: int = -1


class RadixCache:
    """Holds one reference on the page of every node, and one on every checkpoint's slot. slots is None for models without states."""

    def __init__(self, pool: PagePool, page_size: int, slots: PagePool | None = None):
        self._pool, self._page_size, self._slots = pool, page_size, slots
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
        size, node, at, path = self._page_size, self._root, 0, []
        now = next(self._clock)
        while True:
            child = node.children.get(tuple(tokens[at:at + size]))
            if child is None or len(child.tokens) < size:
                break
            child.used = now
            path.append(child)
            node, at = child, at + size
        best, most = None, 0
        rest = tuple(tokens[at:at + size])
        for child in node.children.values():
            common = _common(child.tokens, rest)
            if common > most:
                best, most = child, common
        if self._slots is not None:
            return self._match_checkpoint(tokens, path, at + most, now)
        pages = [node.page for node in path]
        if best is None:
            return Match(pages, 0, 0, at)
        best.used = now
        return Match(pages, best.page, most, at + most)

    def _match_checkpoint(self, tokens: Sequence[int], path: list[Node], known: int, now: int) -> Match:
        """The deepest checkpoint in the matched tokens. It may stand in a page that parts from the path further on."""
        size = self._page_size
        for depth in range(len(path), -1, -1):
            part = tuple(tokens[depth * size:(depth + 1) * size])
            parent = path[depth - 1] if depth else self._root
            found = [(offset, id(node), node) for node in parent.children.values() if node.checkpoints
                     for common in (_common(node.tokens, part),) for offset in node.checkpoints if offset <= common]
            if not found:
                continue
            offset, _, node = max(found)
            node.used = node.checkpoints[offset].used = now
            pages, slot = [n.page for n in path[:depth]], node.checkpoints[offset].slot
            return Match([*pages, node.page], 0, 0, known, slot) if offset == size else Match(pages, node.page, offset, known, slot)
        return Match([], 0, 0, known)

    def insert(self, tokens: Sequence[int], pages: Sequence[int], states: Iterable[tuple[int, int]] = ()) -> None:
        """tokens are cached in pages, which the caller holds, as it does the slots of states (position, slot). What the tree has
        already stays as it is."""
        ends = dict(states)
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
            for offset in range(1, len(part) + 1) if ends else ():
                if (slot := ends.get(index * size + offset)) is not None and offset not in child.checkpoints:
                    self._slots.hold(slot)
                    child.checkpoints[offset] = Checkpoint(slot, now)
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
            for checkpoint in node.checkpoints.values():
                self._slots.release(checkpoint.slot)
            dropped += 1
            parent = node.parent
            if parent is not self._root and not parent.children and self._pool.references(parent.page) == 1:
                heapq.heappush(leaves, (parent.used, id(parent), parent))
        return dropped

    @property
    def evictable_checkpoints(self) -> int:
        """Checkpoints that only the tree holds."""
        return sum(self._slots.references(c.slot) == 1 for node in list(self._nodes) for c in list(node.checkpoints.values()))

    def evict_checkpoint(self) -> bool:
        """Drop the checkpoint that is worth least: long unused, and cheap to compute again from the one before it."""
        worst, least = None, 0.0
        now = next(self._clock)
        for node in self._nodes:
            for offset, checkpoint in node.checkpoints.items():
                if self._slots.references(checkpoint.slot) > 1:
                    continue
                worth = self._gap(node, offset) / (now - checkpoint.used)
                if worst is None or worth < least:
                    worst, least = (node, offset), worth
        if worst is None:
            return False
        node, offset = worst
        self._slots.release(node.checkpoints.pop(offset).slot)
        return True

    def drop_checkpoint(self, slot: int) -> None:
        for node in self._nodes:
            for offset in [o for o, checkpoint in node.checkpoints.items() if checkpoint.slot == slot]:
                del node.checkpoints[offset]
                self._slots.release(slot)

    def _gap(self, node: Node, offset: int) -> int:
        """Tokens between a checkpoint and the one before it on its path."""
        earlier = [o for o in node.checkpoints if o < offset]
        if earlier:
            return offset - max(earlier)
        gap, node = offset, node.parent
        while node is not self._root and not node.checkpoints:
            gap, node = gap + self._page_size, node.parent
        return gap + (self._page_size - max(node.checkpoints) if node.checkpoints else 0)

    def clear(self) -> None:
        self.evict(len(self._nodes))


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    n = 0
    for x, y in zip(a, b):
        if x != y:
            return n
        n += 1
    return n
