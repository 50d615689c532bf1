"""View-dependent prompts: the text says where the camera stands.

Azimuth 0 looks at the object's front, 90 degrees at its left side, 180 at its back, 270 at its right side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

VIEWS = ("front", "back", "left", "right", "overhead")

# wording -> view -> phrase
WORDINGS: dict[str, dict[str, str]] = {
    # DreamFusion's words, for models trained on captions from the web
    "side": {
        "front": "front view",
        "back": "back view",
        "left": "side view",
        "right": "side view",
        "overhead": "overhead view",
    },
    # left and right told apart, for models that know the words
    "left_right": {
        "front": "front view",
        "back": "back view",
        "left": "left side view",
        "right": "right side view",
        "overhead": "overhead view",
    },
    "none": dict.fromkeys(VIEWS, ""),
}


_PUSHED_OFF = {"front": ("left", "right"), "left": ("front", "right"), "right": ("front", "left"),
               "back": ("left", "right", "front")}


def split_view(text: str) -> tuple[str, str]:
    """A prompt in two: the text, and the words of a view at its end, with what joins them ("" if there are none)."""
    phrases = {f", {phrase}" for words in WORDINGS.values() for phrase in words.values() if phrase}
    view = max((phrase for phrase in phrases if text.endswith(phrase)), key=len, default="")
    return text.removesuffix(view), view


@dataclass
class ViewPrompts:
    """Appends the words of the view to a prompt.

    wording          a name in WORDINGS, or a mapping from each of VIEWS to a phrase ("" appends nothing)
    template         how text and phrase are joined
    overhead         elevation in degrees above which the view is overhead (DreamFusion: 60)
    front, back      half-widths in degrees of the front and back sectors. 45 is the nearest of front / side / back,
                     as in DreamFusion; ProlificDreamer's reproductions use 30
    texts            view -> what stands for the text in that view's prompt (see `debias`); {}: the text itself
    """

    wording: str | Mapping[str, str] = "side"
    template: str = "{text}, {view}"
    overhead: float = 60.0
    front: float = 45.0
    back: float = 45.0
    texts: Mapping[str, str] = field(default_factory=dict)
    phrases: Mapping[str, str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.wording, str):
            if self.wording not in WORDINGS:
                raise ValueError(f"wording: expected one of {', '.join(WORDINGS)}, got {self.wording!r}")
            self.phrases = WORDINGS[self.wording]
        else:
            missing = [view for view in VIEWS if view not in self.wording]
            if missing:
                raise ValueError(f"wording: no phrase for {', '.join(missing)}")
            self.phrases = dict(self.wording)
        if not (0 <= self.front and 0 <= self.back and self.front + self.back <= 180):
            raise ValueError(f"front, back: expected half-widths that do not overlap, got {self.front}, {self.back}")

    def view(self, elevation: float, azimuth: float) -> str:
        """One of VIEWS for a camera at these angles in radians."""
        if math.degrees(elevation) > self.overhead:
            return "overhead"
        degrees = math.degrees(azimuth) % 360
        from_front = min(degrees, 360 - degrees)
        if from_front <= self.front:
            return "front"
        if from_front >= 180 - self.back:
            return "back"
        return "left" if degrees < 180 else "right"

    def phrase(self, elevation: float, azimuth: float) -> str:
        return self.phrases[self.view(elevation, azimuth)]

    def __call__(
        self, text: str | Sequence[str], elevation: Tensor | Sequence[float], azimuth: Tensor | Sequence[float]
    ) -> list[str]:
        """Prompts of a batch. text: one for all, or B; elevation, azimuth [B] in radians."""
        angles = [values.tolist() if isinstance(values, Tensor) else list(values) for values in (elevation, azimuth)]
        texts = [text] * len(angles[0]) if isinstance(text, str) else list(text)
        if not len(texts) == len(angles[0]) == len(angles[1]):
            raise ValueError(
                f"text, elevation, azimuth: expected one length, got {len(texts)}, {len(angles[0])}, {len(angles[1])}"
            )
        return [self._prompt(t, self.view(e, a)) for t, e, a in zip(texts, *angles, strict=True)]

    def all(self, text: str) -> list[str]:
        """Every prompt this text can become, without repeats: what to embed before the text encoder is freed."""
        return list(dict.fromkeys([text, *(self._prompt(text, view) for view in VIEWS)]))

    def negatives(self, text: str, amount: float) -> dict[str, dict[str, float]]:
        """Perp-Neg's negative prompts of each view's prompt, for `DistillationLoss`: a view is pushed off those that a
        model would rather draw (Armandpour et al., 2023): a side off the front, the back off the sides and the front.
        """
        found: dict[str, dict[str, float]] = {}
        if amount > 0:
            for view, others in _PUSHED_OFF.items():
                prompt = self._prompt(text, view)
                away = {self._prompt(text, other): amount for other in others if self.phrases[other]}
                away.pop(prompt, None)
                found.setdefault(prompt, {}).update(away)
        return found

    def _prompt(self, text: str, view: str) -> str:
        text, phrase = self.texts.get(view, text), self.phrases[view]
        return self.template.format(text=text, view=phrase) if phrase and text else text
