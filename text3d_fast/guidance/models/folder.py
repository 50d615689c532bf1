"""A model given as folder, file or hub id: find it, read what it says about itself, refuse what cannot work.

Nothing here loads weights: configurations and safetensors headers are enough, so `doctor` answers at once.
"""

from __future__ import annotations

import json
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from text3d_fast.errors import ModelError
from text3d_fast.guidance.models.settings import FILE_NAME, ModelSettings, condition_size
from text3d_fast.guidance.schedule import PREDICTION_TYPES

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COMPONENTS = ("unet", "scheduler", "text_encoder", "tokenizer", "vae")
# What a folder's unet/ may be, by the class name in its configuration: the network and its prior, as module:class
NETWORKS = {
    "UNet2DConditionModel": ("diffusers:UNet2DConditionModel", "text3d_fast.guidance.models.diffusion:DiffusionPrior"),
    "ToyboxDenoiser": (
        "text3d_fast.toybox.learned.denoiser:ToyboxDenoiser", "text3d_fast.toybox.learned.prior:ToyboxPrior",
    ),
}
SUPPORTED = (
    "Supported: Stable-Diffusion-class models (one U-Net conditioned on one CLIP or T5 text encoder, with a VAE or on "
    "pixels, DDPM noise schedule)."
)


def brief(error: BaseException) -> str:
    """An error of another library in one line of at most 200 characters."""
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text if len(text) <= 200 else text[:199] + '…'}"


@dataclass
class ModelFolder:
    """A diffusers-format folder and its configurations (dicts as in the JSON files)."""

    path: Path
    source: str
    settings: ModelSettings
    unet: dict[str, Any]
    scheduler: dict[str, Any]
    text_encoder: dict[str, Any]
    vae: dict[str, Any] | None
    licence: str | None
    weights: Path | None = None  # a single-file checkpoint, for which the folder gives only the configurations

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

    def variant(self, component: str, half: bool = False) -> str | None:
        """"fp16" where only those weights exist, or where they are wanted and exist; otherwise None."""
        names = [path.name for path in (self.path / component).glob("*.safetensors")]
        has_half = any(".fp16." in name for name in names)
        has_full = any(".fp16." not in name and "non_ema" not in name for name in names)
        if not names:
            raise ModelError(
                f"{self.source}: no .safetensors weights in {component}/ (pickled .bin and .ckpt files are not read: "
                f"they can run code; convert them with diffusers)"
            )
        return "fp16" if has_half and (half or not has_full) else None

    def parameters(self, component: str) -> int:
        """Number of parameters of a component, from the file headers (which are checked on the way)."""
        if self.weights is not None:
            from text3d_fast.guidance.models.single_file import count_parameters

            return count_parameters(self.weights, component)
        variant = self.variant(component)
        return sum(
            math.prod(entry["shape"])
            for path in sorted((self.path / component).glob("*.safetensors"))
            if (".fp16." in path.name) == (variant == "fp16") and "non_ema" not in path.name
            for entry in safetensors_header(path).values()
        )

    def describe(self) -> dict[str, Any]:
        """What `doctor --model` prints. memory: bytes of the weights in fp16 and fp32, without activations."""
        components = ["unet", "text_encoder"] + (["vae"] if self.vae is not None else [])
        counts = {name: self.parameters(name) for name in components}
        resident = sum(count for name, count in counts.items() if name != "text_encoder")
        size = self.image_size // self.latent_factor
        return {
            "model": self.settings.name or self.source,
            "kind": "pixel" if self.vae is None else "latent",
            "prediction": self.prediction_type,
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
) -> ModelFolder:
    """Read and check the model behind a path or hub id (downloaded on first use); arguments as `from_pretrained`."""
    path = locate(source, revision, dtype)
    if path.is_dir():
        return read_folder(path, str(source))
    from text3d_fast.guidance.models.single_file import read_single_file

    return read_single_file(path, config)


def locate(source: str | Path, revision: str | None = None, dtype: torch.dtype = torch.float32) -> Path:
    """The local folder or file for a path or hub id."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ModelError(f"{source}: expected a folder or a .safetensors file (pickled checkpoints are not read)")
        return path
    if isinstance(source, Path) or not _HUB_ID.fullmatch(source) or path.suffix in (".safetensors", ".ckpt"):
        raise ModelError(f"{source}: no such folder or file, and not a hub id of the form owner/name")
    return _download(source, revision, dtype)


def locate_configuration(source: str) -> Path:
    """The local folder with a model's configurations and tokenizer; its weights are not fetched."""
    path = Path(source).expanduser()
    return path if path.is_dir() else _download(source, None, None)


