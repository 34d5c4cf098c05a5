"""Text <-> token ids for byte-level BPE, from tokenizer.json or from a GGUF's vocabulary.

Text is plain: the strings of special tokens inside it are ordinary characters. Special tokens enter by name only.
"""

from __future__ import annotations

import codecs
import json
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from functools import cached_property, lru_cache
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
_CONTROL, _USER_DEFINED = 3, 4
# No pre-tokenizer above joins a line break to visible text that follows it, so text may be encoded in pieces cut there.
_CUT = re.compile(r"(?<=[\r\n])(?=\S)")
_PIECE = 512   # characters; a keystroke re-encodes one piece


@lru_cache(1)
def _byte_of() -> dict[str, int]:
    """The byte alphabet of GPT-2: printable characters stand for themselves, other bytes for code points from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


class Tokenizer:
    """vocabulary: ids are below it. special: text -> id of the tokens that are no text."""

    def __init__(self, encoder_json: Mapping[str, Any], special: dict[str, int], where: str):
        self.special = special
        self._encoder = Encoder.from_str(json.dumps(encoder_json))
        self._encode_piece = lru_cache(4096)(lambda text: tuple(self._encoder.encode_batch_fast([text])[0].ids))
        tokens = encoder_json["model"]["vocab"]
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
        if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
            raise BadCheckpoint(f"{path}: it has no BPE model with a vocabulary")
        try:
            special = {token["content"]: token["id"] for token in fields.get("added_tokens") or ()}
            return cls({**fields, "added_tokens": [], "post_processor": None, "truncation": None, "padding": None}, special, str(path))
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
        tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata.get("tokenizer.ggml.token_type", [])
        special = {token: i for i, (token, kind) in enumerate(zip(tokens, kinds)) if kind in (_CONTROL, _USER_DEFINED)}
        pre = metadata["tokenizer.ggml.pre"]
        if pre not in _PRE_TOKENIZERS:
            raise BadCheckpoint(f"{where}: tokenizer.ggml.pre {pre!r} is not known; known are {', '.join(_PRE_TOKENIZERS)}")
        patterns, normalizer = _PRE_TOKENIZERS[pre]
        splits = [{"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False} for p in patterns]
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        try:
            return cls({
                "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "post_processor": None,
                "normalizer": {"type": normalizer} if normalizer else None, "decoder": byte_level,
                "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
                "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "fuse_unk": False, "byte_fallback": False,
                          "merges": [merge.split(" ", 1) for merge in metadata["tokenizer.ggml.merges"]]}}, special, where)
        except BadCheckpoint:
            raise
        except Exception as error:
            raise BadCheckpoint(f"{where}: its tokenizer is damaged: {error}") from None

    def encode(self, text: str) -> list[int]:
        """Ids of plain text. Lone surrogates, which no UTF-8 has, become U+FFFD."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids: list[int] = []
        start = 0
        for cut in _CUT.finditer(text):
            if cut.start() - start >= _PIECE:
                ids += self._encode_piece(text[start:cut.start()])
                start = cut.start()
        return ids + list(self._encode_piece(text[start:])) if start < len(text) else ids

    def encode_with_special(self, text: str, escape: str = "") -> list[int]:
        """Ids of text in which the strings of special tokens mean those tokens; `escape` characters are dropped after they are found."""
        ids: list[int] = []
        start = 0
        for match in self._special_pattern.finditer(text):
            ids += self.encode(_without(text[start:match.start()], escape))
            ids.append(self.special[match[0]])
            start = match.end()
        return ids + self.encode(_without(text[start:], escape))

    def escaped(self, text: str, escape: str) -> str:
        """text in which no special token's string occurs, because `escape` stands behind its first character."""
        return self._special_pattern.sub(lambda match: match[0][0] + escape + match[0][1:], text)

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
    def _sorted(self) -> list[tuple[bytes, int]]:
        return sorted((token, index) for index, token in enumerate(self._bytes) if token)

    def allowed(self, prefix: bytes, words: int) -> bytes:
        """Bits (u32 [words], little endian) of the tokens that begin with `prefix` or are a beginning of it."""
        mask = bytearray(4 * words)
        table = self._sorted
        for length in range(1, len(prefix)):
            at = bisect_left(table, (prefix[:length], -1))
            while at < len(table) and table[at][0] == prefix[:length]:
                _set(mask, table[at][1])
                at += 1
        at = bisect_left(table, (prefix, -1))
        while at < len(table) and table[at][0].startswith(prefix):
            _set(mask, table[at][1])
            at += 1
        return bytes(mask)


_WORD = re.compile(rb"[A-Za-z0-9_\x80-\xff]+")
_OPEN_END = re.compile(rb"[A-Za-z0-9_\x80-\xff \t]$")


def _without(text: str, escape: str) -> str:
    return text.replace(escape, "") if escape else text


def _set(mask: bytearray, index: int) -> None:
    if index < 8 * len(mask):
        mask[index >> 3] |= 1 << (index & 7)


class StreamDecoder:
    """Bytes of tokens in, text out; what may be the beginning of a character is held back."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, data: bytes) -> str:
        return self._utf8.decode(data)

    def finish(self) -> str:
        """What was held back and will never be whole."""
        return self._utf8.decode(b"", final=True)
