"""The learned Toybox model as a prior: any folder whose network is a `ToyboxDenoiser`."""

from __future__ import annotations

from typing import Any

import torch

from text3d_fast.guidance.models.diffusion import DiffusionPrior
from text3d_fast.toybox.captions import canonical_prompt


class ToyboxPrior(DiffusionPrior):
    """Understands Toybox's small language only."""

    normal_words = "normal map"
    flaw_words = "textureless"

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        for part in (self.unet.mean_image, self.unet.refiner):  # channels last pays for the U-Net's convolutions alone
            part.to(memory_format=torch.contiguous_format)

    def canonical(self, prompt: str) -> str:
        return canonical_prompt(prompt)
