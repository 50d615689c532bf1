"""The exact denoiser of Toybox renders: no training, the ceiling of what guidance can give, the fixture of the tests.

For the empirical distribution of images x_i, the best estimate of the clean image is a softmax over them,

    E[x | x_t] = sum_i p_i x_i,     p_i proportional to exp(-|x_t - alpha x_i|^2 / (2 sigma^2)),

and eps = (x_t - alpha E[x | x_t]) / sigma. Which x_i count is the condition: the caption's renders; from the cameras
nearest to a given camera, or all that the view word fits; over the given background colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from text3d_fast.guidance.prior import Conditions, Prior
from text3d_fast.guidance.schedule import NoiseSchedule
from text3d_fast.toybox.bank import Bank, angles_between, caption_bank, empty_bank, even_cameras
from text3d_fast.toybox.captions import canonical_prompt, caption, parse, view_word

# The lights that Toybox pictures are rendered with, in the names of a pipeline's settings
LIGHTS = {
    "lights.spread": 0.6, "lights.lift": 0.5, "lights.distance": (1.0, 1.9),
    "lights.diffuse": (0.5, 0.7), "lights.ambient": (0.3, 0.55),
    "lights.angle": None, "lights.soft": False, "shading.lit": 1.0, "shading.textureless": 0.0,
}


def load(device: torch.device) -> AnalyticPrior:
    """For the registry; the prior's tensors follow those it is given."""
    return AnalyticPrior()


# Each of those pictures has a light of its own, which nothing tells. A surface that is lit by their mean light sees the
# mean of its errors; lit at random, it also pays for the difference of two lights, by bending its normals.
MEAN_LIGHT = {
    "lights.spread": 0.0, "lights.distance": (1.44, 1.44), "lights.diffuse": (0.5, 0.5), "lights.ambient": (0.45, 0.45),
}


def load_fine(device: torch.device) -> AnalyticPrior:
    """For the registry: 128 x 128 pixels of renders of 256 x 256, whole or in part: 120 of the middle of the family."""
    prior = AnalyticPrior(members=1, cameras=120, image_size=128, detail=256)
    prior.wishes = prior.wishes | MEAN_LIGHT
    return prior


