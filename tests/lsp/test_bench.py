"""--bench from end to end against a scripted server: what is sent, what is measured, what is reported."""

import asyncio
import json
import sys
from pathlib import Path
from threading import Thread
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import perf_counter
from xml.etree import ElementTree

import pytest

from inference_pio.lsp_server.bench import command, page, pio, report
from inference_pio.lsp_server.bench.client import LspClient
from inference_pio.lsp_server.bench.replay import Answer, Recording, Sample, replay
from inference_pio.lsp_server.bench.trace import bundled, parse

SCRIPTED = Path(__file__).with_name("scripted_server.py")


def trace(events: list[dict], text: str = "one\ntwo\n"):
    documents = {"a.py": {"language": "python", "text": text}, "b.py": {"language": "python", "text": text}}
    return parse(json.dumps({"schema": 1, "name": "test", "documents": documents, "events": events}), "test")


def key(kind: str, at: tuple[int, int], text: str, **more: object) -> dict:
    cursor = [at[0], at[1] + len(text)]
    return {"document": "a.py", "kind": kind, "change": {"from": list(at), "to": list(at), "text": text}, "request": cursor, **more}


async def play(events: list[dict], tmp_path: Path) -> tuple[Recording, dict[str, str]]:
    texts = tmp_path / "texts.json"
    async with LspClient([sys.executable, str(SCRIPTED), str(texts)]) as client:
        target = pio.PioTarget(client, tmp_path)
        await target.initialize()
        await target.ready(lambda status: None)
        recording = await replay([trace(events)], target, 30, lambda t, r: None)
    return recording, {Path(uri).name: text for uri, text in json.loads(texts.read_text()).items()}


async def test_times_are_the_clients_split_by_the_server(tmp_path):
    began = perf_counter()
    recording, _ = await play([key("cold", (0, 3), "x")], tmp_path)
    elapsed = 1e3 * (perf_counter() - began)
    [sample] = recording.samples
    a = sample.answer
    assert (sample.kind, a.text, a.source) == ("cold", "ABCDEF", "model")
    assert (a.prompt_tokens, a.reused_tokens, a.computed_tokens, a.generated_tokens) == (100, 90, 10, 11)
    assert 0 < a.answer_ms < elapsed
    assert a.tokens_per_second == 200.0 and a.first_token_ms == a.answer_ms - 50.0


async def test_a_request_waits_as_the_editor_does_and_the_wait_does_not_count(tmp_path):
    began = perf_counter()
    recording, _ = await play([key("cold", (0, 3), "x", ask_after_ms=400)], tmp_path)
    assert 1e3 * (perf_counter() - began) > 400 and recording.samples[0].answer.answer_ms < 300 and recording.samples[0].at_s >= 0.4


async def test_suggested_text_is_taken_back_before_the_next_recorded_key(tmp_path):
    events = [key("cold", (0, 3), "x"),
              {"document": "a.py", "kind": "type-through", "take": 2, "request": True},
              {"document": "a.py", "kind": "after accept", "accept": True, "request": True},
              key("same line", (0, 4), "y"),
              {"document": "b.py", "kind": "cold", "request": [1, 3]}]
    recording, texts = await play(events, tmp_path)
    assert [(s.kind, s.answer.text, s.answer.source) for s in recording.samples] == [
        ("cold", "ABCDEF", "model"), ("type-through", "CDEF", "type-through"), ("after accept", "ABCDEF", "model"),
        ("same line", "ABCDEF", "model"), ("cold", "ABCDEF", "model")]
    assert texts == {"a.py": "onexy\ntwo\n", "b.py": "one\ntwo\n"}
    assert recording.skipped == 0 and recording.requests == 5


async def test_nothing_shown_cannot_be_typed_through(tmp_path):
    events = [key("cold", (0, 3), "x", wait=False),
              {"document": "a.py", "kind": "type-through", "take": 1, "request": True}, key("same line", (0, 4), "y")]
    recording, texts = await play(events, tmp_path)
    assert recording.skipped == 1 and recording.requests == 2 and len(recording.samples) == 1
    assert texts["a.py"] == "onexy\ntwo\n"


async def test_a_cancelled_request_gives_a_time_to_idle_and_no_sample(tmp_path):
    recording, _ = await play([key("same line", (0, 3), "x", cancel_after_ms=0)], tmp_path)
    assert len(recording.idle_ms) == 1 and recording.idle_ms[0] > 0 and not recording.samples


async def test_what_was_answered_before_it_was_cancelled_has_no_time_to_idle(tmp_path):
    recording, _ = await play([key("same line", (0, 3), "x", cancel_after_ms=1000)], tmp_path)
    assert not recording.idle_ms and not recording.samples and recording.requests == 1


