"""The multiresolution hash grid in plain torch: the oracle for `ops.hash_grid`."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from text3d_fast.ops.specs import HashGridSpec

_UINT32 = 0xFFFFFFFF


def hash_grid(x: torch.Tensor, params: torch.Tensor, spec: HashGridSpec, active_levels: int) -> torch.Tensor:
    """Shapes and meaning as `ops.hash_grid`; any floating dtype, differentiable any number of times."""
    entries = params.reshape(-1, spec.features)
    outputs = []
    for level in range(spec.levels):
        if level >= active_levels:
            outputs.append(x.new_zeros(x.shape[0], spec.features))
            continue
        table = entries[spec.level_offsets[level] : spec.level_offsets[level + 1]]
        position = x * spec.level_scales[level] + spec.offset
        # saturated to int32, then taken as uint32: what the kernels do with points far outside
        position = position.clamp(-(2.0**31), 2.0**31 - 128)
        cell = position.detach().floor()
        weight = position - cell
        cell = cell.nan_to_num(0.0).long() & _UINT32
        if spec.interpolation == "nearest":
            nearest = table.index_select(0, _index(cell, (0,) * spec.dim, spec, level))
            outputs.append(nearest * (1 + 0 * weight.square().sum(1, keepdim=True)))  # gradients of zero, of any order
            continue
        if spec.interpolation == "smoothstep":
            weight = weight * weight * (3 - 2 * weight)
        output = 0
        for corner in itertools.product((0, 1), repeat=spec.dim):
            factors = [weight[:, d] if bit else 1 - weight[:, d] for d, bit in enumerate(corner)]
            output = output + math.prod(factors)[:, None] * table.index_select(0, _index(cell, corner, spec, level))
        outputs.append(output)
    output = torch.cat(outputs, 1)
    if spec.dialect == "ngp":
        inside = ((x >= 0) & (x <= 1)).all(1, keepdim=True)
        output = torch.where(inside, output, torch.zeros_like(output))
    return output


def hash_grid_grad(
    x: torch.Tensor, params: torch.Tensor, spec: HashGridSpec, active_levels: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shapes and meaning as `ops.hash_grid_grad`."""
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_()
        y = hash_grid(x, params, spec, active_levels)
        if not y.shape[0] or not y.requires_grad:  # no point, or no level is on
            return y, y[:, :, None] * x[:, None, :]
        # a point's outputs depend on that point alone, so one pass per output column gives the whole Jacobian
        columns = [torch.autograd.grad(column.sum(), x, create_graph=True, materialize_grads=True)[0]
                   for column in y.unbind(1)]
        return y, torch.stack(columns, 1)


def hash_grid_vjp(
    x: torch.Tensor, params: torch.Tensor, cotangent: torch.Tensor, spec: HashGridSpec, active_levels: int
) -> torch.Tensor:
    """Shapes and meaning as `ops.hash_grid_vjp`."""
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_()
        y = hash_grid(x, params, spec, active_levels)
        if not y.requires_grad:  # no level is on
            return torch.zeros_like(x)
        return torch.autograd.grad(y, x, cotangent, create_graph=True, materialize_grads=True)[0]


def _index(cell: torch.Tensor, corner: tuple[int, ...], spec: HashGridSpec, level: int) -> torch.Tensor:
    """Entry of the level's table for one corner of each cell; uint32 arithmetic in int64."""
    count = spec.level_offsets[level + 1] - spec.level_offsets[level]
    index = torch.zeros_like(cell[:, 0])
    for d in range(spec.dim):
        vertex = (cell[:, d] + corner[d]) & _UINT32
        if spec.level_hashed[level]:
            index = index ^ (vertex * spec.level_factors(level)[d])
        else:
            index = index + vertex * spec.level_strides[level][d]
    return (index & _UINT32) % count