def _download(hub_id: str, revision: str | None, dtype: torch.dtype | None) -> Path:
    """Fetch the parts of a hub repository that are needed; from the cache when there is no network.

    dtype None: everything but the weights.
    """
    import huggingface_hub
    from huggingface_hub import errors

    def snapshot(patterns: list[str], **options: Any) -> Path:
        return Path(huggingface_hub.snapshot_download(hub_id, revision=revision, allow_patterns=patterns, **options))

    small = [f"{part}/*{end}" for part in _COMPONENTS for end in (".json", ".txt", ".model")]
    small += ["model_index.json", FILE_NAME, "README.md"]
    try:
        files = [entry.rfilename for entry in huggingface_hub.HfApi().model_info(hub_id, revision=revision).siblings]
        if "model_index.json" not in files:
            raise ModelError(f"{hub_id}: not a diffusers model (it has no model_index.json). {SUPPORTED}")
        _refuse_other_pipelines(snapshot(small), hub_id)  # before gigabytes arrive
        return snapshot(small + _weights(files, dtype))
    except ModelError:
        raise
    except errors.GatedRepoError as error:
        raise ModelError(f"{hub_id}: accept its licence on the hub and log in (`hf auth login`) first") from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"{hub_id}: no revision {revision!r} on the hub") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(f"{hub_id}: no such model on the hub (or it is private), and no such folder here") from error
    except Exception as error:  # offline: whichever network library is underneath has its own exceptions
        try:
            patterns = small + ([] if dtype is None else [f"{part}/*.safetensors" for part in _COMPONENTS])
            return snapshot(patterns, local_files_only=True)
        except Exception:
            raise ModelError(
                f"{hub_id}: the hub cannot be reached and the model is not in the cache "
                f"({brief(error)}). "
                f"Give the path of a local folder, or leave --model out for the model that comes with the package."
            ) from error


def _weights(files: list[str], dtype: torch.dtype | None) -> list[str]:
    """The weight files to fetch: safetensors, fp16 ones where they exist and half precision is wanted."""
    wanted: list[str] = []
    if dtype is None:
        return wanted
    for part in ("unet", "text_encoder", "vae"):
        names = [f for f in files if f.startswith(part + "/") and f.endswith(".safetensors") and "non_ema" not in f]
        half = [name for name in names if ".fp16." in name]
        full = [name for name in names if ".fp16." not in name]
        wanted += half if half and (dtype != torch.float32 or not full) else full
    return wanted


def read_folder(path: Path, source: str | None = None) -> ModelFolder:
    """Read a diffusers-format folder; ModelError if it is not complete or not supported."""
    source = source or str(path)
    _refuse_other_pipelines(path, source)
    unet = _read_json(path / "unet" / "config.json", source)
    scheduler = _read_json(path / "scheduler" / "scheduler_config.json", source)
    text_encoder = _read_json(path / "text_encoder" / "config.json", source)
    if not (path / "tokenizer").is_dir():
        raise ModelError(f"{source}: incomplete, tokenizer/ is missing")
    vae = _read_json(path / "vae" / "config.json", source) if (path / "vae").is_dir() else None
    try:
        settings = ModelSettings.load(path)
    except ValueError as error:
        raise ModelError(str(error)) from error
    folder = ModelFolder(path, source, settings, unet, scheduler, text_encoder, vae, settings.licence or _licence(path))
    _refuse_unsupported(folder)
    return folder


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


def _refuse_other_pipelines(path: Path, source: str) -> None:
    """Kinds that the folder's outline already gives away, named."""
    index = path / "model_index.json"
    pipeline = _read_json(index, source).get("_class_name", "") if index.is_file() else ""
    if (path / "transformer").is_dir():
        raise ModelError(f"{source}: {pipeline or 'a diffusion transformer'} has no U-Net. {SUPPORTED}")
    if (path / "text_encoder_2").is_dir() or "XL" in pipeline:
        raise ModelError(f"{source}: SDXL ({pipeline or 'two text encoders'}) is not supported. {SUPPORTED}")
    if not (path / "unet").is_dir():
        raise ModelError(f"{source}: no unet/ inside, so not a diffusers text-to-image folder. {SUPPORTED}")


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


def safetensors_header(path: Path) -> dict[str, dict[str, Any]]:
    """name -> {"dtype", "shape", "data_offsets"}; ModelError if the file is cut short or something else."""
    try:
        total = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(total - 8, 100_000_000):
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if 8 + length + end != total:
            raise ValueError(f"{total} bytes where the header announces {8 + length + end}")
        return header
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: not a complete safetensors file ({error}); fetch it again") from error
