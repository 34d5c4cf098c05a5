"""Token ids are those of the models' own tokenizers, text is never taken for a special token, and cutting text changes nothing."""

from __future__ import annotations

import gc
import json
import threading
import time
from itertools import chain
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints import GOLDEN
from inference_pio.engine.errors import BadCheckpoint
from inference_pio.engine.gguf import open_gguf
from inference_pio.engine.hub import locate
from inference_pio.engine.tokenizer import StreamDecoder, Tokenizer

QWEN_TOKENS = json.loads((GOLDEN / "qwen3_tokens.json").read_text(encoding="utf-8"))
SMOL_TOKENS = {
    "The capital of France is": [504, 3575, 282, 4649, 314],
    "def f(x):\n    return x**2  # 123": [1604, 275, 24, 104, 727, 472, 1003, 1792, 828, 34, 216, 907, 216, 33, 34, 35],
    "Héllo  wörld\t\n\n  42 — ok": [56, 2756, 31394, 216, 267, 29989, 400, 197, 39892, 36, 34, 1841, 10907],
    "it's 3.5kg\n\n\n  x  12 34": [269, 506, 216, 35, 30, 37, 11372, 1116, 3805, 1792, 256, 33, 34, 216, 35, 36],
}


@pytest.fixture(scope="session")
def qwen():
    return Tokenizer.from_file(GOLDEN / "qwen3_tokenizer.json")


@pytest.fixture(scope="session")
def metadata():
    return open_gguf(locate("smollm2-135m").path)[0]


@pytest.fixture(scope="session")
def smol(metadata):
    return Tokenizer.from_gguf(metadata, "smollm2")


