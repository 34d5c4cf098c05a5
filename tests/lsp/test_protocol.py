"""What an editor may count on, whatever it sends: exactly one answer to every request, and a server that stays."""

import threading
import time

import pytest
from scripted_engine import Script
from wire import URI


# ---- initialize ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offered, chosen", [(["utf-8", "utf-16"], "utf-8"), (["utf-16"], "utf-16"), (["utf-32", "utf-16"], "utf-32"), (None, "utf-16")])
def test_capabilities_are_advertised_statically(served, offered, chosen):
    capabilities = served().client.initialize(encodings=offered)["capabilities"]
    assert capabilities["inlineCompletionProvider"] is not None and capabilities["inlineCompletionProvider"] is not False
    assert capabilities["positionEncoding"] == chosen
    assert "completionProvider" in capabilities
    sync = capabilities["textDocumentSync"]
    assert (sync if isinstance(sync, int) else sync["change"]) == 2


def test_an_editor_with_ghost_text_is_offered_no_menu_beside_it(served):
    capabilities = served().client.initialize(text_document={"inlineCompletion": {}})["capabilities"]
    assert "inlineCompletionProvider" in capabilities and "completionProvider" not in capabilities


@pytest.mark.parametrize("encoding, character", [("utf-8", 11), ("utf-16", 9), ("utf-32", 8)])
def test_positions_count_in_the_agreed_unit(ready, encoding, character):
    served, client = ready(encodings=[encoding])
    client.open('s = "🦀"; x\n')
    assert client.inline(0, character + (2 if encoding != "utf-8" else 2)) is not None
    prompt = served.engine.asked[-1].prompt
    assert prompt.prefix + prompt.middle + "|" + prompt.suffix == 's = "🦀"; x\n'.replace(" x", " x", 1)[:len('s = "🦀"; x')] + "|\n"


def test_an_answer_is_an_item_at_the_cursor(ready):
    _, client = ready(Script(["turn 1"]))
    client.open("re")
    answer = client.answer(client.send_inline(0, 2))["result"]
    here = {"line": 0, "character": 2}
    assert answer == {"items": [{"insertText": "turn 1", "range": {"start": here, "end": here}}]}


def test_nothing_to_show_is_an_empty_list_never_null(ready):
    _, client = ready(Script([" "]))
    client.open("x = 1\n")
    assert client.answer(client.send_inline(1, 0))["result"] == {"items": []}


def test_editors_without_ghost_text_get_a_menu_item(ready):
    _, client = ready(Script(["turn 1"]))
    client.open("re")
    result = client.request("textDocument/completion", {"textDocument": {"uri": URI}, "position": {"line": 0, "character": 2}})
    [item] = result["items"]
    assert item["textEdit"]["newText"] == "turn 1" and item["filterText"] == "return 1" and item["label"].startswith("return 1")


# ---- loading -------------------------------------------------------------------------------------------------------------


def test_loading_shows_progress_only_where_the_client_can(served):
    plain, able = served(Script(load_seconds=0.1)).client, served(Script(load_seconds=0.1)).client
    plain.initialize()
    able.initialize(window={"workDoneProgress": True})
    for client in (plain, able):
        client.wait_ready()
    assert [r["method"] for r in able.requests] == ["window/workDoneProgress/create"] and not plain.requests
    token = able.requests[0]["params"]["token"]
    able.wait(lambda: any(v["kind"] == "end" for v in able.progress(token)), "the end of the progress")
    assert [v["kind"] for v in able.progress(token)][0] == "begin"


def test_a_request_waits_for_a_model_that_is_being_loaded(served):
    client = served(Script(load_seconds=0.3)).client
    client.initialize()
    client.open("x = ")
    assert client.inline(0, 4) == "answer"


def test_a_model_that_does_not_load_is_named_and_the_server_stays(served):
    client = served(Script(load_error="no such model: toy; see pio-lsp models")).client
    client.initialize()
    client.open("x = ")
    assert client.inline(0, 4) is None
    assert "no such model: toy" in client.request("pio/status", {})["error"]
    assert "no such model: toy" in client.request("pio/explain", {})["reason"]
    assert any(n["method"] == "window/showMessage" and "no such model" in n["params"]["message"] for n in client.notifications)


# ---- supersession and cancellation ---------------------------------------------------------------------------------------


