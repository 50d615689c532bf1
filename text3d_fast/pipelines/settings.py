"""What every setting may be: its range, its unit and a sentence. One place, for checks and for help.

Names are those of config.yaml without the stage: `fine.guidance.weight` is here as `guidance.weight`.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Setting:
    """low, high: both allowed; of each number, where there are several. None: text, names of files, switches."""

    low: float | None
    high: float | None
    about: str


def _s(low: float, high: float, about: str) -> Setting:
    return Setting(low, high, about)


def _t(about: str) -> Setting:
    return Setting(None, None, about)


SETTINGS: dict[str, Setting] = {
    "seed": _s(0, 2**63 - 1, "the same seed gives the same result on the same machine"),
    "steps": _s(1, 10**7, "of optimization"),
    "batch": _s(1, 4096, "pictures a step"),
    "size": _s(4, 4096, "pixels along a side of the renders"),
    "checkpoint_every": _s(1, 10**7, "steps between checkpoints"),
    "preview_every": _s(1, 10**7, "steps between preview pictures"),
    "mesh_resolution": _s(4, 512, "of the exported mesh's grid; a multiple of 4"),
    "faces": _s(0, 10_000_000, "triangles of the exported mesh at most; 0: all"),
    "texture": _s(0, 8192, "texels along a side of the exported texture; 0: vertex colours"),
    "threads": _s(1, 4096, "CPU threads; another number changes the last bits"),
    "view_sectors": _s(0, 180, "degrees, half-widths of the front and of the back view"),
    "prior.dtype": _t("of a model's networks: float32, float16, bfloat16; null: fp16 on CUDA, fp32 elsewhere"),
    "prior.prediction": _t("epsilon, v_prediction or sample, where a model's file does not say it or is wrong"),
    "prior.revision": _t("of a hub repository"),
    "prior.config": _t("for a single file: a folder with the configurations and tokenizer of its family"),
    "prior.tiny_autoencoder": _t("folder or hub id of an AutoencoderTiny to encode with: a tenth of the VAE's cost"),
    "prior.lora": _t("LoRA files, each FILE or FILE:STRENGTH"),
    "prior.embeddings": _t("textual-inversion files; the prompt names their words"),
    "prior.vae_slicing": _t("encode one picture at a time, recomputed in the backward pass: less memory, more time"),
    "prior.offload": _t("text encoder and VAE stay in the computer's memory: less of the GPU's"),
    "prior.compile": _t("the U-Net by torch.compile: minutes at the start, faster steps on a GPU"),
    "guidance.distillation": _t("sds, csd (the guidance alone), bridge or ism"),
    "guidance.weight": _s(-1, 1000, "w of (1 + w) eps(text) - w eps(empty); others' scale is w + 1"),
    "guidance.time": _s(0, 1, "t is uniform between these two at the start"),
    "guidance.final_time": _s(0, 1, "and between these at the end"),
    "guidance.time_end": _s(1e-6, 1, "progress at which the end of that movement is reached"),
    "guidance.clip": _s(1e-9, 1e9, "largest root mean square of one picture's gradient"),
    "guidance.debias": _t("folder or hub id of a masked language model; words against a view leave its prompt"),
    "guidance.perp_neg": _s(0, 10, "how strongly views are pushed off each other's prompts; Perp-Neg, 0: not"),
    "field.levels": _s(1, 32, "of the hash grid"),
    "field.features": _s(1, 8, "per level: 1, 2, 4 or 8"),
    "field.log2_table_size": _s(4, 28, "entries of a level, as a power of two"),
    "field.base_resolution": _s(1, 1024, "cells along an axis of the coarsest level"),
    "field.max_resolution": _s(1, 65536, "and of the finest"),
    "field.start_levels": _s(1, 32, "levels that are on at the start"),
    "field.levels_end": _s(0, 1, "progress at which all are"),
    "field.hidden": _s(1, 256, "width of the network"),
    "field.sharpness": _s(1e-9, 1e6, "density is multiplied by it, in 1 / length"),
    "field.blob_scale": _s(-1000, 1000, "raw density at the middle at the start"),
    "field.blob_width": _s(1e-3, 100, "length over which it falls"),
    "sampling.radius": _s(0.05, 1.75, "everything lies in this ball of the box [-1, 1]^3"),
    "sampling.step": _s(1e-4, 1, "length between samples along a ray"),
    "sampling.occupancy": _s(1, 512, "cells of the occupancy grid along an axis"),
    "sampling.prune_from": _s(0, 1, "progress before which nothing is skipped"),
    "sampling.update_every": _s(1, 10**6, "steps between looks at the field"),
    "sampling.threshold": _s(0, 1, "opacity of one sample below which a cell is empty"),
    "penalties.orientation": _s(0, 1e6, "weight, at the start and at the end: surfaces face the camera"),
    "penalties.opacity": _s(0, 1e6, "weight: empty space stays empty"),
    "penalties.entropy": _s(0, 1e6, "weight: no fog"),
    "penalties.thickness": _s(0, 1e6, "weight: one surface a ray"),
    "optimizer.grid": _s(0, 10, "learning rate of the hash grid"),
    "optimizer.network": _s(0, 10, "learning rate of the field's network"),
    "optimizer.background": _s(0, 10, "learning rate of the background's network"),
    "optimizer.warmup": _s(0, 1, "share of the steps over which rates rise"),
    "optimizer.final": _s(0, 1, "rates at the end, as a share of the highest"),
    "cameras.elevation": _s(-90, 90, "degrees above the horizon"),
    "cameras.azimuth": _s(-720, 720, "degrees from the front towards the object's left"),
    "cameras.distance": _s(1e-2, 1e3, "from the middle"),
    "cameras.fov_y": _s(1, 175, "degrees, vertical field of view"),
    "cameras.area": _s(0, 1, "share of cameras drawn uniform in area rather than in angle"),
    "cameras.jitter_position": _s(0, 10, "half-width of a random offset"),
    "cameras.jitter_target": _s(0, 10, "standard deviation of the point looked at"),
    "cameras.jitter_up": _s(0, 10, "standard deviation added to the up vector"),
    "cameras.zoom": _s(1, 64, "pictures show a part, so many times larger"),
    "lights.spread": _s(0, 100, "of the light's direction round the camera's"),
    "lights.lift": _s(-100, 100, "upwards from it"),
    "lights.distance": _s(1e-3, 1e3, "in units where the camera stands at 1.25"),
    "lights.diffuse": _s(0, 100, "grey level of the light"),
    "lights.ambient": _s(0, 100, "grey level of the light from everywhere"),
    "shading.albedo_until": _s(0, 1, "progress before which only albedo is shown"),
    "shading.lit": _s(0, 1, "probability of lighting after that"),
    "shading.textureless": _s(0, 1, "probability that a lit picture has no texture"),
}


def setting_of(name: str) -> Setting | None:
    """Of a dotted name, with or without its stage."""
    return SETTINGS.get(name) or SETTINGS.get(name.partition(".")[2])


def names_of(config: Any, prefix: str = "") -> list[str]:
    """Every setting of a configuration, dotted."""
    found = []
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        name = prefix + entry.name
        found += names_of(value, name + ".") if dataclasses.is_dataclass(value) else [name]
    return found


def value_of(config: Any, name: str) -> Any:
    """The value of a dotted name."""
    for part in name.split("."):
        config = getattr(config, part)
    return config


def check_ranges(config: Any) -> None:
    """ValueError that names the first setting outside its range, what was expected and what came."""
    for name in names_of(config):
        known, value = setting_of(name), value_of(config, name)
        if known is None or known.low is None or value is None:
            continue
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float) and not known.low <= number <= known.high:  # NaN neither
                raise ValueError(f"{name}: expected {known.low:g} to {known.high:g} ({known.about}), got {number!r}")


def nearest(name: str, names: list[str]) -> str:
    """", did you mean ...?" for a name that does not exist, or nothing."""
    close = difflib.get_close_matches(name, names, 1, 0.6)
    return f", did you mean {close[0]}?" if close else ""
