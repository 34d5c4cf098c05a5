"""Documents against a slow oracle: split at LSP's line ends, count character by character."""

import re

import pytest
from hypothesis import given, strategies as st

from inference_pio.lsp_server.documents import Document, Documents

ODD = "ab \n\r\t\f\v\x1c\x85\u2028\u2029\0é\u0301ß漢🦀𝒳\ud800\udfff"
TEXTS = st.text(ODD, max_size=40) | st.lists(st.sampled_from(["\r\n", "\r", "\n", "x", "🦀"]), max_size=20).map("".join)
ENCODINGS = st.sampled_from(["utf-8", "utf-16", "utf-32"])


def lines(text: str) -> list[str]:
    """With their ends."""
    return re.findall(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+\Z", text) + ([""] if not text or text[-1] in "\r\n" else [])


def width(character: str, encoding: str) -> int:
    return {"utf-32": 4, "utf-16": 2, "utf-8": 1}[encoding] and len(character.encode(encoding + ("-le" if encoding != "utf-8" else ""), "surrogatepass")) // {
        "utf-32": 4, "utf-16": 2, "utf-8": 1}[encoding]


def oracle_offset(text: str, line: int, character: int, encoding: str) -> int:
    all_lines = lines(text)
    if line >= len(all_lines):
        return len(text)
    start, body = sum(map(len, all_lines[:line])), all_lines[line].rstrip("\r\n")
    for index, c in enumerate(body):
        if character < width(c, encoding):
            return start + index
        character -= width(c, encoding)
    return start + len(body)


@given(TEXTS, st.integers(0, 12), st.integers(0, 30), ENCODINGS)
def test_positions(text, line, character, encoding):
    assert Document.of("u", "x", 1, text).offset(line, character, encoding) == oracle_offset(text, line, character, encoding)


@given(TEXTS, st.integers(0, 40), ENCODINGS)
def test_a_position_leads_back(text, offset, encoding):
    document, offset = Document.of("u", "x", 1, text), min(offset, len(text))
    line, character = document.position(offset, encoding)
    inside_an_end = text[offset - 1:offset + 1] == "\r\n"
    assert document.offset(line, character, encoding) == (offset - 1 if inside_an_end else offset)


@given(TEXTS, st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40), TEXTS), max_size=6))
def test_lines_after_edits_are_those_of_the_new_text(text, edits):
    document = Document.of("u", "x", 1, text)
    for version, (one, other, new) in enumerate(edits, 2):
        start, end = sorted((min(one, len(text)), min(other, len(text))))
        text = text[:start] + new + text[end:]
        document = document.edited(start, end, new, version)
        assert document == Document.of("u", "x", version, text)


@given(TEXTS, st.lists(st.tuples(st.tuples(*[st.integers(-1, 15)] * 4) | st.none(), TEXTS), min_size=1, max_size=5), ENCODINGS)
def test_changes_of_a_client(text, changes, encoding):
    documents = Documents()
    documents.encoding = encoding
    documents.open("u", "x", 1, text)
    for span, new in changes:
        if span is None:
            text = new
        else:
            start, end = sorted((oracle_offset(text, span[0], max(span[1], 0), encoding) if span[0] >= 0 else 0,
                                 oracle_offset(text, span[2], max(span[3], 0), encoding) if span[2] >= 0 else 0))
            text = text[:start] + new + text[end:]
    documents.change("u", 2, changes)
    assert documents.get("u").text == text


def test_who_holds_a_document_keeps_what_they_saw():
    documents = Documents()
    held = documents.open("u", "x", 1, "before")
    documents.change("u", 2, [(None, "after")])
    assert held.text == "before" and documents.get("u").text == "after"


def test_recent_documents_come_first():
    documents = Documents()
    for uri in "abc":
        documents.open(uri, "x", 1, uri)
    documents.change("a", 2, [(None, "!")])
    documents.close("b")
    assert [d.uri for d in documents.recent()] == ["a", "c"]


@pytest.mark.parametrize("uri, version", [("never opened", 2), ("u", 0)])
def test_changes_that_belong_to_nothing(uri, version):
    documents = Documents()
    documents.open("u", "x", 1, "text")
    assert documents.change(uri, version, [(None, "x")]) is None and documents.get("u").text == "text"
