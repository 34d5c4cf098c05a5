"""Imports go down only: editors > lsp_server > engine > models > native. lsp_server sees of the engine what engine/__init__ exports."""

import ast
from pathlib import Path

import pytest

import inference_pio

FLOORS = ("lsp_server", "engine", "models", "native")
ROOTS = {floor: next(Path(p) / floor for p in inference_pio.__path__ if (Path(p) / floor).is_dir()) for floor in FLOORS}
# A model's tests and benchmarks stand beside it and above it: they use the whole engine, and the wheel leaves them out.
FILES = [(floor, path) for floor in FLOORS for path in sorted(ROOTS[floor].rglob("*.py")) if not {"tests", "benchmarks"} & set(path.parts[-3:-1])]


@pytest.mark.parametrize("floor,path", FILES, ids=lambda value: str(value)[-40:])
def test_imports_go_down(floor, path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            if not name.startswith("inference_pio."):
                continue
            target = name.split(".")[1]
            assert FLOORS.index(target) >= FLOORS.index(floor), f"{path} imports {name}, which is above it"
            if floor == "lsp_server" and target != "lsp_server":
                assert name == "inference_pio.engine", f"{path} imports {name}: lsp_server uses what inference_pio.engine exports"
