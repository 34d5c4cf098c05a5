"""The suite once more for each lower instruction set: the one of this processor is what the other files run on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("isa", ["c", "avx2"])
def test_the_op_tests_pass_with(isa, backend):
    if backend.kind != "cpu":
        return   # instruction sets are the CPU library's
    others = [str(path) for path in sorted(Path(__file__).parent.glob("test_*.py")) if path.name != Path(__file__).name]
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *others], env={**os.environ, "TOPS_ISA": isa},
                          capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout[-4000:]
