"""The parts of a model folder as objects: networks, text encoder, noise schedule; broken ones are named."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from text3d_fast.errors import ModelError
from text3d_fast.guidance.models.folder import NETWORKS, ModelFolder, brief, vae_factor
from text3d_fast.guidance.schedule import NoiseSchedule


def network_and_prior(folder: ModelFolder) -> tuple[type, type]:
    """The classes for the folder's unet/, imported now."""
    found = []
    for name in NETWORKS[folder.unet["_class_name"]]:
        module, _, attribute = name.partition(":")
        found.append(getattr(import_module(module), attribute))
    return found[0], found[1]


def load_schedule(folder: ModelFolder) -> NoiseSchedule:
    from diffusers import DDPMScheduler

    known = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas",
             "rescale_betas_zero_snr")
    try:
        given = {key: folder.scheduler[key] for key in known if folder.scheduler.get(key) is not None}
        scheduler = DDPMScheduler(**given)
    except (NotImplementedError, ValueError, TypeError) as error:
        raise ModelError(f"{folder.source}: scheduler_config.json: {error}") from error
    return NoiseSchedule.from_scheduler(scheduler)


def load_component(name: str, kind: Any, folder: ModelFolder, dtype: torch.dtype) -> Any:
    """A model of class `kind` from a folder, with every weight present; ModelError otherwise."""
    folder.parameters(name)  # a broken file is named before diffusers meets it
    try:
        model, info = kind.from_pretrained(
            folder.path,
            subfolder=name,
            torch_dtype=dtype,
            use_safetensors=True,
            variant=folder.variant(name, dtype != torch.float32),
            output_loading_info=True,
            low_cpu_mem_usage=False,
            local_files_only=True,
        )
    except ModelError:
        raise
    except Exception as error:  # diffusers and safetensors raise a dozen kinds
        raise ModelError(f"{folder.source}: {name} cannot be loaded ({brief(error)})") from error
    wrong = [*info["missing_keys"], *info["mismatched_keys"], *info["error_msgs"]]
    if wrong:
        raise ModelError(
            f"{folder.source}: {name} does not fit its configuration, e.g. {wrong[0]} ({len(wrong)} in all)"
        )
    return model


def load_text_encoder(folder: ModelFolder, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """(tokenizer, text encoder) of a folder."""
    import transformers

    folder.parameters("text_encoder")
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()  # it would tear the caller's own
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder.path / "tokenizer", local_files_only=True)
        encoder, info = getattr(transformers, folder.text_encoder["architectures"][0]).from_pretrained(
            folder.path / "text_encoder",
            use_safetensors=True,
            variant=folder.variant("text_encoder", dtype != torch.float32),
            output_loading_info=True,
            local_files_only=True,
        )
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"{folder.source}: text encoder or tokenizer cannot be loaded ({brief(error)})"
        ) from error
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
    missing = [key for key in info["missing_keys"] if "position_ids" not in key]
    if missing:
        raise ModelError(
            f"{folder.source}: text_encoder does not fit its configuration, {sorted(missing)[0]} is missing"
        )
    return tokenizer, encoder.to(device, dtype).eval().requires_grad_(False)


def load_tiny_autoencoder(source: str | Path, folder: ModelFolder, dtype: torch.dtype) -> Any:
    import diffusers

    if folder.vae is None:
        raise ModelError(f"tiny_autoencoder: {folder.source} works on pixels and has no autoencoder to replace")
    try:
        vae = diffusers.AutoencoderTiny.from_pretrained(source, torch_dtype=dtype, low_cpu_mem_usage=False)
    except Exception as error:
        raise ModelError(f"tiny_autoencoder: {source} cannot be loaded ({brief(error)})") from error
    made = (vae.config.latent_channels, vae_factor(dict(vae.config)))
    taken = (folder.unet["in_channels"], folder.latent_factor)
    if made != taken:
        raise ModelError(
            f"tiny_autoencoder: {source} makes {made[0]} channels at 1/{made[1]} of the size, "
            f"the model takes {taken[0]} at 1/{taken[1]}"
        )
    return vae
