"""What the trainers of the learned prior see: images, captions and conditions, drawn from a seed and a step alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from examples.train_toybox.dataset import RenderedImages
from text3d_fast.guidance.prior import Conditions
from text3d_fast.toybox.captions import training_caption
from text3d_fast.toybox.render import over


@dataclass(frozen=True)
class TrainSettings:
    """Everything that decides the result, kept in the checkpoint."""

    batch: int = 32
    learning_rate: float = 6e-4
    warmup: int = 200
    weight_decay: float = 0.01
    average: float = 0.998  # decay of the averaged weights, reached after a start as fast as the run is short
    drop_text: float = 0.10
    drop_camera: float = 0.15
    drop_background: float = 0.15
    largest_weight: float = 8.0
    noise_exponent: float = 0.25  # noise levels are drawn as u^exponent: below 1, noisier ones more often
    front: float = 0.7  # share of front views where the camera is dropped
    overhead: float = 0.12  # where it is given, share drawn from the views from above alone; the others follow the data
    seed: int = 0

    def rate(self, step: int, progress: float) -> float:
        """The learning rate of step `step` with `progress` in 0..1 of the run behind: warm-up and cosine decay."""
        warm = min(1.0, (step + 1) / self.warmup)
        return self.learning_rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))

    def averaging(self, step: int) -> float:
        """The share of step `step`'s weights in the averaged ones."""
        return 1 - min(self.average, (1 + step) / (10 + step))


def random_backgrounds(count: int, generator: torch.Generator) -> Tensor:
    """Colours [count, 3]: two thirds anywhere in the cube, one third greys."""
    colors = torch.rand(count, 3, generator=generator)
    grey = torch.rand(count, generator=generator) < 1 / 3
    return torch.where(grey[:, None], colors[:, :1], colors)


def training_choice(
    data: RenderedImages, settings: TrainSettings, step: int
) -> tuple[np.ndarray, Conditions, Tensor, torch.Generator]:
    """Rows of the data, conditions (some dropped) and true backgrounds [B, 3] of one step, and its generator."""
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    count = settings.batch
    no_text, no_camera, no_background, luck = torch.rand(4, count, generator=generator)
    rows = torch.randint(len(data), (count,), generator=generator).numpy()
    # given the camera, how often it occurs does not matter; without it, this share is what makes Janus faces likely
    places = torch.rand(count, generator=generator)
    for k in range(count):
        if no_camera[k] < settings.drop_camera:
            some = data.front if luck[k] < settings.front else data.not_front
        else:
            some = data.overhead if luck[k] < settings.overhead else ()
        if len(some):
            rows[k] = some[int(places[k] * len(some))]
    camera = torch.from_numpy(data.camera[rows])
    background = random_backgrounds(count, generator)
    texts = [
        "" if no_text[k] < settings.drop_text
        else training_caption(data.descriptions[row], float(camera[k, 0]), float(camera[k, 1]), generator)
        for k, row in enumerate(rows)
    ]
    camera[no_camera < settings.drop_camera] = torch.nan
    known = torch.where((no_background < settings.drop_background)[:, None], torch.nan, background)
    return rows, Conditions(texts, camera, known), background, generator


def training_batch(
    data: RenderedImages, settings: TrainSettings, step: int
) -> tuple[Tensor, Conditions, torch.Generator]:
    """Images [B, H, W, 3] and conditions of one step, and the generator to draw its noise from."""
    rows, conditions, background, generator = training_choice(data, settings, step)
    images = over(torch.from_numpy(data.images(rows)).float() / 255, background[:, None, None])
    return images, conditions, generator
