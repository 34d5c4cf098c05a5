"""Recurrent states of sequences: which slots they are in, and at which tokens they are kept for later prompts.

On the device a state is never copied: a step reads one slot and writes another, so keeping a state is not writing over it. A checkpoint
is a slot that the radix tree holds at a token position; a prefix can be taken up there, and only there. When the device has no slot left,
the checkpoint worth least moves to the host's memory, and comes back when a prompt wants it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from inference_pio.engine.page_pool import PagePool
from inference_pio.engine.radix_cache import DEVICE, HOST, Checkpoint, RadixCache, Worst
from inference_pio.engine.errors import EngineError
from inference_pio.engine.sequence import NOTHING, HeldState, Keep, Sequence

SPACING = 512      # tokens between checkpoints in the last NEAR tokens of a prompt; twice as many in twice as many before, and so on
NEAR = 4096
APART = 32         # an end of a segment closer than this to another mark is not worth a slot
RECENT = 3         # states of the last tokens of an answer: where it is accepted, the last token is often cut anew

COUNTS = ("states_free", "states_cached", "states_in_use", "host_states_free", "host_states_cached", "checkpoints_taken",
          "checkpoints_skipped", "checkpoints_saved", "checkpoints_restored", "checkpoints_dropped")   # fields of EngineStatus


def marks(length: int, segment_ends: Iterable[int]) -> list[int]:
    """Token positions of a prompt at which its state should be kept: where edits will land, and evenly before."""
    chosen = {length, length - 1}
    position, spacing = length // SPACING * SPACING, SPACING
    while position > 0:
        chosen.add(position)
        while length - position >= NEAR * (spacing // SPACING):
            spacing *= 2
        position = (position - 1) // spacing * spacing
    for end in segment_ends:
        ordered = sorted(chosen)
        place = bisect_right(ordered, end)
        if all(abs(end - other) >= APART for other in ordered[max(0, place - 1):place + 1]):
            chosen.add(end)
    return sorted(p for p in chosen if 0 < p <= length)


@dataclass
class HostTier:
    """Slots in the host's memory; the copies are between slot numbers (device, host), in the order of the device's work. `save` gives
    False if the host's memory is used up by others."""

    pool: PagePool
    save: Callable[[int, int], bool]
    restore: Callable[[int, int], None]


