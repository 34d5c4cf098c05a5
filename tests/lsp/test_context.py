"""What is shown of other files: their beginnings and what is named at the cursor, in an order that stays, and no secrets."""

import subprocess

import pytest

from inference_pio.lsp_server.context import SIZE, Context
from inference_pio.lsp_server.documents import Document
from inference_pio.lsp_server.privacy import Privacy


def document(name: str, text: str, version: int = 1, folder: str = "file:///work") -> Document:
    return Document.of(f"{folder}/{name}", "python", version, text)


FILLER = "".join(f"filler_{i} = {i}\n" for i in range(200))
STORE = document("store.py", FILLER + "class Store:\n    def get(self, key):\n        return self.items[key]\n")
MONEY = document("money.py", "def convert(amount, rate):\n    return amount * rate\n")
HERE = document("here.py", "store = Store()\nprice = store.get(1)\n")


def shown(context: Context, here: Document = HERE, others=(STORE, MONEY), offset: int | None = None, **options):
    return context.chunks(here, len(here.text) if offset is None else offset, others, options.pop("secrets", False), **options)


def test_beginnings_come_first_and_then_the_definitions_of_what_is_named():
    chunks = shown(Context(Privacy()))
    assert [c.path for c in chunks] == ["money.py", "store.py", "store.py"]
    assert chunks[0].text == MONEY.text and STORE.text.startswith(chunks[1].text) and chunks[1].text.endswith("\n")
    assert chunks[2].text.startswith("class Store:\n    def get") and "filler" not in chunks[2].text


@pytest.mark.parametrize("line, name", [
    ("export async function fetchAll(url: string) {", "fetchAll"), ("func (s *Store) Lookup(key string) int {", "Lookup"),
    ("pub fn parse_header(input: &[u8]) -> Header {", "parse_header"), ("static int hash_of(const char *key, int n) {", "hash_of"),
    ("#define CAPACITY 64", "CAPACITY"), ("    async def run(self):", "run"), ("pub(crate) struct Config {", "Config"), ("interface Shape {", "Shape")])
def test_definitions_of_many_languages_are_found(line, name):
    other = document("other", FILLER + line + "\n" + FILLER)
    here = document("here", f"x = {name}")
    assert shown(Context(Privacy()), here, [other])[1].text.startswith(line)
    assert len(shown(Context(Privacy()), document("here", "x = nothing"), [other])) == 1


def test_it_stays_while_somebody_types_and_changes_with_the_other_files():
    context = Context(Privacy())
    first = shown(context)
    for typed in ("convert", "(Store, ", "filler_190"):
        assert shown(context, HERE.edited(len(HERE.text), len(HERE.text), typed, 2)) is first
    assert shown(context, others=(MONEY, STORE)) is first, "which was looked at last does not matter"
    changed = shown(context, others=(STORE, document("money.py", "RATE = 2\n", version=2)))
    assert changed[0].text == "RATE = 2\n" and changed[1:] == first[1:]


def test_far_away_other_definitions_are_shown():
    context = Context(Privacy())
    here = document("here.py", "x = Store()\n" + FILLER * 3 + "y = unknown\n")
    assert len(shown(context, here, offset=11)) == 3
    assert len(shown(context, here, offset=400)) == 3
    assert len(shown(context, here)) == 2


@pytest.mark.parametrize("size", [64, 400, SIZE])
def test_it_keeps_to_its_size(size):
    many = [document(f"{n}.py", FILLER + f"def function_{n}():\n    pass\n" * 50) for n in range(9)]
    here = document("here.py", " ".join(f"function_{n}" for n in range(9)))
    chunks = shown(Context(Privacy()), here, many, size=size)
    assert sum(len(c.text) for c in chunks) <= size and len(chunks) >= 3


def test_secret_and_ignored_files_are_never_shown(tmp_path):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / ".gitignore").write_text("private.py\n")
    others = [document(name, f"password_{number} = 1\n", folder=tmp_path.as_uri()) for number, name in enumerate(
        (".env", "prod.env", "server.key", "id_ed25519", "private.py", "public.py"))]
    assert [c.path for c in shown(Context(Privacy()), others=others)] == ["public.py"]
    assert len(shown(Context(Privacy()), others=others, secrets=True)) == 3
