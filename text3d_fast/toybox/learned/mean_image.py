"""The mean of all clean images that fit the conditions, as an input of a small denoiser.

At the highest noise levels, which give a scene its form, a denoiser can only answer with that mean. A U-Net learns such
a function of text and camera slowly, since it has to draw it out of biases that are the same at every pixel. This
network learns nothing else, for a thirtieth of the cost; the U-Net takes its picture as further input channels, as
Grad-TTS (Popov et al. 2021) gives the decoder the mean spectrogram of its text.

A face of a few pixels is a hundredth of that network's loss, and gradient descent does not draw it. `Details` is linear
in harmonics of the camera, so that least squares finds such marks in a minute, whatever their share.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn.functional import affine_grid, grid_sample, pixel_unshuffle

TURN, RISE = 8, 3  # harmonics of azimuth and of twice the elevation
HARMONICS = (1 + 2 * TURN) * (1 + 2 * RISE)
NEAR = 0.8  # of the reference distance: where pictures of details are drawn from, so that the object fills them


def frequencies() -> tuple[Tensor, Tensor]:
    """[HARMONICS] each: how often the harmonics swing in a turn of the azimuth, and of the elevation."""
    turn, rise = (torch.tensor([0.0, *(k for k in range(1, n + 1) for _ in range(2))]) for n in (TURN, RISE))
    return turn.repeat_interleave(len(rise)), 2 * rise.repeat(len(turn))


def series(first: Tensor, cos: Tensor, sin: Tensor, count: int) -> Tensor:
    """[B, 1 + 2 count]: first, then cos k a and sin k a for k = 1..count; all [B]."""
    terms, real, imaginary = [first], cos, sin
    for _ in range(count):
        terms += [real, imaginary]
        real, imaginary = real * cos - imaginary * sin, real * sin + imaginary * cos
    return torch.stack(terms, 1)


def harmonics(vector: Tensor) -> Tensor:
    """[B, HARMONICS] of condition vectors [B, >= 8] (`models.settings.condition_vector`); all zero without a camera.

    Products of 1, cos k az, sin k az (k <= TURN) and 1, cos 2 k el, sin 2 k el (k <= RISE).
    """
    given, sin_el, cos_el, sin_az, cos_az = vector[:, :5].unbind(1)
    turn = series(given, cos_az, sin_az, TURN)
    rise = series(given, cos_el.square() - sin_el.square(), 2 * sin_el * cos_el, RISE)
    return (turn[:, :, None] * rise[:, None]).flatten(1)


def zoomed(images: Tensor, factor: Tensor, side: int) -> Tensor:
    """Images [B, C, h, w] -> [B, C, side, side], enlarged by factors [B] about the middle (or shrunk, on zeros)."""
    scale = torch.eye(2, 3).to(images) / factor[:, None, None].to(images)
    grid = affine_grid(scale, [len(images), images.shape[1], side, side], align_corners=False)
    return grid_sample(images, grid, align_corners=False)


def nearness(vector: Tensor) -> Tensor:
    """[B] how much larger than in pictures of details an object looks from the cameras of condition vectors."""
    return NEAR * torch.exp(-vector[:, 7] / 4)


class Details(nn.Module):
    """Text states [B, L, text_width] and a condition vector -> an addition [B, 4, side, side] to `own` and `clear`.

    The text chooses a kind of image, or none, and a colour; for each colour a linear map takes the harmonics to the
    amplitudes of the kind's pictures, which are bytes of 1 / 127. `toybox.details.fit_details` solves for all of it.
    """

    def __init__(self, text_width: int, pictures: Sequence[int], colors: int, picture_side: int, side: int) -> None:
        super().__init__()
        self.counts, self.side = tuple(pictures), side
        self.choice = nn.Linear(text_width, len(pictures) + 1)  # the last stands for none
        self.color = nn.Linear(text_width, colors)
        self.amplitude = nn.Parameter(torch.zeros(colors, HARMONICS, sum(pictures)))
        shape = (sum(pictures), 4, picture_side, picture_side)
        self.pictures = nn.Parameter(torch.zeros(shape, dtype=torch.int8), requires_grad=False)

    def forward(self, text: Tensor, vector: Tensor) -> Tensor:
        states = text.mean(1)
        color, *shares = self.color(states).softmax(1), *self.choice(states).softmax(1).split(1, 1)
        amplitude = torch.einsum("bc,bh,chp->bp", color, harmonics(vector), self.amplitude)
        amplitude = amplitude * torch.cat([s.expand(-1, n) for s, n in zip(shares, self.counts, strict=False)], 1)
        drawn = torch.einsum("bp,pcyx->bcyx", amplitude / 127, self.pictures.to(amplitude.dtype))
        return zoomed(drawn, nearness(vector), self.side)


class MeanImage(ModelMixin, ConfigMixin):
    """Text states [B, L, text_width] and a condition vector [B, condition_size] -> two parts of the mean image.

    The background is composited, not learned: `forward` returns `own` [B, 3 u^2, size, size] and `clear`
    [B, u^2, size, size], u the pixel unshuffle, such that the image in -1..1 on the background b is own + clear * b.
    What `details` adds to both is not in them: `over` puts all together.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self, text_width: int = 96, condition_size: int = 12, size: int = 16, pixel_unshuffle: int = 4,
        width: int = 128, layers: int = 2, hidden: int = 512, rank: int = 192, channels: int = 128,
        pictures: tuple[int, ...] = (), colors: int = 8, picture_side: int = 48,
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
            nn.Linear(hidden, rank, bias=False), nn.Linear(rank, channels * (size // 4) ** 2),
            nn.Unflatten(1, (channels, size // 4, size // 4)),
        )
        half = channels // 2
        self.draw = nn.Sequential(
            nn.GroupNorm(8, channels), nn.SiLU(), nn.Upsample(scale_factor=2), nn.Conv2d(channels, channels, 3, 1, 1),
            nn.GroupNorm(8, channels), nn.SiLU(), nn.Upsample(scale_factor=2), nn.Conv2d(channels, half, 3, 1, 1),
            nn.GroupNorm(8, half), nn.SiLU(), nn.Conv2d(half, half, 3, 1, 1),
            nn.GroupNorm(8, half), nn.SiLU(), nn.Conv2d(half, 4 * pixel_unshuffle**2, 1),
        )
        side = size * pixel_unshuffle
        self.details = Details(text_width, pictures, colors, picture_side, side) if pictures else None

    def forward(self, text: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
        tokens = torch.cat([self.condition(vector)[:, None], self.text(text)], 1)
        for layer in self.mix:
            tokens = layer(tokens)
        return self._parts(self.draw(self.features(tokens[:, 0])))

    def _parts(self, drawn: Tensor) -> tuple[Tensor, Tensor]:
        pixels = self.config.pixel_unshuffle**2
        return drawn.split([3 * pixels, pixels], 1)

    def over(self, text: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
        """The mean image with its details, and the details alone; both [B, 3 u^2, size, size] in -1..1.

        The vector's background is put behind both (dropped: mid-grey). Without details the second is zero.
        """
        background = vector[:, -3:]  # 2 rgb - 1, zero where it is dropped
        drawn = _composite(*self(text, vector), background)
        if self.details is None:
            return drawn, torch.zeros_like(drawn)
        parts = self._parts(pixel_unshuffle(self.details(text, vector), self.config.pixel_unshuffle))
        details = _composite(*parts, background)
        return drawn + details, details


def _composite(own: Tensor, clear: Tensor, color: Tensor) -> Tensor:
    # unshuffled channels go through the pixels of a cell within each colour
    return own + (color[:, :, None, None, None] * clear[:, None]).flatten(1, 2)
