"""`pio-lsp --bench`: arguments, the runs, and where the report goes."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
from collections.abc import Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from inference_pio import __version__
from inference_pio.lsp_server.arguments import parse as parse_server_options
from inference_pio.lsp_server.bench import memory, page, report, table
from inference_pio.lsp_server.bench.client import LspClient, ServerError
from inference_pio.lsp_server.bench.infill import InfillTarget
from inference_pio.lsp_server.bench.load import OtherLoad
from inference_pio.lsp_server.bench.pio import PioTarget, command
from inference_pio.lsp_server.bench.replay import Recording, Target, replay
from inference_pio.lsp_server.bench.trace import Trace, TraceError, bundled, load
from inference_pio.lsp_server.features.status import loading

OTHERS_PATIENCE = 5   # what is compared may be slower: it should get through the same events


def main(argv: Sequence[str]) -> int:
    options, server_options = _arguments().parse_known_args(argv)
    parse_server_options(server_options, commands=())   # ends here if the server would not understand them
    console, errors = Console(), Console(stderr=True)
    try:
        traces = [load(path) for path in options.trace] or bundled()
        document = asyncio.run(_measure(options, server_options, traces, errors))
        table.show(document, console)
        if options.json:
            options.json.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", "utf-8")
            console.print(f" JSON: {options.json}", style="dim", soft_wrap=True)
        if options.html:
            options.html.write_text(page.render(document), "utf-8")
            console.print(f" page: {options.html}", style="dim", soft_wrap=True)
    except (TraceError, ServerError, OSError) as e:
        errors.print(f"pio-lsp --bench: {e}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pio-lsp --bench", description="Replay recorded keystrokes against the real server and report what "
                                     "they cost.", epilog="Other options are the server's own: --model, --device, --threads, --prompt-tokens and so on.")
    parser.add_argument("--trace", type=Path, action="append", default=[], metavar="FILE",
                        help="replay this trace instead of those that come along; may be repeated")
    parser.add_argument("--seconds", type=float, default=40.0,
                        help=f"play for at most this long (default 40), {OTHERS_PATIENCE} times that on a server that is compared")
    parser.add_argument("--no-reuse", action="store_true", help="play again on a server that computes every prompt anew, and show both")
    parser.add_argument("--against", metavar="URL", help="play again on this llama-server, and show both")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number to FILE")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with charts to FILE")
    return parser


async def _measure(options: argparse.Namespace, server_options: list[str], traces: list[Trace], console: Console) -> dict[str, Any]:
    """Runs what was asked for, one server after another, and puts the results into one document."""
    started, machine = datetime.now(timezone.utc), report.machine()
    ours, model, read = await _pio("pio-lsp", server_options, options.seconds, traces, console)
    runs = [ours]
    if options.no_reuse:
        runs += (await _pio("without reuse", [*server_options, "--no-reuse"], OTHERS_PATIENCE * options.seconds, traces,
                            console))[:1]
    if options.against:
        runs.append(await _llama_server(options, traces, ours, console))
    return {
        "schema": report.SCHEMA, "tool": "pio-lsp --bench", "version": __version__, "started": started.isoformat(timespec="seconds"),
        "machine": machine, "model": model, "traces": [{"name": t.name, "about": t.about} for t in traces],
        "roof": report.roof(model, ours, read), "runs": runs,
        "ratios": {other["name"]: report.ratios(ours, other) for other in runs[1:]},
    }


async def _pio(name: str, server_options: list[str], seconds: float, traces: list[Trace],
               console: Console) -> tuple[dict[str, Any], dict[str, Any], float]:
    """Starts pio-lsp, replays, stops it: the run, the engine's account of the model, and the bytes per second its device reads, the
    better of one measurement before and one after."""
    with tempfile.TemporaryDirectory(prefix="pio-bench-") as folder:
        async with LspClient(command(server_options)) as client:
            target = PioTarget(client, Path(folder).resolve())
            await target.initialize()
            with console.status(" starting the server", spinner="dots") as line:
                await target.ready(lambda progress: line.update(f" {_loading(progress)}"))
            at_rest = memory.held(client.process.pid)
            before = await target.read_bandwidth()
            load = OtherLoad(os.getpid(), client.process.pid)
            recording = await _replay(name, traces, target, seconds, console)
            others, prefetch = load.cores(), (await target.status()).get("prefetch")
            after, round_trip = memory.held(client.process.pid), await target.round_trip_ms()
            working = await target.working_ms(_cold_texts(traces))
            read = max(before, await target.read_bandwidth())
            about = {"options": server_options, "startup": {"initialize_ms": target.initialize_ms, "ready_ms": target.ready_ms},
                     "memory": {"at_rest": at_rest, "after": after, "model": memory.on_disk(target.model["path"])},
                     "round_trip_ms": report.spread(round_trip), "others_cores": others, "prefetch": prefetch,
                     "held_up_ms": {"loading": report.spread(target.loading_ms), "working": report.spread(working)}}
            return report.run(name, about, recording), target.model, read


def _cold_texts(traces: list[Trace]) -> list[str]:
    """Texts of which no server has seen the beginning: the longest document of each trace, its lines from the last to the first."""
    longest = (max((document.text for document in trace.documents.values()), key=len) for trace in traces)
    return ["\n".join(reversed(text.split("\n"))) for text in longest]


async def _llama_server(options: argparse.Namespace, traces: list[Trace], ours: dict[str, Any], console: Console) -> dict[str, Any]:
    longest = max((sample["generated_tokens"] for sample in ours["samples"]), default=0)
    target = InfillTarget(options.against, most_tokens=max(16, longest))
    await target.ready()
    recording = await _replay("llama-server", traces, target, OTHERS_PATIENCE * options.seconds, console)
    about = {"options": {"url": options.against, "model": target.model, "infill": target.fim, "n_predict": target.most_tokens}}
    return report.run("llama-server", about, recording)


async def _replay(name: str, traces: list[Trace], target: Target, seconds: float, console: Console) -> Recording:
    with _progress(name, sum(len(trace.events) for trace in traces), console) as show:
        return await replay(traces, target, seconds, show)


def _loading(progress: dict[str, Any]) -> str:
    if not progress:
        return "starting the server"
    part = f" {progress['done'] / progress['total']:.0%}" if progress["total"] else ""
    return f"{loading(progress['stage'], progress['detail'])}{part}"


@contextmanager
def _progress(name: str, events: int, console: Console):
    columns = (TextColumn(" {task.description}"), BarColumn(bar_width=32), TextColumn("{task.completed:.0f}/{task.total:.0f} events"),
               TextColumn("{task.fields[requests]} requests"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(name, total=events, requests=0)

        def show(trace: Trace, recording: Recording) -> None:
            progress.update(task, advance=1, requests=recording.requests, description=f"{name} · {trace.name}")

        yield show
