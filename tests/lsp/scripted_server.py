"""An LSP server that answers by the book and without a model, for tests of the bench's client side.

Suggests "ABCDEF" everywhere, remembers it for typing along, reports made-up but fixed counts, and writes the text of every document
to the file named by its argument when it is told to exit. `--die` makes it exit at the first suggestion, `--fail` load no model,
`--hold` block for a while as it loads.
"""

import json
import sys
from pathlib import Path
from time import sleep

SUGGESTION = "ABCDEF"
texts: dict[str, str] = {}
last: dict = {}
asked: dict[str, tuple[str, str]] = {}   # uri -> text before the cursor, what was suggested there
polls = 0


def offset(text: str, position: dict) -> int:
    lines = text.split("\n")
    return sum(len(line) + 1 for line in lines[:position["line"]]) + position["character"]


def suggest(params: dict) -> dict:
    if "--die" in sys.argv:
        print("something broke", file=sys.stderr)
        sys.exit(3)
    uri = params["textDocument"]["uri"]
    before = texts[uri][:offset(texts[uri], params["position"])]
    known, text = asked.get(uri, ("", ""))
    rest = text.removeprefix(before.removeprefix(known))
    if before.startswith(known) and 0 < len(rest) < len(text):
        counts = {"source": "type-through", "first_token_ms": None, "total_ms": 0.25, "stats": {}}
    else:
        stats = {"prompt_tokens": 100, "reused_tokens": 90, "computed_tokens": 10, "generated_tokens": 11,
                 "tokens_per_second": 200.0}
        rest, counts = SUGGESTION, {"source": "model", "first_token_ms": 2.0, "total_ms": 52.0, "stats": stats}
        asked[uri] = (before, rest)
    last.clear()
    last.update(counts)
    line_start = params["position"] | {"character": 0}
    return {"items": [{"insertText": before.rpartition("\n")[2] + rest, "range": {"start": line_start, "end": params["position"]}}]}


def status(params: dict) -> dict:
    global polls
    polls += 1
    if "--fail" in sys.argv:
        return {"state": "error", "error": "no such model: toy"}
    if polls == 2 and "--hold" in sys.argv:
        sleep(0.2)
    if polls < 3:
        return {"state": "loading", "progress": {"stage": "load", "done": 1, "total": 2, "detail": "toy"}}
    info = {"name": "toy", "weight_bytes": 99_000_000, "activations": "q8", "device": "cpu", "device_name": "Toy CPU", "path": __file__,
            "page_bytes": 160_000, "page_size": 16}
    return {"state": "ready", "info": info, "engine": {"running": 0, "waiting": 0}, "last": dict(last)}


def change(params: dict) -> None:
    uri = params["textDocument"]["uri"]
    for item in params["contentChanges"]:
        start, end = (offset(texts[uri], item["range"][side]) for side in ("start", "end"))
        texts[uri] = texts[uri][:start] + item["text"] + texts[uri][end:]


def answer(method: str, params: dict) -> object:
    match method:
        case "initialize":
            return {"capabilities": {"inlineCompletionProvider": {}, "textDocumentSync": 2}}
        case "textDocument/inlineCompletion":
            return suggest(params)
        case "pio/status":
            return status(params)
        case "pio/measure":
            return {"readBandwidth": 40e9}
    return None


def main() -> None:
    wire_in, wire_out = sys.stdin.buffer, sys.stdout.buffer
    while header := wire_in.readline():
        length = int(header.split(b":")[1])
        wire_in.readline()
        message = json.loads(wire_in.read(length))
        method, params = message["method"], message.get("params")
        if method == "textDocument/didOpen":
            texts[params["textDocument"]["uri"]] = params["textDocument"]["text"]
        elif method == "textDocument/didChange":
            change(params)
        elif method == "exit":
            Path(sys.argv[1]).write_text(json.dumps(texts))
            return
        elif "id" in message:
            body = json.dumps({"jsonrpc": "2.0", "id": message["id"], "result": answer(method, params)}).encode()
            wire_out.write(b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
            wire_out.flush()


if __name__ == "__main__":
    main()
