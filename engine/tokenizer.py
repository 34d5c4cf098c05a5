"""Text <-> token ids for byte-level BPE, from tokenizer.json or from a GGUF's vocabulary.

Text is plain: the strings of special tokens inside it are ordinary characters. Special tokens enter by name only.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Encoder

from inference_pio.engine.errors import BadCheckpoint
from inference_pio.engine.safetensors import read_json

_QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
_GLM4 = _QWEN2.replace(r"|\p{N}| ", r"|\p{N}{1,3}| ")
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# GGUF `tokenizer.ggml.pre` -> (patterns that split one after the other, normaliser).
_PRE_TOKENIZERS = {"qwen2": ((_QWEN2,), "NFC"), "glm4": ((_GLM4,), None), "llama-bpe": ((_GLM4,), None), "gpt-2": ((_GPT2,), None),
                   "smollm": ((r"\p{N}", _GPT2), None)}
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5
_MOST_IDS = 4 << 20
# Where text may be cut without changing its tokens. GPT-2's pattern never joins visible text to white space behind it; Qwen's and
# GLM's end a piece behind the last line break of white space, whatever follows.
_BEFORE_BREAKS, _BEHIND_BREAKS, _NOWHERE = re.compile(r"(?<=\S)(?=[\r\n])"), re.compile(r"(?<=[\r\n])(?=[ \t]*\S)"), re.compile(r"(?!)")
_CUTS = {_GPT2: _BEFORE_BREAKS, _QWEN2: _BEHIND_BREAKS, _GLM4: _BEHIND_BREAKS}
_HELD = 1 << 20   # characters of lines whose ids are kept: some hundred prompts


@contextmanager
def _panics_are_errors(where: str) -> Iterator[None]:
    """The library is written in Rust, and a panic there is not even an Exception here."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise BadCheckpoint(f"{where}: its tokenizer is damaged: {error}") from None


