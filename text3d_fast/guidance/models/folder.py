"""A model given as folder, file or hub id: read what it says about itself, refuse what cannot work.

Nothing here loads weights: configurations and safetensors headers are enough, so `doctor` answers at once.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from text3d_fast.errors import ModelError, ModelWarning
from text3d_fast.guidance.models.settings import FILE_NAME, ModelSettings, condition_size
from text3d_fast.guidance.models.sources import SUPPORTED, Found, locate, refuse_other_pipelines
from text3d_fast.guidance.models.weights import choose_weights, safetensors_header
from text3d_fast.guidance.schedule import PREDICTION_TYPES

# What a folder's unet/ may be, by the class name in its configuration: the network and its prior, as module:class
NETWORKS = {
    "UNet2DConditionModel": ("diffusers:UNet2DConditionModel", "text3d_fast.guidance.models.diffusion:DiffusionPrior"),
    "ToyboxDenoiser": (
        "text3d_fast.toybox.learned.denoiser:ToyboxDenoiser", "text3d_fast.toybox.learned.prior:ToyboxPrior",
    ),
}
_VOCABULARIES = ({"tokenizer.json"}, {"vocab.json", "merges.txt"}, {"spiece.model"}, {"tokenizer.model"})


@dataclass
class ModelFolder:
    """A diffusers-format folder and its configurations (dicts as in the JSON files).

    files    names in it, relative; of a hub repository also those that were not fetched
    half     fp16 weights are preferred where there are some
    weights  a single-file checkpoint, for which the folder gives only the configurations
    undecided  what it predicts is known from neither, and is told from its answers (see loading.tell_prediction)
    notes    what a user should know, in sentences
    """

    path: Path
    source: str
    settings: ModelSettings
    unet: dict[str, Any]
    scheduler: dict[str, Any]
    text_encoder: dict[str, Any]
    vae: dict[str, Any] | None
    licence: str | None
    files: list[str] = field(default_factory=list)
    half: bool = False
    weights: Path | None = None
    undecided: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def prediction_type(self) -> str:
        return self.scheduler.get("prediction_type", "epsilon")

    @property
    def channels(self) -> int:
        """Channels of x."""
        return self.unet["in_channels"]

    @property
    def latent_factor(self) -> int:
        """Image pixels per pixel of x, along one axis."""
        return self.settings.pixel_unshuffle if self.vae is None else vae_factor(self.vae)

    @property
    def image_size(self) -> int:
        return self.settings.image_size or self.unet["sample_size"] * self.latent_factor

    @property
    def components(self) -> list[str]:
        """Those that have weights."""
        return ["unet", "text_encoder"] + (["vae"] if self.vae is not None else [])

    def weight_files(self, component: str) -> list[Path]:
        """The files with a component's weights; ModelError, with what is missing, if there is no whole set."""
        names = [name.removeprefix(component + "/") for name in self.files if name.startswith(component + "/")]
        try:
            return [self.path / component / name for name in choose_weights(names, self.half, component)]
        except ModelError as error:
            raise ModelError(f"{self.source}: {error}") from error

    def check(self, components: list[str] | None = None) -> None:
        """ModelError, naming it, if something of these (None: all) is missing or damaged."""
        for component in self.components if components is None else components:
            self.parameters(component)

    def parameters(self, component: str) -> int:
        """Number of parameters of a component, from the file headers (which are checked on the way), or, of weights
        that were not fetched, from the configuration.
        """
        if self.weights is not None:
            from text3d_fast.guidance.models.single_file import count_parameters

            return count_parameters(self.weights, component)
        files = self.weight_files(component)
        if not any(file.exists() for file in files):
            from text3d_fast.guidance.models.loading import empty_component

            return sum(parameter.numel() for parameter in empty_component(component, self).parameters())
        return sum(math.prod(entry["shape"]) for file in files for entry in safetensors_header(file).values())

    def predicting(self, prediction: str | None) -> ModelFolder:
        """The same model, taken to predict something else; None: as it says itself."""
        if prediction is None:
            return self
        if prediction not in PREDICTION_TYPES:
            raise ModelError(f"prediction: expected one of {', '.join(PREDICTION_TYPES)}, got {prediction!r}")
        return replace(self, scheduler=self.scheduler | {"prediction_type": prediction}, undecided=False)

    def describe(self) -> dict[str, Any]:
        """What `doctor --model` prints. memory: bytes of the weights in fp16 and fp32, without activations."""
        counts = {name: self.parameters(name) for name in self.components}
        resident = sum(count for name, count in counts.items() if name != "text_encoder")
        size = self.image_size // self.latent_factor
        zero = self.scheduler.get("rescale_betas_zero_snr")
        told = "epsilon or v_prediction: told from the weights when they are loaded, or name it (prior.prediction)"
        about = {
            "model": self.settings.name or self.source,
            "kind": "pixel" if self.vae is None else "latent",
            "prediction": told if self.undecided else self.prediction_type,
            "noise": self.scheduler.get("beta_schedule", "") + (", zero terminal SNR" if zero else ""),
            "image_size": self.image_size,
            "x_shape": [self.channels, size, size],
            "conditions": ["text", *self.settings.conditions],
            "steps_trained": self.scheduler.get("num_train_timesteps", 1000),
            "text_encoder": self.text_encoder["architectures"][0],
            "vae": None if self.vae is None else self.vae.get("_class_name"),
            "scaling_factor": None if self.vae is None else latent_scale(self.vae)[0],
            "shift_factor": None if self.vae is None else latent_scale(self.vae)[1],
            "parameters": counts,
            "memory_fp16": 2 * resident,
            "memory_fp32": 4 * resident,
            "licence": self.licence or "not stated",
        }
        return about | ({"warning": "; ".join(self.notes)} if self.notes else {})

    def warn(self) -> None:
        """Say what a user should know, as warnings."""
        for note in self.notes:
            warnings.warn(f"{self.source}: {note}", ModelWarning, stacklevel=2)


