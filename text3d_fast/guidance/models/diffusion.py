"""A pretrained text-to-image diffusion model as a prior, through diffusers.

Any Stable-Diffusion-class model in latents or pixels; what it predicts, its schedule, its latent scale and its sizes
are read from its own files (and `text3d.json`, see settings.py), never assumed from a name.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from text3d_fast.errors import ModelError
from text3d_fast.guidance.models.adapters import LoraFile, WordFile, check_lora, spell_out
from text3d_fast.guidance.models.encoding import LatentEncoder
from text3d_fast.guidance.models.folder import ModelFolder, latent_scale, open_model, vae_factor
from text3d_fast.guidance.models.loading import (
    LOGGER,
    check_fit,
    empty_component,
    load_network,
    load_schedule,
    load_text_encoder,
    load_tiny_autoencoder,
    network_and_prior,
)
from text3d_fast.guidance.models.multiview import share_attention
from text3d_fast.guidance.models.settings import condition_vector
from text3d_fast.guidance.prior import Conditions, Prior
from text3d_fast.guidance.schedule import NoiseSchedule
from text3d_fast.guidance.text import TextEmbeddings

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class DiffusionPrior(Prior):
    """See the module's docstring. Build one with `DiffusionPrior.from_pretrained`.

    load_unet, load_vae   make the networks, when they are first asked for: after `prepare` has embedded the texts and
                          let the text encoder go, so that the two are not in memory at once. load_vae None: on pixels
    """

    def __init__(
        self,
        folder: ModelFolder,
        load_unet: Callable[[], Any],
        load_vae: Callable[[], Any] | None,
        schedule: NoiseSchedule,
        texts: TextEmbeddings,
        device: torch.device,
        dtype: torch.dtype,
        vae_config: dict[str, Any] | None = None,
        slicing: bool = False,
        offload: bool = False,
    ):
        self.folder = folder
        self.settings = folder.settings
        self._load_unet, self._load_vae = load_unet, load_vae
        self.schedule = schedule
        self.texts = texts
        self.device = device
        self.dtype = dtype
        self.prediction_type = folder.prediction_type
        self.image_size = folder.image_size
        self.channels = folder.channels
        self.name = folder.source
        self.kind = "pixel" if load_vae is None else "latent"
        self.conditions = tuple(folder.settings.conditions)
        self.views = folder.settings.views
        self.view_words = folder.settings.view_words
        self.camera_distribution = folder.settings.cameras
        self.wishes = folder.settings.recipe
        self._vae_config = vae_config or folder.vae
        self._latent_scale = (1.0, 0.0) if load_vae is None else latent_scale(self._vae_config)
        self._factor = folder.latent_factor if load_vae is None else vae_factor(self._vae_config)
        self._slicing, self._offload = slicing, offload

    @cached_property
    def unet(self) -> Any:
        return self._load_unet().eval().requires_grad_(False)

    @cached_property
    def vae(self) -> Any | None:
        return None if self._load_vae is None else self._load_vae().eval().requires_grad_(False)

    @cached_property
    def _encoder(self) -> LatentEncoder:
        return LatentEncoder(self.vae, *self._latent_scale, self.dtype, self.device, self._slicing, self._offload)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | str | None = None,
        revision: str | None = None,
        tiny_autoencoder: str | Path | None = None,
        config: str | Path | None = None,
        prediction: str | None = None,
        lora: Sequence[str | Path] = (),
        embeddings: Sequence[str | Path] = (),
        vae_slicing: bool = False,
        offload: bool = False,
        compile: bool = False,
        decoder: bool = False,
        channels_last: bool = True,
    ) -> DiffusionPrior:
        """Find a model and check it; its networks are loaded when they are first needed.

        source            a diffusers folder, a single .safetensors checkpoint, a hub id "owner/name" or its page
        dtype             of the networks, also by name; fp16 on CUDA, fp32 elsewhere by default
        revision          of the hub repository
        tiny_autoencoder  folder or hub id of an AutoencoderTiny to encode with instead of the model's VAE: about a
                          tenth of the cost, slightly different latents
        config            for a single file: a folder (or hub id) of its family with the configurations and the
                          tokenizer; None: those of Stable Diffusion 1.x and 2.x that come with this package
        prediction        "epsilon", "v_prediction" or "sample", whatever the model's files say
        lora              LoRA files that are merged into U-Net and text encoder, each FILE or FILE:STRENGTH
        embeddings        textual-inversion files; a prompt names them by the word in the file, or the file's name
        vae_slicing       encode one picture at a time and recompute it in the backward pass
        offload           text encoder and VAE stay in the computer's memory; the one computes there
        compile           the U-Net by torch.compile
        decoder           keep the VAE's decoder, for `decode`
        channels_last     memory format of the networks: a tenth faster on a CPU too

        Raises ModelError, with what to do, if the model is missing, broken or not of a supported kind.
        """
        device = torch.device(device)
        dtype = dtype_of(dtype, device)
        folder = open_model(source, revision, dtype, config, prediction)
        folder.warn()
        folder.check([name for name in folder.components if name != "vae" or tiny_autoencoder is None])
        if folder.weights is None:
            cls = network_and_prior(folder)[1]  # seconds of imports: a wrong path has been answered by now
            check_fit("unet", folder)
            if folder.vae is not None and tiny_autoencoder is None:
                check_fit("vae", folder)
        loras = [LoraFile.parse(file) for file in lora]
        if loras:
            check_lora(loras, empty_component("unet", folder), empty_component("text_encoder", folder))
        width = folder.text_encoder.get("hidden_size") or folder.text_encoder.get("d_model")
        words = [word for file in embeddings for word in WordFile.read(file, width)]
        tiny = None if tiny_autoencoder is None else load_tiny_autoencoder(tiny_autoencoder, folder, dtype)
        memory = torch.channels_last if channels_last else torch.contiguous_format
        home = torch.device("cpu") if offload else device

        def load_unet() -> Any:
            unet = load_network("unet", folder, dtype)
            for file in loras:
                file.merge(unet, "unet")
            if folder.settings.views > 1:
                share_attention(unet, folder.settings.views)
            unet = unet.to(device, memory_format=memory)
            if compile:
                unet.compile(fullgraph=True)
            return unet

        def load_vae() -> Any:
            vae = load_network("vae", folder, dtype) if tiny is None else tiny
            if not decoder:
                vae.decoder = None
            return vae.to(home, memory_format=memory)

        def load_text() -> tuple[Any, Any]:
            # half precision is slow on a CPU
            tokenizer, encoder = load_text_encoder(folder, home, torch.float32 if home.type == "cpu" else dtype)
            for file in loras:
                file.merge(encoder, "text_encoder")
            for word in words:
                word.add(tokenizer, encoder)
            return tokenizer, encoder

        texts = TextEmbeddings(load_text, device, dtype, lambda text: spell_out(text, words))
        prior = cls(folder, load_unet, None if folder.vae is None else load_vae, load_schedule(folder), texts, device,
                    dtype, None if tiny is None else dict(tiny.config), vae_slicing, offload)
        if folder.undecided:
            prior._tell_prediction()
        return prior

    @torch.no_grad()
    def _tell_prediction(self) -> None:
        """Whether the network predicts eps or v, from its answer to noise alone: that noise, or minus a picture."""
        self.prepare([])
        x = torch.randn(2, self.channels, 64, 64, generator=torch.Generator().manual_seed(0)).to(self.device)
        answer = self.predict(x, torch.ones(2, device=self.device), Conditions(["", ""]))
        alike = float(F.cosine_similarity(answer.flatten(), x.flatten(), 0))
        told = "epsilon" if alike > 0.5 else "v_prediction"
        LOGGER.info("%s predicts %s: its answer to noise is like the noise to %.2f", self.folder.source, told, alike)
        self.folder = self.folder.predicting(told)
        if told == "epsilon":
            self.folder.unet = self.folder.unet | {"sample_size": 64}  # only the 512-pixel models of 2.x do
        self.prediction_type, self.image_size = told, self.folder.image_size

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
        return self._encoder(pixels)

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """x [B, C, h, w] -> images [B, H, W, 3] in 0..1. A latent model needs `decoder=True` when loaded."""
        if self.vae is None:
            pixels = F.pixel_shuffle(x, self._factor)
        else:
            if self.vae.decoder is None:
                raise ModelError(f"{self.folder.source}: loaded without its decoder; pass decoder=True")
            scale, shift = self._latent_scale
            pixels = self.vae.decode((x / scale + shift).to(self.vae.dtype), return_dict=False)[0]
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

    def seconds_a_picture(self) -> float | None:
        """See Prior. Only said of large models on a CPU."""
        if self.device.type != "cpu" or self.folder.parameters("unet") < 100e6:
            return None
        from text3d_fast.guidance.models.memory import estimate, seconds_on_cpu

        tiny = self._vae_config if self._vae_config is not self.folder.vae else None
        return seconds_on_cpu(estimate(self.folder, self.device, tiny_config=tiny).operations) / self.views

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


def dtype_of(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    """Of networks on a device; None: the one that suits it."""
    if dtype is None:
        return torch.float16 if device.type == "cuda" else torch.float32
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise ModelError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    return DTYPES[dtype] if isinstance(dtype, str) else dtype
