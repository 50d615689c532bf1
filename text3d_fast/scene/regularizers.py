"""Penalties that keep a volume a solid object and a surface smooth.

Every one is a mean, so weights hold for any batch and resolution. For comparison: reproductions that sum over pixels
use weights 64 * 64 * batch times smaller for the same effect, and the ratio to the distillation loss also depends on
whether that one is a sum (see `guidance.distillation_loss`: a mean over images and elements, which is 12288 times
smaller than a sum for one 64 x 64 RGB image).
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


def normal_consistency(normals: Tensor, faces: Tensor) -> Tensor:
    """mean over the sides of faces of 1 - n_a . n_b, the unit normals [V, 3] of the side's two ends; faces int [F, 3].

    Magic3D's smoothness of the surface in the form of threestudio (weight 1e4 beside a loss summed over pixels). Each
    edge of a closed mesh counts twice, so the mean is that over its edges.
    """
    if not len(faces):
        return normals.sum() * 0.0
    a, b, c = (normals.index_select(0, faces[:, k].long()) for k in range(3))
    return 1 - ((a * b).sum() + (b * c).sum() + (c * a).sum()) / (3 * len(faces))


def laplacian_loss(vertices: Tensor, faces: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """mean over vertices of |L v / scale|^2 with the uniform Laplacian L v = (mean of v's neighbours) - v.

    Sorkine 2005, section 2; nvdiffrec and ProlificDreamer's code use it on extracted surfaces. vertices [V, 3], faces
    int [F, 3] of a closed mesh; scale: a length, for example of its edges, so that the weight holds at any resolution.
    """
    if not len(faces):
        return vertices.sum() * 0.0
    corners = faces.long()
    a, b, c = (vertices.index_select(0, corners[:, k]) for k in range(3))
    total = torch.zeros_like(vertices)
    for k, towards in enumerate((b + c - 2 * a, c + a - 2 * b, a + b - 2 * c)):
        total = total.index_add(0, corners[:, k], towards)
    sides = 2 * torch.bincount(corners.flatten(), minlength=len(vertices)).clamp(min=1)
    return (total / sides[:, None] / scale).square().sum(-1).mean()


def sdf_sign_loss(sdf: Tensor, edges: Tensor) -> Tensor:
    """mean over the edges that the surface crosses of BCE(s_i, [s_j > 0]) + BCE(s_j, [s_i > 0]): fewer, flatter walls.

    sdf [V] as logits: divide distances by the grid's spacing; edges int [N, 2] with ends of different sign. Nothing
    inside that no picture shows, and no floaters: nvdiffrec (Munkberg et al. 2022, section 8.2; weight 0.2 to 0.01).
    """
    if not len(edges):
        return sdf.sum() * 0.0
    first, second = sdf[edges.long()].unbind(-1)
    cross_entropy = torch.nn.functional.binary_cross_entropy_with_logits
    return (cross_entropy(first, (second.detach() > 0).to(sdf.dtype))
            + cross_entropy(second, (first.detach() > 0).to(sdf.dtype)))
