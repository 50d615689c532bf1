"""Pictures of a scene in training: previews and views of the volume."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from text3d_fast.scene.cameras import Cameras
from text3d_fast.scene.lights import headlights

from .checkpoint import replacing
from .training import Training

WHITE = (1.0, 1.0, 1.0)
VIEW_LABELS = ["front", "front left", "left", "back left", "back", "back right", "right", "front right"]
TURNTABLE_FRAMES = 36


@torch.no_grad()
def volume_views(
    training: Training, azimuths: list[float], elevation: float = 15.0, size: int = 128, mode: str = "lambertian",
    ground: tuple[float, float, float] = WHITE, distance: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Pictures [V, size, size, 3] in 0..1 and opacities [V, size, size] of the volume; angles in degrees."""
    config, device = training.config, training.device
    if distance is None:
        distance = sum(config.cameras.distance) / 2
    fov_y = math.radians(sum(config.cameras.fov_y) / 2)
    pictures, opacities = [], []
    for azimuth in azimuths:
        cameras = Cameras.orbit(math.radians(elevation), math.radians(azimuth), distance, fov_y, size, device)
        background = torch.tensor([ground], device=device)
        rendering = training.renderer(training.field, cameras, background, headlights(cameras), mode,
                                      None if mode == "albedo" else config.field.normals)
        pictures.append(rendering.color.clamp(0, 1))
        opacities.append(rendering.opacity)
    return torch.cat(pictures), torch.cat(opacities)


def preview(training: Training) -> Tensor:
    """[H, W, 3] four sides of the volume side by side."""
    pictures, _ = volume_views(training, [0.0, 90.0, 180.0, 270.0], size=96)
    return torch.cat(list(pictures), 1)


def views(training: Training, size: int = 192) -> Tensor:
    """[8, size, size, 3] every 45 degrees from the front, as VIEW_LABELS."""
    return volume_views(training, [45.0 * k for k in range(8)], size=size)[0]


def turntable(training: Training, frames: int, size: int = 192) -> Tensor:
    """[frames, size, size, 3] once around."""
    return volume_views(training, [360.0 * k / frames for k in range(frames)], size=size)[0]


def to_bytes(picture: Tensor) -> np.ndarray:
    """0..1 floats to uint8."""
    return (picture.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


def write_png(path: str | Path, picture: Tensor) -> None:
    """[H, W, 3] in 0..1, written atomically."""
    from PIL import Image

    with replacing(path) as part:
        Image.fromarray(to_bytes(picture)).save(part)
