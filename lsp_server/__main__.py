"""pio-lsp: serve an editor, measure (--bench), list models, print settings."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence

from attrs import fields

from inference_pio import __version__
from inference_pio.lsp_server.settings import Settings, schema


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--bench" in argv:
        from inference_pio.lsp_server.bench import main as bench

        argv.remove("--bench")
        return bench(argv)
    arguments = _parser().parse_args(argv)
    if arguments.command == "models":
        return _models()
    if arguments.command == "settings":
        print(json.dumps(schema(), indent=2))
        return 0
    given = {name: value for name, value in vars(arguments).items() if value is not None and name in {a.name for a in fields(Settings)}}
    settings, messages = Settings.from_client(given)
    if messages:
        print(f"pio-lsp: {messages[0]}", file=sys.stderr)
        return 2
    logging.basicConfig(level=settings.log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("pygls").setLevel(logging.CRITICAL if settings.log_level != "debug" else logging.WARNING)   # at INFO it logs documents

    from inference_pio.lsp_server.server import Server
    from inference_pio.lsp_server.session import open_engine

    sys.setswitchinterval(5e-4)   # 5 ms, Python's default, is what a decoding engine would make each hop between threads cost
    if arguments.port is None:
        Server(settings, __version__, reuse=not arguments.no_reuse).serve_stdio()
    else:
        from inference_pio.lsp_server.tcp import serve

        try:
            serve(arguments.port, lambda shared: Server(settings, __version__, shared, not arguments.no_reuse, alone=False), open_engine)
        except OSError as error:
            print(f"pio-lsp: port {arguments.port} cannot be served: {error.strerror}. Choose another --port", file=sys.stderr)
            return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pio-lsp", description="A language server that writes code while you type, from models on your "
                                     "own machine. Without a command it serves LSP over stdin and stdout.",
                                     epilog="--bench measures a typing session and prints a table; pio-lsp --bench --help tells more.")
    parser.add_argument("command", nargs="?", choices=("models", "settings"), help="models: what can be selected; settings: their JSON schema")
    parser.add_argument("--version", action="version", version=f"pio-lsp {__version__}")
    parser.add_argument("--stdio", action="store_true", help="serve over stdin and stdout (the default)")
    parser.add_argument("--port", type=int, help="serve over TCP on this port of the loopback interface instead: any number of "
                        "clients, which share the models they load; ends with the last of them")
    parser.add_argument("--no-reuse", action="store_true", help="compute every prompt anew, to measure what the cache is worth")
    for attribute in fields(Settings):
        kind = {"int": int, "float": float, "str": str}.get(str(attribute.type))
        option = "--" + attribute.name.replace("_", "-")
        if kind is None:
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=None, help=attribute.metadata["help"])
        else:
            parser.add_argument(option, type=kind, help=f"{attribute.metadata['help']} (default: {attribute.default})")
    return parser


def _models() -> int:
    from rich.console import Console
    from rich.table import Table

    from inference_pio.engine import list_models

    table = Table(title="Models that --model takes by name (a Hugging Face id, a folder or a .gguf file works, too)")
    for heading in ("name", "what it is", "on disk", "in memory", "published as"):
        table.add_column(heading, overflow="fold")
    for model in list_models():
        size = f"{model.disk_bytes / 1e6:,.0f} MB" if model.disk_bytes else "size not known"
        memory = f"{model.memory_bytes / 1e6:,.0f} MB" if model.memory_bytes else "known once it is here"
        table.add_row(model.name, model.description, f"yes, {size}" if model.on_disk else f"no ({size})", memory, model.checkpoint)
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
