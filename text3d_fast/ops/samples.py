"""Packed samples along rays, as `march_rays` makes them and `composite` takes them."""

from dataclasses import dataclass

import torch

from text3d_fast.ops.checks import require_same_device, require_tensor


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


def check_samples(
    sigma: torch.Tensor,
    t_starts: torch.Tensor,
    t_ends: torch.Tensor,
    ray_ids: torch.Tensor,
    ray_offsets: torch.Tensor,
    *dtypes: torch.dtype,
) -> None:
    """Raise ValueError or TypeError unless these are samples with densities `sigma` of one of these dtypes."""
    require_tensor("samples.t_starts", t_starts, ("samples",), *dtypes)
    count = t_starts.shape[0]
    require_tensor("sigma", sigma, (count,), *dtypes)
    require_tensor("samples.t_ends", t_ends, (count,), *dtypes)
    require_tensor("samples.ray_ids", ray_ids, (count,), torch.int32)
    require_tensor("samples.ray_offsets", ray_offsets, ("rays + 1",), torch.int32)
    if ray_offsets.shape[0] == 0:
        raise ValueError("samples.ray_offsets: expected shape [rays + 1], at least one entry, got [0]")
    require_same_device(sigma=sigma, **{"samples.t_starts": t_starts, "samples.t_ends": t_ends,
                                        "samples.ray_ids": ray_ids, "samples.ray_offsets": ray_offsets})