def vae_factor(config: dict[str, Any]) -> int:
    """How much smaller a VAE's latents are than its images."""
    channels = config.get("block_out_channels") or config.get("encoder_block_out_channels")
    return 2 ** (len(channels) - 1)


def latent_scale(config: dict[str, Any]) -> tuple[float, float]:
    """(scaling factor, shift factor): x = (z - shift) * scale."""
    default = 1.0 if config.get("_class_name") == "AutoencoderTiny" else 0.18215
    scale, shift = config.get("scaling_factor"), config.get("shift_factor")
    return default if scale is None else float(scale), 0.0 if shift is None else float(shift)


def open_model(
    source: str | Path,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    config: str | Path | None = None,
    prediction: str | None = None,
    weights: bool = True,
) -> ModelFolder:
    """Read and check the model behind a path or hub id; arguments as `DiffusionPrior.from_pretrained`, and

    weights   False: of a hub repository everything but them is fetched
    """
    found = locate(source, revision, dtype != torch.float32, weights)
    if found.path.is_dir():
        if config is not None:
            raise ModelError(f"config: {source} is a folder and has its own configurations; it is for single files")
        folder = read_folder(found, str(source))
        folder.half = dtype != torch.float32
    else:
        from text3d_fast.guidance.models.single_file import read_single_file

        folder = read_single_file(found.path, config)
    return folder.predicting(prediction)


def read_folder(found: Found, source: str | None = None) -> ModelFolder:
    """Read a diffusers-format folder; ModelError if it is not complete (but for weights) or not supported."""
    path = found.path
    source = source or str(path)
    refuse_other_pipelines(path, found.files, source)
    unet = _read_json(path / "unet" / "config.json", source)
    scheduler = _read_json(path / "scheduler" / "scheduler_config.json", source)
    text_encoder = _read_json(path / "text_encoder" / "config.json", source)
    if not (path / "tokenizer").is_dir():
        raise ModelError(f"{source}: incomplete, tokenizer/ is missing")
    words = {name.removeprefix("tokenizer/") for name in found.files if name.startswith("tokenizer/")}
    if not any(needed <= words for needed in _VOCABULARIES):
        raise ModelError(f"{source}: incomplete, tokenizer/ holds no vocabulary (tokenizer.json, vocab.json with "
                         f"merges.txt, or spiece.model)")
    vae = _read_json(path / "vae" / "config.json", source) if (path / "vae").is_dir() else None
    try:
        settings = ModelSettings.load(path)
    except ValueError as error:
        raise ModelError(str(error)) from error
    folder = ModelFolder(path, source, settings, unet, scheduler, text_encoder, vae, settings.licence or _licence(path),
                         found.files)
    _refuse_unsupported(folder)
    folder.notes += _doubts(folder)
    return folder


def _doubts(folder: ModelFolder) -> list[str]:
    """Distilled models sample in a few steps, and have no score to distil again."""
    scheduler = folder.scheduler
    name = f"{folder.source} {folder.unet.get('_name_or_path', '')}".lower()
    few = re.search(r"turbo|\blcm\b|[-_]lcm|lightning|hyper-?sd|schnell", name)
    # Turbo models come with "trailing"; so do models of zero terminal SNR, which are not distilled
    trailing = scheduler.get("timestep_spacing") == "trailing" and not scheduler.get("rescale_betas_zero_snr")
    if few or "LCM" in scheduler.get("_class_name", "") or "TCD" in scheduler.get("_class_name", "") or (
        trailing and folder.prediction_type == "epsilon"
    ):
        return ["this looks like a model distilled to few steps (turbo, LCM, Lightning): it has no usable score at "
                "most noise levels, so results will be poor; take the model that it was distilled from"]
    return []


