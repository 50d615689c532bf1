"""Settings that suit a prior, from its properties; one precedence, and each value knows where it comes from.

Later layers win: the pipeline's defaults, the recipe of the prior's kind, what the prior says of itself (views,
cameras, conditions), what follows from the weighting, the prior's own wishes, and at last the user's `settings`.

The figures for real models are the published ones for their class (DreamFusion's paper and its reproductions),
carried over to this package's world: the box [-1, 1]^3, mean-reduced losses, and the (1 + w) / w form of guidance.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from text3d_fast.guidance import Prior
from text3d_fast.pipelines.config import RunConfig
from text3d_fast.pipelines.stage_config import VolumeConfig

# A scene as fine as 512 pixels can show: the sizes of the papers and their reproductions. Rays through the ball
# of radius 0.9 take up to 512 samples.
FINE_SCENE: dict[str, Any] = {
    "field.levels": 16, "field.log2_table_size": 19, "field.base_resolution": 16, "field.max_resolution": 4096,
    "field.start_levels": 8, "field.levels_end": 0.6, "field.hidden": 64, "sampling.step": 0.0035,
    "sampling.occupancy": 64,
}

KINDS: dict[str, dict[str, Any]] = {
    # Stable Diffusion and its like, 512 or 768 pixels through a VAE
    "latent": {
        "steps": 10_000, "guidance.weight": 100.0, "optimizer.grid": 1e-2, "optimizer.network": 1e-3,
        "cameras.elevation": (-10.0, 80.0), "cameras.fov_y": (35.0, 50.0), **FINE_SCENE,
    },
    # DeepFloyd IF's first stage and its like: 64 pixels, no VAE
    "pixel": {
        "steps": 10_000, "guidance.weight": 20.0, "optimizer.grid": 1e-2, "optimizer.network": 1e-3,
        "cameras.elevation": (-10.0, 80.0), "cameras.fov_y": (35.0, 50.0), **FINE_SCENE,
    },
    # a small model that is given the camera: the words need little amplification, and few steps suffice
    "camera": {
        "guidance.weight": 5.0, "guidance.final_time": (0.02, 0.5), "optimizer.grid": 1e-2,
        "optimizer.network": 2e-3, "view_words": "left_right",
        "cameras.elevation": (-10.0, 80.0), "cameras.fov_y": (35.0, 50.0),
    },
    # an exact denoiser: conditions are exact, so there is nothing to amplify; w = sigma / alpha makes the gradient
    # the picture minus the denoised picture
    "exact": {
        "guidance.weight": 0.0, "guidance.weighting": "sample",
        "guidance.time": (0.02, 0.5), "guidance.final_time": (0.02, 0.2),
    },
}

# The same for a stage that optimizes a surface. It starts from a shape that is about right: little noise; longer focal
# lengths (Magic3D, section 4.3; threestudio: 30 to 45 degrees from 1.5 to 2 radii) or, where the prior knows windows,
# parts of its pictures.
SURFACE_KINDS: dict[str, dict[str, Any]] = {
    "latent": {
        "steps": 5_000, "size": 512, "guidance.weight": 100.0, "guidance.time": (0.02, 0.5),
        "cameras.elevation": (-10.0, 80.0), "cameras.fov_y": (25.0, 45.0),
    },
    "pixel": {
        "steps": 5_000, "guidance.weight": 20.0, "guidance.time": (0.02, 0.5), "cameras.elevation": (-10.0, 80.0),
    },
    "camera": {
        "guidance.weight": 5.0, "guidance.time": (0.02, 0.5), "view_words": "left_right",
        "cameras.elevation": (-10.0, 80.0),
    },
    "exact": {
        "guidance.weight": 0.0, "guidance.weighting": "sample",
        "guidance.time": (0.02, 0.4), "guidance.final_time": (0.02, 0.15),
    },
}
PARTS = (1.0, 2.0)  # zoom of the pictures for priors that know windows

# What VSD takes instead: guidance as strong as for sampling pictures, 7.5 in the form that others use, large t for a
# fifth of the steps (Wang et al., 2023). An exact denoiser has no network for a LoRA.
PARTICLE_KINDS: dict[str, dict[str, Any]] = {
    "latent": {
        "guidance.weight": 6.5, "guidance.time": (0.02, 0.98), "guidance.final_time": (0.02, 0.5),
        "guidance.time_end": 0.2, "guidance.time_moves": "step",
    },
    # few steps: the score has to follow at twenty times the paper's rate, at the t that the loss asks it at
    "camera": {"guidance.time_end": 1.0, "guidance.time_moves": "linear", "score.calls": "reused", "score.rate": 2e-3},
    "exact": {"score.kind": "particles", "guidance.time_end": 1.0, "guidance.time_moves": "linear"},
}
PARTICLE_KINDS["pixel"] = PARTICLE_KINDS["latent"]

# Settings of ProlificDreamer by a name.
PRESETS: dict[str, dict[str, Any]] = {
    # two CPU cores
    "small": {
        "vsd.steps": 500, "geometry.steps": 100, "geometry.size": 128, "geometry.surface.resolution": 48,
        "texturing.steps": 200, "texturing.size": 128, "mesh_resolution": 96,
    },
    # a place seen from within (the paper's section 4): nothing is dense in its middle, cameras are near it and look out
    # and about. threestudio's sizes, blob -10 and 2.5 wide, cameras 0.1 to 2.3 from the centre, in a box of radius 5
    "scene": {
        "vsd.field.blob_profile": "gaussian", "vsd.field.blob_scale": -10.0, "vsd.field.blob_width": 0.5,
        "vsd.cameras.distance": (0.02, 0.46), "vsd.cameras.fov_y": (40.0, 70.0), "vsd.sampling.radius": 1.0,
        "vsd.penalties.opacity": (0.0, 0.0), "vsd.penalties.thickness": (1.0, 1.0), "vsd.guidance.time_end": 0.4,
    },
}

# With w = sigma / alpha the gradient is the picture minus the denoised one, which is small beside a gradient with
# guidance 100. At the paper's weight the orientation penalty does nothing against it and density rises and falls on its
# way in: pits. Cells of 1/32 are as wide as a pixel of 64 x 64. A blurred answer leaves fog: opacity costs something.
SMALL_GRADIENT = {
    "penalties.orientation": (0.03, 0.03), "penalties.opacity": (0.003, 0.003), "field.max_resolution": 64,
}


@dataclass
class Recipe:
    """Layers of (where they come from, settings by dotted name); the last one that has a setting decides it."""

    layers: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def add(self, source: str, settings: dict[str, Any]) -> None:
        self.layers.append((source, dict(settings)))

    def settings(self) -> dict[str, Any]:
        return {name: value for _, layer in self.layers for name, value in layer.items()}

    def source(self, name: str) -> str:
        """Where a setting's value comes from."""
        return next((source for source, layer in reversed(self.layers) if name in layer), "default")


