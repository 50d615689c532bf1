"""`text3d.json`: what a diffusers model folder cannot say about itself, and the camera/background vector.

A model folder in the diffusers format works without the file; with it, a model may live on pixel-unshuffled images,
take the camera and the background colour, and name its licence, its cameras and good settings.

    {
      "format": 1,
      "image_size": 64,                 height and width of the images, pixels
      "pixel_unshuffle": 4,             pixel-space models: channels = 3 * 4 * 4 at 64 / 4; 1 if absent
      "conditions": ["camera", "background"],   what `class_labels` holds, in this order; absent: nothing
      "views": 4,                       multi-view models: pictures of one object, in whose self-attention all are seen
      "reference_distance": 2.75,       the camera distance that the vector calls zero
      "cameras": {"elevation": [-10, 60], "azimuth": [0, 360], "distance": [2.5, 3.0], "fov_y": [40, 40]},  degrees
      "view_words": "left_right",       a name in prompts.WORDINGS
      "recipe": {"guidance.weight": 5.0, "steps": 1000},   settings that suit it, dotted as in config.yaml
      "licence": "CC0-1.0",
      "name": "toybox"
    }

Conditioned models have class_embed_type="projection", projection_class_embeddings_input_dim=condition_size(...).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from text3d_fast.guidance.prior import Conditions

FILE_NAME = "text3d.json"
CONDITION_SIZES = {"camera": 8, "background": 4, "pose": 16}


@dataclass
class ModelSettings:
    """The content of `text3d.json`; see the module's docstring."""

    format: int = 1
    image_size: int | None = None
    pixel_unshuffle: int = 1
    conditions: list[str] = field(default_factory=list)
    views: int = 1
    reference_distance: float = 2.75
    cameras: dict[str, list[float]] | None = None
    view_words: str | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    licence: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if self.format != 1:
            raise ValueError(f"format: this version reads {FILE_NAME} of format 1, got {self.format!r}")
        unknown = [name for name in self.conditions if name not in CONDITION_SIZES]
        if unknown:
            raise ValueError(f"conditions: expected names among {', '.join(CONDITION_SIZES)}, got {unknown}")
        if not isinstance(self.views, int) or self.views < 1:
            raise ValueError(f"views: expected a positive integer, got {self.views!r}")
        if not isinstance(self.pixel_unshuffle, int) or self.pixel_unshuffle < 1:
            raise ValueError(f"pixel_unshuffle: expected a positive integer, got {self.pixel_unshuffle!r}")

    @classmethod
    def load(cls, folder: str | Path) -> ModelSettings:
        """Read the file in a model folder; the defaults if there is none."""
        path = Path(folder) / FILE_NAME
        if not path.is_file():
            return cls()
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                raise ValueError("expected a JSON object")
            known = {entry.name for entry in fields(cls)}
            return cls(**{key: value for key, value in content.items() if key in known})
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error

    def save(self, folder: str | Path) -> None:
        """Write the file into a model folder."""
        content = {key: value for key, value in asdict(self).items() if value is not None}
        (Path(folder) / FILE_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def condition_size(names: list[str]) -> int:
    """Length of the vector for these conditions."""
    return sum(CONDITION_SIZES[name] for name in names)


def condition_vector(conditions: Conditions, names: list[str], reference_distance: float = 2.75) -> Tensor:
    """[B, condition_size(names)] fp32: the parts in the order of `names`, a part all zero in rows where it is dropped.

    camera      1, sin el, cos el, sin az, cos az, sin 2 az, cos 2 az, 4 log(distance / reference_distance)
    background  1, 2 r - 1, 2 g - 1, 2 b - 1
    pose        camera to world, row by row, as MVDream has it: Z up, the object facing +X, at distance 1
    """
    parts = []
    for name in names:
        value = getattr(conditions, name)
        if value is None:
            given = (conditions.camera, conditions.background, conditions.pose)
            device = next((v.device for v in given if v is not None), None)
            parts.append(torch.zeros(len(conditions), CONDITION_SIZES[name], device=device))
            continue
        value = value.float()
        one = torch.ones_like(value[..., 0])
        if name == "pose":
            columns = multiview_pose(value).unbind(1)
        elif name == "camera":
            elevation, azimuth, distance = value.unbind(1)
            columns = [one, elevation.sin(), elevation.cos(), azimuth.sin(), azimuth.cos(),
                       (2 * azimuth).sin(), (2 * azimuth).cos(), 4 * torch.log(distance / reference_distance)]
        else:
            columns = [one, *(2 * value - 1).unbind(1)]
        known = value.flatten(1).isfinite().all(1, keepdim=True)
        parts.append(torch.where(known, torch.stack(columns, 1), 0.0))
    return torch.cat(parts, 1) if parts else torch.zeros(len(conditions), 0)


def multiview_pose(pose: Tensor) -> Tensor:
    """[B, 4, 4] camera to world, Y up and the object facing +Z -> [B, 16] in MVDream's world, at distance 1."""
    turned = pose[:, [2, 0, 1, 3]]  # its x, y, z are our z, x, y
    position = turned[:, :3, 3:]
    at_one = torch.cat([turned[:, :3, :3], position / position.norm(dim=1, keepdim=True).clamp(min=1e-6)], 2)
    return torch.cat([at_one, turned[:, 3:]], 1).flatten(1)
