"""Trimming against marked texts, one file for each language: see trim/README.md."""

import re
from pathlib import Path

import pytest

from inference_pio.lsp_server.trim import Place, trim

CASES = []
for file in sorted(Path(__file__).with_name("trim").glob("*.txt")):
    for case in re.split(r"(?m)^### ", file.read_text())[1:]:
        name, _, body = case.partition("\n")
        CASES.append(pytest.param(*body.split("\n--- ", 1), id=f"{file.stem}: {name}"))


def shown(marked: str) -> tuple[str, str, Place]:
    """The document with its cursor, the raw text, and the place."""
    before, raw, after = re.fullmatch(r"(?s)(.*?)⟦(.*?)⟧(.*)", marked).groups()
    cut = raw.endswith("✂")
    rest, newline, below = after.partition("\n")
    return before, raw.removesuffix("✂"), Place(before.rpartition("\n")[2], rest, newline + below, cut)


@pytest.mark.parametrize("marked, expected", CASES)
def test_golden(marked, expected):
    _, raw, place = shown(marked)
    head, _, text = expected.partition("\n")
    trimmed = trim(raw, place)
    if head.startswith("nothing: "):
        assert (trimmed.text, trimmed.dropped_by) == ("", head.removeprefix("nothing: ").strip())
    else:
        assert trimmed.text == text.removesuffix("\n").removesuffix("$") and trimmed.dropped_by is None


def test_every_case_is_read():
    assert len(CASES) >= 20


@pytest.mark.parametrize("raw", ["", "\n", "\0\0", "}" * 1000, "a\n" * 5000, "\ud800", "\r\r\r", "```", " " * 100, "\t\n\t\n"])
@pytest.mark.parametrize("place", [Place("", "", ""), Place("    ", "", "\n}"), Place("x", "y)", "\nz"), Place("\t\t", ")", "", True)])
def test_any_text_is_survived(raw, place):
    trimmed = trim(raw, place)
    assert bool(trimmed.text.strip()) == (trimmed.dropped_by is None)
    assert trimmed.text in raw.replace("\r", "\n") or "\0" in raw or len(trimmed.text) <= len(raw)
