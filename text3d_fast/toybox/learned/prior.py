"""The learned Toybox model as a prior: any folder whose network is a `ToyboxDenoiser`."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch

from text3d_fast.guidance.models.diffusion import DiffusionPrior
from text3d_fast.toybox.captions import canonical_prompt


class ToyboxPrior(DiffusionPrior):
    """Understands Toybox's small language only."""

    normal_words = "normal map"
    flaw_words = "textureless"

    @cached_property
    def unet(self) -> Any:
        network = super().unet
        for part in (network.mean_image, network.refiner):  # channels last pays for the U-Net's convolutions alone
            part.to(memory_format=torch.contiguous_format)
        return network

    def canonical(self, prompt: str) -> str:
        return canonical_prompt(prompt)
