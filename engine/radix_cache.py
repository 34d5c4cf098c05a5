"""Token prefix -> pages and checkpoints. A tree whose edges are pages of tokens, so that a prefix is found to the token.

A node is one page: `tokens` are the ones whose keys and values it holds. Full nodes may have children; a node that is not full is a
leaf. What a sequence shares of a page that it will write further is copied by the caller ("copy on write").

For a model with recurrent layers, a prefix is usable up to its deepest checkpoint: the slot that holds the state behind some token. Slots
are of two tiers, on the device and in the host's memory.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

from inference_pio.engine.page_pool import PagePool


DEVICE, HOST = 0, 1   # tiers


@dataclass(eq=False)
class Checkpoint:
    slot: int
    used: int
    tier: int = DEVICE


@dataclass(eq=False)
class Node:
    tokens: tuple[int, ...]
    page: int
    parent: Node | None
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)   # by tokens
    used: int = 0
    checkpoints: dict[int, Checkpoint] = field(default_factory=dict)      # by how many of `tokens` lie before


class Match(NamedTuple):
    """The longest prefix that can be taken up: whole pages, and the first `partial` tokens of one more page; the state behind it. known:
    tokens whose keys and values are cached; what of them lies behind the prefix has no state to go on from."""

    pages: list[int]
    partial_page: int
    partial: int
    known: int
    checkpoint: Checkpoint | None = None


class Worst(NamedTuple):
    """The checkpoint that is worth least: tokens to compute again, by how long it was not used."""

    worth: float
    gap: int           # tokens from the checkpoint before it
    node: Node
    offset: int


class RadixCache:
    """Holds one reference on the page of every node, and one on every checkpoint's slot. slots: of states on the device, None for models
    without; host: of states in the host's memory, where there are any."""

    def __init__(self, pool: PagePool, page_size: int, slots: PagePool | None = None, host: PagePool | None = None):
        self._pool, self._page_size, self._slots, self._tiers = pool, page_size, slots, (slots, host)
        self._root = Node((), 0, None)
        self._clock = count(1)
        self._nodes: set[Node] = set()
        self._marked: set[Node] = set()   # those with checkpoints

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
            pages, checkpoint = [n.page for n in path[:depth]], node.checkpoints[offset]
            whole = offset == size
            return Match([*pages, node.page], 0, 0, known, checkpoint) if whole else Match(pages, node.page, offset, known, checkpoint)
        return Match([], 0, 0, known)

    def insert(self, tokens: Sequence[int], pages: Sequence[int], states: Iterable[tuple[int, int]] = ()) -> None:
        """tokens are cached in pages, which the caller holds, as it does the slots of states (position, slot). What the tree has
        already stays as it is."""
        size, node, now = self._page_size, self._root, next(self._clock)
        ends: dict[int, list[tuple[int, int]]] = {}   # page -> (tokens of it before the state, slot)
        for position, slot in states:
            ends.setdefault((position - 1) // size, []).append(((position - 1) % size + 1, slot))
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
            for offset, slot in ends.get(index, ()):
                self._keep(child, offset, slot, now)
            if len(part) < size:
                return
            node = child

    def _keep(self, node: Node, offset: int, slot: int, now: int) -> None:
        """A state on the device takes the place of its copy in the host's memory."""
        known = node.checkpoints.get(offset)
        if known is not None and known.tier == DEVICE:
            return
        if known is not None:
            self.drop(node, offset)
        self._slots.hold(slot)
        node.checkpoints[offset] = Checkpoint(slot, now)
        self._marked.add(node)

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
            for offset in list(node.checkpoints):
                self.drop(node, offset)
            dropped += 1
            parent = node.parent
            if parent is not self._root and not parent.children and self._pool.references(parent.page) == 1:
                heapq.heappush(leaves, (parent.used, id(parent), parent))
        return dropped

    # ---- checkpoints -----------------------------------------------------------------------------------------------------

    def evictable_checkpoints(self, tier: int) -> int:
        """Checkpoints of a tier that only the tree holds. May be asked by any thread."""
        pool = self._tiers[tier]
        return sum(c.tier == tier and pool.references(c.slot) == 1 for node in list(self._marked) for c in list(node.checkpoints.values()))

    def worst_checkpoint(self, tier: int) -> Worst | None:
        """The one to part with: long unused, and cheap to compute again from the one before it. None if sequences hold them all."""
        now, worst = next(self._clock), None
        for node in self._marked:
            for offset, checkpoint in node.checkpoints.items():
                if checkpoint.tier != tier or self._tiers[tier].references(checkpoint.slot) > 1:
                    continue
                gap = self._gap(node, offset)
                worth = gap / (now - checkpoint.used)
                if worst is None or worth < worst.worth:
                    worst = Worst(worth, gap, node, offset)
        return worst

    def drop(self, node: Node, offset: int) -> None:
        checkpoint = node.checkpoints.pop(offset)
        if not node.checkpoints:
            self._marked.discard(node)
        self._tiers[checkpoint.tier].release(checkpoint.slot)

    def move_to_host(self, node: Node, offset: int, slot: int) -> None:
        """The state was copied to a slot in the host's memory, whose reference goes to the tree."""
        checkpoint = node.checkpoints[offset]
        self._slots.release(checkpoint.slot)
        checkpoint.slot, checkpoint.tier = slot, HOST

    def drop_checkpoint(self, slot: int) -> None:
        """Of the device."""
        for node in list(self._marked):
            for offset in [o for o, c in node.checkpoints.items() if c.slot == slot and c.tier == DEVICE]:
                self.drop(node, offset)

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
