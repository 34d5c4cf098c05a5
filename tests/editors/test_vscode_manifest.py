"""What can be said of the VS Code extension without VS Code."""

from __future__ import annotations

import json
from pathlib import Path

from inference_pio.lsp_server.settings import schema

VSCODE = Path(__file__).parents[2] / "editors" / "vscode"


def test_settings_are_the_servers():
    properties = json.loads((VSCODE / "package.json").read_text())["contributes"]["configuration"]["properties"]
    properties.pop("pio.command")
    assert properties == json.loads(json.dumps(schema())), "run `npm run settings` in editors/vscode"


def test_commands_are_declared_and_carried_out():
    declared = {entry["command"] for entry in json.loads((VSCODE / "package.json").read_text())["contributes"]["commands"]}
    sources = "".join(path.read_text() for path in (VSCODE / "src").glob("*.ts"))
    assert declared and all(f'"{command}"' in sources for command in declared)


def test_the_lock_file_names_no_registry():
    assert "resolved" not in (VSCODE / "package-lock.json").read_text()
