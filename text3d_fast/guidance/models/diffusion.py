"""A pretrained text-to-image diffusion model as a prior, through diffusers.

Any Stable-Diffusion-class model in latents or pixels; what it predicts, its schedule, its latent scale and its sizes
are read from its own files (and `text3d.json`, see model_settings.py), never assumed from a name.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from text3d_fast.errors import ModelError
from text3d_fast.guidance.models.folder import (
    MEAN_IMAGE,
    REFINER,
    ModelFolder,
    brief,
    latent_scale,
    open_model,
    vae_factor,
)
from text3d_fast.guidance.models.settings import condition_vector
from text3d_fast.guidance.models.single_file import load_single_file, load_single_file_text
from text3d_fast.guidance.prior import Conditions
from text3d_fast.guidance.schedule import NoiseSchedule
from text3d_fast.guidance.text import TextEmbeddings


class DiffusionPrior:
    """See the module's docstring. Build one with `DiffusionPrior.from_pretrained`."""

    def __init__(
        self,
        folder: ModelFolder,
        unet: Any,
        vae: Any | None,
        schedule: NoiseSchedule,
        texts: TextEmbeddings,
        device: torch.device,
        dtype: torch.dtype,
        mean_image: Any | None = None,
        refiner: Any | None = None,
    ):
        self.folder = folder
        self.settings = folder.settings
        self.unet = unet.eval().requires_grad_(False)
        self.vae = vae if vae is None else vae.eval().requires_grad_(False)
        self.mean_image = mean_image if mean_image is None else mean_image.eval().requires_grad_(False)
        self.refiner = refiner if refiner is None else refiner.eval().requires_grad_(False)
        self.schedule = schedule
        self.texts = texts
        self.device = device
        self.dtype = dtype
        self.prediction_type = folder.prediction_type
        self.image_size = folder.image_size
        self.channels = folder.channels
        self.camera_distribution = folder.settings.cameras
        self._latent_scale = (1.0, 0.0) if vae is None else latent_scale(dict(vae.config))
        self._factor = folder.settings.pixel_unshuffle if vae is None else vae_factor(dict(vae.config))

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        tiny_autoencoder: str | Path | None = None,
        config: str | Path | None = None,
        decoder: bool = False,
        channels_last: bool = True,
    ) -> DiffusionPrior:
        """Load a model.

        source            a diffusers folder, a single .safetensors checkpoint, or a hub id "owner/name"
        dtype             of the networks; fp16 on CUDA, fp32 elsewhere by default
        revision          of the hub repository
        tiny_autoencoder  folder or hub id of an AutoencoderTiny to encode with instead of the model's VAE: about a
                          tenth of the cost, slightly different latents
        config            for a single file: a folder (or hub id) of its family with the configurations and the
                          tokenizer; otherwise diffusers fetches them from the hub
        decoder           keep the VAE's decoder, for `decode`
        channels_last     memory format of the networks: a tenth faster on a CPU too

        Raises ModelError, with what to do, if the model is missing, broken or not of a supported kind.
        """
        device = torch.device(device)
        if dtype is None:
            dtype = torch.float16 if device.type == "cuda" else torch.float32
        folder = open_model(source, revision, dtype, config)
        if folder.weights is not None:
            unet, vae = load_single_file(folder, dtype)
            load_text = load_single_file_text
        else:
            import diffusers  # after open_model: a wrong path is answered without the seconds this takes

            unet = load_component("unet", diffusers.UNet2DConditionModel, folder, dtype)
            vae = None
            if folder.vae is not None and tiny_autoencoder is None:
                vae = load_component("vae", getattr(diffusers, folder.vae["_class_name"]), folder, dtype)
            load_text = load_text_encoder
        if tiny_autoencoder is not None:
            vae = _load_tiny_autoencoder(tiny_autoencoder, folder, dtype)
        if vae is not None:
            vae = vae.to(device)
            if not decoder:
                vae.decoder = None
        unet = unet.to(device)
        if channels_last:
            unet = unet.to(memory_format=torch.channels_last)
            vae = vae if vae is None else vae.to(memory_format=torch.channels_last)
        texts = TextEmbeddings(lambda: load_text(folder, device, dtype), device, dtype)
        mean_image = refiner = None
        if folder.has_mean_image:
            from text3d_fast.toybox.learned.mean_image import MeanImage

            mean_image = load_component(MEAN_IMAGE, MeanImage, folder, dtype).to(device)
        if folder.has_refiner:
            from text3d_fast.toybox.learned.refiner import Refiner

            refiner = load_component(REFINER, Refiner, folder, dtype).to(device)
        return cls(folder, unet, vae, _schedule(folder), texts, device, dtype, mean_image, refiner)

    def prepare(self, texts: list[str]) -> None:
        """Embed these prompts (and the empty one) now, and free the text encoder."""
        self.texts.prepare(["", *texts])
        gc.collect()

    def encode(self, images: Tensor) -> Tensor:
        """images [B, H, W, 3] in 0..1, resized to image_size if need be -> x [B, C, h, w] fp32. Differentiable."""
        if images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"images: expected [B, H, W, 3], got {list(images.shape)}")
        pixels = images.permute(0, 3, 1, 2).float()
        size = (self.image_size, self.image_size)
        if tuple(pixels.shape[2:]) != size:
            shrinks = min(pixels.shape[2:]) > self.image_size
            pixels = F.interpolate(pixels, size, mode="bilinear", antialias=shrinks, align_corners=False)
        pixels = 2 * pixels - 1
        if self.vae is None:
            return F.pixel_unshuffle(pixels, self._factor)
        if self.dtype == torch.float32:
            return self._encode_latent(pixels)
        box: dict[str, Tensor] = {}
        latent = self._encode_latent(_Restore.apply(pixels, box).to(self.dtype))
        return _Enlarge.apply(latent.float(), box)

    def _encode_latent(self, pixels: Tensor) -> Tensor:
        encoded = self.vae.encode(pixels)
        # the mean: a sample differs from it by a few thousandths of the latents' spread
        latent = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
        scale, shift = self._latent_scale
        return (latent - shift) * scale

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """x [B, C, h, w] -> images [B, H, W, 3] in 0..1. A latent model needs `decoder=True` when loaded."""
        if self.vae is None:
            pixels = F.pixel_shuffle(x, self._factor)
        else:
            if self.vae.decoder is None:
                raise ModelError(f"{self.folder.source}: loaded without its decoder; pass decoder=True")
            scale, shift = self._latent_scale
            pixels = self.vae.decode((x / scale + shift).to(self.dtype), return_dict=False)[0]
        return (pixels.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)

    def predict(self, x_t: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """What the networks themselves return (eps, v or x, by `prediction_type`), fp32. x_t [B, C, h, w], t [B]."""
        if x_t.ndim != 4 or x_t.shape[1] != self.channels or len(x_t) != len(conditions):
            raise ValueError(
                f"x_t: expected [{len(conditions)}, {self.channels}, h, w] as in conditions, got {list(x_t.shape)}"
            )
        labels = None
        if self.settings.conditions:
            labels = condition_vector(conditions, self.settings.conditions, self.settings.reference_distance)
            labels = labels.to(self.device, self.dtype)
        text, seen, step = self.texts(conditions.texts), x_t.to(self.dtype), self.schedule.timestep(t)
        if self.mean_image is not None:
            mean, details = self.mean_image.over(text, labels, conditions.background)
            seen = torch.cat([seen, mean], 1)
        prediction = self.unet(
            seen,
            step,
            encoder_hidden_states=text,
            class_labels=labels,
            return_dict=False,
        )[0]
        prediction = prediction[:, : self.channels].float()  # a learned variance, if any, comes after
        if self.refiner is None:
            return prediction
        alpha = self.schedule.alpha(self.schedule.snap(t))
        return self.refiner(x_t, prediction, mean, details, step, alpha, text, labels)

    def predict_noise(self, x_t: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """See Prior. The conversion to eps is made in fp32."""
        return self.schedule.to_noise(self.predict(x_t, t, conditions), x_t.float(), t, self.prediction_type)

    def describe(self) -> dict[str, Any]:
        """What `doctor --model` prints, with what is resident now."""
        parts = {"unet": self.unet, "vae": self.vae, MEAN_IMAGE: self.mean_image, REFINER: self.refiner}
        resident = {
            name: sum(p.numel() * p.element_size() for p in part.parameters())
            for name, part in parts.items()
            if part is not None
        }
        return self.folder.describe() | {
            "vae": None if self.vae is None else type(self.vae).__name__,
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "memory_resident": resident,
        }


class _Enlarge(torch.autograd.Function):
    """Identity whose backward scales the gradient to a largest entry near 1, by a power of two kept in `box`.

    A mean-reduced loss has gradients near 1e-6, which half precision rounds to nothing inside the VAE.
    """

    @staticmethod
    def forward(ctx, x: Tensor, box: dict[str, Tensor]) -> Tensor:
        ctx.box = box
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        largest = gradient.abs().amax().clamp(1e-30, 1e30)
        ctx.box["scale"] = torch.exp2(-torch.log2(largest).round())
        return gradient * ctx.box["scale"], None


class _Restore(torch.autograd.Function):
    """Identity whose backward undoes `_Enlarge`; entries that overflowed on the way become zero."""

    @staticmethod
    def forward(ctx, x: Tensor, box: dict[str, Tensor]) -> Tensor:
        ctx.box = box
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        gradient = gradient.float() / ctx.box["scale"]
        return torch.where(gradient.isfinite(), gradient, 0.0), None


def _schedule(folder: ModelFolder) -> NoiseSchedule:
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


def _load_tiny_autoencoder(source: str | Path, folder: ModelFolder, dtype: torch.dtype) -> Any:
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