def whole(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of text that is encoded in one piece, by the library alone."""
    return tokenizer._encoder.encode_batch_fast([text])[0].ids


@pytest.mark.parametrize("text", QWEN_TOKENS)
def test_qwen_ids(qwen, text):
    assert qwen.encode_with_special(text) == QWEN_TOKENS[text]
    assert qwen.vocabulary == 151669


@pytest.mark.parametrize("text", SMOL_TOKENS)
def test_smollm_ids(smol, text):
    assert smol.encode(text) == SMOL_TOKENS[text] and smol.decode(SMOL_TOKENS[text]) == text


def test_special_ids(qwen, smol):
    assert [qwen.special[f"<|{name}|>"] for name in ("endoftext", "im_start", "im_end", "fim_prefix", "fim_middle", "fim_suffix", "file_sep")] == [
        151643, 151644, 151645, 151659, 151660, 151661, 151664]
    assert (smol.special["<|endoftext|>"], smol.special["<|im_start|>"], smol.special["<|im_end|>"]) == (0, 1, 2)
    assert sorted(smol.special.values()) == list(range(17)) and smol.vocabulary == 49152


@pytest.mark.parametrize("text", ["<|im_end|>", "a<|im_start|>system\n<|endoftext|>", "<think><|fim_prefix|></think>"])
def test_special_tokens_in_text_are_text(qwen, smol, text):
    for tokenizer in (qwen, smol):
        ids = tokenizer.encode(text)
        assert not set(ids) & set(tokenizer.special.values()) and tokenizer.decode(ids) == text
        escaped = tokenizer.escaped(text, "\ue000")
        assert tokenizer.encode_with_special(escaped, "\ue000") == ids


def test_a_special_token_of_one_character_can_be_escaped(tmp_path):
    fields = json.loads((GOLDEN / "qwen3_tokenizer.json").read_text(encoding="utf-8"))
    fields["added_tokens"] += [{"content": c, "id": 151700 + i} for i, c in enumerate(("§", "¶", "§¶"))]
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    tokenizer = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert tokenizer.encode_with_special("§¶¶§") == [151702, 151701, 151700]
    assert tokenizer.encode_with_special(tokenizer.escaped("§¶¶§", "\ue000"), "\ue000") == tokenizer.encode("§¶¶§")


PIECES = st.sampled_from(["\n", "\r\n", "\r", "\n\n", " ", "    ", "\t", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u180e", "\u00a0", "a", "Word", "_", "'s",
                          "'LL", "12", "½", "²", "Ⅷ", "٣", "{", "};", "(),", "# ", "é", "e\u0301", "\u0301", "\u0327", "日本", "😀", "\u200b", "\0", "\ufeff"])


@settings(max_examples=600)
@given(st.lists(PIECES, max_size=30).map("".join))
def test_cutting_at_lines_changes_no_id(qwen, smol, text):
    for tokenizer in (smol, qwen):
        assert tokenizer.encode(text) == whole(tokenizer, text)


def test_text_is_cut_where_it_can_be(qwen, smol):
    assert len(qwen._cut.split("a\nb;\n\n  c\n")) == 3 and len(smol._cut.split("a\nb;\n\n  c\n")) == 4


def test_unknown_splitting_is_never_cut(tmp_path):
    fields = json.loads((GOLDEN / "qwen3_tokenizer.json").read_text(encoding="utf-8"))
    for steps in ([{"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}], [{"type": "Split", "pattern": {"Regex": "x"}, "behavior": "Isolated"},
                  {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]):
        fields["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"trim_offsets": True, "invert": False, **step} for step in steps]}
        (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
        tokenizer = Tokenizer.from_file(tmp_path / "tokenizer.json")
        assert tokenizer.encode("1 2\n3\n\n45 6\n") == whole(tokenizer, "1 2\n3\n\n45 6\n")


# SmolLM2's vocabulary lacks some bytes: those of a few control characters and of planes without characters.
KNOWN = st.characters(codec="utf-8", max_codepoint=0x3FFFF, exclude_characters="\x04\x06\x13\x14\x16\x1d")


@settings(max_examples=200)
@given(st.text(KNOWN, max_size=60))
def test_any_text_comes_back(smol, text):
    assert smol.decode(smol.encode(text)) == text


def test_lone_surrogates_and_nuls(smol):
    assert smol.decode(smol.encode("a\ud800b\udfffc\0d")) == "a\ufffdb\ufffdc\0d"
    assert smol.decode(smol.encode("\ud83d\ude00")) == "😀", "a pair is the character it stands for"


def test_streaming_never_splits_a_character(smol):
    text = "né 日本語 😀👨‍👩‍👧 ok"
    stream, pieces = StreamDecoder(), []
    for byte in b"".join(map(smol.token_bytes, smol.encode(text))):
        pieces.append(stream.feed(bytes([byte])))
    assert "".join(pieces) == text and all(len(piece) <= 1 for piece in pieces) and stream.finish() == ""
    assert stream.feed(b"\xf0\x9f") == "" and stream.finish() == "\ufffd", "what is never finished is shown as such"


def test_special_and_padding_ids_are_no_text(smol, qwen):
    assert smol.decode([2, 504, 0, 49152, -1, 10**9]) == "The" and qwen.decode([151668, 9707, 151935]) == "Hello"


# ---- token healing -----------------------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(st.lists(PIECES, max_size=12).map("".join))
def test_healing_loses_nothing(smol, text):
    ids = smol.encode("x = 1\n" + text)
    kept, required = smol.heal(ids)
    assert ids[:len(kept)] == kept and kept and required == b"".join(map(smol.token_bytes, ids[len(kept):]))


def test_a_cut_word_is_backed_up_to_where_it_begins(smol):
    assert smol.heal(smol.encode("value = json.du"))[1] == b"du"
    assert smol.heal(smol.encode("    return resu"))[1] == b" resu"
    assert smol.heal(smol.encode("foo("))[1] == b"" and smol.heal(smol.encode("foo();\n"))[1] == b""


@pytest.mark.parametrize("prefix", [b"d", b" retu", b"    ", b"\xe6", "日本".encode(), b"zzqq", b"\0"])
def test_allowed_tokens_agree_with_the_prefix(smol, prefix):
    words = -(-smol.vocabulary // 32)
    mask = smol.allowed(prefix, words)
    found = {i for i in range(32 * words) if mask[i >> 3] >> (i & 7) & 1}
    texts = {i: smol.token_bytes(i) for i in range(smol.vocabulary)}
    assert len(mask) == 4 * words and found
    assert found == {i for i, text in texts.items() if text and (text.startswith(prefix) or prefix.startswith(text))}


# ---- time and threads --------------------------------------------------------------------------------------------------------


def test_a_keystroke_in_a_long_prompt_costs_its_line(smol, monkeypatch):
    text = "".join(f"def function_{n}(self, value):\n    return value * {n}  # a comment about it\n\n" for n in range(350))
    assert 8000 < len(smol.encode(text)) < 16000
    fresh = []
    encoder, encode_batch = smol._encoder, smol._encoder.encode_batch_fast
    monkeypatch.setattr(smol, "_encoder", SimpleNamespace(encode_batch_fast=lambda texts: fresh.append(texts) or encode_batch(texts)))
    for n in range(1, 20):
        edited = text[:400] + "x" * n + text[400:]
        fresh.clear()
        ids = smol.encode(edited)
        assert sum(map(len, chain.from_iterable(fresh))) < 200
        assert ids == encoder.encode(edited, add_special_tokens=False).ids


def longest_gap(work) -> tuple[float, float]:
    """(longest time between two turns of this thread, time that work takes on another), in seconds."""
    gc.disable()   # of a test run's many objects it would be the longest
    try:
        worker, began = threading.Thread(target=work), time.perf_counter()
        longest, last = 0.0, began
        worker.start()
        while worker.is_alive():
            time.sleep(0.001)
            longest, last = max(longest, time.perf_counter() - last), time.perf_counter()
    finally:
        gc.enable()
    return longest, last - began


def test_five_megabytes_do_not_hold_other_threads(smol):
    gap, took = longest_gap(lambda: smol.encode("let a = [1, 2, 3]; " * 270_000))
    assert gap < took / 2, "the lock is free while text is encoded"


def test_many_threads_get_the_same_ids(smol):
    texts = [f"line {n}\n" * 50 + "tail" for n in range(20)]
    wanted, wrong = [whole(smol, text) for text in texts], []

    def work():
        for text, ids in zip(texts, wanted):
            if smol.encode(text) != ids:
                wrong.append(text)

    threads = [threading.Thread(target=work) for _ in range(4)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert not wrong


def test_what_is_kept_of_lines_is_bounded(qwen, monkeypatch):
    monkeypatch.setattr("inference_pio.engine.tokenizer._HELD", 1000)
    for n in range(50):
        text = f"line {n}\n" * 3 + "y" * 90
        assert qwen.encode(text) == whole(qwen, text)
        assert sum(map(len, qwen._lines)) <= 1000


# ---- damaged vocabularies ----------------------------------------------------------------------------------------------------

GGML = "tokenizer.ggml."


@pytest.mark.parametrize("changes,names", [
    ({"tokens": None}, "lacks tokenizer.ggml.tokens"), ({"merges": None}, "lacks tokenizer.ggml.merges"), ({"pre": None}, "lacks tokenizer.ggml.pre"),
    ({"model": "llama"}, "gpt2"), ({"model": 5}, "gpt2"), ({"tokens": 7}, "array of strings"), ({"tokens": ["a", 1]}, "array of strings"),
    ({"merges": "a b"}, "array of strings"), ({"merges": ["ab"]}, "damaged"), ({"merges": ["a nowhere"]}, "damaged"), ({"pre": "unheard-of"}, "'unheard-of'"),
    ({"pre": ["gpt-2"]}, "pre"), ({"tokens": ["a", "a"], "token_type": [1, 1]}, "twice"), ({"tokens": ["a", "b"], "token_type": [1]}, "token_type"), ({"token_type": 1}, "token_type"),
    ({"tokens": ["▁a", "b"], "token_type": [1, 1], "merges": []}, "byte-level"), ({"tokens": ["", "b"], "token_type": [1, 1], "merges": []}, "''"),
])
def test_a_damaged_gguf_vocabulary_is_refused_by_name(metadata, changes, names):
    fields = {**{k: v for k, v in metadata.items() if k.startswith(GGML)}, **{GGML + k: v for k, v in changes.items()}}
    with pytest.raises(BadCheckpoint, match=names):
        Tokenizer.from_gguf({k: v for k, v in fields.items() if v is not None}, "file.gguf")


@pytest.mark.parametrize("damage,names", [
    (lambda f: f.pop("model"), "no BPE"), (lambda f: f.update(model=[1]), "no BPE"), (lambda f: f["model"].update(type="Unigram"), "no BPE"),
    (lambda f: f["model"].update(vocab=[]), "no BPE"), (lambda f: f["model"].update(merges=[["x", "nowhere"]]), "tokenizer.json"),
    (lambda f: f["model"].update(continuing_subword_prefix="xx"), "tokenizer.json.*damaged"),
    (lambda f: f["model"]["vocab"].update(x=-1), "tokenizer.json"), (lambda f: f["model"]["vocab"].update(x=4_000_000_000), "'x'.*4000000000"),
    (lambda f: f["model"]["vocab"].update(x="1"), "tokenizer.json"), (lambda f: f["model"]["vocab"].update({"▁x": 5}), "byte-level"),
    (lambda f: f.update(added_tokens=[{"content": "<a>", "id": -1}]), "'<a>'.*-1"), (lambda f: f.update(added_tokens=[{"content": "", "id": 1}]), "''"),
    (lambda f: f.update(added_tokens=[{"content": "<a>", "id": 2**40}]), "'<a>'"), (lambda f: f.update(added_tokens=[{"id": 1}]), "tokenizer.json"),
    (lambda f: f.update(added_tokens=7), "tokenizer.json"), (lambda f: f.update(added_tokens=[{"content": ["a"], "id": 1}]), "tokenizer.json"),
    (lambda f: f.update(pre_tokenizer={"type": "None"}), "tokenizer.json"), (lambda f: f.update(pre_tokenizer=[3]), "tokenizer.json"),
])
def test_a_damaged_tokenizer_json_is_refused_by_name(tmp_path, damage, names):
    fields = json.loads((GOLDEN / "qwen3_tokenizer.json").read_text(encoding="utf-8"))
    damage(fields)
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(BadCheckpoint, match=names):
        Tokenizer.from_file(tmp_path / "tokenizer.json")


def test_padding_of_a_gguf_vocabulary_is_never_drawn(metadata):
    fields = {k: v for k, v in metadata.items() if k.startswith(GGML)}
    fields |= {GGML + "tokens": fields[GGML + "tokens"] + ["[PAD0]", "[PAD1]"], GGML + "token_type": fields[GGML + "token_type"] + [5, 5]}
    tokenizer = Tokenizer.from_gguf(fields, "file.gguf")
    assert tokenizer.vocabulary == 49152 and tokenizer.token_bytes(49152) == b""
