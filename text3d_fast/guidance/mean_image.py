"""The mean of all clean images that fit the conditions, as an input of a small denoiser.

At the highest noise levels, which give a scene its form, a denoiser can only answer with that mean. A U-Net learns such
a function of text and camera slowly, since it has to draw it out of biases that are the same at every pixel. This
network learns nothing else, for a thirtieth of the cost; the U-Net takes its picture as further input channels, as
Grad-TTS (Popov et al. 2021) gives the decoder the mean spectrogram of its text.

A face of a few pixels is a hundredth of that network's loss, and gradient descent does not draw it. `Details` is linear
in harmonics of the camera, so that least squares finds such marks in a minute, whatever their share.
"""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn.functional import pixel_unshuffle

TURN, RISE = 6, 3  # harmonics of azimuth and of twice the elevation
NEAR_TURN, NEAR_RISE = 4, 1  # those that are also multiplied by the distance
HARMONICS = (1 + 2 * TURN) * (1 + 2 * RISE) + (1 + 2 * NEAR_TURN) * (1 + 2 * NEAR_RISE)


def _products(turn: Tensor, rise: Tensor, distance: Tensor) -> Tensor:
    """[B, HARMONICS] of series in azimuth [B, 1 + 2 TURN] and elevation [B, 1 + 2 RISE], the near ones times [B]."""
    both = turn[:, :, None] * rise[:, None]
    near = both[:, : 1 + 2 * NEAR_TURN, : 1 + 2 * NEAR_RISE] * distance[:, None, None]
    return torch.cat([both.flatten(1), near.flatten(1)], 1)


def frequencies() -> tuple[Tensor, Tensor]:
    """[HARMONICS] each: how often the harmonics swing in a turn of the azimuth, and of the elevation."""
    turn, rise = (torch.tensor([[0.0, *(k for k in range(1, n + 1) for _ in range(2))]]) for n in (TURN, RISE))
    one = torch.ones(1)
    return _products(turn, torch.ones_like(rise), one)[0], _products(torch.ones_like(turn), 2 * rise, one)[0]


def harmonics(vector: Tensor) -> Tensor:
    """[B, HARMONICS] of condition vectors [B, >= 8] (`model_settings.condition_vector`); all zero without a camera.

    Products of 1, cos k az, sin k az (k <= TURN) and 1, cos 2 k el, sin 2 k el (k <= RISE), then the lower ones among
    them times the vector's distance.
    """
    given, sin_el, cos_el, sin_az, cos_az = vector[:, :5].unbind(1)

    def series(cos: Tensor, sin: Tensor, count: int) -> Tensor:
        terms, real, imaginary = [given], cos, sin
        for _ in range(count):
            terms += [real, imaginary]
            real, imaginary = real * cos - imaginary * sin, real * sin + imaginary * cos
        return torch.stack(terms, 1)

    turn = series(cos_az, sin_az, TURN)
    rise = series(cos_el.square() - sin_el.square(), 2 * sin_el * cos_el, RISE)
    return _products(turn, rise, vector[:, 7])


class Details(nn.Module):
    """Text states [B, L, text_width] and a condition vector -> an addition [B, 4, side, side] to `own` and `clear`.

    The text chooses one of `groups` kinds of image, or none; each has its own linear map from the harmonics to the
    amplitudes of the `pictures`. `toybox.details.fit_details` solves for all three.
    """

    def __init__(self, text_width: int, groups: int, pictures: int, side: int) -> None:
        super().__init__()
        self.choice = nn.Linear(text_width, groups + 1)  # the last stands for none
        self.amplitude = nn.Parameter(torch.zeros(groups, HARMONICS, pictures))
        self.pictures = nn.Parameter(torch.zeros(pictures, 4, side, side))

    def forward(self, text: Tensor, vector: Tensor) -> Tensor:
        chosen = self.choice(text.mean(1)).softmax(1)[:, :-1]
        amplitude = torch.einsum("bg,bh,ghp->bp", chosen, harmonics(vector), self.amplitude)
        return torch.einsum("bp,pcyx->bcyx", amplitude, self.pictures)


class MeanImage(ModelMixin, ConfigMixin):
    """Text states [B, L, text_width] and a condition vector [B, condition_size] -> two parts of the mean image.

    The background is composited, not learned: `forward` returns `own` [B, 3 u^2, size, size] and `clear`
    [B, u^2, size, size], u the pixel unshuffle, such that the image in -1..1 on the background b is own + clear * b.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self, text_width: int = 96, condition_size: int = 12, size: int = 16, pixel_unshuffle: int = 4,
        width: int = 128, layers: int = 2, hidden: int = 512, channels: int = 128, groups: int = 0, pictures: int = 0,
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
        self.details = Details(text_width, groups, pictures, size * pixel_unshuffle) if pictures else None

    def forward(self, text: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
        tokens = torch.cat([self.condition(vector)[:, None], self.text(text)], 1)
        for layer in self.mix:
            tokens = layer(tokens)
        drawn = self.draw(self.features(tokens[:, 0]))
        if self.details is not None:
            drawn = drawn + pixel_unshuffle(self.details(text, vector), self.config.pixel_unshuffle)
        return drawn.split([3 * self.config.pixel_unshuffle**2, self.config.pixel_unshuffle**2], 1)

    def over(self, text: Tensor, vector: Tensor, background: Tensor | None) -> Tensor:
        """The mean image [B, 3 u^2, size, size] in -1..1 over backgrounds [B, 3] in 0..1 (NaN or None: mid-grey)."""
        own, clear = self(text, vector)
        if background is None:
            return own
        color = (2 * background.to(own) - 1).nan_to_num(0.0)
        # unshuffled channels go through the pixels of a cell within each colour
        return own + (color[:, :, None, None, None] * clear[:, None]).flatten(1, 2)
