"""A small network on top of a hash grid, without the encoding in memory."""

import torch

from text3d_fast import backends, native
from text3d_fast.ops.checks import float_dtypes, require_same_device, require_tensor
from text3d_fast.ops.hash_grid import _check as check_grid
from text3d_fast.ops.hash_grid import _hash_grid, _hash_grid_backward, _hash_grid_second, hash_grid
from text3d_fast.ops.hash_grid import layout as grid_layout
from text3d_fast.ops.mlp import _mlp_backward, _mlp_second, mlp, partial_sums
from text3d_fast.ops.mlp import layout as mlp_layout
from text3d_fast.ops.registration import define
from text3d_fast.ops.specs import HashGridSpec, MLPSpec
from text3d_fast.ops.typed import typed

backends.declare("hash_mlp", triton=True)


@typed
def hash_mlp(
    x: torch.Tensor,
    params: torch.Tensor,
    weights: torch.Tensor,
    grid_spec: HashGridSpec,
    mlp_spec: MLPSpec,
    active_levels: int | None = None,
) -> torch.Tensor:
    """`mlp(hash_grid(x, params, grid_spec, active_levels), weights, mlp_spec)`, without the encoding in memory.

    x: float32 [N, grid_spec.dim]; params [grid_spec.num_params]; weights [mlp_spec.num_params];
    mlp_spec.inputs is grid_spec.output_dim. Returns float32 [N, mlp_spec.outputs]. Gradients to all three, twice.
    Kept for the backward pass: x, params and weights themselves; the encoding is computed again. On a GPU it stays in
    shared memory or registers, on a CPU chunks of points have it in memory; for second derivatives all points at once.
    Sums into params and weights: as `hash_grid` and `mlp`.
    Raises ValueError or TypeError for wrong shapes, dtypes or devices.
    """
    if mlp_spec.inputs != grid_spec.output_dim:
        raise ValueError(f"mlp_spec.inputs: expected {grid_spec.output_dim} like the grid, got {mlp_spec.inputs}")
    backend = backends.choose("hash_mlp", x.device)
    if backend == "reference":
        return mlp(hash_grid(x, params, grid_spec, active_levels), weights, mlp_spec)
    active_levels = grid_spec.levels if active_levels is None else active_levels
    return _hash_mlp(x, params, weights, grid_spec.key, mlp_spec.key, active_levels, backend)


def _check(x, params, weights, grid_key, mlp_key, active_levels, backend):
    check_grid(x, params, None, grid_key, active_levels, backend)
    require_tensor("weights", weights, (MLPSpec.parse(mlp_key).num_params,), *float_dtypes(backend))
    require_same_device(x=x, weights=weights)


def _check_backward(grad_y, x, params, weights, grid_key, mlp_key, active_levels, need_x, need_params, need_weights,
                    backend):
    _check(x, params, weights, grid_key, mlp_key, active_levels, backend)
    require_tensor("grad_y", grad_y, (x.shape[0], MLPSpec.parse(mlp_key).outputs), x.dtype)
    require_same_device(x=x, grad_y=grad_y)


def _run(backend, kernel, fields, grid_key, mlp_key, active_levels):
    grid, network = HashGridSpec.parse(grid_key), mlp_layout(MLPSpec.parse(mlp_key))
    if backend == "triton":
        from text3d_fast._triton import hash_mlp as twin

        getattr(twin, kernel)(*fields, grid, active_levels, network)
    else:
        points = fields[0].shape[0]
        native.call(f"hash_mlp_{kernel}", *fields, points, *grid_layout(grid, active_levels), *network)


def _forward(x, params, weights, grid_key, mlp_key, active_levels, backend):
    y = _fake_forward(x, params, weights, grid_key, mlp_key, active_levels, backend)
    _run(backend, "forward", (*map(native.aligned, (x, params, weights)), y), grid_key, mlp_key, active_levels)
    return y


def _fake_forward(x, params, weights, grid_key, mlp_key, active_levels, backend):
    return x.new_empty(x.shape[0], MLPSpec.parse(mlp_key).outputs)


