"""What the rest of the machine does meanwhile: times taken beside other work are not the machine's best, and a reader must know."""

from __future__ import annotations

import os
from time import perf_counter


class OtherLoad:
    """Counts, from its creation on, the processor time of all processes but `pids`."""

    def __init__(self, *pids: int) -> None:
        self._pids = pids
        self._began, self._before = perf_counter(), self._seconds()

    def cores(self) -> float | None:
        """Cores that the others used on average; None where the system does not tell (it does on Linux)."""
        after = self._seconds()
        if self._before is None or after is None:
            return None
        return max(0.0, after - self._before) / (perf_counter() - self._began)

    def _seconds(self) -> float | None:
        try:
            with open("/proc/stat", encoding="ascii") as lines:
                user, nice, system, _idle, _wait, irq, softirq, *_ = map(int, lines.readline().split()[1:])
            ticks = user + nice + system + irq + softirq
            for pid in self._pids:
                with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
                    fields = file.read().rpartition(")")[2].split()   # the name before it may hold anything
                ticks -= int(fields[11]) + int(fields[12])            # user and system time of all its threads
        except (OSError, ValueError, IndexError):
            return None
        return ticks / os.sysconf("SC_CLK_TCK")
