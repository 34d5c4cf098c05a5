"""The report for a terminal. Everything shown comes from the JSON document."""

from __future__ import annotations

from statistics import median
from textwrap import wrap
from typing import Any

from rich.console import Console
from rich.text import Text

from inference_pio.lsp_server.bench.chart import number
from inference_pio.lsp_server.bench.trace import COLD, SAME_LINE

PERCENTILES = ("p50", "p90", "p99")
BUSY = 0.2   # cores used by others from which a reader should know


def show(document: dict[str, Any], console: Console) -> None:
    ours, *others = document["runs"]
    console.print()
    console.print(_headline(document), soft_wrap=True)
    for block in (_kinds(ours), *(_beside(ours, other, document["ratios"][other["name"]]) for other in others)):
        console.print()
        for line in block:
            console.print(line, soft_wrap=True)
    console.print()
    for label, text in facts(document):
        first, *more = wrap(text, max(40, console.width - 17))
        console.print(Text.assemble((f" {label:<15} ", "dim"), "\n".join([first, *(f"{'':17}{line}" for line in more)])), soft_wrap=True)
    console.print()


def facts(document: dict[str, Any]) -> list[tuple[str, str]]:
    """The findings in words, for the terminal and for the page."""
    run, roof = document["runs"][0], document["roof"]
    lines = []
    if (warm := warm_against_cold(run)) is not None:
        cold_ms, warm_ms = warm
        lines.append(("a keystroke", f"{number(warm_ms)} ms from the request to the first token; a cold prompt takes {number(cold_ms)} ms, "
                                     f"{cold_ms / warm_ms:.0f} times as long (p50)"))
    if run["prompt_tokens"]:
        again = f", {run['recomputed_tokens']:,} of them again, from the last checkpoint on" if document["model"].get("state_bytes") else ""
        lines.append(("prompt tokens", f"{run['prompt_tokens']:,} in the measured requests: {run['reused_tokens']:,} reused, "
                                       f"{run['computed_tokens']:,} computed{again}"))
    if speed := run["decode_tokens_per_second"]:
        lines.append(("decode", f"{speed:.0f} tokens/s = {roof['decode_gb_per_second']:.1f} GB/s, "
                                f"{100 * roof['share']:.0f} % of the {roof['read_gb_per_second']:.1f} GB/s measured on this device"))
    if memory := run["from_memory_ms"]:
        lines.append(("type-through", f"p50 {number(memory['p50'])} ms, p99 {number(memory['p99'])} ms inside the server; no model is asked"))
    if (ahead := run["prefetch"]) and ahead["begun"]:
        lines.append(("prefetch", f"{ahead['begun']} continuations written while a suggestion was shown, {ahead['used']} of them asked for"))
    if idle := run["cancel_to_idle_ms"]:
        lines.append(("cancel to idle", f"p50 {number(idle['p50'])} ms, p99 {number(idle['p99'])} ms until the engine rests"))
    start, trip = run["startup"], run["round_trip_ms"]
    lines.append(("round trip", f"p50 {number(trip['p50'])} ms, p99 {number(trip['p99'])} ms for a request that asks no model"))
    held_up = {name: spread for name, spread in run["held_up_ms"].items() if spread}
    lines.append(("event loop", "; ".join(f"while the model is {name}, another request waits p99 {number(spread['p99'])} ms, at most {number(spread['max'])} ms"
                                          for name, spread in held_up.items())))
    lines.append(("start", f"initialize answered after {start['initialize_ms'] / 1e3:.2f} s, model ready after {start['ready_ms'] / 1e3:.1f} s"))
    if (memory := run["memory"])["at_rest"]:
        lines.append(("memory", f"{memory['at_rest'] / 1e6:.0f} MB at rest, {memory['after'] / 1e6:.0f} MB with the cache of the session; the "
                                f"model's files have {memory['model'] / 1e6:.0f} MB"))
    for other in document["runs"][1:]:
        lines.append((other["name"], f"{other['measured']} requests measured in {other['seconds']:.0f} s; a cold prompt is "
                                     f"{_cold_tokens(other)} tokens there and {_cold_tokens(run)} here (p50)"))
    played = f"{run['measured']} of {run['requests']} requests measured in {run['seconds']:.0f} s; the others were typed over or cancelled"
    if run["events_left"]:
        played += f"; the time was up with {run['events_left']} events left"
    lines.append(("played", played))
    if (busy := run["others_cores"]) is not None and busy > BUSY:
        lines.append(("busy machine", f"other programs used {busy:.1f} cores meanwhile: these times are not this machine's best"))
    return lines


