"""What runs in the next step.

A step serves one priority only, the highest that waits: completions are never slowed by chat, chat never by prefetching. Within it,
every sequence that decodes gives one row, and the rest of the step's tokens go to prompts, first come first served.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from inference_pio.engine.sequence import Sequence

STEP_SECONDS = 0.030   # what a step with prompt tokens may take: this is how long a cancelled or more urgent request waits
_LEAST, _MOST = 16, 2048


class Work(NamedTuple):
    """`count` tokens of the sequence from its first uncomputed one."""

    sequence: Sequence
    count: int


class Scheduler:
    """Sequences in order of arrival. chunk adapts to how fast this machine computes prompts."""

    def __init__(self, most_tokens: int, most_sequences: int):
        self.sequences: list[Sequence] = []
        self._most_tokens, self._most_sequences = min(most_tokens, _MOST), most_sequences
        self._chunk = min(64, self._most_tokens)

    @property
    def chunk(self) -> int:
        return self._chunk

    def add(self, sequence: Sequence) -> None:
        self.sequences.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        self.sequences.remove(sequence)

    def next_step(self) -> list[Work]:
        """Empty if nothing waits."""
        if not self.sequences:
            return []
        urgent = min(s.priority for s in self.sequences)
        chosen = [s for s in self.sequences if s.priority == urgent][:self._most_sequences]
        work = [Work(s, 1) for s in chosen if s.started and s.waiting_tokens == 1]
        room = self._chunk - len(work)
        for sequence in chosen:
            if room <= 0:
                break
            if not (sequence.started and sequence.waiting_tokens == 1):
                count = min(room, sequence.waiting_tokens)
                work.append(Work(sequence, count))
                room -= count
        return work

    def learn(self, tokens: int, seconds: float) -> None:
        """A step of that many prompt tokens took so long: aim the next chunk at STEP_SECONDS."""
        if tokens >= _LEAST and seconds > 0:
            aimed = tokens / seconds * STEP_SECONDS
            self._chunk = int(min(max(0.5 * self._chunk + 0.5 * aimed, _LEAST), self._most_tokens, 2 * self._chunk))

    def least_urgent(self, than: Sequence) -> Sequence | None:
        """The sequence to give up pages for `than`: lower priority first, then the latest comer. None if all come before it."""
        others: Iterable[tuple[int, int, Sequence]] = ((s.priority, i, s) for i, s in enumerate(self.sequences) if s.pages and s is not than)
        worst = max(others, default=None, key=lambda entry: entry[:2])
        if worst is None or (worst[0], worst[1]) < (than.priority, self.sequences.index(than)):
            return None
        return worst[2]
