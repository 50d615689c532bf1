"""Packed samples along rays, as `march_rays` makes them and `composite` takes them."""

from dataclasses import dataclass

import torch


@dataclass
class RaySamples:
    """Intervals [t_start, t_end] along rays, packed and sorted by ray. Anyone may build one.

    ray_ids: int32 [S], the ray of each sample
    t_starts, t_ends: float [S], in units of the ray direction's length
    ray_offsets: int32 [R + 1], ray r owns samples ray_offsets[r] to ray_offsets[r + 1]
    overflow: bool [], None except in capacity mode: true if samples were dropped for want of room

    In capacity mode S is fixed; samples beyond ray_offsets[-1] are padding: ray 0, zero length.
    """

    ray_ids: torch.Tensor
    t_starts: torch.Tensor
    t_ends: torch.Tensor
    ray_offsets: torch.Tensor
    overflow: torch.Tensor | None = None

    @property
    def num_rays(self) -> int:
        return self.ray_offsets.shape[0] - 1

    @property
    def num_samples(self) -> int:
        """S, padding included."""
        return self.t_starts.shape[0]

    @property
    def t_middles(self) -> torch.Tensor:
        return 0.5 * (self.t_starts + self.t_ends)

    def positions(self, origins: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
        """The samples' middles [S, 3] on rays with these origins and directions [R, 3]; differentiable in all."""
        ids = self.ray_ids
        return torch.addcmul(origins.index_select(0, ids), directions.index_select(0, ids), self.t_middles[:, None])
