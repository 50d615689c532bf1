"""Stable Diffusion checkpoints in one .safetensors file (the original key names), through diffusers' converters.

Such a file holds weights only. The configurations and the tokenizer come with this package, or from a folder of the
same family.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from text3d_fast.errors import ModelError
from text3d_fast.guidance.models.families import FAMILIES
from text3d_fast.guidance.models.folder import ModelFolder, read_folder
from text3d_fast.guidance.models.kinds import part_of_a_model
from text3d_fast.guidance.models.sources import SUPPORTED, Found, brief, locate
from text3d_fast.guidance.models.weights import safetensors_header

PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text_encoder": "cond_stage_model."}
_CAMERA = PREFIXES["unet"] + "camera_embed."
_CLIP = "cond_stage_model.transformer."


def read_single_file(path: Path, config: str | Path | None = None) -> ModelFolder:
    """The checkpoint's family configuration as a ModelFolder whose weights are that file."""
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    header = safetensors_header(path)
    part = part_of_a_model(header)
    if part is not None:
        raise ModelError(f"{path}: {part}. {SUPPORTED}")
    shapes = {key: SimpleNamespace(shape=torch.Size(entry["shape"])) for key, entry in header.items()}
    kind = infer_diffusers_model_type(shapes)
    if not any(key.startswith(PREFIXES["unet"]) for key in header) or kind not in ("v1", "v2"):
        reason = f"recognized as {kind}" if kind not in ("v1", "v2") else "no U-Net weights (model.diffusion_model.*)"
        raise ModelError(f"{path}: not a whole Stable Diffusion checkpoint ({reason}). {SUPPORTED}")
    family = FAMILIES / ("sd1" if kind == "v1" else "sd2")
    try:
        if config is None:
            # the tokenizer's files are made when they are needed; see families
            found = Found(family, [*locate(family).files, "tokenizer/vocab.json", "tokenizer/merges.txt"])
        else:
            found = locate(config if isinstance(config, Path) else str(config), weights=False)
            if not found.path.is_dir():
                raise ModelError(f"{config}: expected a diffusers folder of the same family")
        folder = read_folder(found, str(found.path if config is None else config))
    except ModelError as error:
        raise ModelError(f"{path}: config: {error}") from error
    folder = replace(folder, source=str(path), weights=path)
    if _CAMERA + "0.weight" in header:  # MVDream: four views of 256 pixels, from models that predict eps
        folder.settings = replace(folder.settings, views=4, conditions=["pose"])
        folder.unet = folder.unet | {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 16}
        if config is None:
            folder.unet["sample_size"] = 32
            folder.settings.cameras = {"elevation": [0.0, 30.0], "fov_y": [15.0, 60.0]}
        return folder.predicting("epsilon" if config is None else None)
    # two empty tensors by which trainers mark what their model predicts, and its noise
    if "v_pred" in header or "ztsnr" in header:
        marked = {"prediction_type": "v_prediction"} | ({"rescale_betas_zero_snr": True} if "ztsnr" in header else {})
        return replace(folder, scheduler=folder.scheduler | marked)
    # 2.x of 512 pixels predict eps, those of 768 v, and their weights have the same shapes
    return replace(folder, undecided=kind == "v2" and config is None)


def load_single_file(folder: ModelFolder, name: str, dtype: torch.dtype) -> Any:
    """The "unet" or "vae" of a checkpoint read by `read_single_file`."""
    import diffusers
    from safetensors.torch import load_file

    config, weights, changes = folder.unet if name == "unet" else folder.vae, str(folder.weights), {}
    try:
        if name == "unet" and folder.settings.views > 1:
            # its camera network is where other models have one for labels
            weights = {key.replace(_CAMERA, PREFIXES["unet"] + "label_emb.0."): value
                       for key, value in load_file(folder.weights).items()}
            changes = {key: config[key] for key in ("class_embed_type", "projection_class_embeddings_input_dim")}
        part = getattr(diffusers, config["_class_name"]).from_single_file(
            weights, config=str(folder.path), subfolder=name, torch_dtype=dtype, local_files_only=True, **changes
        )
    except Exception as error:
        # weights that the file lacks stay on the "meta" device, and diffusers stumbles over them
        reason = "weights are missing from the file" if "meta tensor" in str(error) else brief(error)
        raise ModelError(f"{folder.source}: {name} cannot be loaded as {folder.path} says ({reason})") from error
    missing = [key for key, value in part.state_dict().items() if value.is_meta]
    if missing:
        raise ModelError(f"{folder.source}: {name} does not fit {folder.path}: {missing[0]} is missing")
    return part


def load_single_file_text(folder: ModelFolder, dtype: torch.dtype) -> Any:
    """The text encoder of a checkpoint read by `read_single_file`."""
    import transformers
    from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
    from safetensors import safe_open

    try:
        with safe_open(str(folder.weights), "pt") as file:
            names = [key for key in safetensors_header(folder.weights) if key.startswith(PREFIXES["text_encoder"])]
            weights = {_clip_name(key): file.get_tensor(key) for key in names}
        return create_diffusers_clip_model_from_ldm(
            transformers.CLIPTextModel,
            weights,
            subfolder="text_encoder",
            config=str(folder.path),
            torch_dtype=dtype,
            local_files_only=True,
        )
    except Exception as error:
        raise ModelError(f"{folder.source}: text encoder cannot be loaded ({brief(error)})") from error


def _clip_name(key: str) -> str:
    """Some files were written by a transformers whose text model had no wrapper of that name."""
    if key.startswith(_CLIP) and not key.startswith(_CLIP + "text_model."):
        return _CLIP + "text_model." + key.removeprefix(_CLIP)
    return key


def count_parameters(path: Path, component: str) -> int:
    """Parameters of one component in a checkpoint, from its header; ModelError if there are none."""
    header = safetensors_header(path)
    count = sum(math.prod(entry["shape"]) for key, entry in header.items() if key.startswith(PREFIXES[component]))
    if count == 0:
        name = {"unet": "U-Net", "vae": "VAE", "text_encoder": "text encoder"}[component]
        raise ModelError(f"{path}: the checkpoint holds no {name} ({PREFIXES[component]}*)"
                         + ("; give one as --set prior.tiny_autoencoder=FOLDER" if component == "vae" else ""))
    return count
