"""Text embeddings: every string is encoded once, and the encoder is not kept."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from text3d_fast.errors import ModelWarning
from text3d_fast.guidance.prompts import split_view


class TextEmbeddings:
    """Embeddings by string, [L, D] each. The encoder is loaded when a new string comes and dropped after it.

    load      () -> (tokenizer, encoder), called each time strings are missing
    spell     a string -> what the tokenizer is given for it
    """

    def __init__(self, load: Callable[[], tuple[Any, Any]], device: torch.device, dtype: torch.dtype,
                 spell: Callable[[str], str] = str):
        self._load, self._spell = load, spell
        self._device = device
        self._dtype = dtype
        self._cache: dict[str, Tensor] = {}
        self.loads = 0  # how often the encoder had to be loaded

    def prepare(self, texts: Iterable[str]) -> None:
        """Embed all of these now, so that the encoder is loaded once."""
        missing = [text for text in dict.fromkeys(texts) if text not in self._cache]
        if not missing:
            return
        tokenizer, encoder = self._load()
        self.loads += 1
        for start in range(0, len(missing), 16):
            batch = missing[start : start + 16]
            spelled = [self._spell(text) for text in batch]
            for text, embedding in zip(batch, _embed(tokenizer, encoder, spelled)):
                self._cache[text] = embedding.to(self._device, self._dtype)

    def __call__(self, texts: list[str]) -> Tensor:
        """[B, L, D] on the prior's device."""
        self.prepare(texts)
        return torch.stack([self._cache[text] for text in texts])

    def __contains__(self, text: str) -> bool:
        return text in self._cache


@torch.no_grad()
def _embed(tokenizer: Any, encoder: Any, texts: list[str]) -> Tensor:
    device = encoder.get_input_embeddings().weight.device
    is_t5 = type(encoder).__name__.startswith("T5")
    if is_t5:
        length = 77  # what DeepFloyd IF was trained with
        texts = [text.lower().strip() for text in texts]
    else:
        length = min(int(tokenizer.model_max_length), int(encoder.config.max_position_embeddings))
    texts = [shorten(tokenizer, text, length) for text in texts]
    tokens = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    masked = is_t5 or getattr(encoder.config, "use_attention_mask", False)
    mask = tokens.attention_mask.to(device) if masked else None
    return encoder(tokens.input_ids.to(device), attention_mask=mask)[0]


def shorten(tokenizer: Any, text: str, length: int) -> str:
    """A text of at most `length` tokens: the last words before the words of the view are left out, with a warning."""
    def count(text: str) -> int:
        return len(tokenizer(text, truncation=False, verbose=False).input_ids)

    if count(text) <= length:
        return text
    head, view = split_view(text)
    words = head.split()
    while len(words) > 1 and count(" ".join(words).rstrip(" ,") + view) > length:
        words.pop()
    kept = " ".join(words).rstrip(" ,")
    warnings.warn(f"prompt: longer than the {length} tokens that the model reads; of {head!r} it is given {kept!r}",
                  ModelWarning, stacklevel=2)
    return kept + view
