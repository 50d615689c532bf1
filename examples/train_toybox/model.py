"""The learned prior of Toybox: a small text-to-image diffusion model in the standard diffusers folder format.

    model_index.json  scheduler/  text_encoder/  tokenizer/  unet/  text3d.json

A CLIP text encoder of width 96 over the Toybox words and a `ToyboxDenoiser` on the pixel-unshuffled image
(3 x 64 x 64 -> 48 x 16 x 16, values in -1..1) that predicts the clean image. Camera and background colour are optional
conditions: the vector of `guidance.models.settings.condition_vector`.
Any code that loads Stable-Diffusion-class folders loads this one; `ToyboxModel` is what trainer and sampler share.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from examples.train_toybox.tokens import MAX_TOKENS, build_tokenizer
from text3d_fast.files import write_bytes
from text3d_fast.guidance.models.settings import ModelSettings, condition_size, condition_vector
from text3d_fast.guidance.prior import Conditions
from text3d_fast.toybox.analytic import LIGHTS
from text3d_fast.toybox.captions import words
from text3d_fast.toybox.learned import WEIGHTS
from text3d_fast.toybox.learned.denoiser import ToyboxDenoiser
from text3d_fast.toybox.learned.mean_image import MeanImage
from text3d_fast.toybox.learned.refiner import Refiner
from text3d_fast.toybox.objects import COLORS

IMAGE_SIZE, UNSHUFFLE, TEXT_WIDTH = 64, 4, 96
CHANNELS = (96, 128, 160)
CONDITION_NAMES = ["camera", "background"]
# Classes whose sides differ in a few pixels, and how many pictures of details each may have within 25 MB.
DETAILED = {"snowman": 30, "house": 14, "teapot": 12, "clock": 10}


def model_settings() -> ModelSettings:
    """What `text3d.json` says of this model."""
    return ModelSettings(
        image_size=IMAGE_SIZE,
        pixel_unshuffle=UNSHUFFLE,
        conditions=CONDITION_NAMES,
        cameras={"elevation": [-10, 80], "azimuth": [0, 360], "distance": [2.4, 3.0], "fov_y": [40, 40]},
        view_words="left_right",
        # a small denoiser knows the form that is asked for where the picture is mostly noise; below, it keeps any form
        recipe={name: list(value) if isinstance(value, tuple) else value for name, value in LIGHTS.items()} | {
            "guidance.weight": 1.0, "guidance.weighting": "sample",
            "guidance.time": [0.85, 0.98], "guidance.final_time": [0.5, 0.7],
        },
        licence="CC0-1.0",
        name="toybox",
    )


def build_denoiser(channels: tuple[int, ...] = CHANNELS) -> ToyboxDenoiser:
    """A fresh network. Attention starts below the full 16 x 16 resolution, where it would cost a third of the time."""
    below = len(channels) - 1
    unet = UNet2DConditionModel(
        sample_size=IMAGE_SIZE // UNSHUFFLE,
        in_channels=2 * 3 * UNSHUFFLE**2,  # the noisy image and the mean image
        out_channels=3 * UNSHUFFLE**2,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * below),
        up_block_types=(*["CrossAttnUpBlock2D"] * below, "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # heads: diffusers' historic name
        class_embed_type="projection",
        projection_class_embeddings_input_dim=condition_size(CONDITION_NAMES),
        # the whole text beside camera and noise level, at full resolution too, where there is no attention
        addition_embed_type="text",
        addition_embed_type_num_heads=8,
    )
    size = condition_size(CONDITION_NAMES)
    mean_image = MeanImage(TEXT_WIDTH, size, IMAGE_SIZE // UNSHUFFLE, UNSHUFFLE, pictures=tuple(DETAILED.values()),
                           colors=len(COLORS))
    return denoiser_of(unet, mean_image, Refiner(TEXT_WIDTH, size, UNSHUFFLE))


def denoiser_of(unet: UNet2DConditionModel, mean_image: MeanImage, refiner: Refiner) -> ToyboxDenoiser:
    """One network of the three, with their weights."""
    parts = {"unet": unet, "mean_image": mean_image, "refiner": refiner}
    configs = {f"{name}_config": {key: value for key, value in part.config.items() if not key.startswith("_")}
               for name, part in parts.items()}
    denoiser = ToyboxDenoiser(**configs)
    for name, part in parts.items():
        getattr(denoiser, name).load_state_dict(part.state_dict())
    return denoiser


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A fresh two-layer CLIP text encoder for the tokenizer."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_scheduler() -> DDPMScheduler:
    """The noise schedule: cosine, which spends enough steps on low noise at 64 x 64."""
    return DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample", clip_sample=True)


def to_latent(images: Tensor) -> Tensor:
    """Images [B, H, W, 3] in 0..1 -> x [B, 48, H / 4, W / 4] in -1..1."""
    return pixel_unshuffle(images.permute(0, 3, 1, 2) * 2 - 1, UNSHUFFLE)


def to_images(x: Tensor) -> Tensor:
    """The inverse of `to_latent`, clamped to 0..1."""
    return (pixel_shuffle(x, UNSHUFFLE).permute(0, 2, 3, 1) / 2 + 0.5).clamp(0, 1)


@dataclass
class ToyboxModel:
    """The networks, the tokenizer and the noise schedule, and how they fit together."""

    denoiser: ToyboxDenoiser
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: DDPMScheduler
    settings: ModelSettings = field(default_factory=model_settings)

    @classmethod
    def build(cls, seed: int = 0, channels: tuple[int, ...] = CHANNELS) -> ToyboxModel:
        """A fresh model; its random weights depend on `seed` alone."""
        tokenizer = build_tokenizer(words())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            text_encoder = build_text_encoder(tokenizer)
            return cls(build_denoiser(channels), text_encoder, tokenizer, build_scheduler())

    @classmethod
    def load(cls, folder: str | Path = WEIGHTS, device: torch.device | str = "cpu") -> ToyboxModel:
        """A model folder, as fp32 on `device`, ready to sample.

        Raises FileNotFoundError if the folder is no model, ValueError naming the folder if a file in it is damaged.
        """
        folder = Path(folder)
        if not (folder / "model_index.json").is_file():
            raise FileNotFoundError(f"folder: {folder} holds no model_index.json, so it is no diffusers model folder")
        try:
            model = cls(
                ToyboxDenoiser.from_pretrained(folder, subfolder="unet", torch_dtype=torch.float32),
                CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", dtype=torch.float32),
                CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer"),
                DDPMScheduler.from_pretrained(folder, subfolder="scheduler"),
                ModelSettings.load(folder),
            )
        except Exception as error:  # every library below raises its own kinds
            raise ValueError(f"folder: {folder} is damaged or incomplete: {error}") from error
        return model.to(device).eval()

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float16) -> None:
        """Writes the folder with weights in `dtype`; `model_index.json` last, so that half a folder is no model."""
        import diffusers

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        index = folder / "model_index.json"
        index.unlink(missing_ok=True)
        copy = denoiser_of(self.unet, self.mean_image, self.refiner)
        copy.to(dtype).save_pretrained(folder / "unet")
        text_encoder = CLIPTextModel(self.text_encoder.config)
        text_encoder.load_state_dict(self.text_encoder.state_dict())
        text_encoder.to(dtype).save_pretrained(folder / "text_encoder")
        self.tokenizer.save_pretrained(folder / "tokenizer")
        self.scheduler.save_pretrained(folder / "scheduler")
        self.settings.save(folder)
        content = {
            "_class_name": "DiffusionPipeline",
            "_diffusers_version": diffusers.__version__,
            "scheduler": ["diffusers", "DDPMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["text3d_fast.toybox.learned.denoiser", "ToyboxDenoiser"],
        }
        write_bytes(index, (json.dumps(content, indent=2) + "\n").encode())

    @property
    def unet(self) -> UNet2DConditionModel:
        return self.denoiser.unet

    @property
    def mean_image(self) -> MeanImage:
        return self.denoiser.mean_image

    @property
    def refiner(self) -> Refiner:
        return self.denoiser.refiner

    @property
    def device(self) -> torch.device:
        return self.denoiser.device

    def to(self, device: torch.device | str) -> ToyboxModel:
        """Moves the networks to `device`; returns self."""
        for part in (self.denoiser, self.text_encoder):
            part.to(device)
        return self

    def eval(self) -> ToyboxModel:
        """Sets the networks to evaluation; returns self."""
        for part in (self.denoiser, self.text_encoder):
            part.eval()
        return self

    def token_ids(self, texts: list[str]) -> Tensor:
        """Token numbers [B, MAX_TOKENS] int64, padded, on the CPU. Longer texts are cut."""
        return self.tokenizer(
            texts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
        ).input_ids

    def embed(self, token_ids: Tensor) -> Tensor:
        """Token numbers [B, L] -> text states [B, L, 96]."""
        return self.text_encoder(token_ids.to(self.device))[0]

    def condition_vector(self, conditions: Conditions) -> Tensor:
        """What U-Net and mean image are told of camera and background, [B, 12] on the model's device."""
        vector = condition_vector(conditions, self.settings.conditions, self.settings.reference_distance)
        return vector.to(self.device)

    def coarse(
        self, x_t: Tensor, steps: Tensor, text: Tensor, conditions: Conditions
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The U-Net's answer, and the mean image and its details that it was shown; all [B, 48, 16, 16]."""
        return self.denoiser.coarse(x_t, steps, text, self.condition_vector(conditions))

    def refine(
        self, coarse: tuple[Tensor, Tensor, Tensor], x_t: Tensor, steps: Tensor, text: Tensor, conditions: Conditions
    ) -> Tensor:
        """The refined answer to what `coarse` gave for the same arguments."""
        return self.denoiser.refine(coarse, x_t, steps, text, self.condition_vector(conditions))

    def predict(self, x_t: Tensor, steps: Tensor, text: Tensor, conditions: Conditions) -> Tensor:
        """The clean x predicted from noisy x_t [B, 48, 16, 16] at discrete steps [B]; text [B, L, 96] from `embed`.

        `conditions` gives camera and background (its texts are not read). Differentiable in everything but `steps`.
        """
        coarse = self.coarse(x_t, steps, text, conditions)
        return self.refine(coarse, x_t, steps, text, conditions)
