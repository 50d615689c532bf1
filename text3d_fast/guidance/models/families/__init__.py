"""Configurations of the families that single-file checkpoints belong to, and CLIP's tokenizer; see README.md."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

FAMILIES = Path(__file__).parent


@contextmanager
def clip_tokenizer_folder(family: Path) -> Iterator[Path]:
    """A folder with the whole tokenizer of a family, to be read by transformers."""
    merges = gzip.decompress((FAMILIES / "clip_merges.txt.gz").read_bytes()).decode("utf-8")
    pairs = [line.split() for line in merges.splitlines()]
    letters = list(_byte_letters().values())
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in pairs),
             "<|startoftext|>", "<|endoftext|>"]
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}), encoding="utf-8")
        (folder / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
        (folder / "tokenizer_config.json").write_bytes((family / "tokenizer" / "tokenizer_config.json").read_bytes())
        yield folder


def _byte_letters() -> dict[int, str]:
    """Byte-level encodings write each byte as one letter: printable ones as they are, then the rest from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
