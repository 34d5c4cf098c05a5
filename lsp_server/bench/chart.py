"""Charts as inline SVG, without a library: three drawings do not need one. Colours are CSS variables of the page, so one drawing serves light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

WIDTH, LEFT, RIGHT = 760, 136, 70    # LEFT holds the names of rows, RIGHT the values at their ends


class LogAxis:
    """Values to x; ticks at 1, 2 and 5 of each decade, or only at 1 when there are many."""

    def __init__(self, values: Sequence[float], left: float = LEFT, right: float = WIDTH - RIGHT) -> None:
        smallest, largest = min(values), max(values)
        self.low, self.high = math.log10(smallest) - 0.05, math.log10(largest) + 0.05
        self.left, self.right = left, right

    def __call__(self, value: float) -> float:
        return self.left + (self.right - self.left) * (math.log10(value) - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        steps = (1, 2, 5) if self.high - self.low < 2.2 else (1,)
        return [step * 10.0**d for d in decades for step in steps if self.low <= math.log10(step * 10.0**d) <= self.high]


def ranges(rows: Sequence[tuple[str, Sequence[tuple[str, dict[str, float]]]]], label: str) -> str:
    """A row for each kind, a bar from p50 to p99 for each run in it: dot at p50, tick at p90. Log scale, milliseconds."""
    axis = LogAxis([max(spread[p], 1e-3) for _, bars in rows for _, spread in bars for p in ("p50", "p99")])
    parts, y = [], 8.0
    for name, bars in rows:
        height = 20 * len(bars) + 10
        parts.append(f'<text class="name" x="{LEFT - 12}" y="{y + height / 2 + 4:.0f}">{escape(name)}</text>')
        for i, (run, spread) in enumerate(bars):
            middle = y + 5 + 20 * i + 10
            x50, x90, x99 = (axis(max(spread[p], 1e-3)) for p in ("p50", "p90", "p99"))
            title = f"{name}, {run}: " + ", ".join(f"{p} {number(spread[p])} ms" for p in ("p50", "p90", "p99"))
            parts.append(
                f'<g class="run{i}"><title>{escape(title)}</title>'
                f'<rect x="{LEFT}" y="{middle - 10:.1f}" width="{WIDTH - LEFT}" height="20" fill="transparent"/>'
                f'<line class="range" x1="{x50:.1f}" y1="{middle:.1f}" x2="{x99:.1f}" y2="{middle:.1f}"/>'
                f'<line class="mark" x1="{x90:.1f}" y1="{middle - 4:.1f}" x2="{x90:.1f}" y2="{middle + 4:.1f}"/>'
                f'<circle cx="{x50:.1f}" cy="{middle:.1f}" r="4.5"/>'
                f'<text class="value" x="{x99 + 9:.1f}" y="{middle + 4:.1f}">{number(spread["p50"])}</text></g>')
        y += height
    return _svg(y + 34, _vertical_grid(axis, y, label) + parts, label)


def timeline(dots: Sequence[tuple[float, float, int, str]], label: str) -> str:
    """(seconds, milliseconds, class, title) as dots: time to the right, milliseconds upwards on a log scale."""
    height, left = 220.0, 52.0
    end = max(at for at, *_ in dots) or 1.0
    axis = LogAxis([max(value, 1e-3) for _, value, *_ in dots], height, 12.0)
    parts = []
    for tick in axis.ticks():
        y = axis(tick)
        parts.append(f'<line class="grid" x1="{left}" y1="{y:.1f}" x2="{WIDTH}" y2="{y:.1f}"/>'
                     f'<text class="tick end" x="{left - 8}" y="{y + 4:.1f}">{number(tick)}</text>')
    for second in range(0, math.ceil(end) + 1, max(1, round(end / 8))):
        x = left + (WIDTH - left - 8) * second / end
        if x <= WIDTH - 4:
            parts.append(f'<text class="tick" x="{x:.1f}" y="{height + 20:.0f}">{second} s</text>')
    for at, value, kind, title in dots:
        x, y = left + (WIDTH - left - 8) * at / end, axis(max(value, 1e-3))
        parts.append(f'<circle class="dot kind{kind}" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{escape(title)}</title></circle>')
    return _svg(height + 28, parts, label)


def shares(rows: Sequence[tuple[str, float, float]], label: str) -> str:
    """Stacked bars of two amounts: tokens reused, tokens computed. Linear scale."""
    most = max(reused + computed for _, reused, computed in rows) or 1.0
    scale, parts, y = (WIDTH - LEFT - 150) / most, [], 4.0
    for name, reused, computed in rows:
        kept, new = reused * scale, max(computed * scale, 2.0)
        gap = 2.0 if reused else 0.0    # the two parts must not look like one
        title = f"{name}: {number(reused)} tokens reused, {number(computed)} computed"
        parts.append(f'<g><title>{escape(title)}</title><text class="name" x="{LEFT - 12}" y="{y + 17:.0f}">{escape(name)}</text>'
                     f'<rect class="reused" x="{LEFT}" y="{y + 5:.1f}" width="{kept:.1f}" height="16" rx="2"/>'
                     f'<rect class="computed" x="{LEFT + kept + gap:.1f}" y="{y + 5:.1f}" width="{new:.1f}" height="16" rx="2"/>'
                     f'<text class="value" x="{LEFT + kept + gap + new + 8:.1f}" y="{y + 17:.0f}">'
                     f'{number(reused)} + {number(computed)}</text></g>')
        y += 28
    return _svg(y + 4, parts, label)


def number(value: float) -> str:
    """Three digits are what a clock on a busy machine is good for."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 1 else f"{value:.2f}" if value else "0"


def _vertical_grid(axis: LogAxis, bottom: float, label: str) -> list[str]:
    parts = []
    for tick in axis.ticks():
        x = axis(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="4" x2="{x:.1f}" y2="{bottom:.1f}"/>'
                     f'<text class="tick" x="{x:.1f}" y="{bottom + 18:.0f}">{number(tick)}</text>')
    return [*parts, f'<text class="tick end" x="{WIDTH}" y="{bottom + 18:.0f}">ms</text>']


def _svg(height: float, parts: list[str], label: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
