"""Settings that suit a prior: a real text-to-image model, the learned Toybox model, the analytic prior."""

from __future__ import annotations

from text3d_fast.guidance import DiffusionPrior, Prior
from text3d_fast.guidance.prior import camera_distribution
from text3d_fast.guidance.recipes import Recipe, choose_recipe
from text3d_fast.pipelines.config import DreamFusionConfig
from text3d_fast.pipelines.priors import ANALYTIC, known_conditions, speaks_toybox


def default_config(prior: Prior, model: str) -> DreamFusionConfig:
    """The starting point for `model`; everything can be changed with `settings`."""
    settings: dict = {"model": model, "size": min(prior.image_size, 64)}
    if isinstance(prior, DiffusionPrior):
        settings |= recipe_settings(choose_recipe(prior))
    else:
        settings |= {f"cameras.{name}": tuple(bounds) for name, bounds in (camera_distribution(prior) or {}).items()}
    words = getattr(prior, "view_words", None) or getattr(getattr(prior, "settings", None), "view_words", None)
    if words:
        settings["view_words"] = words
    settings["background"] = "solid" if "background" in known_conditions(prior) else "network"
    if speaks_toybox(prior):
        settings |= TOYBOX_LIGHTS
    if settings.get("guidance.weighting") == "sample":
        settings |= SMALL_GRADIENT
    if model == ANALYTIC:
        settings |= ANALYTIC_SETTINGS
    return DreamFusionConfig().updated(settings)


def recipe_settings(recipe: Recipe) -> dict:
    """A guidance recipe in the names of DreamFusionConfig."""
    time = recipe.time_range
    settings = {
        "size": recipe.render_size, "steps": recipe.steps, "batch": recipe.batch, "view_words": recipe.view_words,
        "guidance.weight": recipe.guidance_weight, "guidance.weighting": recipe.weighting,
        "guidance.time": (time.low, time.high), "guidance.time_end": time.end,
        "guidance.final_time": None if time.kind == "constant" else time.at(1.0),
    }
    settings |= {f"optimizer.{name}": rate for name, rate in recipe.learning_rates.items()}
    return settings | {f"cameras.{name}": tuple(bounds) for name, bounds in recipe.cameras.items()}


# The lights that Toybox pictures are rendered with.
TOYBOX_LIGHTS = {
    "lights.spread": 0.6, "lights.lift": 0.5, "lights.distance": (1.0, 1.9),
    "lights.diffuse": (0.5, 0.7), "lights.ambient": (0.3, 0.55),
    "shading.lit": 1.0, "shading.textureless": 0.0,
}

# With w = sigma / alpha the gradient is the picture minus the denoised one, which is small beside a gradient with
# guidance 100. At the paper's weight the orientation penalty does nothing against it and density rises and falls on its
# way in: pits. Cells of 1/32 are as wide as a pixel of 64 x 64. A blurred answer leaves fog: opacity costs something.
SMALL_GRADIENT = {
    "penalties.orientation": (0.03, 0.03), "penalties.opacity": (0.003, 0.003), "field.max_resolution": 64,
}

# The exact denoiser needs no guidance, leaves no fog, and is steady enough for a stronger orientation penalty.
ANALYTIC_SETTINGS = {
    "guidance.weight": 0.0, "guidance.weighting": "sample",
    "guidance.time": (0.02, 0.5), "guidance.final_time": (0.02, 0.2),
    "penalties.orientation": (0.1, 0.1), "field.max_resolution": 64,
}
