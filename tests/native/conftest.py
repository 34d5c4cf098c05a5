"""Fixtures of the op tests, which run on any kernel library: `pytest tests/native --device cuda` takes the GPU's."""

from __future__ import annotations

import numpy as np
import pytest

from inference_pio.native.backend import Backend


@pytest.fixture(scope="session")
def backend(request):
    with Backend.open(request.config.getoption("--device")) as backend:
        backend.reserve(n=128, widest=8192, h=32, p=256)
        yield backend


@pytest.fixture
def rng():
    """Fresh inputs in every run; a failure prints the seed."""
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed {seed}")
    return np.random.default_rng(seed)