def slow() -> Script:
    return Script(["slowly, slowly it is written"], token_seconds=0.05)


def endless() -> Script:
    """It would write for longer than any test waits."""
    return Script(["x" * 64], token_seconds=0.5)


def wait_idle(served) -> None:
    served.client.wait(lambda: not served.engine.status().running, "the end of the engine's work")


def test_a_newer_request_supersedes_an_older_one(ready):
    served, client = ready(slow())
    client.open("a\nb\n")
    older = client.send_inline(0, 1)
    client.wait(lambda: served.engine.asked, "the first generation")
    newer = client.send_inline(1, 1)
    assert client.answer(older)["result"] == {"items": []}
    assert client.answer(newer)["result"]["items"]
    assert served.engine.asked[0].stream.closed


def test_documents_do_not_supersede_each_other(ready):
    _, client = ready(slow())
    client.open("a")
    client.open("b", uri=URI + "2")
    one, two = client.send_inline(0, 1), client.send_inline(0, 1, URI + "2")
    assert client.answer(one)["result"]["items"] and client.answer(two)["result"]["items"]


@pytest.mark.parametrize("method, context", [("textDocument/inlineCompletion", {"triggerKind": 1}), ("textDocument/completion", {"triggerKind": 1})])
def test_a_cancelled_request_is_answered_and_the_engine_stops(ready, method, context):
    served, client = ready(endless())
    client.open("a")
    number = client.send(method, {"textDocument": {"uri": URI}, "position": {"line": 0, "character": 1}, "context": context})
    client.wait(lambda: served.engine.asked, "a generation")
    client.notify("$/cancelRequest", {"id": number})
    assert client.answer(number)["error"]["code"] == -32800
    wait_idle(served)


def test_cancelling_what_does_not_run_does_no_harm(ready):
    _, client = ready()
    for number in (4711, "a name"):
        client.notify("$/cancelRequest", {"id": number})
    client.open("x = ")
    assert client.inline(0, 4) == "answer"


def test_a_flood_is_answered_completely_and_leaves_nothing_behind(ready):
    served, client = ready(slow())
    client.open("a = 1\n" * 50)
    numbers = [client.send_inline(i % 50, i % 5) for i in range(1000)]
    for number in numbers:
        assert "items" in client.answer(number)["result"]
    wait_idle(served)
    client.wait(lambda: not served.server.protocol._request_futures, "the end of all requests")


def test_closing_a_document_ends_what_is_written_for_it(ready):
    served, client = ready(endless())
    client.open("a")
    number = client.send_inline(0, 1)
    client.wait(lambda: served.engine.asked, "a generation")
    client.notify("textDocument/didClose", {"textDocument": {"uri": URI}})
    assert client.answer(number)["result"] == {"items": []}
    wait_idle(served)


# ---- bad input -----------------------------------------------------------------------------------------------------------


def test_documents_that_are_not_open(ready):
    _, client = ready()
    assert client.inline(0, 0, "file:///never/opened.py") is None
    client.change(2, (0, 0, 0, 0, "x"), uri="file:///never/opened.py")
    client.notify("textDocument/didClose", {"textDocument": {"uri": "file:///never/opened.py"}})
    client.open("x = ")
    client.notify("textDocument/didClose", {"textDocument": {"uri": URI}})
    assert client.inline(0, 4) is None


def test_positions_and_ranges_outside_the_text_are_moved_into_it(ready):
    served, client = ready()
    client.open("one\ntwo")
    client.change(2, (0, 3, 99, 99, "!"))
    assert client.inline(77, 77) is not None
    prompt = served.engine.asked[-1].prompt
    assert (prompt.prefix + prompt.middle, prompt.suffix) == ("one!", "")


def test_versions_that_go_back_are_ignored(ready):
    served, client = ready()
    client.open("one", version=5)
    client.change(4, ("older",))
    client.change(6, (0, 3, 0, 3, " more"))
    client.inline(0, 8)
    prompt = served.engine.asked[-1].prompt
    assert prompt.prefix + prompt.middle == "one more"


@pytest.mark.parametrize("params", [None, [], {}, {"textDocument": {}}, {"textDocument": {"uri": URI}, "position": "here"}, "text",
                                    {"textDocument": {"uri": URI}, "position": {"line": -1, "character": 0}}])
