"""Multiresolution hash-grid encoding (Mueller et al. 2022)."""

import torch

from text3d_fast import backends
from text3d_fast.ops.checks import require_same_device, require_tensor
from text3d_fast.reference import hash_grid as reference
from text3d_fast.reference.hash_grid_spec import HashGridSpec

__all__ = ["HashGridSpec", "hash_grid", "hash_grid_grad"]

backends.declare("hash_grid")
TABLE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def hash_grid(
    x: torch.Tensor,
    params: torch.Tensor,
    spec: HashGridSpec,
    active_levels: int | None = None,
    compute_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Encode points: interpolate feature vectors stored at the vertices of several grids.

    x: float32 [N, dim], points in [0, 1]; outside, the spec's dialect says what happens.
    params: float32 [spec.num_params], the levels one after the other, features of an entry side by side.
    active_levels: only the first so many levels; the others give 0 and get no gradient. None: all.
    compute_dtype: what the table is rounded to before reading (float32, float16, bfloat16; None: float32); sums are
        float32 whatever it is, and gradients are of the rounded table with respect to its float32 master.
    Returns float32 [N, levels * features], level by level. Gradients to x and params, twice.
    Kept for the backward pass: x and params themselves.
    Raises ValueError or TypeError for wrong shapes, dtypes or devices; on a CPU also for x that is not finite.
    """
    active_levels, compute_dtype = _check(x, params, spec, active_levels, compute_dtype)
    return reference.hash_grid(x, _rounded(params, compute_dtype), spec, active_levels)


def hash_grid_grad(
    x: torch.Tensor,
    params: torch.Tensor,
    spec: HashGridSpec,
    active_levels: int | None = None,
    compute_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`hash_grid` together with its derivative by x, both differentiable (once) by x and params.

    For gradients inside a loss, such as normals of a density, under torch.compile, which refuses create_graph=True.
    Arguments and errors as `hash_grid`. Returns y [N, levels * features] and dy/dx [N, levels * features, dim].
    """
    active_levels, compute_dtype = _check(x, params, spec, active_levels, compute_dtype)
    return reference.hash_grid_grad(x, _rounded(params, compute_dtype), spec, active_levels)


def _check(x, params, spec, active_levels, compute_dtype):
    if not isinstance(spec, HashGridSpec):
        raise TypeError(f"spec: expected a HashGridSpec, got {type(spec).__name__}")
    require_tensor("x", x, ("points", spec.dim))
    require_tensor("params", params, (spec.num_params,))
    require_same_device(x=x, params=params)
    active_levels = spec.levels if active_levels is None else active_levels
    if not 0 <= active_levels <= spec.levels:
        raise ValueError(f"active_levels: expected 0 to {spec.levels}, got {active_levels}")
    compute_dtype = torch.float32 if compute_dtype is None else compute_dtype
    if compute_dtype not in TABLE_DTYPES:
        raise TypeError(f"compute_dtype: expected one of {', '.join(map(str, TABLE_DTYPES))}, got {compute_dtype}")
    return active_levels, compute_dtype


def _rounded(params: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """params with the values of `dtype`; the gradient passes straight through."""
    if dtype == torch.float32:
        return params
    return params + (params.detach().to(dtype).to(params.dtype) - params.detach())
