"""A server with a scripted engine for every test that asks for one."""

import pytest
from wire import Client, Served


@pytest.fixture
def served():
    """Call it with a Script; its client has not initialized yet."""
    running = []

    def start(script=None) -> Served:
        running.append(Served(script))
        return running[-1]

    yield start
    for one in running:
        one.end()


@pytest.fixture
def ready(served):
    """Call it with a Script: (Served, Client) with the model loaded. The engine is asked nothing that the test did not ask for."""
    def start(script=None, **options) -> tuple[Served, Client]:
        one = served(script)
        options.setdefault("options", {"prefetch": False})
        one.client.initialize(**options)
        one.client.wait_ready()
        return one, one.client
    return start