@lru_cache(1)
def _byte_of() -> dict[str, int]:
    """The byte alphabet of GPT-2: printable characters stand for themselves, other bytes for code points from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


class Tokenizer:
    """vocabulary: ids are below it. special: text -> id of the tokens that are no text."""

    def __init__(self, encoder_json: Mapping[str, Any], special: dict[str, int], where: str):
        self.special, self._where = special, where
        with _panics_are_errors(where):
            self._encoder = Encoder.from_str(json.dumps(encoder_json))
        self._cut = _cut(encoder_json)
        self._lines: dict[str, list[int]] = {}
        self._held = 0
        tokens = encoder_json["model"]["vocab"]
        for token, index in chain(tokens.items(), special.items()):
            if not token or type(index) is not int or not 0 <= index < _MOST_IDS:
                raise BadCheckpoint(f"{where}: token {token!r} has the id {index!r}")
        self.vocabulary = max([*tokens.values(), *special.values()], default=-1) + 1
        self._bytes: list[bytes] = [b""] * self.vocabulary
        alphabet = _byte_of()
        for token, index in tokens.items():
            if token not in special:
                try:
                    self._bytes[index] = bytes(map(alphabet.__getitem__, token))
                except KeyError:
                    raise BadCheckpoint(f"{where}: token {token!r} is not byte-level BPE, the only kind that is supported") from None
        self._special_ids = set(special.values())
        self._special_pattern = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")

    @classmethod
    def from_file(cls, path: Path) -> Tokenizer:
        """From a tokenizer.json. BadCheckpoint if it is not one of byte-level BPE."""
        fields = read_json(path)
        model = fields.get("model")
        if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
            raise BadCheckpoint(f"{path}: it has no BPE model with a vocabulary")
        try:
            special = {token["content"]: token["id"] for token in fields.get("added_tokens") or ()}
            return cls({**fields, "added_tokens": [], "post_processor": None, "truncation": None, "padding": None,
                        "model": {**model, "dropout": None}}, special, str(path))
        except BadCheckpoint:
            raise
        except Exception as error:   # the library reports what it dislikes as a bare Exception
            raise BadCheckpoint(f"{path} is not a tokenizer.json: {error}") from None

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], where: str) -> Tokenizer:
        """From the vocabulary in a GGUF's metadata."""
        for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.pre"):
            if key not in metadata:
                raise BadCheckpoint(f"{where} lacks {key}")
        if metadata.get("tokenizer.ggml.model") != "gpt2":
            raise BadCheckpoint(f"{where}: tokenizer.ggml.model must be gpt2 (byte-level BPE), not {metadata.get('tokenizer.ggml.model')!r}")
        tokens, merges, pre = (metadata["tokenizer.ggml." + name] for name in ("tokens", "merges", "pre"))
        for name, entries in (("tokens", tokens), ("merges", merges)):
            if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
                raise BadCheckpoint(f"{where}: tokenizer.ggml.{name} must be an array of strings")
        kinds = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
        if not isinstance(kinds, list) or len(kinds) != len(tokens):
            raise BadCheckpoint(f"{where}: tokenizer.ggml.token_type must have an entry for each of the {len(tokens)} tokens")
        if len(set(tokens)) != len(tokens):
            raise BadCheckpoint(f"{where}: a token occurs twice in tokenizer.ggml.tokens")
        if not isinstance(pre, str) or pre not in _PRE_TOKENIZERS:
            raise BadCheckpoint(f"{where}: tokenizer.ggml.pre {pre!r} is not known; known are {', '.join(_PRE_TOKENIZERS)}")
        special = {token: i for i, (token, kind) in enumerate(zip(tokens, kinds)) if kind in (_CONTROL, _USER_DEFINED)}
        # Converters fill the vocabulary up to the rows of the embedding with tokens of no use: they are no text and never drawn.
        text = {token: i for i, (token, kind) in enumerate(zip(tokens, kinds)) if kind != _UNUSED}
        patterns, normalizer = _PRE_TOKENIZERS[pre]
        splits = [{"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False} for p in patterns]
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        try:
            return cls({
                "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "post_processor": None,
                "normalizer": {"type": normalizer} if normalizer else None, "decoder": byte_level,
                "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
                "model": {"type": "BPE", "vocab": text, "fuse_unk": False, "byte_fallback": False,
                          "merges": [merge.split(" ", 1) for merge in merges]}}, special, where)
        except BadCheckpoint:
            raise
        except Exception as error:
            raise BadCheckpoint(f"{where}: its tokenizer is damaged: {error}") from None

    def encode(self, text: str) -> list[int]:
        """Ids of plain text. Lone surrogates, which no UTF-8 has, become U+FFFD.

        Lines seen before are looked up, so that a keystroke in a long prompt costs its own line. The rest is encoded without the GIL.
        """
        try:
            text.isascii() or text.encode("utf-8")
        except UnicodeEncodeError:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        pieces, lines = self._cut.split(text), self._lines
        if fresh := [piece for piece in dict.fromkeys(pieces) if piece not in lines]:
            size = sum(map(len, fresh))
            if self._held + size > _HELD:   # another thread may still read the old table
                lines = self._lines = {}
                self._held, fresh = 0, list(dict.fromkeys(pieces))
            self._held += size
            with _panics_are_errors(self._where):
                found = self._encoder.encode_batch_fast(fresh)
            lines.update(zip(fresh, [encoding.ids for encoding in found]))
        return list(chain.from_iterable(map(lines.__getitem__, pieces)))

    def encode_with_special(self, text: str, escape: str = "") -> list[int]:
        """Ids of text in which the strings of special tokens mean those tokens, unless they are `escaped`."""
        ids: list[int] = []
        start = 0
        for match in self._special_pattern.finditer(text):
            if escape and text.startswith(escape, match.end()):
                continue
            ids += self.encode(_without(text[start:match.start()], escape))
            ids.append(self.special[match[0]])
            start = match.end()
        return ids + self.encode(_without(text[start:], escape))

    def escaped(self, text: str, escape: str) -> str:
        """text in which no special token's string is found, because the character `escape` stands behind each of its own."""
        return self._special_pattern.sub(lambda match: "".join(character + escape for character in match[0]), text)

    def token_bytes(self, index: int) -> bytes:
        """The bytes of a token of text; none for a special token or a padding id."""
        return self._bytes[index] if 0 <= index < self.vocabulary else b""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; special tokens are left out, bytes that are no UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    # ---- token healing ---------------------------------------------------------------------------------------------------

    def heal(self, ids: list[int], most: int = 4) -> tuple[list[int], bytes]:
        """ids without the tokens of an unfinished last word or indentation, and the bytes that must come instead.

        A word cut by the cursor is split into other tokens than the whole word, and spaces belong to the word that follows them: a
        model seldom continues either well.
        """
        keep, tail = len(ids), b""
        while keep > 1 and len(ids) - keep < most:
            token = self.token_bytes(ids[keep - 1])
            if not token or not _OPEN_END.search(token):
                break
            keep, tail = keep - 1, token + tail
            if not _WORD.fullmatch(token):   # the word, or the line, begins inside this token
                break
        return ids[:keep], tail

    @cached_property
    def _by_start(self) -> dict[bytes, list[tuple[bytes, int]]]:
        """Tokens by their first two bytes. One sorted table would be searched faster, but sorting it holds the GIL for too long."""
        groups: dict[bytes, list[tuple[bytes, int]]] = {}
        for index, token in enumerate(self._bytes):
            if token:
                groups.setdefault(token[:2], []).append((token, index))
        return groups

    def allowed(self, prefix: bytes, words: int) -> bytes:
        """Bits (u32 [words], little endian) of the tokens that begin with `prefix` or are a beginning of it."""
        mask, groups = bytearray(4 * words), self._by_start
        starts = {prefix[:1], prefix[:2]} if len(prefix) > 1 else [start for start in groups if start[:1] == prefix]
        for token, index in chain.from_iterable(groups.get(start, ()) for start in starts):
            if token.startswith(prefix) or prefix.startswith(token):
                _set(mask, index)
        return bytes(mask)


_WORD = re.compile(rb"[A-Za-z0-9_\x80-\xff]+")
_OPEN_END = re.compile(rb"[A-Za-z0-9_\x80-\xff \t]$")


def _cut(encoder_json: Mapping[str, Any]) -> re.Pattern:
    """Where this tokenizer's text may be cut; nowhere if its steps are not all known."""
    pre, normalizer = encoder_json.get("pre_tokenizer") or {}, encoder_json.get("normalizer") or {}
    cuts = set()
    for step in pre.get("pretokenizers", [pre]):
        kind = step.get("type")
        if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            pattern = step["pattern"].get("Regex")
            if pattern != r"\p{N}":
                cuts.add(_CUTS.get(pattern, _NOWHERE))
        elif kind == "ByteLevel" and not step.get("add_prefix_space"):
            cuts |= {_BEFORE_BREAKS} if step.get("use_regex", True) else set()
        elif kind != "Digits":
            return _NOWHERE
    return cuts.pop() if len(cuts) == 1 and normalizer.get("type", "NFC") == "NFC" else _NOWHERE


def _without(text: str, escape: str) -> str:
    return text.replace(escape, "") if escape else text


def _set(mask: bytearray, index: int) -> None:
    if index < 8 * len(mask):
        mask[index >> 3] |= 1 << (index & 7)


class StreamDecoder:
    """Bytes of tokens in, text out; what may be the beginning of a character is held back."""

    def __init__(self) -> None:
        self._held = b""

    def feed(self, data: bytes) -> str:
        data = self._held + data
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._held = data[used:]
        return text

    def finish(self) -> str:
        """What was held back and will never be whole."""
        held, self._held = self._held, b""
        return held.decode("utf-8", "replace")
