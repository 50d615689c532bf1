"""The mean of all clean images that fit the conditions, as an input of a small denoiser.

At the highest noise levels, which give a scene its form, a denoiser can only answer with that mean. A U-Net learns such
a function of text and camera slowly, since it has to draw it out of biases that are the same at every pixel. This
network learns nothing else, for a thirtieth of the cost; the U-Net takes its picture as further input channels, as
Grad-TTS (Popov et al. 2021) gives the decoder the mean spectrogram of its text.
"""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn


class MeanImage(ModelMixin, ConfigMixin):
    """Text states [B, L, text_width] and a condition vector [B, condition_size] -> two parts of the mean image.

    The background is composited, not learned: `forward` returns `own` [B, 3 u^2, size, size] and `clear`
    [B, u^2, size, size], u the pixel unshuffle, such that the image in -1..1 on the background b is own + clear * b.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self, text_width: int = 96, condition_size: int = 12, size: int = 16, pixel_unshuffle: int = 4,
        width: int = 128, layers: int = 2, hidden: int = 512, channels: int = 128,
    ) -> None:
        super().__init__()
        self.text = nn.Linear(text_width, width)
        self.condition = nn.Sequential(nn.Linear(condition_size, 256), nn.SiLU(), nn.Linear(256, width))
        self.mix = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.features = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(),
            nn.Linear(hidden, channels * (size // 4) ** 2), nn.Unflatten(1, (channels, size // 4, size // 4)),
        )
        half = channels // 2
        self.draw = nn.Sequential(
            nn.GroupNorm(8, channels), nn.SiLU(), nn.Upsample(scale_factor=2), nn.Conv2d(channels, channels, 3, 1, 1),
            nn.GroupNorm(8, channels), nn.SiLU(), nn.Upsample(scale_factor=2), nn.Conv2d(channels, half, 3, 1, 1),
            nn.GroupNorm(8, half), nn.SiLU(), nn.Conv2d(half, half, 3, 1, 1),
            nn.GroupNorm(8, half), nn.SiLU(), nn.Conv2d(half, 4 * pixel_unshuffle**2, 1),
        )

    def forward(self, text: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
        tokens = torch.cat([self.condition(vector)[:, None], self.text(text)], 1)
        for layer in self.mix:
            tokens = layer(tokens)
        drawn = self.draw(self.features(tokens[:, 0]))
        return drawn.split([3 * self.config.pixel_unshuffle**2, self.config.pixel_unshuffle**2], 1)

    def over(self, text: Tensor, vector: Tensor, background: Tensor | None) -> Tensor:
        """The mean image [B, 3 u^2, size, size] in -1..1 over backgrounds [B, 3] in 0..1 (NaN or None: mid-grey)."""
        own, clear = self(text, vector)
        if background is None:
            return own
        color = (2 * background.to(own) - 1).nan_to_num(0.0)
        # unshuffled channels go through the pixels of a cell within each colour
        return own + (color[:, :, None, None, None] * clear[:, None]).flatten(1, 2)
