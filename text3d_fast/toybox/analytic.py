"""The exact denoiser of Toybox renders: no training, the ceiling of what guidance can give, the fixture of the tests.

For the empirical distribution of images x_i, the best estimate of the clean image is a softmax over them,

    E[x | x_t] = sum_i p_i x_i,     p_i proportional to exp(-|x_t - alpha x_i|^2 / (2 sigma^2)),

and eps = (x_t - alpha E[x | x_t]) / sigma. Which x_i count is the condition: the caption's renders; from the cameras
nearest to a given camera, or all that the view word fits; over the given background colour.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from text3d_fast.guidance.prior import Conditions
from text3d_fast.guidance.schedule import NoiseSchedule
from text3d_fast.toybox.bank import Bank, angles_between, caption_bank, empty_bank, even_cameras
from text3d_fast.toybox.captions import caption, parse, view_word
from text3d_fast.toybox.scenes import Description


class AnalyticPrior:
    """An image prior over Toybox captions, behind the interface of `guidance.Prior`.

    members          members of the caption's class family in its bank; the middle of the family first
    cameras          cameras of a caption's bank, even over elevations -12..82 degrees; cameras * members images
    nearest          with a camera given, how many of the bank's cameras count: the nearest ones
    progress         show a bar while a bank is rendered (about 8 ms an image, once; then read from disk)

    Texts are parsed (synonyms are fine); unknown words raise `captions.PromptError`.
    """

    image_size = 64
    view_words = "left_right"
    conditions = ("camera", "background")
    camera_distribution = {
        "elevation": (-10.0, 70.0),
        "azimuth": (0.0, 360.0),
        "distance": (2.5, 3.0),
        "fov_y": (40.0, 40.0),
    }

    def __init__(
        self,
        members: int = 2,
        cameras: int = 500,
        nearest: int = 1,
        schedule: NoiseSchedule | None = None,
        progress: bool = True,
    ) -> None:
        self.schedule = schedule or NoiseSchedule.cosine()
        self.members, self.cameras, self.nearest = members, cameras, nearest
        self.progress = progress
        self._banks: dict[str, _Images] = {}

    def encode(self, images: Tensor) -> Tensor:
        """images [B, H, W, 3] in 0..1 -> x [B, 3, H, W] in -1..1."""
        return images.permute(0, 3, 1, 2) * 2 - 1

    def predict_noise(self, x_t: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """eps [B, 3, H, W] of the exact denoiser. Differentiable in x_t."""
        clean = self.predict_sample(x_t, t, conditions)
        alpha, sigma = (v.to(x_t).reshape(-1, 1, 1, 1) for v in self.schedule.alpha_sigma(t))
        return (x_t - alpha * clean) / sigma.clamp_min(1e-4)

    def predict_sample(self, x_t: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """E[x | x_t], [B, 3, H, W]."""
        size = self.image_size
        if tuple(x_t.shape[1:]) != (3, size, size):
            raise ValueError(f"x_t: expected shape [B, 3, {size}, {size}], got {list(x_t.shape)}")
        alpha, sigma = (v.to(x_t) for v in self.schedule.alpha_sigma(t))
        rows = []
        for k, text in enumerate(conditions.texts):
            camera = _row(conditions.camera, k)
            background = _row(conditions.background, k)
            images = self._images(text, camera, x_t.device)
            rows.append(_denoise(images, x_t[k], alpha[k], sigma[k].clamp_min(1e-3), background))
        return torch.stack(rows)

    def prepare(self, texts: Sequence[str]) -> None:
        """Renders, or reads, the banks of these texts now; the empty text's only when it is first asked for."""
        for text in texts:
            if text.strip():
                self._whole(parse(text))

    def bank(self, text: str) -> Bank:
        """The bank behind a text, rendered or read if need be."""
        if not text.strip():
            return empty_bank(size=self.image_size, progress=self.progress)
        return caption_bank(parse(text), self.cameras, self.members, self.image_size, progress=self.progress)

    def known_cameras(self, text: str) -> Tensor:
        """[N, 3] elevation, azimuth (radians) and distance of the bank's renders: from there the prior is exact."""
        return even_cameras(self.cameras)

    def _images(self, text: str, camera: Tensor | None, device: torch.device) -> _Images:
        description = parse(text) if text.strip() else None
        view = None if description is None else description.view
        whole = self._whole(description)
        if camera is not None:
            return whole.nearest(camera.cpu(), self.nearest).to(device)
        return whole.of_view(view).to(device)

    def _whole(self, description: Description | None) -> _Images:
        plain = "" if description is None else caption(replace(description, view=None))
        if plain not in self._banks:
            self._banks[plain] = _Images.from_bank(self.bank(plain))
        return self._banks[plain]


