"""Trains the mean image of the learned prior and its text encoder: the first part of `toybox.train`.

It costs a thirtieth of the U-Net, which then never has to learn what a prompt and a camera mean.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pixel_unshuffle

from examples.train_toybox.batches import TrainSettings, training_choice
from examples.train_toybox.dataset import RenderedImages
from examples.train_toybox.model import UNSHUFFLE, ToyboxModel
from examples.train_toybox.muon import optimizers
from text3d_fast.guidance.prior import Conditions


def lacking(
    model: ToyboxModel, data: RenderedImages, rows: np.ndarray, conditions: Conditions
) -> tuple[Tensor, Tensor]:
    """What both parts of the mean image (see `guidance.mean_image`) of these conditions lack of the renders `rows`."""
    rgba = pixel_unshuffle(torch.from_numpy(data.images(rows)).float().permute(0, 3, 1, 2) / 255, UNSHUFFLE)
    color, alpha = rgba.to(model.device).split([3 * UNSHUFFLE**2, UNSHUFFLE**2], 1)
    text = model.embed(model.token_ids(conditions.texts))
    own, clear = model.mean_image(text, model.condition_vector(conditions))
    return (2 * color - alpha.repeat(1, 3, 1, 1)) - own, (1 - alpha) - clear


def mean_image_loss(model: ToyboxModel, data: RenderedImages, settings: TrainSettings, step: int) -> Tensor:
    """Squared error of both parts of the mean image over one batch."""
    rows, conditions, _, _ = training_choice(data, settings, step)
    own, clear = lacking(model, data, rows, conditions)
    return own.square().mean() + clear.square().mean()


def train_mean_image(
    model: ToyboxModel, data: RenderedImages, steps: int, settings: TrainSettings, batch: int = 128,
    learning_rate: float = 2e-3, report: Callable[[dict], None] | None = None,
) -> None:
    """Trains the mean image and the text encoder for `steps` steps of cosine decay; both end with averaged weights."""
    settings = replace(settings, batch=batch)
    named = [*model.mean_image.named_parameters(), *model.text_encoder.named_parameters()]
    parameters = [p for name, p in named if not name.startswith("details.")]  # those are solved for, by fit_details
    tables = {p for m in model.text_encoder.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    both = optimizers(parameters, tables, learning_rate, settings.weight_decay)
    average = [p.detach().clone() for p in parameters]
    started, mean = time.monotonic(), math.nan
    for step in range(steps):
        rate = learning_rate * min(1.0, 10 * (step + 1) / steps) * (1 + math.cos(math.pi * step / steps)) / 2
        for optimizer in both:
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = rate
        loss = mean_image_loss(model, data, settings, step)
        loss.backward()
        for optimizer in both:
            optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - min(0.99, (1 + step) / (10 + step)))
        mean = float(loss.detach()) if step == 0 else 0.98 * mean + 0.02 * float(loss.detach())
        if report and step % 10 == 9:
            seconds = time.monotonic() - started
            report({"part": "mean image", "step": step + 1, "loss": mean, "seconds": seconds,
                    "remaining": seconds * (steps / (step + 1) - 1)})
    with torch.no_grad():
        torch._foreach_copy_(parameters, average)