def _cold_tokens(run: dict[str, Any]) -> str:
    tokens = [sample["prompt_tokens"] for sample in run["samples"] if sample["kind"] == COLD]
    return f"{median(tokens):,.0f}" if tokens else "no"


def warm_against_cold(run: dict[str, Any]) -> tuple[float, float] | None:
    """Median milliseconds to the first token: a cold prompt's, and a key's on a line that was asked for before."""
    spreads = [run["kinds"].get(kind, {}).get("first_token_ms") for kind in (COLD, SAME_LINE)]
    return (spreads[0]["p50"], spreads[1]["p50"]) if all(spreads) else None


def _headline(document: dict[str, Any]) -> Text:
    model, machine = document["model"], document["machine"]
    return Text.assemble((f" {model['name']}", "bold"), (
        f"  {model['weight_bytes'] / 1e6:.0f} MB of weights, {model['activations']} activations, on {model['device']}"
        f" ({machine['processor']}, {machine['cores']} cores)", "dim"))


def _kinds(run: dict[str, Any]) -> list[Text]:
    lines = [_head("", "first token, ms", "suggestion, ms", "prompt tokens"), _names(run["name"], "reused", "new")]
    for kind, row in run["kinds"].items():
        tokens = [f"{row[key]['p50']:,}" if row[key] else "–" for key in ("reused_tokens", "computed_tokens")]
        lines.append(_row(kind, row["requests"], row["first_token_ms"], row["answer_ms"], *tokens))
    return lines


def _beside(ours: dict[str, Any], other: dict[str, Any], ratios: dict[str, dict[str, float]]) -> list[Text]:
    lines = [_head("", "its first token, ms", "ours, ms", "times longer"), _names(other["name"], "p50", "p90")]
    for kind, ratio in ratios.items():
        theirs, mine = other["kinds"][kind], ours["kinds"][kind]
        longer = (f"{ratio[p]:.1f}" for p in ("p50", "p90"))
        lines.append(_row(kind, theirs["requests"], theirs["first_token_ms"], mine["first_token_ms"], *longer))
    return lines


# Rows of 79 characters, for a terminal of 80: name, count, two spreads of three columns, two numbers.


def _head(name: str, first: str, second: str, third: str) -> Text:
    return Text(f" {name:<25}{first:>19}{second:>20}{third:>15}", "dim")


def _names(name: str, first: str, second: str) -> Text:
    percentiles = "".join(f"{p:>6}" for p in PERCENTILES)
    return Text.assemble((f" {name:<20}", "bold"), (f"{'asked':>6}{percentiles}  {percentiles}{first:>8}{second:>7}", "dim"))


def _row(name: str, count: int, first: dict[str, float] | None, second: dict[str, float] | None, third: str, fourth: str) -> Text:
    parts: list[Any] = [f" {name:<20}", f"{count:>6}"]
    for i, spread in enumerate((first, second)):
        parts += ["  " if i else "", *((f"{value:>6}", "" if j else "bold cyan") for j, value in enumerate(_spread(spread)))]
    return Text.assemble(*parts, f"{third:>8}{fourth:>7}")


def _spread(spread: dict[str, float] | None) -> list[str]:
    return [number(spread[p]).replace(",", "") for p in PERCENTILES] if spread else ["–"] * 3
