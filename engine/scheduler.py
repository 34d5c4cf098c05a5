"""What runs in the next step.

A step serves one priority only, the highest that waits: completions are never slowed by chat, chat never by prefetching. Within it,
every sequence that decodes gives one row, and the rest of the step's tokens go to prompts, first come first served.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from inference_pio.engine.sequence import Sequence

STEP_SECONDS = 0.030   # what a step with prompt tokens may take: this is how long a cancelled or more urgent request waits
_FIXED = 3             # or so many times what it takes whatever its tokens: a step that reads all experts for a few tokens is a waste
_LEAST, _MOST = 16, 2048
_FORGET = 0.8          # weight of a step among those that come after it
_SLOWER = 1.02         # how much longer than the shortest a step of one token may be and still count: a pause of the machine does not


class Work(NamedTuple):
    """`count` tokens of the sequence from its first uncomputed one."""

    sequence: Sequence
    count: int


class StepTimes:
    """Least squares of `seconds = fixed + each * tokens` over the last steps with prompt tokens. `fixed` stays what it was while steps
    are too much alike to tell the two apart; a step that takes twice or half of what was expected makes everything before it void.

    `fixed` is at least what a step of one token takes. A line does not see that: while weights are read, a few tokens are computed
    beside it and cost nothing, so that short steps alone look as if each token had its price.
    """

    def __init__(self) -> None:
        self.fixed, self.each, self._alone = 0.0, 0.0, 0.0
        self._forget()

    def _forget(self) -> None:
        self._line, self._sums = 0.0, [0.0] * 5   # fixed part; weights, tokens, tokens^2, seconds, tokens * seconds

    def add(self, tokens: int, seconds: float) -> None:
        if tokens == 1:
            self._alone = min(seconds, _SLOWER * self._alone) if self._alone else seconds
            return
        if not 0.5 < seconds / (self.fixed + self.each * tokens or seconds) < 2.0:
            self._forget()
        new = (1.0, tokens, tokens * tokens, seconds, tokens * seconds)
        w, n, nn, t, nt = self._sums = [_FORGET * old + value for old, value in zip(self._sums, new)]
        spread = nn / w - (n / w) ** 2
        if spread > (0.1 * n / w) ** 2:
            each = (nt / w - n / w * t / w) / spread
            if each > 0:   # else it is noise
                self._line = max(0.0, (t - each * n) / w)
        self.fixed = max(self._line, self._alone)
        self.each = max(t - self.fixed * w, 0.05 * t) / n


class Scheduler:
    """Sequences in order of arrival. chunk adapts to how fast this machine computes prompts."""

    def __init__(self, most_tokens: int, most_sequences: int):
        self.sequences: list[Sequence] = []
        self._most_tokens, self._most_sequences = min(most_tokens, _MOST), most_sequences
        self._chunk = max(_LEAST, self._most_tokens // 8)
        self._times = StepTimes()

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
        chosen = self.sequences
        if len(chosen) > 1:
            urgent = min([s.priority for s in chosen])
            chosen = [s for s in chosen if s.priority == urgent][:self._most_sequences]
        work = [Work(s, 1) for s in chosen if s.started and s.waiting_tokens == 1]
        if len(work) == len(chosen):
            return work
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
        """A step of one token, or of that many of which most are of prompts, took so long."""
        if seconds > 0 and (tokens == 1 or tokens >= _LEAST):
            self._times.add(tokens, seconds)
        if seconds > 0 and tokens >= _LEAST:
            fixed = self._times.fixed
            aimed = (max(STEP_SECONDS, _FIXED * fixed) - fixed) / self._times.each
            self._chunk = int(min(max(0.5 * self._chunk + 0.5 * aimed, _LEAST), self._most_tokens, 2 * self._chunk))

    def least_urgent(self, than: Sequence) -> Sequence | None:
        """The sequence to give up pages for `than`: lower priority first, then the latest comer. None if all come before it."""
        others: Iterable[tuple[int, int, Sequence]] = ((s.priority, i, s) for i, s in enumerate(self.sequences) if s.pages and s is not than)
        worst = max(others, default=None, key=lambda entry: entry[:2])
        if worst is None or (worst[0], worst[1]) < (than.priority, self.sequences.index(than)):
            return None
        return worst[2]
