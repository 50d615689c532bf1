"""Text embeddings: every string is encoded once, and the encoder is not kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class TextEmbeddings:
    """Embeddings by string, [L, D] each. The encoder is loaded when a new string comes and dropped after it.

    load      () -> (tokenizer, encoder), called each time strings are missing
    """

    def __init__(self, load: Callable[[], tuple[Any, Any]], device: torch.device, dtype: torch.dtype):
        self._load = load
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
            for text, embedding in zip(batch, _embed(tokenizer, encoder, batch, self._device)):
                self._cache[text] = embedding.to(self._device, self._dtype)

    def __call__(self, texts: list[str]) -> Tensor:
        """[B, L, D] on the prior's device."""
        self.prepare(texts)
        return torch.stack([self._cache[text] for text in texts])

    def __contains__(self, text: str) -> bool:
        return text in self._cache


@torch.no_grad()
def _embed(tokenizer: Any, encoder: Any, texts: list[str], device: torch.device) -> Tensor:
    is_t5 = type(encoder).__name__.startswith("T5")
    if is_t5:
        length = 77  # what DeepFloyd IF was trained with
        texts = [text.lower().strip() for text in texts]
    else:
        length = min(int(tokenizer.model_max_length), int(encoder.config.max_position_embeddings))
    tokens = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    masked = is_t5 or getattr(encoder.config, "use_attention_mask", False)
    mask = tokens.attention_mask.to(device) if masked else None
    return encoder(tokens.input_ids.to(device), attention_mask=mask)[0]
