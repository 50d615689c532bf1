"""A pretrained text-to-image diffusion model as a prior, through diffusers.

Any Stable-Diffusion-class model in latents or pixels; what it predicts, its schedule, its latent scale and its sizes
are read from its own files (and `text3d.json`, see model_settings.py), never assumed from a name.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from text3d_fast.errors import ModelError
from text3d_fast.guidance.models.folder import ModelFolder, latent_scale, open_model, vae_factor
from text3d_fast.guidance.models.loading import (
    load_component,
    load_schedule,
    load_text_encoder,
    load_tiny_autoencoder,
    network_and_prior,
)
from text3d_fast.guidance.models.settings import condition_vector
from text3d_fast.guidance.models.single_file import load_single_file, load_single_file_text
from text3d_fast.guidance.prior import Conditions, Prior
from text3d_fast.guidance.schedule import NoiseSchedule
from text3d_fast.guidance.text import TextEmbeddings


class DiffusionPrior(Prior):
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
    ):
        self.folder = folder
        self.settings = folder.settings
        self.unet = unet.eval().requires_grad_(False)
        self.vae = vae if vae is None else vae.eval().requires_grad_(False)
        self.schedule = schedule
        self.texts = texts
        self.device = device
        self.dtype = dtype
        self.prediction_type = folder.prediction_type
        self.image_size = folder.image_size
        self.channels = folder.channels
        self.name = folder.source
        self.kind = "pixel" if vae is None else "latent"
        self.conditions = tuple(folder.settings.conditions)
        self.view_words = folder.settings.view_words
        self.camera_distribution = folder.settings.cameras
        self.wishes = folder.settings.recipe
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

            network, cls = network_and_prior(folder)
            unet = load_component("unet", network, folder, dtype)
            vae = None
            if folder.vae is not None and tiny_autoencoder is None:
                vae = load_component("vae", getattr(diffusers, folder.vae["_class_name"]), folder, dtype)
            load_text = load_text_encoder
        if tiny_autoencoder is not None:
            vae = load_tiny_autoencoder(tiny_autoencoder, folder, dtype)
        if vae is not None:
            vae = vae.to(device)
            if not decoder:
                vae.decoder = None
        unet = unet.to(device)
        if channels_last:
            unet = unet.to(memory_format=torch.channels_last)
            vae = vae if vae is None else vae.to(memory_format=torch.channels_last)
        texts = TextEmbeddings(lambda: load_text(folder, device, dtype), device, dtype)
        return cls(folder, unet, vae, load_schedule(folder), texts, device, dtype)

    def prepare(self, texts: Sequence[str]) -> None:
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
        prediction = self.unet(
            x_t.to(self.dtype),
            self.schedule.timestep(t),
            encoder_hidden_states=self.texts(conditions.texts),
            class_labels=labels,
            return_dict=False,
        )[0]
        return prediction[:, : self.channels].float()  # a learned variance, if any, comes after

    def predict_noise(self, x_t: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """See Prior. The conversion to eps is made in fp32."""
        return self.schedule.to_noise(self.predict(x_t, t, conditions), x_t.float(), t, self.prediction_type)

    def describe(self) -> dict[str, Any]:
        """What `doctor --model` prints, with what is resident now."""
        parts = {"unet": self.unet, "vae": self.vae}
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
