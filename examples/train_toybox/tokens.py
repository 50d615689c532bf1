"""A CLIPTokenizer whose byte pairs are trained on a word list until every word is one token.

The folder it saves is an ordinary CLIP tokenizer; words outside the list fall apart into letters, as in any CLIP.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from transformers import CLIPTokenizer

MAX_TOKENS = 24  # the longest caption (two described objects, view, style) is 22 with both ends
_END = "</w>"


def _byte_letters() -> list[str]:
    """The 256 printable letters that byte-level BPE writes bytes as: printable Latin-1 bytes as themselves, the
    others as the letters from U+0100 on, in byte order."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def _merge(pieces: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    merged, k = [], 0
    while k < len(pieces):
        if pieces[k : k + 2] == pair:
            merged.append(pieces[k] + pieces[k + 1])
            k += 2
        else:
            merged.append(pieces[k])
            k += 1
    return tuple(merged)


def train_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Byte-pair merges (the most frequent pair first, ties by alphabet) after which every word is one piece."""
    spelled = [(*word[:-1], word[-1] + _END) for word in sorted(set(words))]
    merges = []
    while any(len(pieces) > 1 for pieces in spelled):
        counts = Counter(pair for pieces in spelled for pair in pairwise(pieces))
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        spelled = [_merge(pieces, best) for pieces in spelled]
    return merges


def build_tokenizer(words: Iterable[str]) -> CLIPTokenizer:
    """The tokenizer of a word list (lower-case letters only) with one token a word; commas are a token of their own."""
    words = sorted(set(words))
    wrong = [word for word in words if not (word.isascii() and word.isalpha() and word.islower())]
    if wrong:
        raise ValueError(f"words: expected lower-case letters a-z only, got {wrong}")
    letters, merges = _byte_letters(), train_merges(words)
    pieces = [*letters, *(letter + _END for letter in letters), *dict.fromkeys("".join(pair) for pair in merges)]
    vocabulary = {piece: index for index, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    with tempfile.TemporaryDirectory() as folder:  # from files, as transformers 4 and 5 both take them
        files = {"vocab.json": json.dumps(vocabulary, ensure_ascii=False),
                 "merges.txt": "#version: 0.2\n" + "".join(f"{' '.join(pair)}\n" for pair in merges)}
        for name, text in files.items():
            Path(folder, name).write_text(text, encoding="utf-8")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=MAX_TOKENS)