async def test_time_is_shared_between_traces():
    class Slow:
        remembers_shown = True

        def __getattr__(self, name):
            return lambda *a: None

        def suggest(self, *a):
            return self

        async def answer(self):
            await asyncio.sleep(0.05)
            return Answer(text="x", answer_ms=50.0)

    traces = [trace([key("same line", (0, 3 + i), "x") for i in range(20)]) for _ in range(2)]
    recording = await replay(traces, Slow(), 0.4, lambda t, r: None)
    assert 3 <= len(recording.samples) <= 10
    assert recording.events_left == 40 - len(recording.samples)


# -- the whole command ----------------------------------------------------------------------------------------


@pytest.fixture
def scripted(monkeypatch, tmp_path):
    """--bench with the scripted server in the real one's place; the fixture is the list of its extra arguments."""
    extra: list[str] = []
    monkeypatch.setattr(command, "command", lambda *a: [sys.executable, str(SCRIPTED), str(tmp_path / "texts.json"), *extra])
    return extra


@pytest.fixture
def short(tmp_path):
    path = tmp_path / "trace.json"
    events = [key("cold", (0, 3), "x"), *(key("same line", (0, 4 + i), "y") for i in range(3)),
              {"document": "a.py", "kind": "type-through", "take": 2, "request": True}, key("same line", (0, 7), "z", cancel_after_ms=0)]
    document = {"language": "python", "text": "one\ntwo\n"}
    path.write_text(json.dumps({"schema": 1, "name": "short", "documents": {"a.py": document}, "events": events}))
    return path