def _row(values: Tensor | None, k: int) -> Tensor | None:
    return None if values is None or bool(values[k].isnan().any()) else values[k]


class _Images:
    """Images as one matrix [N, 4 * H * W] of premultiplied red, green, blue and alpha planes, in 0..1."""

    def __init__(self, planes: Tensor, cameras: Tensor | None = None, members: int = 1) -> None:
        self.planes, self.cameras, self.members = planes, cameras, members
        self._views: dict[str | None, _Images] = {}
        self._moved: dict[torch.device, _Images] = {}
        self._moments: tuple[Tensor, Tensor, Tensor] | None = None

    @classmethod
    def from_bank(cls, bank: Bank) -> _Images:
        planes = torch.from_numpy(bank.images).permute(0, 1, 4, 2, 3).flatten(2).flatten(0, 1).contiguous()
        return cls(planes, bank.cameras, bank.members)

    def to(self, device: torch.device) -> _Images:
        """fp32 on that device; kept."""
        if device not in self._moved:
            planes = self.planes.to(device)
            planes = planes.float() / 255 if planes.dtype == torch.uint8 else planes
            self._moved[device] = _Images(planes)
        return self._moved[device]

    def of_view(self, view: str | None) -> _Images:
        """The images that a view word fits (all for None)."""
        if view not in self._views:
            words = [view_word(float(e), float(a)) for e, a, _ in self.cameras]
            keep = torch.tensor([view is None or word == view for word in words])
            self._views[view] = _Images(self.planes[keep.repeat_interleave(self.members)])
        return self._views[view]

    def nearest(self, camera: Tensor, count: int) -> _Images:
        """The images of the `count` nearest cameras, scaled as their distance differs from the camera's."""
        chosen = angles_between(camera[None], self.cameras)[0].topk(count, largest=False).indices
        rows = (chosen[:, None] * self.members + torch.arange(self.members)).flatten()
        planes = self.planes[rows]
        size = math.isqrt(planes.shape[1] // 4)
        images = planes.view(-1, 4, size, size).float() / 255
        zoom = (camera[2] / self.cameras[chosen, 2]).repeat_interleave(self.members)
        transform = torch.zeros(len(rows), 2, 3)
        transform[:, 0, 0] = transform[:, 1, 1] = zoom
        grid = torch.nn.functional.affine_grid(transform, list(images.shape), align_corners=False)
        images = torch.nn.functional.grid_sample(images, grid, padding_mode="zeros", align_corners=False)
        return _Images(images.flatten(1))

    @property
    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """With u = 2 rgb - 1 and v = 2 (1 - alpha): sums over pixels of |u|^2 [N], u v [N, 3], v^2 [N]."""
        if self._moments is None:
            planes = self.planes.view(len(self.planes), 4, -1)
            u, v = 2 * planes[:, :3] - 1, 2 * (1 - planes[:, 3])
            self._moments = u.square().sum((1, 2)), torch.einsum("ncp,np->nc", u, v), v.square().sum(1)
        return self._moments


def _denoise(images: _Images, x_t: Tensor, alpha: Tensor, sigma: Tensor, background: Tensor | None) -> Tensor:
    """E[x | x_t] [3, H, W] for one noisy image; everything is linear in the planes, so no image is composited."""
    if background is None:
        # unknown: every image stands over each of a few greys and colours
        grounds = x_t.new_tensor([[0.1] * 3, [0.5] * 3, [0.9] * 3, [0.8, 0.4, 0.3], [0.3, 0.7, 0.4], [0.3, 0.4, 0.8]])
    else:
        grounds = background.to(x_t)[None]
    flat = x_t.flatten(1)
    square, cross, clear = images.moments
    # x_i . x_t = 2 rgb . x_t - 2 sum_c b_c alpha . x_t,c + constants of i
    colors = images.planes[:, : flat.numel()] @ flat.flatten()
    covers = images.planes[:, flat.numel() :] @ flat.T
    dot = 2 * colors[:, None] - 2 * covers @ grounds.T + (2 * grounds @ flat.sum(1) - flat.sum())
    norm = square[:, None] + 2 * cross @ grounds.T + clear[:, None] * grounds.square().sum(1)
    logits = (alpha * dot - 0.5 * alpha**2 * norm) / sigma**2
    weights = torch.softmax(logits.flatten(), 0).view_as(logits)
    mean = (weights.sum(1) @ images.planes).view(4, *x_t.shape[1:])
    cover = (weights.T @ images.planes[:, flat.numel() :]).view(-1, 1, *x_t.shape[1:])
    behind = (weights.sum(0).view(-1, 1, 1, 1) - cover) * grounds[:, :, None, None]
    return 2 * (mean[:3] + behind.sum(0)) - 1
