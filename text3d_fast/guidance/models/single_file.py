"""Stable Diffusion checkpoints in one .safetensors file (the original key names), through diffusers' converters.

Such a file holds weights only. The configurations and the tokenizer come from a folder of the same family.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from text3d_fast.errors import ModelError
from text3d_fast.guidance.models.folder import (
    SUPPORTED,
    ModelFolder,
    brief,
    locate_configuration,
    read_folder,
    safetensors_header,
)


def read_single_file(path: Path, config: str | Path | None = None) -> ModelFolder:
    """The checkpoint's family configuration as a ModelFolder whose weights are that file."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config, infer_diffusers_model_type

    header = safetensors_header(path)
    shapes = {key: SimpleNamespace(shape=torch.Size(entry["shape"])) for key, entry in header.items()}
    kind = infer_diffusers_model_type(shapes)
    if not any(key.startswith("model.diffusion_model.") for key in header) or kind not in ("v1", "v2"):
        reason = f"recognized as {kind}" if kind not in ("v1", "v2") else "no U-Net weights (model.diffusion_model.*)"
        raise ModelError(f"{path}: not a whole Stable Diffusion checkpoint ({reason}). {SUPPORTED}")
    family = str(config) if config is not None else fetch_diffusers_config(shapes)["pretrained_model_name_or_path"]
    try:
        folder = read_folder(locate_configuration(family), family)
    except ModelError as error:
        raise ModelError(
            f"{path}: the file holds weights only, and the configurations and tokenizer of its family could not be "
            f"read: {error} Pass config=FOLDER with a diffusers folder of the same family (its weights are not needed)."
        ) from error
    return replace(folder, source=str(path), weights=path)


def load_single_file(folder: ModelFolder, dtype: torch.dtype) -> tuple[Any, Any | None]:
    """(U-Net, VAE) of a checkpoint read by `read_single_file`."""
    import diffusers

    parts = []
    for name, config in (("unet", folder.unet), ("vae", folder.vae)):
        if config is None:
            parts.append(None)
            continue
        try:
            part = getattr(diffusers, config["_class_name"]).from_single_file(
                str(folder.weights), config=str(folder.path), subfolder=name, torch_dtype=dtype, local_files_only=True
            )
        except Exception as error:
            # weights that the file lacks stay on the "meta" device, and diffusers stumbles over them
            reason = "weights are missing from the file" if "meta tensor" in str(error) else brief(error)
            raise ModelError(f"{folder.source}: {name} cannot be loaded as {folder.path} says ({reason})") from error
        missing = [key for key, value in part.state_dict().items() if value.is_meta]
        if missing:
            raise ModelError(f"{folder.source}: {name} does not fit {folder.path}: {missing[0]} is missing")
        parts.append(part)
    return parts[0], parts[1]


def load_single_file_text(folder: ModelFolder, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """(tokenizer, text encoder) of a checkpoint read by `read_single_file`."""
    import transformers
    from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
    from safetensors import safe_open

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder.path / "tokenizer", local_files_only=True)
        with safe_open(str(folder.weights), "pt") as file:
            names = [key for key in safetensors_header(folder.weights) if key.startswith("cond_stage_model.")]
            weights = {key: file.get_tensor(key) for key in names}
        encoder = create_diffusers_clip_model_from_ldm(
            transformers.CLIPTextModel,
            weights,
            subfolder="text_encoder",
            config=str(folder.path),
            torch_dtype=dtype,
            local_files_only=True,
        )
    except Exception as error:
        raise ModelError(
            f"{folder.source}: text encoder or tokenizer cannot be loaded ({brief(error)})"
        ) from error
    return tokenizer, encoder.to(device, dtype).eval().requires_grad_(False)


def count_parameters(path: Path, component: str) -> int:
    """Parameters of one component in a checkpoint, from its header."""
    prefix = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text_encoder": "cond_stage_model."}
    header = safetensors_header(path)
    return sum(math.prod(entry["shape"]) for key, entry in header.items() if key.startswith(prefix[component]))