def test_command_prints_a_table_and_writes_json_and_html(scripted, short, tmp_path, capsys):
    assert command.main(["--trace", str(short), "--json", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html")]) == 0
    out = capsys.readouterr().out
    assert "same line" in out and "type-through" in out and "toy" in out and "initialize answered" in out
    document = json.loads((tmp_path / "r.json").read_text())
    [run] = document["runs"]
    assert document["schema"] == 1 and document["model"]["name"] == "toy"
    assert run["kinds"]["same line"]["requests"] == 3 and run["kinds"]["same line"]["reused_tokens"]["p50"] == 90
    assert run["decode_tokens_per_second"] == pytest.approx(200.0)
    assert document["roof"] == {"read_gb_per_second": 40.0, "decode_gb_per_second": pytest.approx(20.011), "share": pytest.approx(0.500275)}
    assert run["memory"]["at_rest"] > 1 << 20 and run["memory"]["model"] == SCRIPTED.stat().st_size and "at rest" in out
    assert run["held_up_ms"]["working"]["p50"] > 0 and "event loop" in out
    html = (tmp_path / "r.html").read_text()
    assert html == page.render(document)
    for svg in html.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + svg.split("</svg>")[0] + "</svg>")
    assert "http" not in html, "the page must not need a network"


def test_an_event_loop_that_is_blocked_is_seen(scripted, short, tmp_path):
    scripted.append("--hold")
    assert command.main(["--trace", str(short), "--json", str(tmp_path / "r.json")]) == 0
    assert json.loads((tmp_path / "r.json").read_text())["runs"][0]["held_up_ms"]["loading"]["max"] >= 190


def test_a_server_that_dies_is_named_with_its_last_words(scripted, short, capsys):
    scripted.append("--die")
    assert command.main(["--trace", str(short)]) == 1
    error = capsys.readouterr().err
    assert "exit code 3" in error and "something broke" in error and "Traceback" not in error


def test_a_model_that_cannot_be_loaded_is_an_error(scripted, short, capsys):
    scripted.append("--fail")
    assert command.main(["--trace", str(short)]) == 1
    assert "no such model: toy" in capsys.readouterr().err


def test_a_trace_that_does_not_fit_its_document_is_an_error(scripted, tmp_path, capsys):
    path = tmp_path / "bad.json"
    event = key("cold", (7, 0), "x")
    path.write_text(json.dumps({"schema": 1, "name": "bad", "documents": {"a.py": {"language": "c", "text": "x"}}, "events": [event]}))
    assert command.main(["--trace", str(path)]) == 1
    assert "trace bad, event 0: line 7 is outside the document of 1 lines" in capsys.readouterr().err


def test_no_reuse_plays_twice_and_shows_both(scripted, short, tmp_path, capsys):
    assert command.main(["--trace", str(short), "--no-reuse", "--json", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html")]) == 0
    document = json.loads((tmp_path / "r.json").read_text())
    assert [run["name"] for run in document["runs"]] == ["pio-lsp", "without reuse"]
    assert set(document["ratios"]["without reuse"]) == {"cold", "same line", "type-through"}
    assert "times longer" in capsys.readouterr().out
    assert 'class="run1"' in (tmp_path / "r.html").read_text()


# -- a llama-server -------------------------------------------------------------------------------------------


class LlamaServer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fim = True
    bodies: list[tuple[str, dict]] = []

    def log_message(self, *args):
        pass

    def do_GET(self):
        self._send(200, {"model_path": "/models/toy.gguf"} if self.path == "/props" else [{"id": 0, "is_processing": False}])

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/infill" and not self.fim:
            return self._send(501, {"error": {"message": "Infill is not supported by this model"}})
        self.bodies.append((self.path, body))
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        timings = {"cache_n": 70, "prompt_n": 30, "predicted_n": 2, "predicted_ms": 1.0, "prompt_ms": 1.0}
        for event in ({"content": "ab"}, {"content": "c", "stop": True, "timings": timings}):
            data = f"data: {json.dumps(event)}\n\n".encode()
            self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
        self.wfile.write(b"0\r\n\r\n")

    def _send(self, status: int, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture(params=[True, False], ids=["infill", "completion"])
def llama_server(request):
    handler = type("Handler", (LlamaServer,), {"fim": request.param, "bodies": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()


def test_against_a_llama_server(scripted, short, llama_server, tmp_path, capsys):
    url, handler = llama_server
    assert command.main(["--trace", str(short), "--against", url, "--json", str(tmp_path / "r.json")]) == 0
    run = json.loads((tmp_path / "r.json").read_text())["runs"][1]
    assert run["options"]["infill"] is handler.fim and run["options"]["model"] == "toy.gguf"
    assert run["kinds"]["same line"]["reused_tokens"]["p50"] == 70 and run["kinds"]["same line"]["computed_tokens"]["p50"] == 30
    assert "type-through" not in run["kinds"] and run["skipped"] == 1
    assert run["cancel_to_idle_ms"]["p50"] > 0
    path, body = handler.bodies[1]   # the first is the question whether it can fill in the middle
    if handler.fim:
        assert path == "/infill" and (body["input_prefix"], body["prompt"], body["input_suffix"]) == ("", "onex", "\ntwo\n")
    else:
        assert path == "/completion" and body["prompt"] == "onex"
    out = capsys.readouterr().out
    assert "its first token, ms" in out and "llama-server" in out


def test_against_nothing_is_an_error(scripted, short, capsys):
    assert command.main(["--trace", str(short), "--against", "http://127.0.0.1:9"]) == 1
    assert "http://127.0.0.1:9" in capsys.readouterr().err
    assert command.main(["--trace", str(short), "--against", "https://example"]) == 1


# -- numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values, p, expected", [
    ([5], 50, 5), ([5], 99, 5), ([1, 2], 50, 1), ([1, 2, 3], 50, 2), (list(range(1, 101)), 90, 90), (list(range(1, 101)), 99, 99),
    ([3, 1, 2], 99, 3), (list(range(1, 12)), 90, 10),
])
def test_percentiles_are_nearest_rank(values, p, expected):
    assert report.percentile(values, p) == expected


def test_report_of_fixed_samples():
    def sample(kind, first, answer, **more):
        return Sample("t", "a.py", kind, 0.0, Answer("x", first, answer, **more))

    recording = Recording([
        sample("cold", 900.0, 1000.0, prompt_tokens=1000, computed_tokens=1000, generated_tokens=21, tokens_per_second=200.0),
        sample("same line", 30.0, 130.0, prompt_tokens=1001, reused_tokens=1000, computed_tokens=1, generated_tokens=21, tokens_per_second=400.0),
        sample("same line", 50.0, 150.0, prompt_tokens=1002, reused_tokens=1000, computed_tokens=2, generated_tokens=3, tokens_per_second=9999.0),
        sample("type-through", 0.9, 0.9, source="type-through", server_ms=0.2),
    ], idle_ms=[4.0, 8.0], requests=6, seconds=2.5)
    run = report.run("x", {}, recording)
    assert list(run["kinds"]) == ["cold", "same line", "type-through"]
    assert run["kinds"]["same line"]["first_token_ms"] == {"p50": 30.0, "p90": 50.0, "p99": 50.0, "max": 50.0}
    assert run["kinds"]["type-through"]["reached_model"] == 0 and run["kinds"]["type-through"]["reused_tokens"] is None
    assert run["decode_tokens_per_second"] == 300.0    # 200 and 400; the answer of 3 tokens says nothing
    assert run["from_memory_ms"]["p99"] == 0.2 and run["cancel_to_idle_ms"]["max"] == 8.0
    assert (run["prompt_tokens"], run["reused_tokens"], run["computed_tokens"]) == (3003, 2000, 1003)
    slower = report.run("y", {}, Recording([sample("same line", 90.0, 99.0), sample("file switch", 1.0, 1.0)]))
    assert report.ratios(run, slower) == {"same line": {"p50": 3.0, "p90": 1.8, "p99": 1.8}}


def test_bundled_traces_can_be_played():
    traces = bundled()
    assert {t.name for t in traces} == {"c", "go", "python", "rust", "typescript"}
    kinds = {e.kind for t in traces for e in t.events if e.request}
    assert len(kinds) == 7
