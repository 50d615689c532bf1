"""The learned prior's network: what a U-Net is called with, and what it answers, with three networks inside."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ConfigMixin, DDPMScheduler, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from text3d_fast.guidance.schedule import NoiseSchedule
from text3d_fast.toybox.learned.mean_image import MeanImage
from text3d_fast.toybox.learned.refiner import Refiner


class ToyboxDenoiser(ModelMixin, ConfigMixin):
    """Noisy x [B, 48, 16, 16] -> the clean x, as a UNet2DConditionModel with camera and background in `class_labels`.

    The U-Net is shown, beside the noisy image, the mean of all images that fit the conditions (`mean_image`);
    `refiner` goes over its answer. Every argument but the configurations of the three is named as a U-Net names it.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        unet_config: dict[str, Any],
        mean_image_config: dict[str, Any],
        refiner_config: dict[str, Any],
        sample_size: int = 16,
        in_channels: int = 48,
        out_channels: int = 48,
        cross_attention_dim: int = 96,
        class_embed_type: str = "projection",
        projection_class_embeddings_input_dim: int = 12,
        beta_schedule: str = "squaredcos_cap_v2",
        num_train_timesteps: int = 1000,
    ) -> None:
        super().__init__()
        self.unet = UNet2DConditionModel.from_config(unet_config)
        self.mean_image = MeanImage.from_config(mean_image_config)
        self.refiner = Refiner.from_config(refiner_config)
        scheduler = DDPMScheduler(num_train_timesteps, beta_schedule=beta_schedule)
        self.schedule = NoiseSchedule.from_scheduler(scheduler)

    @property
    def time_embedding(self) -> nn.Module:
        return self.unet.time_embedding

    def coarse(
        self, sample: Tensor, timestep: Tensor, text: Tensor, vector: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The U-Net's answer, and the mean image and its details that it was shown; all [B, 48, 16, 16]."""
        mean, details = self.mean_image.over(text, vector)
        seen = torch.cat([sample, mean], 1)
        answer = self.unet(seen, timestep, encoder_hidden_states=text, class_labels=vector, return_dict=False)[0]
        return answer, mean, details

    def refine(
        self, coarse: tuple[Tensor, Tensor, Tensor], sample: Tensor, timestep: Tensor, text: Tensor, vector: Tensor
    ) -> Tensor:
        """The refined answer to what `coarse` gave for the same arguments, fp32."""
        alpha = self.schedule.alpha(self.schedule.from_timestep(timestep))
        answer, mean, details = coarse
        return self.refiner(sample, answer.float(), mean, details, timestep, alpha, text, vector)

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, class_labels: Tensor,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """sample [B, 48, 16, 16], steps [B] of 1000, text [B, L, 96], vector [B, 12] -> (clean [B, 48, 16, 16] fp32,).

        The vector is `guidance.models.settings.condition_vector` of camera and background.
        """
        coarse = self.coarse(sample, timestep, encoder_hidden_states, class_labels)
        return (self.refine(coarse, sample, timestep, encoder_hidden_states, class_labels),)