class AnalyticPrior(Prior):
    """An image prior over Toybox captions, behind the interface of `guidance.Prior`.

    members          members of the caption's class family in its bank; the middle of the family first
    cameras          cameras of a caption's bank, even over elevations -12..82 degrees; cameras * members images
    nearest          with a camera given, how many of the bank's cameras count: the nearest ones
    image_size       pixels of a side that it denoises
    detail           pixels of a side of the bank's renders. Conditions may show a window of what the camera sees: with
                     more detail than image_size, parts are as sharp as the whole
    progress         show a bar while a bank is rendered (about 8 ms an image of 64 x 64, once; then read from disk)

    Texts are parsed (synonyms are fine); unknown words raise `captions.PromptError`.
    """

    name, kind = "analytic", "exact"
    view_words = "left_right"
    normal_words = "normal map"
    flaw_words = "textureless"
    conditions = ("camera", "background", "window")
    camera_distribution = {
        "elevation": (-10.0, 70.0),
        "azimuth": (0.0, 360.0),
        "distance": (2.5, 3.0),
        "fov_y": (40.0, 40.0),
    }
    # the exact denoiser leaves no fog, and is steady enough for a strong orientation penalty
    wishes = LIGHTS | {"penalties.orientation": (0.1, 0.1), "penalties.opacity": (1e-3, 1e-3)}

    def __init__(
        self,
        members: int = 2,
        cameras: int = 500,
        nearest: int = 1,
        schedule: NoiseSchedule | None = None,
        progress: bool = True,
        image_size: int = 64,
        detail: int | None = None,
    ) -> None:
        self.schedule = schedule or NoiseSchedule.cosine()
        self.image_size, self.detail = image_size, detail or image_size
        if self.detail % image_size:
            raise ValueError(f"detail: expected a multiple of image_size = {image_size}, got {detail}")
        self.members, self.cameras, self.nearest = members, cameras, nearest
        self.progress = progress
        self._banks: dict[str, Bank] = {}
        self._views: dict[tuple[str, str | None], _Images] = {}

    def encode(self, images: Tensor) -> Tensor:
        """images [B, H, W, 3] in 0..1 -> x [B, 3, H, W] in -1..1."""
        return images.permute(0, 3, 1, 2) * 2 - 1

    def decode(self, x: Tensor) -> Tensor:
        """See Prior."""
        return (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)

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
            camera, background, window = (
                _row(value, k) for value in (conditions.camera, conditions.background, conditions.window)
            )
            images = self._images(text, camera, window, x_t.device)
            rows.append(_denoise(images, x_t[k], alpha[k], sigma[k].clamp_min(1e-3), background))
        return torch.stack(rows)

    def prepare(self, texts: Sequence[str]) -> None:
        """Renders, or reads, the banks of these texts now; the empty text's only when it is first asked for."""
        for text in texts:
            if text.strip():
                self.bank(text)

    def bank(self, text: str) -> Bank:
        """The bank behind a text (its view word does not count), rendered or read if need be."""
        plain = _plain(text)
        if plain not in self._banks:
            size, progress = self.detail, self.progress
            self._banks[plain] = (
                caption_bank(parse(plain), self.cameras, self.members, size, progress=progress) if plain
                else empty_bank(size=size, progress=progress)
            )
        return self._banks[plain]

    def canonical(self, prompt: str) -> str:
        return canonical_prompt(prompt)

    def known_cameras(self, text: str) -> Tensor:
        """[N, 3] elevation, azimuth (radians) and distance of the bank's renders: from there the prior is exact."""
        return even_cameras(self.cameras)

    def _images(self, text: str, camera: Tensor | None, window: Tensor | None, device: torch.device) -> _Images:
        """The images that count for one row of conditions."""
        bank = self.bank(text)
        view = parse(text).view if text.strip() else None
        if camera is not None:  # scaled as their distance differs from the camera's
            chosen = angles_between(camera[None].cpu(), bank.cameras)[0].topk(self.nearest, largest=False).indices
            zoom = camera[2].cpu() / bank.cameras[chosen, 2]
            return _Images(self._shown(bank, chosen, zoom, window)).to(device)
        if window is not None:
            chosen = _of_view(bank, view)
            return _Images(self._shown(bank, chosen, torch.ones(len(chosen)), window)).to(device)
        key = _plain(text), view
        if key not in self._views:
            self._views[key] = _Images(self._whole(bank, _of_view(bank, view)))
        return self._views[key].to(device)

    def _shown(self, bank: Bank, cameras: Tensor, zoom: Tensor, window: Tensor | None) -> Tensor:
        """fp32 planes [N, 4 * H * W] of a window of some cameras' renders, `zoom` [cameras] times as far away."""
        images = torch.from_numpy(bank.images[cameras.numpy()]).flatten(0, 1).permute(0, 3, 1, 2).float() / 255
        x, y, part = (0.0, 0.0, 1.0) if window is None else window.tolist()
        zoom = zoom.repeat_interleave(bank.members)
        while float(zoom.mean()) * part * images.shape[-1] > 1.5 * self.image_size:
            images = torch.nn.functional.avg_pool2d(images, 2)
        transform = torch.zeros(len(images), 2, 3)
        transform[:, 0, 0] = transform[:, 1, 1] = zoom * part
        transform[:, 0, 2], transform[:, 1, 2] = zoom * x, zoom * -y
        size = [len(images), 4, self.image_size, self.image_size]
        grid = torch.nn.functional.affine_grid(transform, size, align_corners=False)
        return torch.nn.functional.grid_sample(images, grid, padding_mode="zeros", align_corners=False).flatten(1)

    def _whole(self, bank: Bank, cameras: Tensor) -> Tensor:
        """uint8 planes [N, 4 * H * W] of some cameras' renders."""
        factor = self.detail // self.image_size
        parts = []
        for rows in cameras.split(max(1, 256 // factor**2)):
            images = torch.from_numpy(bank.images[rows.numpy()]).flatten(0, 1).permute(0, 3, 1, 2)
            if factor > 1:
                images = torch.nn.functional.avg_pool2d(images.float(), factor).round().to(torch.uint8)
            parts.append(images.flatten(1))
        return torch.cat(parts)


def _plain(text: str) -> str:
    """The caption without its view word; "" of the empty text."""
    return caption(replace(parse(text), view=None)) if text.strip() else ""


def _of_view(bank: Bank, view: str | None) -> Tensor:
    """The cameras that a view word fits (all for None)."""
    words = [view_word(float(e), float(a)) for e, a, _ in bank.cameras]
    return torch.tensor([k for k, word in enumerate(words) if view is None or word == view])


def _row(values: Tensor | None, k: int) -> Tensor | None:
    return None if values is None or bool(values[k].isnan().any()) else values[k]


class _Images:
    """Images as one matrix [N, 4 * H * W] of premultiplied red, green, blue and alpha planes, in 0..1."""

    def __init__(self, planes: Tensor) -> None:
        self.planes = planes
        self._moved: dict[torch.device, _Images] = {}
        self._moments: tuple[Tensor, Tensor, Tensor] | None = None

    def to(self, device: torch.device) -> _Images:
        """fp32 on that device; kept."""
        if device not in self._moved:
            planes = self.planes.to(device)
            planes = planes.float() / 255 if planes.dtype == torch.uint8 else planes
            self._moved[device] = _Images(planes)
        return self._moved[device]

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
