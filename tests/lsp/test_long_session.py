"""Somebody edits twenty documents for a long time: no page and no checkpoint is lost, no byte more is used than was said, and the
answers are those of a server that has just begun."""

from __future__ import annotations

import random
import time

import pytest
from real_server import check_at_rest, resident, start
from tiny_model import write_model

DOCUMENTS, LINES = 20, 60
WORDS = ["value", "self", "return ", "def f(x):\n    ", "\n", "\n    ", "(", ")", " = ", "1", "for i in range(3):\n        ", "\u00e9", "\U0001f980"]


class Person:
    """Edits at random, as editors tell it. `texts` are the documents by their lines; characters are counted in utf-32."""

    def __init__(self, client, seed: int):
        self.client, self.draw = client, random.Random(seed)
        self.texts: dict[str, list[str]] = {}
        self.versions: dict[str, int] = {}
        self.asked: list[int] = []

    def open(self, number: int) -> str:
        uri = f"file:///work/module_{number}.py"
        if uri not in self.texts:
            self.texts[uri] = [f"value_{number}_{line} = {line}" for line in range(self.draw.randrange(1, LINES))]
            self.versions[uri] = 1
            self.client.open("\n".join(self.texts[uri]), uri)
        return uri

    def edit(self) -> None:
        uri = self.open(self.draw.randrange(DOCUMENTS))
        for _ in range(self.draw.randrange(1, 8)):
            lines = self.texts[uri]
            first = self.draw.randrange(len(lines))
            last = min(first + self.draw.choice([0, 0, 0, 0, 1, 5]), len(lines) - 1)
            start, end = self.draw.randrange(len(lines[first]) + 1), self.draw.randrange(len(lines[last]) + 1)
            if first == last:
                start, end = sorted((start, end)) if self.draw.random() < 0.3 else (start, start)
            if len(lines[first]) > 200:   # documents do not grow for ever
                start, end = 0, len(lines[last])
            new = "".join(self.draw.choices(WORDS, k=self.draw.choice([1, 1, 1, 2, 30])))[:LINES * 4]
            self.versions[uri] += 1
            self.client.change(self.versions[uri], (first, start, last, end, new), uri=uri)
            middle = (lines[first][:start] + new + lines[last][end:]).split("\n")
            lines[first:last + 1] = middle
            del lines[4 * LINES:]
            if len(lines) == 4 * LINES:     # the server's copy is cut off, too
                self.versions[uri] += 1
                self.client.change(self.versions[uri], (4 * LINES, 0, 10**6, 0, ""), (4 * LINES - 1, len(lines[-1]), 10**6, 0, ""), uri=uri)
            place = min(first + len(middle) - 1, len(lines) - 1)
            self.asked.append(self.client.send_inline(place, len(lines[place]), uri))
            if self.draw.random() < 0.2:
                self.client.notify("$/cancelRequest", {"id": self.draw.choice(self.asked)})
        if self.draw.random() < 0.1:
            self.client.notify("textDocument/didClose", {"textDocument": {"uri": uri}})
            del self.texts[uri]

    def wait(self) -> None:
        for number in self.asked:
            answer = self.client.answer(number)
            assert "result" in answer or answer["error"]["code"] == -32800, answer
            del self.client.answers[number]
        self.asked.clear()


def live(tmp_path, seconds: float) -> None:
    model = write_model(tmp_path / "model")
    server = start(model, encodings=["utf-32"])
    person, begin, before = Person(server.client, seed=7), time.monotonic(), 0
    while time.monotonic() < begin + seconds or not before:
        for _ in range(40):
            person.edit()
        person.wait()
        check_at_rest(server.client)
        if time.monotonic() > begin + seconds / 4:   # what may be remembered is remembered by then
            before = before or resident(server) or 1
    assert resident(server) - before < 64 << 20, "bytes that came to stay"
    fresh = start(model, "--no-reuse", encodings=["utf-32"])
    for uri in person.texts:
        server.client.notify("textDocument/didClose", {"textDocument": {"uri": uri}})
    for uri, lines in person.texts.items():
        found = []
        for client in (server.client, fresh.client):
            client.open("\n".join(lines), uri + "x")   # a new name: nothing is remembered of where its windows began
            found.append(client.inline(len(lines) - 1, len(lines[-1]), uri + "x"))
            client.notify("textDocument/didClose", {"textDocument": {"uri": uri + "x"}})
        assert found[0] == found[1]
    for process in (server, fresh):
        code, stderr = process.end()
        assert code == 0 and b"Traceback" not in stderr, stderr.decode()


def test_a_session_over_twenty_documents(tmp_path):
    live(tmp_path, 5)


@pytest.mark.slow
def test_a_session_over_twenty_documents_of_ten_minutes(tmp_path):
    live(tmp_path, 600)
