"""The real server with a real (tiny, hybrid) model over stdio, and clients that behave badly: answers stay exact, memory stays bounded,
nothing hangs. The model's weights are random, so its text gives away any wrong token."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
from real_server import check_at_rest, resident, start
from tiny_model import write_model
from wire import PATIENCE, Client, Process

FILES = [f"file:///work/{name}" for name in ("a.py", "b.py", "c.py")]
TEXTS = ["def add(a, b):\n    return \n", "class Store:\n    def get(self, key):\n        \n", "x = 1\n" * 40]
ENDS = [(1, 11), (2, 8), (30, 5)]   # where suggestions are asked for


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny") / "model")


def suggestions(client: Client) -> list[str | None]:
    """Of fresh documents: what was open is closed before."""
    for uri, text in zip(FILES, TEXTS, strict=True):
        client.notify("textDocument/didClose", {"textDocument": {"uri": uri}})
        client.open(text, uri)
    return [client.inline(*end, uri=uri) for uri, end in zip(FILES, ENDS, strict=True)]


@pytest.fixture(scope="module")
def cold(model) -> list[str | None]:
    """What a server without a cache suggests."""
    process = start(model, "--no-reuse")
    found = suggestions(process.client)
    assert process.end()[0] == 0 and any(found)
    return found


@pytest.fixture
def server(model):
    process = start(model)
    yield process
    code, stderr = process.end()
    assert code == 0 and b"Traceback" not in stderr, stderr.decode()


def test_changes_that_make_no_sense_change_no_answer(server, cold):
    client = server.client
    assert suggestions(client) == cold
    for uri in FILES:
        client.change(3, (0, 0, 0, 0, "never opened"), uri="file:///work/never.py")
        client.change(3, (0, 0, 0, 5, "# new\n"), uri=uri)
        client.change(2, ("older",), uri=uri)
        client.change(4, (900, 900, 901, 7, "outside"), (5, 7, 3, 2, "backwards"), uri=uri)
        client.change(-7, (0, 0, 0, 0, "negative"), uri=uri)
        client.inline(4_000, 4_000, uri=uri)
        client.inline(1, 3, uri="file:///work/never.py")
    assert suggestions(client) == cold
    check_at_rest(client)


def test_a_thousand_requests_in_a_second_are_all_answered(server, cold):
    client = server.client
    suggestions(client)
    before, generator, numbers = resident(server), random.Random(4), []
    for number in range(1000):
        uri = generator.choice(FILES)
        if number % 3 == 0:
            client.change(10 + number, (1, 0, 1, generator.randrange(3), generator.choice(["x", "yz", "\n", ""])), uri=uri)
        numbers.append(client.send_inline(generator.randrange(5), generator.randrange(9), uri))
    for number in numbers:
        assert "items" in client.answer(number)["result"]
    check_at_rest(client)
    assert suggestions(client) == cold
    assert resident(server) - before < 64 << 20, "bytes that stay after a flood"


def test_everything_is_cancelled(server, cold):
    client = server.client
    suggestions(client)
    generator, numbers = random.Random(5), []
    for number in range(300):
        uri = generator.choice(FILES)
        client.change(10 + number, (1, 0, 1, 0, "z"), uri=uri)
        numbers.append(client.send_inline(1, 1 + generator.randrange(4), uri))
        for cancelled in generator.sample(numbers, min(3, len(numbers))) + [numbers[-1]]:
            client.notify("$/cancelRequest", {"id": cancelled})
    for number in numbers:
        answer = client.answer(number)
        assert answer.get("error", {}).get("code") == -32800 or "items" in answer["result"]
    check_at_rest(client)
    assert suggestions(client) == cold


@pytest.mark.parametrize("requests", [1, 300])
def test_a_client_that_disconnects_in_mid_stream_leaves_no_process(model, requests):
    process = start(model, "--max-tokens", "400")
    process.client.open(TEXTS[0], FILES[0])
    for number in range(requests):
        process.client.change(2 + number, (1, 11, 1, 11, "x"), uri=FILES[0])
        process.client.send_inline(1, 12 + number, FILES[0])
    process.client.wait(lambda: requests == 1 or process.client.answers, "the first answers")
    process.process.stdin.close()
    process.process.stdout.close()
    assert process.process.wait(PATIENCE) is not None
    assert process.process.stderr.read() == b"", "nobody may be there to read it, and then the server would wait for ever"
    process.process.stderr.close()


def test_typing_at_the_cursor_computes_what_was_typed(model):
    server = start(model, "--memory", "20000000", "--no-prefill", "--no-prefetch")
    client, typed, counted = server.client, 0, 0
    client.open(TEXTS[0] + "\n\n" + TEXTS[1], FILES[0])
    client.open(TEXTS[2], FILES[1])
    client.inline(*ENDS[0], uri=FILES[0])
    for character in "Q.Z_Q7(Q, Z)[Q]{Z}":     # hardly what random weights would suggest
        client.change(2 + typed, (1, 11 + typed, 1, 11 + typed, character), uri=FILES[0])
        typed += 1
        client.inline(1, 11 + typed, uri=FILES[0])
        last = client.request("pio/status", {})["last"]
        if last["source"] == "model":
            counted += 1
            assert last["stats"]["recomputed_tokens"] == 0 and last["stats"]["computed_tokens"] <= 3, last
    assert counted > 10
    server.end()


def test_a_client_that_leaves_while_the_model_is_loaded_leaves_no_process():
    process = Process(sys.executable, str(Path(__file__).parent / "scripted_engine.py"), "--load-seconds", "600")
    process.client.initialize()
    process.process.stdin.close()
    assert process.process.wait(PATIENCE) is not None
    process.process.stdout.close()
    process.process.stderr.close()
