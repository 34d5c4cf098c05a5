"""How many prompt tokens a step takes: as many as keep it short, and more where a short step would be a waste."""

from __future__ import annotations

import random

import pytest

from inference_pio.engine.scheduler import STEP_SECONDS, Scheduler


def learned(fixed: float, each: float, most: int = 2048, steps: int = 40, noise: float = 0.05) -> int:
    """The chunk after steps on a machine that needs fixed + each * tokens seconds."""
    scheduler, draw = Scheduler(most, 16), random.Random(1)
    for _ in range(steps):
        tokens = max(16, int(scheduler.chunk * draw.uniform(0.4, 1.0)))   # a prompt's last step is smaller
        scheduler.learn(tokens, (fixed + each * tokens) * draw.uniform(1 - noise, 1 + noise))
    return scheduler.chunk


@pytest.mark.parametrize("fixed,each", [(0.0, 4e-4), (0.002, 3e-4), (0.0, 1e-4)])
def test_a_step_takes_as_long_as_others_may_wait(fixed, each):
    assert fixed + each * learned(fixed, each) == pytest.approx(STEP_SECONDS, rel=0.3)


def test_where_a_step_is_slow_whatever_it_holds_it_holds_more():
    """A mixture of experts on a GPU: 16 tokens take 27 ms, 2,048 take 93."""
    fixed, each = 0.026, 3.3e-5
    chunk = learned(fixed, each)
    assert chunk > 1000 and fixed + each * chunk < 4 * fixed


def test_what_is_computed_while_weights_are_read_is_not_taken_for_cheap():
    """bf16 weights on a CPU: reading them takes 24 ms, and in that time 24 tokens are computed. Steps of 16 tokens alone would
    look like 1.5 ms a token, and stay steps of 16; what a step of one token takes tells them apart."""
    read, each = 0.024, 1e-3
    scheduler, draw = Scheduler(512, 16), random.Random(1)
    for answer in range(4):
        for _ in range(10):   # a prompt
            tokens = max(16, int(scheduler.chunk * draw.uniform(0.7, 1.0)))
            scheduler.learn(tokens, max(read, each * tokens) * draw.uniform(0.95, 1.05))
        for token in range(30):
            scheduler.learn(1, 0.5 if token == 7 else read * draw.uniform(1.0, 1.1))   # once the machine pauses
    assert 1.5 * read < each * scheduler.chunk < 4 * read


def test_limits_hold():
    assert learned(0.0, 1e-7) == 2048 and learned(0.0, 1e-7, most=512) == 512
    assert learned(0.0, 0.1) == 16
    assert learned(1.0, 1e-4, noise=0.0) == 2048, "however slow, never more than a step has room for"


def test_steps_of_one_size_tell_nothing_of_what_is_fixed():
    scheduler = Scheduler(512, 16)
    for _ in range(30):
        scheduler.learn(64, 0.064)
    assert scheduler.chunk == pytest.approx(30, abs=2)


def test_a_machine_that_becomes_slower_is_noticed():
    scheduler = Scheduler(512, 16)
    for seconds in [1e-4] * 20 + [1e-3] * 20:
        scheduler.learn(scheduler.chunk, seconds * scheduler.chunk)
    assert seconds * scheduler.chunk == pytest.approx(STEP_SECONDS, rel=0.3)
