"""Penalties that keep a volume a solid object. Every one is a mean, so weights hold for any batch and resolution.

For comparison: reproductions that sum over pixels use weights 64 * 64 * batch times smaller for the same effect, and
the ratio to the distillation loss also depends on whether that one is a sum (see `guidance.distillation_loss`: a mean
over images and elements, which is 12288 times smaller than a sum for one 64 x 64 RGB image).
"""

from __future__ import annotations

import torch
from torch import Tensor


def orientation_loss(weights: Tensor, normals: Tensor, directions: Tensor, rays: int) -> Tensor:
    """mean over rays of sum_i stopgrad(w_i) max(0, n_i . d)^2: visible surfaces must face the camera (Ref-NeRF).

    weights [S] of the samples, normals [S, 3] unit, directions [S, 3] from the camera, rays the number to average over.
    DreamFusion's weight grows from 1e-4 to 1e-2.
    """
    facing_away = (normals * directions).sum(-1).clamp_min(0)
    return (weights.detach() * facing_away.square()).sum() / max(rays, 1)


def opacity_loss(opacity: Tensor) -> Tensor:
    """mean over rays of sqrt(opacity^2 + 0.01): empty space stays empty. DreamFusion's weight is 1e-3 to 5e-3."""
    return torch.sqrt(opacity.square() + 0.01).mean()


def entropy_loss(opacity: Tensor) -> Tensor:
    """mean binary entropy (nats) of the opacity: a ray either hits or misses, no fog."""
    p = opacity.clamp(1e-3, 1 - 1e-3)
    return -(p * p.log() + (1 - p) * (1 - p).log()).mean()


def thickness_loss(depth_variance: Tensor, opacity: Tensor) -> Tensor:
    """mean over rays of opacity * depth variance: each ray meets one surface (HiFA's z-variance)."""
    return (opacity.detach() * depth_variance).mean()