def test_unreadable_parameters_are_answered(ready, params):
    _, client = ready()
    client.open("x = ")
    answer = client.answer(client.send("textDocument/inlineCompletion", params))
    assert answer.get("error", {}).get("code") in (-32602, -32603) or "items" in answer["result"]
    assert client.inline(0, 4) == "answer"


@pytest.mark.parametrize("body", [b"{", b"null", b"[]", b"17", b"\xff\xfe", b'{"id": 7}', b'{"jsonrpc": "2.0"}', b'{"jsonrpc": "1.0", "id": 77, "method": "x"}',
                                  b'{"jsonrpc": "2.0", "id": 99, "result": 1}', b'{"jsonrpc": "2.0", "method": "textDocument/didOpen"}',
                                  b'{"jsonrpc": "2.0", "method": "textDocument/didChange", "params": {"contentChanges": 3}}',
                                  b'{"jsonrpc": "2.0", "method": "$/cancelRequest", "params": {}}', b'{"jsonrpc": "2.0", "id": {}, "method": "shutdown"}'])
def test_messages_that_mean_nothing_do_not_end_the_session(ready, body):
    _, client = ready()
    client.raw(b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
    client.open("x = ")
    assert client.inline(0, 4) == "answer"


def test_unknown_methods_are_refused(ready):
    _, client = ready()
    assert client.answer(client.send("no/such", {}))["error"]["code"] == -32601
    client.notify("no/such", {})
    assert client.answer(client.send("workspace/executeCommand", {"command": "no.such"}))["error"]["code"] == -32602


@pytest.mark.parametrize("text", ["a\0b = ", "x\r\ny\rz = ", "page\f\x0b\x1c\u2028\u2029\x85 = ", "\ud800 lone \udfff = ", "🦀" * 100 + " = "])
def test_odd_texts_are_kept_to_the_character(ready, text):
    served, client = ready(encodings=["utf-32"])
    client.open(text)
    line = text.replace("\r\n", "\n").replace("\r", "\n").count("\n")
    assert client.inline(line, 10_000) == "answer"
    prompt = served.engine.asked[-1].prompt
    assert prompt.prefix + prompt.middle == text


def test_an_error_of_the_engine_is_explained(ready):
    served, client = ready()
    served.script.submit_error = "out of memory: choose a smaller context"
    client.open("x = ")
    assert client.inline(0, 4) is None
    assert "smaller context" in client.request("pio/explain", {})["reason"]


def test_a_change_of_a_document_of_5_mb_costs_less_than_reading_it(ready):
    _, client = ready(Script(["answer"]))
    text = "value = compute(value)  # naïve\n" * 160_000

    def took(send) -> float:
        began = time.perf_counter()
        send()
        client.request("pio/status", {})   # answered behind it
        return time.perf_counter() - began

    client.open(text)
    assert client.inline(80_000, 5) is not None
    opening = sorted(took(lambda: client.open(text, version=1)) for _ in range(5))
    typing = sorted(took(lambda: client.change(version, (80_000, 5, 80_000, 5, "x"))) for version in range(2, 22))
    assert typing[10] < opening[2], f"{1e3 * typing[10]:.0f} of {1e3 * opening[2]:.0f} ms"


def test_the_event_loop_is_free_while_the_engine_is_not(served):
    """The engine is stuck in each of its calls, and everything else is answered."""
    gate = threading.Event()
    one = served(Script(gate=gate))
    client = one.client
    client.initialize()
    assert client.request("pio/status", {})["state"] == "loading"
    gate.set()
    client.wait_ready()
    gate.clear()
    client.open("x = ")
    number = client.send_inline(0, 4)
    client.wait(lambda: one.engine.waiting, "a prompt in the engine's hands")
    assert client.request("pio/status", {})["state"] == "ready" and number not in client.answers
    client.change(2, (0, 4, 0, 4, "y"))
    assert client.request("pio/explain", {})["version"] == 1
    client.notify("workspace/didChangeConfiguration", {"settings": {"pio": {"weights": "q8"}}})   # closes the engine, when it can
    assert client.request("pio/status", {})["state"] == "loading" and not one.engine.closed
    gate.set()
    assert "items" in client.answer(number)["result"]
    client.wait(lambda: len(one.engines) == 2, "the second engine")
