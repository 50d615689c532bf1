"""What every image prior looks like: a trained diffusion model, the exact denoiser of a data set, an oracle."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from text3d_fast.guidance.schedule import NoiseSchedule


@dataclass
class Conditions:
    """What a batch of B images is conditioned on.

    texts        B strings; "" is the empty prompt (unconditional)
    camera       [B, 3] elevation (radians), azimuth (radians), distance; a row of NaN is dropped; None drops all
    background   [B, 3] rgb in 0..1; a row of NaN is dropped; None drops all
    pose         [B, 4, 4] camera to world; a row of NaN is dropped; None drops all. Where `camera` says from which side
                 an object is seen, this is the whole camera: what a learned score of the rendered images is given
    window       [B, 3] x, y, size: the images show only that part of what the camera sees, whose whole picture is -1..1
                 to the right and up (see `scene.Cameras`); a row of NaN, or None: all of it

    A prior that does not know a condition ignores it.
    """

    texts: list[str]
    camera: Tensor | None = None
    background: Tensor | None = None
    pose: Tensor | None = None
    window: Tensor | None = None

    def __post_init__(self) -> None:
        if isinstance(self.texts, str):
            raise TypeError("texts: expected a list of strings, one per image, got one string")
        self.texts = list(self.texts)
        for name, size in _SIZES.items():
            value, shape = getattr(self, name), [len(self.texts), *size]
            if value is not None and list(value.shape) != shape:
                raise ValueError(f"{name}: expected shape {shape}, got {list(value.shape)}")

    def __len__(self) -> int:
        return len(self.texts)

    def unconditional(self, keep_camera: bool = True, keep_background: bool = True) -> Conditions:
        """The other side of classifier-free guidance: the same batch with empty prompts.

        Kept conditions are not amplified by the guidance weight; dropped ones are.
        """
        return Conditions(
            [""] * len(self),
            self.camera if keep_camera else None,
            self.background if keep_background else None,
            self.pose if keep_camera else None,
            self.window,
        )

    def with_texts(self, texts: list[str]) -> Conditions:
        """The same conditions with other texts."""
        return replace(self, texts=texts)

    def to(self, device: torch.device | str) -> Conditions:
        return self._map(self.texts, lambda value: value.to(device))

    def __getitem__(self, rows: slice) -> Conditions:
        return self._map(self.texts[rows], lambda value: value[rows])

    def _map(self, texts: list[str], function: Callable[[Tensor], Tensor]) -> Conditions:
        values = {name: getattr(self, name) for name in _SIZES}
        return Conditions(texts, **{name: None if value is None else function(value) for name, value in values.items()})

    @staticmethod
    def concatenate(parts: Sequence[Conditions]) -> Conditions:
        """One batch after the other; a condition that only some parts have is dropped (NaN) in the rest."""
        if not parts:
            raise ValueError("parts: expected at least one Conditions")

        def join(name: str) -> Tensor | None:
            values = [getattr(part, name) for part in parts]
            known = next((value for value in values if value is not None), None)
            if known is None:
                return None
            dropped = known.new_full((1, *_SIZES[name]), torch.nan)
            return torch.cat([
                dropped.expand(len(part), *_SIZES[name]) if value is None else value.to(known)
                for part, value in zip(parts, values, strict=True)
            ])

        return Conditions([text for part in parts for text in part.texts], **{name: join(name) for name in _SIZES})


_SIZES = {"camera": (3,), "background": (3,), "pose": (4, 4), "window": (3,)}  # of one row


class Prior(ABC):
    """An image prior. An own one says its schedule and image_size and how to encode and predict; the rest has defaults.

    schedule     the noise schedule of its diffusion
    image_size   the height and width of the images that `encode` takes
    name         what `load_prior` takes to get it again
    kind         "latent", "pixel", or "exact" for an exact denoiser: which recipe of settings suits it
    conditions   what it knows beside the text: "camera", "background", "pose"
    views        how many rows of a batch, one after the other, are pictures of one object at one t, taken from cameras
                 evenly round it, and judged together; 1: each is judged alone
    view_words   a name in prompts.WORDINGS; None: the recipe's
    camera_distribution  the cameras it knows, in degrees and world units: {"elevation": (low, high), "azimuth": ...,
                 "distance": ..., "fov_y": ...}; None if it does not say
    normal_words what a prompt adds for pictures of normals ((n + 1) / 2 in the world); "": it takes them as any picture
    flaw_words   what a prompt adds for pictures that distillation spoiled; "": `variants.FLAWS`
    wishes       settings that suit it better than the recipe's: {"guidance.weight": 1.0}, dotted as in config.yaml
    """

    schedule: NoiseSchedule
    image_size: int
    name: str = ""
    kind: str = "pixel"
    conditions: Sequence[str] = ()
    views: int = 1
    view_words: str | None = None
    camera_distribution: Mapping[str, Any] | None = None
    normal_words: str = ""
    flaw_words: str = ""
    wishes: Mapping[str, Any] = MappingProxyType({})

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """images [B, H, W, 3] in 0..1 -> x [B, C, h, w], the space the diffusion runs in. Differentiable."""

    @abstractmethod
    def predict_noise(self, x_t: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """eps_theta(x_t; conditions, t) without guidance. x_t [B, C, h, w], t [B] in [0, 1] -> [B, C, h, w].

        Differentiable in x_t when gradients are enabled.
        """

    def decode(self, x: Tensor) -> Tensor:
        """x [B, C, h, w] -> images [B, H, W, 3] in 0..1, where there is such a way."""
        raise NotImplementedError(f"{type(self).__name__} has no way from x back to pictures")

    def prepare(self, texts: Sequence[str]) -> None:  # noqa: B027  (nothing to do is a good default)
        """Do now, once, what these texts will need: embed them, render for them."""

    def seconds_a_picture(self) -> float | None:
        """About how long guidance of one picture takes on this machine; None: too little to be spoken of."""
        return None

    def describe(self) -> dict[str, Any]:
        """What `doctor --model` prints."""
        return {"model": self.name, "kind": self.kind, "image_size": self.image_size,
                "conditions": ["text", *self.conditions]}

    def canonical(self, prompt: str) -> str:
        """The prompt in the prior's words. ValueError, with what is understood, if it has none for it."""
        if not prompt.strip():
            raise ValueError("prompt: expected some words, got an empty text")
        return " ".join(prompt.split())

    def known_cameras(self, text: str) -> Tensor | None:
        """[N, 3] elevation, azimuth (radians) and distance of the only views that it knows exactly; None: no such.

        Pipelines that tell it the camera then look from there.
        """
        return None
