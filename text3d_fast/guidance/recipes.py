"""What suits a prior: resolution, guidance, noise levels, rates, cameras and view words, chosen from its properties.

The figures for real models are the published ones for their class (DreamFusion's paper and its reproductions),
carried over to this package's world: the box [-1, 1]^3, mean-reduced losses, and the (1 + w) / w form of guidance.
A model overrides any of them in its `text3d.json` ("recipe": {...}).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

from text3d_fast.guidance.distillation import TimeRange
from text3d_fast.guidance.models.diffusion import DiffusionPrior
from text3d_fast.guidance.prior import Prior, camera_distribution
from text3d_fast.guidance.prompts import ViewPrompts

_CAMERAS = {"elevation": (-10.0, 80.0), "azimuth": (0.0, 360.0), "distance": (2.5, 3.0), "fov_y": (35.0, 50.0)}


@dataclass(frozen=True)
class Recipe:
    """Starting values of a run.

    render_size      pixels along a side of the renders; `Prior.encode` enlarges them where the model wants more
    guidance_weight  w of (1 + w) eps(text) - w eps(empty)
    weighting        a name in sds.WEIGHTINGS
    time_range       of t, with its annealing
    steps, batch     length of the run, images a step
    learning_rates   of Adam: "grid" (hash grid), "network" (MLPs), "background" (its network)
    cameras          ranges of elevation, azimuth, fov_y in degrees and of distance
    view_words       a name in prompts.WORDINGS
    front, back      half-widths of the front and back sectors, degrees
    """

    name: str
    render_size: int = 64
    guidance_weight: float = 100.0
    weighting: str = "sigma2"
    time_range: TimeRange = field(default_factory=TimeRange)
    steps: int = 10_000
    batch: int = 1
    learning_rates: dict[str, float] = field(
        default_factory=lambda: {"grid": 1e-2, "network": 1e-3, "background": 1e-3}
    )
    cameras: dict[str, tuple[float, float]] = field(default_factory=lambda: dict(_CAMERAS))
    view_words: str = "side"
    front: float = 45.0
    back: float = 45.0

    def view_prompts(self) -> ViewPrompts:
        return ViewPrompts(self.view_words, front=self.front, back=self.back)


RECIPES = {
    # Stable Diffusion and its like, 512 or 768 pixels through a VAE
    "latent": Recipe("latent", guidance_weight=100.0),
    # DeepFloyd IF's first stage and its like: 64 pixels, no VAE
    "pixel": Recipe("pixel", guidance_weight=20.0),
    # a small model that is given the camera: the words need little amplification, and few steps suffice
    "camera": Recipe(
        "camera",
        guidance_weight=5.0,
        time_range=TimeRange(0.02, 0.98, final_high=0.5, kind="linear"),
        steps=1000,
        learning_rates={"grid": 1e-2, "network": 2e-3, "background": 1e-3},
        view_words="left_right",
    ),
    # an exact denoiser: conditions are exact, so there is nothing to amplify; w = sigma / alpha makes the gradient
    # the picture minus the denoised picture
    "exact": Recipe(
        "exact",
        guidance_weight=0.0,
        weighting="sample",
        time_range=TimeRange(0.02, 0.7, final_high=0.3, kind="linear"),
        steps=1000,
        learning_rates={"grid": 1e-2, "network": 2e-3, "background": 1e-3},
        view_words="left_right",
    ),
}


def choose_recipe(prior: Prior) -> Recipe:
    """The recipe for a prior: by what it works on and what it is given, then its own wishes.

    latents -> "latent"; pixels without a camera -> "pixel"; with one -> "camera"; a prior that is no diffusion
    network (the exact denoisers) -> "exact". Raises ValueError if the model's own "recipe" is wrong.
    """
    if not isinstance(prior, DiffusionPrior):
        recipe, wishes = RECIPES["exact"], {}
        words = getattr(prior, "view_words", None)
    else:
        kind = "camera" if "camera" in prior.settings.conditions else "pixel" if prior.vae is None else "latent"
        recipe, wishes, words = RECIPES[kind], prior.settings.recipe, prior.settings.view_words
    changes: dict[str, Any] = {"render_size": min(recipe.render_size, prior.image_size)}
    if words is not None:
        changes["view_words"] = words
    cameras = camera_distribution(prior)
    if cameras is not None:
        changes["cameras"] = recipe.cameras | {name: tuple(bounds) for name, bounds in cameras.items()}
    return _with_wishes(replace(recipe, **changes), wishes)


def _with_wishes(recipe: Recipe, wishes: dict[str, Any]) -> Recipe:
    known = {entry.name for entry in fields(Recipe)} - {"name"}
    unknown = sorted(set(wishes) - known)
    if unknown:
        raise ValueError(f"recipe: {unknown[0]!r} in text3d.json is none of {', '.join(sorted(known))}")
    changes = dict(wishes)
    try:
        if "time_range" in changes:
            changes["time_range"] = TimeRange(**changes["time_range"])
        for name in ("learning_rates", "cameras"):
            if name in changes:
                changes[name] = getattr(recipe, name) | changes[name]
        recipe = replace(recipe, **changes)
        recipe.view_prompts()
    except TypeError as error:
        raise ValueError(f"recipe: {error}") from error
    return recipe
