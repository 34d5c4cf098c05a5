"""The command line: how to serve, and every setting."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from attrs import fields

from inference_pio import __version__
from inference_pio.lsp_server.settings import Settings


COMMANDS = ("models", "settings")


def parse(argv: Sequence[str], commands: Sequence[str] = COMMANDS) -> argparse.Namespace:
    """Arguments of the server. Ends the process, with a line that names the wrong one."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command is not None and arguments.command not in commands:
        parser.error(f"no command {arguments.command!r}" + (f": there are {' and '.join(commands)}" if commands else " here"))
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pio-lsp", usage="pio-lsp [OPTION ...] [models | settings]\n       pio-lsp --bench [OPTION ...]",
        description="A language server that writes code while you type, from models on your own machine. Without a command it serves LSP over "
        "stdin and stdout.", epilog="--bench measures a typing session and prints a table; pio-lsp --bench --help tells more.")
    parser.add_argument("command", nargs="?", metavar="models | settings", help="models: what can be selected; settings: their JSON schema")
    parser.add_argument("--version", action="version", version=f"pio-lsp {__version__}")
    parser.add_argument("--stdio", action="store_true", help="serve over stdin and stdout (the default)")
    parser.add_argument("--port", type=_port, metavar="N", help="serve over TCP on this port of the loopback interface instead: any number of "
                        "clients, which share the models they load; ends with the last of them")
    parser.add_argument("--no-reuse", action="store_true", help="compute every prompt anew, to measure what the cache is worth")
    settings = parser.add_argument_group("settings", "An editor's own settings come on top of these.")
    for attribute in fields(Settings):
        kind, meta = {"int": int, "float": float, "str": str}.get(str(attribute.type)), attribute.metadata
        option, shown = "--" + attribute.name.replace("_", "-"), f" (default: {attribute.default})"
        if kind is None:
            settings.add_argument(option, action=argparse.BooleanOptionalAction, default=None, help=meta["help"])
        else:
            metavar = None if meta["choices"] else "N" if kind is int else attribute.name.rpartition("_")[2].upper()
            settings.add_argument(option, type=kind, choices=meta["choices"] or None, metavar=metavar, help=meta["help"] + shown)
    return parser


def _port(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 0 < int(text) < 1 << 16):
        raise argparse.ArgumentTypeError(f"must be in 1..65535, not {text!r}")
    return int(text)
