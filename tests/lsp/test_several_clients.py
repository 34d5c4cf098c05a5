"""Several editor windows on one server: they share the model and what was computed, and none takes another along when it goes."""

from __future__ import annotations

import socket
import subprocess
import sys
import time

import pytest
from tiny_model import write_model
from wire import PATIENCE, Client

TEXT = "class Store:\n    def get(self, key):\n        return self.items[key]\n\n    def put(self, key, value):\n        "
END = (5, 8)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def server(model):
    """(process, a function that connects a client)"""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-m", "inference_pio.lsp_server", "--model", str(model), "--device", "cpu", "--threads", "1",
                                "--port", str(port), "--no-prefetch"], stderr=subprocess.PIPE)
    sockets = []

    def connect() -> tuple[Client, socket.socket]:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                sockets.append(socket.create_connection(("127.0.0.1", port)))
                break
            except ConnectionRefusedError:
                assert time.monotonic() < deadline and process.poll() is None, process.stderr.read().decode()
                time.sleep(0.05)
        stream = sockets[-1].makefile("rwb")
        client = Client(stream, stream)
        client.initialize()
        client.wait_ready()
        return client, sockets[-1]

    yield process, connect
    for one in sockets:
        one.close()
    process.kill()
    process.wait()
    process.stderr.close()


def ask(client: Client, uri: str) -> tuple[str | None, dict]:
    """(the suggestion, its counts)"""
    text = client.inline(*END, uri=uri)
    return text, client.request("pio/status", {})["last"]["stats"]


def test_they_share_the_model_and_what_was_computed(server):
    process, connect = server
    (one, _), (two, _) = connect(), connect()
    one.open(TEXT, "file:///one/a.py")
    two.open(TEXT, "file:///two/a.py")
    text, cold = ask(one, "file:///one/a.py")
    again, warm = ask(two, "file:///two/a.py")
    assert text == again and cold["reused_tokens"] == 0 and warm["computed_tokens"] == 1
    for number in range(5):
        two.open(f"# {number}\n" + TEXT, f"file:///two/{number}.py")
        two.inline(6, 8, uri=f"file:///two/{number}.py")
    one.change(2, (*END, *END, "x"), uri="file:///one/a.py")
    one.inline(5, 9, uri="file:///one/a.py")
    assert one.request("pio/status", {})["last"]["stats"]["computed_tokens"] <= 2, "the other's files took nothing from it"


def test_one_that_leaves_takes_nobody_along_and_the_last_one_ends_the_server(server):
    process, connect = server
    (polite, _), (rude, rude_socket), (last, last_socket) = connect(), connect(), connect()
    for number, client in enumerate((polite, rude, last)):
        client.open(TEXT, f"file:///{number}.py")
        client.send_inline(*END, uri=f"file:///{number}.py")
    polite.request("shutdown")
    polite.notify("exit")
    rude_socket.shutdown(socket.SHUT_RDWR)
    polite.wait(lambda: polite.ended and rude.ended, "the end of two connections")
    assert ask(last, "file:///2.py")[1]["prompt_tokens"] > 0 and process.poll() is None
    last_socket.shutdown(socket.SHUT_RDWR)
    assert process.wait(PATIENCE) == 0
    assert process.stderr.read() == b""


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run([sys.executable, "-m", "inference_pio.lsp_server", "--port", str(port)], capture_output=True, timeout=PATIENCE)
    assert done.returncode == 1 and str(port).encode() in done.stderr and b"Traceback" not in done.stderr