@dataclass
class Checkpoints:
    """The slots of a model with recurrent layers. boundaries: special tokens that end a segment of a prompt. Counts are since the model
    was loaded."""

    pool: PagePool
    cache: RadixCache
    boundaries: frozenset[int]
    host: HostTier | None = None
    taken: int = 0
    skipped: int = 0        # marks for which there was no slot
    saved: int = 0          # moved to the host's memory
    restored: int = 0       # brought back from there
    dropped: int = 0        # given up for others

    def counts(self) -> dict[str, int]:
        """By COUNTS. May be asked by any thread."""
        free, cached, host = self.pool.free, self.cache.evictable_checkpoints(DEVICE), self.host
        return dict(zip(COUNTS, (
            free, cached, self.pool.usable - free - cached, host.pool.free if host else 0, self.cache.evictable_checkpoints(HOST) if host else 0,
            self.taken, self.skipped, self.saved, self.restored, self.dropped), strict=True))

    def begin(self, sequence: Sequence, checkpoint: Checkpoint | None, position: int) -> bool:
        """The sequence starts from a checkpoint behind `position` tokens, or from nothing. False if there is no slot to bring it to."""
        ends = [index + 1 for index, token in enumerate(sequence.ids) if token in self.boundaries]
        sequence.marks = marks(len(sequence.ids), ends)
        return checkpoint is None or self._take_up(sequence, checkpoint, position)

    def _take_up(self, sequence: Sequence, checkpoint: Checkpoint, position: int) -> bool:
        if checkpoint.tier == DEVICE:
            self.pool.hold(checkpoint.slot)
            sequence.states.append(HeldState(position, checkpoint.slot, False))
            return True
        self.host.pool.hold(checkpoint.slot)   # so that making room cannot take it
        slot = self._take()
        if slot is not None:
            self.host.restore(slot, checkpoint.slot)
            self.restored += 1
            sequence.states.append(HeldState(position, slot, True))
        self.host.pool.release(checkpoint.slot)
        return slot is not None

    def provide(self, sequence: Sequence, count: int) -> bool:
        """Slots for the next `count` tokens. False if there is not even one for the state behind them."""
        first, last = sequence.computed, sequence.computed + count
        slot = self._own(sequence, decoding=count == 1)
        if slot is None:
            slot = self._take()
        if slot is None:
            slot = self._last_resort(sequence)
        if slot is None:
            return False
        slots = {count - 1: slot}
        for position in sequence.marks:
            if not first < position < last:
                continue
            kept = self._take()
            if kept is None:
                self.skipped += 1
            else:
                slots[position - first - 1] = kept
        sequence.keep = Keep(sequence.states[-1].slot if sequence.states else -1, slots)
        return True

    def _own(self, sequence: Sequence, decoding: bool) -> int | None:
        """A slot of the sequence that may be written over: its newest, or in an answer the oldest of the last few."""
        spare = [s for s in sequence.states if not s.wanted and self.pool.references(s.slot) == 1]
        if not spare or decoding and len(spare) < RECENT and self.pool.free:
            return None
        if not decoding and spare[-1] is not sequence.states[-1]:
            return None
        return (spare[0] if decoding else spare[-1]).slot

    def _last_resort(self, sequence: Sequence) -> int | None:
        """Give up the checkpoint that the sequence stands on."""
        if not sequence.states:
            return None
        newest = sequence.states[-1]
        if self.pool.references(newest.slot) > 1:
            self.cache.drop_checkpoint(newest.slot)
        if self.pool.references(newest.slot) > 1:
            return None
        self.skipped += newest.wanted
        newest.wanted = False
        return newest.slot

    def _take(self) -> int | None:
        return self.pool.take() if self.pool.free or self._make_room() else None

    def _make_room(self) -> bool:
        """Have a free slot on the device. False if sequences hold them all."""
        worst = self.cache.worst_checkpoint(DEVICE)
        if worst is None:
            return False
        # What is nearer is computed again as fast as it is copied.
        if worst.gap < APART or not self._host_has_room(worst.worth) or not self._move_to_host(worst):
            self.cache.drop(worst.node, worst.offset)
            self.dropped += 1
        return True

    def _move_to_host(self, worst: Worst) -> bool:
        slot = self.host.pool.take()
        if not self.host.save(worst.node.checkpoints[worst.offset].slot, slot):
            self.host.pool.release(slot)
            return False
        self.cache.move_to_host(worst.node, worst.offset, slot)
        self.saved += 1
        return True

    def _host_has_room(self, worth: float) -> bool:
        """Whether a checkpoint of this worth can go to the host's memory; one that is worth less makes room."""
        if self.host is None or self.host.pool.free:
            return self.host is not None
        least = self.cache.worst_checkpoint(HOST)
        if least is None or least.worth >= worth:
            return False
        self.cache.drop(least.node, least.offset)
        self.dropped += 1
        return True

    def take(self) -> int:
        """A slot for the caller alone."""
        slot = self._take()
        if slot is None:
            raise EngineError("there is no free slot for a recurrent state: wait for the requests that run")
        return slot

    def settle(self, sequence: Sequence) -> None:
        """The step is done; sequence.computed stands where it began."""
        keep, sequence.keep = sequence.keep, NOTHING
        written = set(keep.slots.values())
        sequence.states = [s for s in sequence.states if s.slot not in written]
        for row, slot in sorted(keep.slots.items()):
            position = sequence.computed + row + 1
            wanted = position in sequence.marks
            self.taken += wanted
            sequence.states.append(HeldState(position, slot, wanted))
        # What a prompt leaves behind between two marks is of no use to anybody.
        if len(keep.slots) > 1 or max(keep.slots) > 0:
            for state in [s for s in sequence.states[:-1] if not s.wanted]:
                sequence.states.remove(state)
                self.pool.release(state.slot)

    def finished(self, sequence: Sequence) -> list[tuple[int, int]]:
        """(position, slot) of what the sequence leaves behind: not what the tree has already, nor a slot that a step which did not
        end may have written."""
        return [(s.position, s.slot) for s in sequence.states
                if self.pool.references(s.slot) == 1 and s.slot not in sequence.keep.slots.values()]

    def release(self, sequence: Sequence) -> None:
        for slot in {s.slot for s in sequence.states} | set(sequence.keep.slots.values()):
            self.pool.release(slot)
        sequence.states, sequence.keep = [], NOTHING
