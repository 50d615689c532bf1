"""Volume rendering of a field in plain torch, step by step: the oracle for `ops.render_field`.

The steps are arguments: with the ops' own ones the same text renders a field part by part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import normalize, softplus

from text3d_fast.reference.composite import composite
from text3d_fast.reference.hash_grid import hash_grid
from text3d_fast.reference.mlp import mlp

if TYPE_CHECKING:
    from text3d_fast.ops.specs import FieldSpec

SMALLEST_GRADIENT = 1e-6  # below it a normal is shorter than 1


class Steps(NamedTuple):
    """The parts of a rendering, with the references' arguments; hash_grid and mlp twice differentiable."""

    hash_grid: Callable = hash_grid
    mlp: Callable = mlp
    composite: Callable = composite


REFERENCES = Steps()


def render_field(
    origins: torch.Tensor,
    directions: torch.Tensor,
    params: torch.Tensor,
    weights: torch.Tensor,
    t_starts: torch.Tensor,
    t_ends: torch.Tensor,
    ray_ids: torch.Tensor,
    ray_offsets: torch.Tensor,
    lights: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    spec: FieldSpec,
    active_levels: int,
    early_stop: float,
    mode: str,
    normals: bool,
    steps: Steps = REFERENCES,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Shapes and meaning as `ops.render_field`; any floating dtype, differentiable by params and weights."""
    ids, rays = ray_ids.long(), len(origins)
    positions = (origins[ids] + (0.5 * (t_starts + t_ends))[:, None] * directions[ids]).detach()
    x = ((positions + spec.radius) / (2 * spec.radius)).clamp(0, 1)
    with torch.set_grad_enabled(normals or torch.is_grad_enabled()):
        x.requires_grad_(normals)
        out = steps.mlp(steps.hash_grid(x, params, spec.grid, active_levels), weights, spec.mlp)
        raw = out[:, 0]
        if normals:
            gradient = _gradient(raw, x) / (2 * spec.radius)
    blob, slope = _blob(positions, spec)
    raw, albedo = raw + blob, torch.sigmoid(out[:, 1:])
    shown = softplus(raw) if spec.density == "softplus" else torch.exp(raw.clamp(max=15.0))
    values, per_sample = albedo, None
    if normals:
        normal = -normalize(gradient + slope, dim=-1, eps=SMALLEST_GRADIENT)
        if mode != "albedo":
            view = ids // (rays // len(lights[0]))
            position, diffuse, ambient = (light[view] for light in lights)
            cosine = (normal * normalize(position - positions, dim=-1)).sum(-1, keepdim=True)
            light = diffuse * cosine.clamp_min(0) + ambient
            values = light if mode == "textureless" else albedo * light
        values = torch.cat([values, normal], 1)
        per_sample = (normal * directions[ids]).sum(-1).clamp_min(0).square()
    samples = (t_starts, t_ends, ray_ids, ray_offsets)
    values, opacity, depth, variance, weight = steps.composite(spec.sharpness * shown, values, *samples, early_stop)
    orientation = None
    if normals:
        orientation = weight.new_zeros(rays).index_add(0, ids, weight.detach() * per_sample)
    return values, opacity, depth, variance, orientation


def _gradient(raw: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """d raw / dx of each sample, differentiable; 0 where no level of the grid is on."""
    if not raw.requires_grad:
        return torch.zeros_like(x)
    return torch.autograd.grad(raw.sum(), x, create_graph=True, materialize_grads=True)[0]


def _blob(positions: torch.Tensor, spec: FieldSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """The blob [S] and its derivative by position [S, 3]."""
    if spec.blob == "linear":
        value = spec.blob_scale * (1 - positions.norm(dim=-1) / spec.blob_width)
        return value, -spec.blob_scale / spec.blob_width * normalize(positions, dim=-1)
    value = spec.blob_scale * torch.exp(-positions.square().sum(-1) / (2 * spec.blob_width**2))
    return value, -value[:, None] * positions / spec.blob_width**2
