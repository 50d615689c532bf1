"""From one ray index per sample to one chunk per ray."""

import torch
from torch import Tensor


@torch.no_grad()
def pack_info(ray_indices: Tensor, n_rays: int | None = None) -> Tensor:
    """The first sample and the number of samples of each ray, [n_rays, 2], in the dtype of ray_indices.

    ray_indices: int [samples], sorted. n_rays: by default one more than the largest index, which a GPU has to wait for.
    """
    if ray_indices.dim() != 1:
        raise ValueError(f"ray_indices: expected shape [samples], got {list(ray_indices.shape)}")
    if n_rays is None:
        n_rays = int(ray_indices[-1]) + 1 if ray_indices.numel() else 0
    edges = torch.arange(n_rays + 1, dtype=ray_indices.dtype, device=ray_indices.device)
    begin = torch.searchsorted(ray_indices, edges).to(ray_indices.dtype)
    return torch.stack([begin[:-1], begin.diff()], -1)
