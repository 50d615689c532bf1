"""Prompt debiasing (Hong et al., 2023): words that speak against a view are left out of that view's prompt.

"A smiling dog, back view" asks for a face and for none; a model then draws the face. A masked language model says how
likely each view is with and without a word: P(view | text) / P(view | text without the word). Where that is small, the
word contradicts the view.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from text3d_fast.errors import ModelError
from text3d_fast.guidance.models.loading import LOGGER, quiet
from text3d_fast.guidance.models.sources import brief

WORDS = {"front": "front", "left": "side", "right": "side", "back": "back", "overhead": "overhead"}
THRESHOLD = 0.9  # of the ratio of probabilities
Probabilities = Callable[[Sequence[str]], list[dict[str, float]]]  # texts -> for each, view -> P(view | text)


def debias(text: str, probabilities: Probabilities, threshold: float = THRESHOLD) -> dict[str, str]:
    """view -> the text without the words that contradict it. One word at least stays."""
    words = text.split()
    without = [" ".join(words[:i] + words[i + 1 :]) for i in range(len(words))]
    whole, *parts = probabilities([text, *without])
    texts = {}
    for view in whole:
        kept = [word for word, part in zip(words, parts, strict=True) if whole[view] >= threshold * part[view]]
        texts[view] = " ".join(kept) or text
        if 0 < len(kept) < len(words):
            LOGGER.info("the prompt of the %s view is %r", view, texts[view])
    return texts


class MaskedViews:
    """P(view | text) by a masked language model: a folder or hub id such as a BERT's.

    The probabilities of the views' words at the mask of "this is a [MASK] view of TEXT", among these words.
    """

    def __init__(self, source: str | Path):
        import transformers

        path = Path(source).expanduser()
        place: Any = path if path.is_dir() else str(source)
        try:
            with quiet():
                self.tokenizer = transformers.AutoTokenizer.from_pretrained(place)
                self.model = transformers.AutoModelForMaskedLM.from_pretrained(place, use_safetensors=True).eval()
        except Exception as error:
            raise ModelError(f"debias: {source} cannot be loaded as a masked language model "
                             f"({brief(error)})") from error
        ids = {word: self.tokenizer.convert_tokens_to_ids(word) for word in dict.fromkeys(WORDS.values())}
        unknown = [word for word, number in ids.items() if number in (None, self.tokenizer.unk_token_id)]
        if unknown or self.tokenizer.mask_token_id is None:
            raise ModelError(f"debias: {source} has no token for {', '.join(unknown) or 'a mask'}")
        self._ids: Mapping[str, int] = ids

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> list[dict[str, float]]:
        found = []
        for text in texts:
            sentence = f"this is a {self.tokenizer.mask_token} view of {text}"
            tokens = self.tokenizer(sentence, return_tensors="pt", truncation=True)
            at = int((tokens.input_ids[0] == self.tokenizer.mask_token_id).nonzero()[0, 0])
            logits = self.model(**tokens).logits[0, at, list(self._ids.values())]
            shares = dict(zip(self._ids, torch.softmax(logits.double(), 0).tolist(), strict=True))
            found.append({view: shares[word] for view, word in WORDS.items()})
        return found
