"""An LSP server that suggests what a test tells it to: SUGGESTION after an optional delay, logs the methods it sees to LOG and its process to
LOG.pid. SUGGESTION is also its answer in the chat, which never ends if `hang` follows, and what it writes over a selection. With `slow` it
takes a second to start, with `thinks` it reasons before it answers. Suggestions separated by \\x1e are several; --version VERSION is what
it says of itself."""

import json
import os
import sys
import time
from pathlib import Path

suggestion, delay, log = sys.argv[1].encode().decode("unicode_escape"), float(sys.argv[2]), open(sys.argv[3], "a", buffering=1)
Path(sys.argv[3] + ".pid").write_text(str(os.getpid()))


def read():
    length = 0
    while line := sys.stdin.buffer.readline().strip():
        name, _, value = line.partition(b":")
        length = int(value) if name.lower() == b"content-length" else length
    return json.loads(sys.stdin.buffer.read(length)) if length else None


def send(message):
    body = json.dumps({"jsonrpc": "2.0", **message}).encode()
    sys.stdout.buffer.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)
    sys.stdout.buffer.flush()


while message := read():
    method = message.get("method")
    log.write(f"{method}\n")
    if method == "initialize":
        time.sleep("slow" in sys.argv)
        encoding = message["params"]["capabilities"]["general"]["positionEncodings"][0]
        capabilities = {"textDocumentSync": 2, "inlineCompletionProvider": {}, "positionEncoding": encoding, "codeActionProvider": True}
        version = sys.argv[sys.argv.index("--version") + 1] if "--version" in sys.argv else "0.1.0"
        send({"id": message["id"], "result": {"capabilities": capabilities, "serverInfo": {"name": "scripted", "version": version}}})
    elif method == "textDocument/inlineCompletion":
        time.sleep(delay)
        here = message["params"]["position"]
        items = [{"insertText": text, "range": {"start": here, "end": here}} for text in suggestion.split("\x1e")]
        send({"id": message["id"], "result": {"items": items}})
    elif method == "pio/status":
        send({"id": message["id"], "result": {"state": "ready", "enabled": True, "model": "scripted", "error": None, "progress": None}})
    elif method == "pio/chat":
        if "thinks" in sys.argv:
            send({"method": "$/progress", "params": {"token": message["params"]["partialResultToken"], "value": {"reasoning": "<b>because</b>"}}})
        send({"method": "$/progress", "params": {"token": message["params"]["partialResultToken"], "value": {"delta": suggestion}}})
        if "hang" not in sys.argv:
            send({"id": message["id"], "result": {"text": suggestion}})
    elif method == "pio/edit":
        edit = {"range": message["params"]["range"], "newText": suggestion}
        document = {"uri": message["params"]["textDocument"]["uri"], "version": message["params"]["textDocument"]["version"]}
        send({"id": message["id"], "result": {"documentChanges": [{"textDocument": document, "edits": [edit]}]}})
    elif method == "exit":
        break
    elif "id" in message and method:
        send({"id": message["id"], "result": None})
