"""pio-lsp: serve an editor, measure (--bench), list models, print settings."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence
from textwrap import fill

from attrs import fields

from inference_pio import __version__
from inference_pio.lsp_server.arguments import parse
from inference_pio.lsp_server.settings import Settings, schema


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--bench" in argv:
        from inference_pio.lsp_server.bench import main as bench

        argv.remove("--bench")
        return bench(argv)
    arguments = parse(argv)
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
            print(f"pio-lsp: port {arguments.port} cannot be served: {os.strerror(error.errno) if error.errno else error}. Choose another --port", file=sys.stderr)
            return 1
    return 0


def _models() -> int:
    from inference_pio.engine import list_models

    print("What --model takes by name; a Hugging Face id, a folder or a .gguf file works, too.")
    default = Settings().model
    for model in sorted(list_models(), key=lambda model: (model.name != default, model.name)):
        size = f"{model.disk_bytes / 1e6:,.0f} MB" if model.disk_bytes else ""
        here = f"on disk, {size}" if model.on_disk else "fetched at its first start" + (f", {size}" if size else "")
        memory = f"; needs {model.memory_bytes / 1e6:,.0f} MB of memory" if model.memory_bytes else ""
        print(f"\n{model.name}{' (the default)' if model.name == default else ''}: {here}{memory}")
        print(fill(model.description[:1].upper() + model.description[1:] + ".", 79, initial_indent="    ", subsequent_indent="    "))
        print(f"    From {model.checkpoint}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
