"""Cut from a tokenizer.json what some texts need, so that their token ids can be tested without the whole vocabulary.

Usage: extract_tokenizer.py TOKENIZER_JSON OUT. Kept are the 256 byte tokens, the added tokens, and every merge whose result occurs in
one of the texts: BPE of these texts then takes the same steps, with the ids of the whole vocabulary.
"""

import json
import sys
import unicodedata
from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel

TEXTS = json.loads((Path(__file__).parent / "qwen3_tokens.json").read_text(encoding="utf-8"))


def main() -> None:
    fields = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    vocab, merges = fields["model"]["vocab"], fields["model"]["merges"]
    pairs = [merge if isinstance(merge, list) else merge.split(" ", 1) for merge in merges]
    split = ByteLevel(add_prefix_space=False, use_regex=False)
    spelled = ["".join(piece for piece, _ in split.pre_tokenize_str(unicodedata.normalize("NFC", text))) for text in TEXTS]
    kept = [pair for pair in pairs if any("".join(pair) in text for text in spelled)]
    tokens = set(ByteLevel.alphabet()) | {"".join(pair) for pair in kept}
    fields["model"] |= {"vocab": {token: vocab[token] for token in sorted(tokens, key=vocab.__getitem__)}, "merges": kept}
    Path(sys.argv[2]).write_text(json.dumps(fields, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