def _backward(grad_y, x, params, weights, grid_key, mlp_key, active_levels, need_x, need_params, need_weights, backend):
    outputs = _fake_backward(grad_y, x, params, weights, grid_key, mlp_key, active_levels, need_x, need_params,
                             need_weights, backend)
    needs = need_x, need_params, need_weights
    # The fused kernels of GPUs add to params in any order; hash_grid has sums that do not vary.
    on_gpu = backends.runs_gpu_source(backend, x.device)
    if not (on_gpu and need_params and torch.are_deterministic_algorithms_enabled()):
        tensors = (*map(native.aligned, (grad_y, x, params, weights)),
                   *(output if need else None for output, need in zip(outputs, needs)),
                   *partial_sums(weights, need_weights, backend))
        _run(backend, "backward", tensors, grid_key, mlp_key, active_levels)
        return outputs
    grid, inner = (params, None, grid_key, active_levels), need_x or need_params
    grad_features, grad_weights = _mlp_backward(grad_y, _hash_grid(x, *grid, backend), weights, mlp_key, torch.float32,
                                                inner, need_weights, backend)
    if not inner:
        return *outputs[:2], grad_weights
    return *_hash_grid_backward(grad_features, x, *grid, need_x, need_params, backend), grad_weights


def _fake_backward(grad_y, x, params, weights, grid_key, mlp_key, active_levels, need_x, need_params, need_weights,
                   backend):
    """A gradient that is not needed comes back empty."""
    return tuple(t.new_empty(t.shape if need else 0)
                 for t, need in ((x, need_x), (params, need_params), (weights, need_weights)))


class _Value:
    @staticmethod
    def setup_context(ctx, inputs, y):
        x, params, weights, *ctx.rest = inputs
        ctx.save_for_backward(x, params, weights)

    @staticmethod
    def backward(ctx, grad_y):
        needs = ctx.needs_input_grad[:3]
        *rest, backend = ctx.rest
        grads = _hash_mlp_backward(grad_y, *ctx.saved_tensors, *rest, *needs, backend)
        return *(grad if need else None for grad, need in zip(grads, needs)), *[None] * 4


class _ValueBackward:
    """Second order, put together from that of the two ops."""

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        grad_y, x, params, weights, *ctx.rest = inputs
        ctx.save_for_backward(grad_y, x, params, weights)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *cotangents):
        grid_key, mlp_key, active_levels, *given, backend = ctx.rest
        toward_x, toward_params, toward_weights = (c if g else None for c, g in zip(cotangents, given))
        toward_grid = toward_x is not None or toward_params is not None
        if not toward_grid and toward_weights is None:
            return (None,) * 11
        grad_y, x, params, weights = ctx.saved_tensors
        need_grad_y, need_x, need_params, need_weights = ctx.needs_input_grad[:4]
        grid, network = (x, params, None, grid_key, active_levels), (weights, mlp_key, torch.float32)
        inner = need_x or need_params
        features = _hash_grid(*grid, backend)
        toward_features, grad_x, grad_params = None, None, None
        if toward_grid:
            grad_features, _ = _mlp_backward(grad_y, features, *network, True, False, backend)
            both = need_params and toward_x is not None  # grad_params does not depend on params
            toward_features, *direct = _hash_grid_second(toward_x, toward_params, grad_features, *grid, need_x, both,
                                                         backend)
            grad_x, grad_params = direct[0] if need_x else None, direct[1] if both else None
        grad_grad_y, through, grad_weights = _mlp_second(toward_features, toward_weights, grad_y, features, *network,
                                                         need_grad_y, inner, need_weights, backend)
        if inner:
            more_x, more_params = _hash_grid_backward(through, *grid, need_x, need_params, backend)
            grad_x = more_x if grad_x is None else grad_x + more_x
            grad_params = more_params if grad_params is None else grad_params + more_params
        return (grad_grad_y if need_grad_y else None, grad_x if need_x else None,
                grad_params if need_params else None, grad_weights if need_weights else None, *[None] * 7)


_INPUTS = "Tensor x, Tensor params, Tensor weights, str grid_spec, str mlp_spec, SymInt active_levels"
_hash_mlp = define(f"hash_mlp({_INPUTS}, str backend) -> Tensor", _forward, _fake_forward, _Value, _check)
_hash_mlp_backward = define(
    f"hash_mlp_backward(Tensor grad_y, {_INPUTS}, bool need_x, bool need_params, bool need_weights, str backend) "
    "-> (Tensor, Tensor, Tensor)", _backward, _fake_backward, _ValueBackward, _check_backward)