def recipe(prior: Prior, config_type: type[RunConfig]) -> Recipe:
    """What suits the prior in a pipeline with these settings: each stage that has a radiance field takes the recipe."""
    stages = [f"{entry.name}." for entry in dataclasses.fields(config_type) if _is_volume(entry)]
    if issubclass(config_type, VolumeConfig):
        stages.append("")
    whole = Recipe()
    for source, layer in volume_recipe(prior).layers:
        whole.add(source, {prefix + name: value for prefix in stages for name, value in layer.items()})
    return whole


def surface_recipe(prior: Prior) -> Recipe:
    """The layers for one stage that optimizes a surface."""
    found = Recipe()
    kind = "camera" if prior.kind == "pixel" and "camera" in prior.conditions else prior.kind
    found.add(f"recipe {kind}", SURFACE_KINDS[kind])
    own: dict[str, Any] = _of_views(prior)
    if kind in ("camera", "exact"):  # pictures finer than the prior's, averaged down to it
        own["size"] = max(1, 256 // prior.image_size) * prior.image_size
    if prior.view_words is not None:
        own["view_words"] = prior.view_words
    own |= {f"cameras.{name}": tuple(bounds) for name, bounds in (prior.camera_distribution or {}).items()}
    if "window" in prior.conditions:
        own["cameras.zoom"] = PARTS
    found.add("the prior", own)
    # wishes for a volume that mean the same for a surface; it begins with the noise that a volume ends with
    shared = ("cameras.", "lights.", "shading.", "guidance.weight")
    wishes = {name: value for name, value in prior.wishes.items() if name.startswith(shared)}
    if "guidance.final_time" in prior.wishes:
        wishes["guidance.time"] = prior.wishes["guidance.final_time"]
    found.add("the prior's wishes", wishes)
    return found


def _of_views(prior: Prior) -> dict[str, Any]:
    """A multi-view prior takes whole groups, is told the cameras, and was trained without view words (MVDream: guidance
    50 in the form that others use).
    """
    return {} if prior.views == 1 else {"batch": prior.views, "view_words": "none", "guidance.weight": 49.0}


def particle_recipe(prior: Prior, stage: Recipe) -> Recipe:
    """A stage's layers, and what its VSD takes; the prior's wishes still come last."""
    kind = "camera" if prior.kind == "pixel" and "camera" in prior.conditions else prior.kind
    layers = list(stage.layers)
    layers.insert(1, (f"recipe {kind} of VSD", PARTICLE_KINDS[kind]))
    return Recipe(layers)


def _is_volume(entry: dataclasses.Field) -> bool:
    return isinstance(entry.default_factory, type) and issubclass(entry.default_factory, VolumeConfig)


def volume_recipe(prior: Prior) -> Recipe:
    """The layers for one stage that optimizes a radiance field."""
    found = Recipe()
    kind = "camera" if prior.kind == "pixel" and "camera" in prior.conditions else prior.kind
    found.add(f"recipe {kind}", KINDS[kind])
    own: dict[str, Any] = {"size": min(prior.image_size, 64)} | _of_views(prior)
    if prior.view_words is not None:
        own["view_words"] = prior.view_words
    own |= {f"cameras.{name}": tuple(bounds) for name, bounds in (prior.camera_distribution or {}).items()}
    own["background"] = "solid" if "background" in prior.conditions else "network"
    found.add("the prior", own)
    weighting = {**found.settings(), **prior.wishes}.get("guidance.weighting")
    if weighting == "sample":
        found.add("weighting sample", SMALL_GRADIENT)
    found.add("the prior's wishes", dict(prior.wishes))
    return found