def _read_json(path: Path, source: str) -> dict[str, Any]:
    if not path.is_file():
        raise ModelError(f"{source}: incomplete, {path.parent.name}/{path.name} is missing")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: expected a JSON object")
    return content


def _refuse_unsupported(folder: ModelFolder) -> None:
    unet, vae, settings, source = folder.unet, folder.vae, folder.settings, folder.source

    def refuse(reason: str) -> None:
        raise ModelError(f"{source}: {reason}. {SUPPORTED}")

    if unet.get("_class_name") not in NETWORKS:
        refuse(f"its unet is a {unet.get('_class_name')}, not a UNet2DConditionModel")
    if unet.get("addition_embed_type") not in (None, "text"):
        refuse(f"its U-Net needs extra inputs ({unet['addition_embed_type']}, as SDXL and Kandinsky do)")
    if unet.get("encoder_hid_dim_type") not in (None, "text_proj"):
        refuse(f"its U-Net takes image embeddings ({unet['encoder_hid_dim_type']})")
    if unet.get("time_cond_proj_dim") is not None:
        refuse("a guidance-distilled (LCM) U-Net has no usable score")
    architecture = (folder.text_encoder.get("architectures") or ["unknown"])[0]
    if architecture not in ("CLIPTextModel", "T5EncoderModel"):
        refuse(f"its text encoder is a {architecture}")
    size = condition_size(settings.conditions)
    if unet.get("class_embed_type") != ("projection" if size else None) or unet.get("num_class_embeds") is not None:
        refuse(
            f"class_embed_type is {unet.get('class_embed_type')!r} but {FILE_NAME} names "
            f"{settings.conditions or 'no conditions'}"
        )
    if size and unet.get("projection_class_embeddings_input_dim") != size:
        refuse(f"conditions {settings.conditions} make {size} numbers, the U-Net takes "
               f"{unet.get('projection_class_embeddings_input_dim')}")
    if settings.views > 1 and unet.get("_class_name") != "UNet2DConditionModel":
        refuse(f"{FILE_NAME} names {settings.views} views, which only a UNet2DConditionModel shares")
    if vae is None and unet.get("in_channels", 4) == 4 and settings.pixel_unshuffle == 1:
        raise ModelError(f"{source}: incomplete, vae/ is missing (its U-Net works on latents)")
    if vae is None:
        channels = 3 * settings.pixel_unshuffle**2
        name = f"pixels (pixel_unshuffle {settings.pixel_unshuffle})"
    else:
        if vae.get("_class_name") not in ("AutoencoderKL", "AutoencoderTiny"):
            refuse(f"its VAE is a {vae.get('_class_name')}")
        if settings.pixel_unshuffle != 1:
            refuse("pixel_unshuffle together with a VAE")
        channels, name = vae.get("latent_channels", 4), "latents"
    if unet.get("in_channels", 4) != channels:
        refuse(f"its U-Net takes {unet.get('in_channels')} channels where {name} have {channels} (an inpainting, "
               f"upscaling or image-to-image model?)")
    if unet.get("out_channels", 4) not in (channels, 2 * channels):
        refuse(f"its U-Net returns {unet.get('out_channels')} channels where {channels} were expected")
    if not isinstance(unet.get("sample_size"), int) and not settings.image_size:
        refuse(f"neither unet/config.json (sample_size) nor {FILE_NAME} (image_size) says how large the images are")
    if folder.image_size % folder.latent_factor:
        refuse(f"image_size {folder.image_size} is not a multiple of {folder.latent_factor}")
    scheduler = folder.scheduler.get("_class_name", "")
    if "FlowMatch" in scheduler or "beta_schedule" not in folder.scheduler:
        refuse(f"its scheduler ({scheduler or 'unnamed'}) has no DDPM noise schedule")
    if folder.prediction_type not in PREDICTION_TYPES:
        refuse(f"prediction_type is {folder.prediction_type!r}, expected one of {', '.join(PREDICTION_TYPES)}")


def _licence(path: Path) -> str | None:
    """The licence in the front matter of a model card."""
    card = path / "README.md"
    if not card.is_file():
        return None
    front = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    found = front and re.search(r"^licen[sc]e:\s*(\S+)", front.group(1), re.MULTILINE)
    return found.group(1).strip("\"'") if found else None
