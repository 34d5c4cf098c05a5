"""pio-lsp --bench: replay a recorded typing session against the real server and report what a person would have felt."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(argv)
    from inference_pio.lsp_server.bench.replay import ServerFailed, replay
    from inference_pio.lsp_server.bench.report import print_table, summary, write_html
    from inference_pio.lsp_server.bench.trace import BadTrace, load_traces

    options = [f"--{name.replace('_', '-')}={value}" for name in ("model", "device", "threads", "prompt_tokens", "max_tokens")
               if (value := getattr(arguments, name)) is not None]
    try:
        traces = load_traces(arguments.trace)
        runs = {"reuse": asyncio.run(replay(traces, options, "with cache reuse"))}
        if arguments.no_reuse:
            runs["no reuse"] = asyncio.run(replay(traces, [*options, "--no-reuse"], "without cache reuse"))
    except (BadTrace, ServerFailed) as error:
        print(f"pio-lsp --bench: {error}", file=sys.stderr)
        return 1
    results = {name: summary(run) for name, run in runs.items()}
    for name, result in results.items():
        print_table(result, name)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"schema": 1, "runs": results}, indent=1) + "\n", encoding="utf-8")
    if arguments.html:
        write_html(results, Path(arguments.html))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pio-lsp --bench", description=__doc__)
    parser.add_argument("--model", help="as for pio-lsp")
    parser.add_argument("--device", help="as for pio-lsp")
    parser.add_argument("--threads", type=int, help="as for pio-lsp")
    parser.add_argument("--prompt-tokens", type=int, help="as for pio-lsp")
    parser.add_argument("--max-tokens", type=int, help="as for pio-lsp")
    parser.add_argument("--trace", action="append", metavar="FILE", help="a recorded session (may be given more than once; default: those that come "
                        "with the package)")
    parser.add_argument("--no-reuse", action="store_true", help="replay once more with every prompt computed anew, to see what the cache is worth")
    parser.add_argument("--json", metavar="FILE", help="write all numbers")
    parser.add_argument("--html", metavar="FILE", help="write a page with charts")
    return parser
