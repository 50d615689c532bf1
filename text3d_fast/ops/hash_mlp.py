"""A small network on top of a hash grid, without the encoding in memory."""

import torch

from text3d_fast import backends
from text3d_fast.ops.checks import float_dtypes, require_same_device, require_tensor
from text3d_fast.ops.hash_grid import _check as check_grid
from text3d_fast.ops.hash_grid import _hash_grid, _hash_grid_backward, hash_grid
from text3d_fast.ops.mlp import _mlp, _mlp_backward, mlp
from text3d_fast.ops.registration import define
from text3d_fast.ops.specs import HashGridSpec, MLPSpec
from text3d_fast.ops.typed import typed

CHUNK = 1 << 16  # points whose encoding is in memory at a time


@typed
def hash_mlp(
    x: torch.Tensor,
    params: torch.Tensor,
    weights: torch.Tensor,
    grid_spec: HashGridSpec,
    mlp_spec: MLPSpec,
    active_levels: int | None = None,
) -> torch.Tensor:
    """`mlp(hash_grid(x, params, grid_spec, active_levels), weights, mlp_spec)`, with the encoding in chunks.

    x: float32 [N, grid_spec.dim]; params [grid_spec.num_params]; weights [mlp_spec.num_params];
    mlp_spec.inputs is grid_spec.output_dim. Returns float32 [N, mlp_spec.outputs]. Gradients to all three, twice.
    Kept for the backward pass: x, params and weights themselves; the encoding is computed again, all at once.
    Raises ValueError or TypeError for wrong shapes, dtypes or devices.
    """
    if mlp_spec.inputs != grid_spec.output_dim:
        raise ValueError(f"mlp_spec.inputs: expected {grid_spec.output_dim} like the grid, got {mlp_spec.inputs}")
    chosen = backends.choose("hash_grid", x.device), backends.choose("mlp", x.device)
    if "reference" in chosen:
        return mlp(hash_grid(x, params, grid_spec, active_levels), weights, mlp_spec)
    active_levels = grid_spec.levels if active_levels is None else active_levels
    return _hash_mlp(x, params, weights, grid_spec.key, mlp_spec.key, active_levels, *chosen)


def _check(x, params, weights, grid_key, mlp_key, active_levels, grid_backend, mlp_backend):
    check_grid(x, params, None, grid_key, active_levels, grid_backend)
    require_tensor("weights", weights, (MLPSpec.parse(mlp_key).num_params,), *float_dtypes(mlp_backend))
    require_same_device(x=x, weights=weights)


def _forward(x, params, weights, grid_key, mlp_key, active_levels, grid_backend, mlp_backend):
    parts = [_mlp(_hash_grid(part, params, None, grid_key, active_levels, grid_backend), weights, mlp_key,
                  torch.float32, mlp_backend) for part in x.split(CHUNK)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _fake_forward(x, params, weights, grid_key, mlp_key, active_levels, grid_backend, mlp_backend):
    return x.new_empty(x.shape[0], MLPSpec.parse(mlp_key).outputs)


class _Derivative:
    @staticmethod
    def setup_context(ctx, inputs, y):
        x, params, weights, *ctx.rest = inputs
        ctx.save_for_backward(x, params, weights)

    @staticmethod
    def backward(ctx, grad_y):
        x, params, weights = ctx.saved_tensors
        need_x, need_params, need_weights = ctx.needs_input_grad[:3]
        grid_key, mlp_key, active_levels, grid_backend, mlp_backend = ctx.rest
        grid = (params, None, grid_key, active_levels)
        features = _hash_grid(x, *grid, grid_backend)
        inner = need_x or need_params
        grad_features, grad_weights = _mlp_backward(grad_y, features, weights, mlp_key, torch.float32, inner,
                                                    need_weights, mlp_backend)
        grad_x = grad_params = None
        if inner:
            grad_x, grad_params = _hash_grid_backward(grad_features, x, *grid, need_x, need_params, grid_backend)
        return (grad_x if need_x else None, grad_params if need_params else None,
                grad_weights if need_weights else None, *[None] * 5)


_hash_mlp = define(
    "hash_mlp(Tensor x, Tensor params, Tensor weights, str grid_spec, str mlp_spec, SymInt active_levels, "
    "str grid_backend, str mlp_backend) -> Tensor", _forward, _fake_forward, _Derivative, _check)
