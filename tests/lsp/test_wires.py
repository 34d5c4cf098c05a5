"""The server as a process: stdio and TCP, what comes out of it, and how it ends."""

import socket
import subprocess
import sys
import time
from pathlib import Path

from wire import PATIENCE, URI, Client, Process

SCRIPTED = str(Path(__file__).with_name("scripted_engine.py"))


def test_nothing_but_lsp_comes_out_of_stdout():
    process = Process(sys.executable, SCRIPTED, "--print-to-stdout")
    process.client.initialize()
    process.client.wait_ready()
    process.client.open("x = ")
    assert process.client.inline(0, 4) == "answer"
    code, stderr = process.end()
    assert code == 0 and not process.client.requests
    for words in (b"printed by Python", b"written by a C library", b"by a child process"):
        assert words in stderr


def test_the_server_leaves_when_the_client_hangs_up():
    process = Process(sys.executable, SCRIPTED, "--token-seconds", "0.05", "--answer", "x" * 200)
    process.client.initialize()
    process.client.wait_ready()
    process.client.open("x = ")
    process.client.send_inline(0, 4)
    time.sleep(0.2)
    process.process.stdin.close()
    assert process.process.wait(PATIENCE) is not None


def test_user_code_is_not_logged():
    process = Process(sys.executable, SCRIPTED, "--answer", "secret_answer")
    process.client.initialize()
    process.client.wait_ready()
    process.client.open("secret_text = ")
    assert process.client.inline(0, 14) is not None
    process.client.change(2, (0, 0, 0, 0, "secret_change"))
    process.client.notify("textDocument/didChange", {"textDocument": {"uri": URI}, "contentChanges": [{"text": "secret_broken", "range": 3}]})
    process.client.answer(process.client.send("textDocument/inlineCompletion", {"secret_params": 1}))
    _, stderr = process.end()
    assert b"secret_" not in stderr


def test_tcp_sees_the_document_as_it_was_when_the_request_came():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([sys.executable, SCRIPTED, "--port", str(port)], stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                connection = socket.create_connection(("127.0.0.1", port))
                break
            except ConnectionRefusedError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        stream = connection.makefile("rwb")
        client = Client(stream, stream)
        client.initialize()
        client.wait_ready()
        client.open("x = ")
        request = {"id": 900, "method": "textDocument/inlineCompletion", "params": {
            "textDocument": {"uri": URI}, "position": {"line": 0, "character": 4}, "context": {"triggerKind": 2}}}
        change = {"method": "textDocument/didChange", "params": {"textDocument": {"uri": URI, "version": 2}, "contentChanges": [{"text": ""}]}}
        client.raw(client.frame(request) + client.frame(change))
        assert [item["insertText"] for item in client.answer(900)["result"]["items"]] == ["answer"]
        connection.shutdown(socket.SHUT_RDWR)
        process.wait(PATIENCE)
    finally:
        process.kill()


HEAVY = {"numpy", "torch", "tokenizers", "huggingface_hub", "jinja2", "cffi", "rich", "safetensors"}


def test_initialize_is_answered_before_anything_heavy_is_imported():
    done = subprocess.run([sys.executable, "-c", "import sys, inference_pio.lsp_server.__main__, inference_pio.lsp_server.server; print(*sys.modules)"],
                          capture_output=True, text=True, check=True)
    assert not HEAVY & set(done.stdout.split())
