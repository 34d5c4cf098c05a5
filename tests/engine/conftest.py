"""Fixtures of the engine's tests."""

from __future__ import annotations

import numpy as np
import pytest


@pytest.fixture
def rng():
    """Fresh inputs in every run; a failure prints the seed."""
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed {seed}")
    return np.random.default_rng(seed)
