"""The report as one HTML file that needs nothing else: no network, no script; light and dark."""

from __future__ import annotations

from html import escape
from importlib import resources
from typing import Any

from inference_pio.lsp_server.bench import chart
from inference_pio.lsp_server.bench.chart import number
from inference_pio.lsp_server.bench.table import PERCENTILES, facts, warm_against_cold
from inference_pio.lsp_server.bench.trace import COLD, THROUGH


def render(document: dict[str, Any]) -> str:
    style = (resources.files("inference_pio.lsp_server.bench") / "page.css").read_text("utf-8")
    model = document["model"]
    body = [
        f"<h1>{escape(model['name'])}: what a keystroke costs</h1>",
        f'<p class="about">{escape(_about(document))}</p>',
        _tiles(document),
        _latency(document),
        _timeline(document["runs"][0]),
        _tokens(document["runs"][0]),
        *(_table(run) for run in document["runs"]),
        _ratios(document),
        "<h2>In words</h2><dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts(document)) + "</dl>",
        f"<footer>{escape(document['tool'])} {escape(document['version'])} · {escape(document['started'])} · "
        f"traces: {escape(', '.join(t['name'] for t in document['traces']))}</footer>",
    ]
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f"<title>pio-lsp --bench: {escape(model['name'])}</title><style>\n{style}</style></head><body><main>\n"
            + "\n".join(part for part in body if part) + "\n</main></body></html>\n")


def _about(document: dict[str, Any]) -> str:
    model, machine = document["model"], document["machine"]
    return (f"{model['weight_bytes'] / 1e6:.0f} MB of weights, {model['activations']} activations, on {model['device']} "
            f"({machine['processor']}, {machine['cores']} cores, {machine['system']}).")


def _tiles(document: dict[str, Any]) -> str:
    run, roof, tiles = document["runs"][0], document["roof"], []
    if warm := warm_against_cold(run):
        tiles += [("a key on the same line", f"{number(warm[1])} ms", "to the first token, p50"),
                  ("a cold prompt", f"{number(warm[0])} ms", f"to the first token, p50: {warm[0] / warm[1]:.0f} times a key")]
    if speed := run["decode_tokens_per_second"]:
        tiles.append(("decode", f"{speed:.0f} tok/s", f"{roof['decode_gb_per_second']:.1f} GB/s of {roof['read_gb_per_second']:.1f} measured"))
    if idle := run["cancel_to_idle_ms"]:
        tiles.append(("cancel to idle", f"{number(idle['p50'])} ms", f"p50; p99 {number(idle['p99'])} ms"))
    return '<div class="tiles">' + "".join(
        f"<div><span>{escape(name)}</span><strong>{escape(value)}</strong><span>{escape(note)}</span></div>"
        for name, value, note in tiles) + "</div>"


def _latency(document: dict[str, Any]) -> str:
    runs = document["runs"]
    rows = []
    for kind in runs[0]["kinds"]:
        bars = [(run["name"], spread) for run in runs if (spread := run["kinds"].get(kind, {}).get("first_token_ms"))]
        if bars and bars[0][0] == runs[0]["name"]:
            rows.append((kind, bars))
    if not rows:
        return ""
    legend = _legend([(f"run{i}", run["name"]) for i, run in enumerate(runs)]) if len(runs) > 1 else ""
    return _figure("Request to first token", "By kind of edit, milliseconds on a log scale: the dot is p50 (its value stands at the end), "
                   "the tick p90, the line ends at p99. What an editor waits before it asks comes on top.", legend + chart.ranges(rows, "milliseconds to the first token by kind of edit"))


def _timeline(run: dict[str, Any]) -> str:
    dots = []
    for sample in run["samples"]:
        if (first := sample["first_token_ms"]) is not None:
            group = 0 if sample["kind"] == COLD else 2 if sample["source"] == THROUGH else 1
            title = f"{sample['kind']} in {sample['document']}: {number(first)} ms, {sample['computed_tokens']} tokens computed"
            dots.append((sample["at_s"], first, group, title))
    if not dots:
        return ""
    legend = _legend([("kind0", "cold prompt"), ("kind1", "everything else"), ("kind2", "from memory, no model asked")])
    return _figure("The session as it went", "Each dot is a request: when it was made, and milliseconds to its first token.",
                   legend + chart.timeline(dots, "milliseconds to the first token of every request over time"))


def _tokens(run: dict[str, Any]) -> str:
    rows = [(kind, row["reused_tokens"]["p50"], row["computed_tokens"]["p50"])
            for kind, row in run["kinds"].items() if row["reused_tokens"]]
    if not rows:
        return ""
    legend = _legend([("reused", "reused"), ("computed", "computed")])
    return _figure("Tokens of the prompt", "Medians, of the requests that reached the model.",
                   legend + chart.shares(rows, "prompt tokens reused and computed by kind of edit"))


def _table(run: dict[str, Any]) -> str:
    columns = ("kind of edit", "asked", "shown", *PERCENTILES, *PERCENTILES, "reused", "computed")
    head = "".join(f'<th scope="col">{column}</th>' for column in columns)
    rows = []
    for kind, row in run["kinds"].items():
        cells = [str(row["requests"]), str(row["shown"])]
        for key in ("first_token_ms", "answer_ms"):
            cells += [number(row[key][p]) if row[key] else "–" for p in PERCENTILES]
        cells += [f"{row[key]['p50']:,}" if row[key] else "–" for key in ("reused_tokens", "computed_tokens")]
        rows.append(f'<tr><th scope="row">{escape(kind)}</th>{"".join(f"<td>{c}</td>" for c in cells)}</tr>')
    groups = ((3, ""), (3, "first token, ms"), (3, "suggestion, ms"), (2, "tokens, p50"))
    group = "".join(f'<th colspan="{span}">{name}</th>' for span, name in groups)
    return (f'<h2>{escape(run["name"])}</h2><div class="scroll"><table><tr class="group">{group}</tr><tr>{head}</tr>'
            f'{"".join(rows)}</table></div>')


def _ratios(document: dict[str, Any]) -> str:
    parts = []
    for name, kinds in document["ratios"].items():
        if not kinds:
            continue
        rows = "".join(f'<tr><th scope="row">{escape(kind)}</th>' + "".join(f"<td>{ratio[p]:.1f}</td>" for p in PERCENTILES) + "</tr>"
                       for kind, ratio in kinds.items())
        parts.append(f'<h2>Times longer to the first token: {escape(name)}</h2><div class="scroll"><table>'
                     f'<tr><th scope="col">kind of edit</th>{"".join(f"<th scope=col>{p}</th>" for p in PERCENTILES)}</tr>{rows}</table></div>')
    return "".join(parts)


def _figure(title: str, caption: str, drawing: str) -> str:
    return f"<figure><h2>{escape(title)}</h2><figcaption>{escape(caption)}</figcaption>{drawing}</figure>"


def _legend(entries: list[tuple[str, str]]) -> str:
    return '<p class="legend">' + "".join(f'<span class="{name}"><i></i>{escape(text)}</span>' for name, text in entries) + "</p>"
