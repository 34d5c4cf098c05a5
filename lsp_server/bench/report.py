"""From records to numbers that people compare, as a table, JSON and a page with charts."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from inference_pio.lsp_server.bench.replay import Record, Run
from inference_pio.lsp_server.bench.trace import KINDS


def percentile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that at least `share` of the values do not exceed (nearest rank); None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[max(0, -(-int(share * 1000 * len(ordered)) // 1000) - 1)]


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    return {name: percentile(values, share) for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))}


def summary(run: Run) -> dict[str, Any]:
    """Plain data, which is what --json writes. Milliseconds, tokens, bytes per second."""
    speeds = [r.tokens_per_second for r in run.records if r.tokens_per_second]
    speed = percentile(speeds, 0.5)
    return {
        "model": run.info["name"], "device": run.info["device"], "device_name": run.info["device_name"], "build": run.info["build"],
        "activations": run.info["activations"], "initialize_ms": run.initialize_ms, "ready_ms": run.ready_ms,
        "kinds": {kind: _of_kind([r for r in run.records if r.kind == kind]) for kind in KINDS if any(r.kind == kind for r in run.records)},
        "cancel_to_idle_ms": {**_spread(run.cancel_ms), "count": len(run.cancel_ms)},
        "round_trip_ms": _spread(run.round_trip_ms),
        "decode": {"tokens_per_second": speed, "weight_bytes": run.info["weight_bytes"],
                   "bytes_per_second": speed * run.info["weight_bytes"] if speed else None, "read_bandwidth": run.read_bandwidth},
        "records": [r.__dict__ for r in run.records]}


def _of_kind(records: list[Record]) -> dict[str, Any]:
    return {"count": len(records), "shown": sum(r.shown for r in records),
            "first_token_ms": _spread([r.first_token_ms for r in records if r.first_token_ms is not None]),
            "total_ms": _spread([r.total_ms for r in records]),
            "prompt_tokens": _mean([r.prompt_tokens for r in records]), "reused_tokens": _mean([r.reused_tokens for r in records]),
            "computed_tokens": _mean([r.computed_tokens for r in records])}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def print_table(result: dict[str, Any], title: str) -> None:
    table = Table(title=f"{result['model']} on {result['device_name']} ({result['device']}), {title}, milliseconds")
    for heading in ("kind of edit", "asked", "shown", "first token", "suggestion", "reused of prompt"):
        table.add_column(heading, justify="left" if heading == "kind of edit" else "right")
    for kind, k in result["kinds"].items():
        spreads = (" ".join(f"{_ms(k[name][p]):>5}" for p in ("p50", "p90", "p99")) for name in ("first_token_ms", "total_ms"))
        table.add_row(kind, str(k["count"]), str(k["shown"]), *spreads, f"{k['reused_tokens']:.0f} of {k['prompt_tokens']:.0f}")
    console = Console()
    console.print(table)
    console.print("p50, p90 and p99; first token: inside the engine; suggestion: until the editor has it; tokens: mean per request", style="dim")
    decode, cancel = result["decode"], result["cancel_to_idle_ms"]
    if decode["tokens_per_second"]:
        share = decode["bytes_per_second"] / decode["read_bandwidth"]
        console.print(f"decode {decode['tokens_per_second']:.0f} tok/s = {decode['bytes_per_second'] / 1e9:.1f} GB/s of weights; "
                      f"measured read bandwidth {decode['read_bandwidth'] / 1e9:.1f} GB/s ({share:.0%})")
    console.print(f"server answered initialize after {result['initialize_ms']:.0f} ms, model ready after {result['ready_ms']:.0f} ms; round trip "
                  f"without a model p50 {_ms(result['round_trip_ms']['p50'])} p99 {_ms(result['round_trip_ms']['p99'])} ms; cancel to idle "
                  f"p50 {_ms(cancel['p50'])} p99 {_ms(cancel['p99'])} ms ({cancel['count']} cancelled)")


# ---- the page ----------------------------------------------------------------------------------------------------------------

_STYLE = """:root{color-scheme:light dark;--ink:#1f2430;--bar:#3b7dd8;--second:#c8702a;--line:#8884}body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;
margin:2rem auto;padding:0 1rem}@media(prefers-color-scheme:dark){:root{--ink:#e4e6eb;--bar:#6ea8fe;--second:#f0a35e}}table{border-collapse:collapse;
width:100%}th,td{text-align:right;padding:.25rem .6rem;border-bottom:1px solid var(--line)}th:first-child,td:first-child{text-align:left}text{fill:
var(--ink);font-size:13px}.a{fill:var(--bar)}.b{fill:var(--second)}"""


def write_html(results: dict[str, dict[str, Any]], path: Path) -> None:
    """One page, no network: bars of the median time to the first token by kind of edit, and the table."""
    first = next(iter(results.values()))
    parts = [f"<!doctype html><meta charset=utf-8><title>pio-lsp --bench: {escape(first['model'])}</title><style>{_STYLE}</style>",
             f"<h1>{escape(first['model'])} on {escape(first['device_name'])}</h1>", "<h2>Request to suggestion, p50 and p99, ms</h2>", _bars(results)]
    for name, result in results.items():
        rows = "".join(
            f"<tr><td>{escape(kind)}<td>{k['count']}<td>{k['shown']}" + "".join(f"<td>{_ms(k['first_token_ms'][p])}" for p in ("p50", "p90", "p99"))
            + "".join(f"<td>{_ms(k['total_ms'][p])}" for p in ("p50", "p90", "p99"))
            + "".join(f"<td>{k[n]:.0f}" for n in ("prompt_tokens", "reused_tokens", "computed_tokens")) for kind, k in result["kinds"].items())
        parts.append(f"<h2>{escape(name)}</h2><table><tr><th>kind of edit<th>asked<th>shown<th>first token p50<th>p90<th>p99<th>suggestion p50<th>p90"
                     f"<th>p99<th>prompt<th>reused<th>computed{rows}</table>")
        decode = result["decode"]
        if decode["tokens_per_second"]:
            parts.append(f"<p>Decode {decode['tokens_per_second']:.0f} tok/s = {decode['bytes_per_second'] / 1e9:.1f} GB/s of weights; measured read "
                         f"bandwidth {decode['read_bandwidth'] / 1e9:.1f} GB/s.")
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")


def _bars(results: dict[str, dict[str, Any]]) -> str:
    kinds = list(next(iter(results.values()))["kinds"])
    longest = max((r["kinds"][k]["total_ms"]["p99"] or 0 for r in results.values() for k in kinds if k in r["kinds"]), default=0) or 1
    y, out = 0, []
    for kind in kinds:
        out.append(f"<text x=0 y={y + 15}>{escape(kind)}</text>")
        for css, (name, result) in zip("ab", results.items()):
            spread = result["kinds"].get(kind, {}).get("total_ms")
            if spread is None or spread["p50"] is None:
                continue
            p50, p99 = (max(spread[p] / longest * 560, 1) for p in ("p50", "p99"))
            out.append(f"<rect class={css} opacity=.35 x=150 y={y + 3} width={p99:.0f} height=14 /><rect class={css} x=150 y={y + 3} width={p50:.0f} "
                       f"height=14 /><text x={p99 + 156:.0f} y={y + 15}>{_ms(spread['p50'])} / {_ms(spread['p99'])} {escape(name)}</text>")
            y += 20
        y += 8
    return f"<svg viewBox='0 0 900 {y}' role=img aria-label='latency by kind of edit'>{''.join(out)}</svg>"
