"""Refines the clean image that a small denoiser predicts, at twice the resolution of its U-Net.

A U-Net on 4 x 4 cells of pixels is cheap because its convolutions run on a sixteenth of them, and for the same reason
cannot hold a mark of two pixels: it paints the eyes of a snowman over, even where the noise has left them visible. This
network adds what is missing on 2 x 2 cells. It sees what the U-Net saw, what it answered, and the noisy image's
difference from that answer; the text, the camera and the noise level scale and shift its channels (FiLM, Perez et al.
2018).
"""

from __future__ import annotations

import math

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle, silu

from text3d_fast.toybox.learned.mean_image import series

VARIANCE = 0.005  # of the U-Net's answer about the clean image, in -1..1, where there is little noise
SCALE = 0.03  # of what is added: with Adam's equal steps the last layer would else outrun the others
TURN, LEVELS = 4, 16  # harmonics of the azimuth, frequencies of the noise level


class _Block(nn.Module):
    """x + conv(silu(x (1 + scale) + shift)), scale and shift from the embedding."""

    def __init__(self, channels: int, embedding: int, dilation: int) -> None:
        super().__init__()
        self.film = nn.Linear(embedding, 2 * channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation)
        nn.init.normal_(self.film.weight, std=0.02)
        nn.init.zeros_(self.film.bias)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.film(embedding)[:, :, None, None].chunk(2, 1)
        return x + self.conv(silu(x * (1 + scale) + shift))


class Refiner(ModelMixin, ConfigMixin):
    """The clean image of a U-Net -> a finer one, all images unshuffled [B, 3 u^2, size, size] in -1..1."""

    config_name = "config.json"

    @register_to_config
    def __init__(
        self, text_width: int = 96, condition_size: int = 12, pixel_unshuffle: int = 4, channels: int = 64,
        dilations: tuple[int, ...] = (1, 2, 4, 2, 1, 1), embedding: int = 160,
    ) -> None:
        super().__init__()
        given = 2 * LEVELS + condition_size + 4 * TURN + text_width
        self.embed = nn.Sequential(
            nn.Linear(given, 2 * embedding), nn.SiLU(), nn.Linear(2 * embedding, embedding), nn.SiLU()
        )
        fine = 3 * (pixel_unshuffle // 2) ** 2
        self.first = nn.Conv2d(4 * fine, channels, 3, 1, 1)
        self.blocks = nn.ModuleList(_Block(channels, embedding, dilation) for dilation in dilations)
        self.last = nn.Conv2d(channels, fine, 3, 1, 1)
        nn.init.normal_(self.last.weight, std=0.01)  # a fresh one changes next to nothing
        nn.init.zeros_(self.last.bias)

    def _embedding(self, steps: Tensor, text: Tensor, vector: Tensor) -> Tensor:
        given, sin_el, _, sin_az, cos_az = vector[:, :5].unbind(1)
        turn = series(given, cos_az, sin_az, TURN)[:, 1:]
        waves = torch.exp(torch.linspace(0, math.log(500), LEVELS, device=steps.device))
        level = steps.float()[:, None] / 1000 * waves
        parts = [level.sin(), level.cos(), vector, turn, turn * sin_el[:, None], text.mean(1)]
        return self.embed(torch.cat([part.to(vector) for part in parts], 1))

    def forward(
        self, noisy: Tensor, clean: Tensor, mean: Tensor, details: Tensor, steps: Tensor, alpha: Tensor,
        text: Tensor, vector: Tensor,
    ) -> Tensor:
        """The refined clean image, fp32.

        noisy x_t = alpha x + sigma eps, `clean` the U-Net's prediction of x, `mean` and `details` of
        `MeanImage.over`; the discrete steps [B] of 1000 and alpha [B] there; text [B, L, text_width] and vector
        [B, condition_size] as for the U-Net.
        """
        alpha = alpha.float().view(-1, 1, 1, 1)
        # the best linear estimate of x from both: x_t / alpha errs by sigma^2 / alpha^2, `clean` by VARIANCE
        gain = VARIANCE / (VARIANCE + (1 - alpha.square()) / alpha.square())
        off = (noisy.float() / alpha - clean.float()) * gain.sqrt()
        unshuffle = self.config.pixel_unshuffle
        seen = [pixel_shuffle(part.to(text), unshuffle) for part in (off / VARIANCE**0.5, mean, details, clean)]
        x = self.first(pixel_unshuffle(torch.cat(seen, 1), unshuffle // 2))
        embedding = self._embedding(steps, text, vector)
        for block in self.blocks:
            x = block(x, embedding)
        added = pixel_unshuffle(pixel_shuffle(self.last(silu(x)), unshuffle // 2), unshuffle)
        return clean.float() + gain.sqrt() * off + SCALE * added.float()
