"""The language of Toybox, both ways: a `Description` to a caption, and a prompt to a `Description`.

`canonical("a crimson cup, from behind")` is "a red mug, back view"; unknown words fail with the vocabulary.
Conditions of the priors are these canonical captions.
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import replace

import torch

from text3d_fast.toybox.objects import CLASSES, COLORS, PATTERNS
from text3d_fast.toybox.scenes import SIZES, VIEWS, Description, Thing

_USUAL = "red blue orange purple green red blue red red green white red yellow blue green red"
DEFAULT_COLORS = dict(zip(CLASSES, _USUAL.split(), strict=True))
SYNONYMS = {
    **dict.fromkeys(("sphere", "globe", "orb", "marble"), "ball"),
    **dict.fromkeys(("box", "block", "dice", "die"), "cube"),
    **dict.fromkeys(("doughnut", "torus", "bagel"), "donut"),
    **dict.fromkeys(("tube", "can", "drum", "pillar", "column"), "cylinder"),
    **dict.fromkeys(("cup", "beaker", "tankard"), "mug"),
    **dict.fromkeys(("seat", "armchair"), "chair"),
    **dict.fromkeys(("desk", "bench"), "table"),
    **dict.fromkeys(("toadstool", "fungus"), "mushroom"),
    **dict.fromkeys(("pine", "fir", "spruce", "conifer"), "tree"),
    **dict.fromkeys(("auto", "automobile", "vehicle", "sedan"), "car"),
    **dict.fromkeys(("home", "hut", "cottage", "cabin", "building"), "house"),
    **dict.fromkeys(("kettle", "teakettle"), "teapot"),
    **dict.fromkeys(("dish", "basin"), "bowl"),
    **dict.fromkeys(("watch", "timepiece"), "clock"),
    **dict.fromkeys(("crimson", "scarlet", "ruby"), "red"),
    **dict.fromkeys(("golden", "gold"), "yellow"),
    **dict.fromkeys(("emerald", "lime"), "green"),
    **dict.fromkeys(("navy", "azure"), "blue"),
    **dict.fromkeys(("violet", "lilac"), "purple"),
    **dict.fromkeys(("ivory", "snowy"), "white"),
    **dict.fromkeys(("ebony", "dark"), "black"),
    **dict.fromkeys(("stripy", "stripey", "stripes"), "striped"),
    **dict.fromkeys(("checked", "chequered", "checkerboard", "checker"), "checkered"),
    **dict.fromkeys(("little", "tiny", "mini", "miniature"), "small"),
    **dict.fromkeys(("high", "elongated"), "tall"),
    **{kind.plural: name for name, kind in CLASSES.items()},
}
_FILLERS = frozenset(
    {"a", "an", "the", "of", "one", "single", "photo", "picture", "image", "render", "rendering", "3d", "model", "toy"}
)
_ON = r"\b(on top of|atop|upon|standing on|sitting on|on)\b"
_VIEW_PHRASES = (
    (r"\b(overhead|top|top[- ]down|bird'?s[- ]eye)( view)\b|\bfrom (above|the top)\b|\boverhead\b", "overhead"),
    (r"\bleft( side)? view\b|\bfrom (the |its )?left( side)?\b|\bleft side\b", "left side"),
    (r"\bright( side)? view\b|\bfrom (the |its )?right( side)?\b|\bright side\b", "right side"),
    (r"\b(back|rear)( side)?( view)\b|\bfrom (behind|the back)\b", "back"),
    (r"\bfront( side)?( view)\b|\bfrom the front\b", "front"),
)
_STYLE_PHRASES = (
    (r"\b(textureless|untextured|without texture)\b", "textureless"),
    (r"\bnormals? map\b|\bnormals\b", "normal map"),
)


_BASES = ", ".join(name for name, kind in CLASSES.items() if kind.base)
TWO_OBJECTS = f'two objects: "a red ball on a blue cube" (the lower one a {_BASES})'
_NUMBERS = frozenset(("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "many", "several"))


class PromptError(ValueError):
    """A prompt that Toybox has no words for."""


def vocabulary_table() -> dict[str, list[str]]:
    """What can be said, by kind of word."""
    return {"objects": list(CLASSES), "colours": list(COLORS), "patterns": list(PATTERNS), "sizes": list(SIZES),
            "views": [f"{view} view" for view in VIEWS], "styles": ["textureless", "normal map"]}


def vocabulary() -> str:
    """The same in a few lines, for error messages."""
    return "\n".join(f"{kind}: {', '.join(known)}" for kind, known in vocabulary_table().items()) + f"\n{TWO_OBJECTS}"


def words() -> tuple[str, ...]:
    """Every word that canonical captions use, sorted (the vocabulary of a text encoder)."""
    return tuple(sorted({*CLASSES, *COLORS, *PATTERNS, *SIZES, *" ".join(VIEWS).split(), *_GLUE}))


_GLUE = ("a", "an", "on", "view", "textureless", "normal", "map")


def _phrase(thing: Thing) -> str:
    parts = [part for part in (thing.size, thing.pattern, thing.color, thing.kind) if part]
    return ("an " if parts[0][0] in "aeiou" else "a ") + " ".join(parts)


def caption(description: Description) -> str:
    """The canonical caption, e.g. "a small striped red mug on a blue cube, front view, textureless"."""
    text = " on ".join(_phrase(thing) for thing in description.things)
    if description.view is not None:
        text += f", {description.view} view"
    return text if description.style == "shaded" else f"{text}, {description.style}"


def _take(text: str, phrases: tuple) -> tuple[str, str | None]:
    found = None
    for pattern, meaning in phrases:
        text, count = re.subn(pattern, " ", text)
        if count and found is None:
            found = meaning
    return text, found


def _thing(text: str, prompt: str) -> Thing:
    slots: dict[str, str | None] = {"kind": None, "color": None, "pattern": None, "size": None}
    roles = (("kind", CLASSES), ("color", COLORS), ("pattern", PATTERNS), ("size", SIZES))
    known = [*CLASSES, *COLORS, *PATTERNS, *SIZES, *SYNONYMS]
    for word in re.findall(r"[\w']+", text):
        if word in _FILLERS:
            continue
        meaning = SYNONYMS.get(word, word)
        role = next((name for name, members in roles if meaning in members), None)
        if role is None:
            raise PromptError(f"prompt {prompt!r}: the word {word!r} is not in the vocabulary{_hint(word, known)}\n"
                              f"{vocabulary()}")
        if slots[role] not in (None, meaning):
            raise PromptError(f"prompt {prompt!r}: {slots[role]!r} and {meaning!r} cannot both hold\n{vocabulary()}")
        slots[role] = meaning
    if slots["kind"] is None:
        raise PromptError(f"prompt {prompt!r}: no object is named\n{vocabulary()}")
    return Thing(slots["kind"], slots["color"] or DEFAULT_COLORS[slots["kind"]], slots["pattern"], slots["size"])


def _hint(word: str, known: list[str]) -> str:
    """The known word that one letter too many, too few or out of place has become; a word of another meaning that
    happens to look alike (corgi and orange, horse and house) is no help.
    """
    if word in _NUMBERS:
        return "; there is one object, or one on another"
    for near in difflib.get_close_matches(word, known, n=3, cutoff=0.66):
        if sorted(word) == sorted(near) or _within(*sorted((word, near), key=len)):
            return f"; did you mean {near!r}?"
    return ""


def _within(short: str, long: str) -> bool:
    """Whether `short` is `long` without one letter."""
    return any(long[:place] + long[place + 1:] == short for place in range(len(long)))


def parse(prompt: str) -> Description:
    """The meaning of a prompt. A colour that is not named is the class's usual one.

    Raises PromptError (a ValueError) naming the unknown word, its nearest known one and the vocabulary.
    """
    text, style = _take(prompt.lower(), _STYLE_PHRASES)
    text, view = _take(text, _VIEW_PHRASES)
    pieces = re.split(_ON, text)
    if len(pieces) > 3:
        raise PromptError(f"prompt {prompt!r}: at most two objects, one on the other\n{vocabulary()}")
    thing = _thing(pieces[0], prompt)
    base = _thing(pieces[2], prompt) if len(pieces) == 3 else None
    try:
        return Description(thing, base, view, style or "shaded")
    except ValueError as error:
        raise PromptError(f"prompt {prompt!r}: {error}\n{vocabulary()}") from error


def canonical(prompt: str) -> str:
    """A prompt in the words the priors know; "" (no condition) stays ""."""
    return caption(parse(prompt)) if prompt.strip() else ""


def canonical_prompt(prompt: str) -> str:
    """A prompt for a whole object in the words the priors know: `canonical` without a view. "" is refused."""
    if not prompt.strip():
        raise PromptError("prompt: expected some words, got an empty text")
    return caption(replace(parse(prompt), view=None))


def view_word(elevation: float, azimuth: float) -> str:
    """The view word of a camera (radians): overhead above 60 degrees, otherwise the nearest side of the object."""
    if elevation > math.radians(60):
        return "overhead"
    return ("front", "left side", "back", "right side")[round(azimuth / (math.pi / 2)) % 4]


def training_caption(
    description: Description,
    elevation: float,
    azimuth: float,
    generator: torch.Generator | None = None,
    drop: float = 0.3,
    wrong: float = 0.05,
) -> str:
    """A caption for an image from this camera: the view word left out in a share `drop`, wrong in a share `wrong`."""
    view: str | None = view_word(elevation, azimuth)
    luck = float(torch.rand((), generator=generator))
    if luck < drop:
        view = None
    elif luck < drop + wrong:
        others = [word for word in VIEWS if word != view]
        view = others[int(torch.randint(len(others), (), generator=generator))]
    return caption(Description(description.thing, description.base, view, description.style))
