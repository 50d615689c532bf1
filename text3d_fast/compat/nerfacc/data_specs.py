"""Edges and samples along rays, batched or packed."""

from dataclasses import dataclass

import torch


@dataclass
class RaySamples:
    """Samples along rays.

    vals: [rays, samples], or packed [all samples]
    packed_info: int64 [rays, 2], first sample and number of samples of each ray; for packed vals, as ray_indices
    ray_indices: int64 [all samples]
    is_valid: bool [all samples], false for room that no sample fills
    """

    vals: torch.Tensor
    packed_info: torch.Tensor | None = None
    ray_indices: torch.Tensor | None = None
    is_valid: torch.Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.vals.device


@dataclass
class RayIntervals:
    """Intervals along rays, as their edges.

    vals: [rays, edges], or packed [all edges]
    packed_info, ray_indices: as in RaySamples
    is_left, is_right: bool [all edges], whether an interval begins or ends here; for packed vals
    """

    vals: torch.Tensor
    packed_info: torch.Tensor | None = None
    ray_indices: torch.Tensor | None = None
    is_left: torch.Tensor | None = None
    is_right: torch.Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.vals.device
