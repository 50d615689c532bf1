"""Multiresolution hash-grid encoding (Mueller et al. 2022)."""

import torch

from text3d_fast import backends, native
from text3d_fast.ops.checks import (
    alert_not_deterministic,
    float_dtypes,
    require_same_device,
    require_tensor,
)
from text3d_fast.ops.registration import LastOrder, define
from text3d_fast.ops.specs import INTERPOLATIONS, HashGridSpec
from text3d_fast.ops.typed import typed
from text3d_fast.reference import hash_grid as reference

__all__ = ["HashGridSpec", "hash_grid", "hash_grid_grad", "hash_grid_vjp"]

backends.declare("hash_grid", triton=True)
TABLE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@typed
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
    Kept for the backward pass: x and params themselves, and the rounded table, which each call makes anew.
    On a CPU sums into params are always in the order of the points, so results do not depend on the threads; on CUDA
    they are exact sums in fixed point, slower, under torch.use_deterministic_algorithms(True), where Triton raises.
    Raises ValueError or TypeError for wrong shapes, dtypes or devices; on a CPU also for x that is not finite.
    """
    arguments = _arguments(x, params, spec, active_levels, compute_dtype)
    if arguments[-1] == "reference":
        _check_for(spec, x, params, None, *arguments[4:])
        return reference.hash_grid(x, _rounded(params, compute_dtype), spec, arguments[4])
    return _hash_grid(*arguments)


@typed
def hash_grid_grad(
    x: torch.Tensor,
    params: torch.Tensor,
    spec: HashGridSpec,
    active_levels: int | None = None,
    compute_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`hash_grid` together with its derivative by x, both differentiable (once) by x and params.

    For gradients inside a loss under torch.compile, which refuses create_graph=True. Where only their product with a
    known cotangent is needed, as for normals of a density, `hash_grid_vjp` takes a third of the time.
    Arguments and errors as `hash_grid`. Returns y [N, levels * features] and dy/dx [N, levels * features, dim].
    """
    arguments = _arguments(x, params, spec, active_levels, compute_dtype)
    if arguments[-1] == "reference":
        _check_for(spec, x, params, None, *arguments[4:])
        return reference.hash_grid_grad(x, _rounded(params, compute_dtype), spec, arguments[4])
    return _hash_grid_grad(*arguments)


@typed
def hash_grid_vjp(
    x: torch.Tensor,
    params: torch.Tensor,
    cotangent: torch.Tensor,
    spec: HashGridSpec,
    active_levels: int | None = None,
    compute_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """cotangent times the derivative of `hash_grid` by x, differentiable (once) by x, params and cotangent.

    Where a function of the encoding is differentiated by x, as for normals of a density, this is what is needed of
    `hash_grid_grad`'s derivative, which is never formed. Also under torch.compile.

    cotangent: float32 [N, levels * features]. Other arguments and errors as `hash_grid`. Returns float32 [N, dim].
    """
    *arguments, backend = _arguments(x, params, spec, active_levels, compute_dtype)
    if backend == "reference":
        _check_for(spec, x, params, None, arguments[4], backend)
        _check_cotangent(spec, cotangent, x)
        return reference.hash_grid_vjp(x, _rounded(params, compute_dtype), cotangent, spec, arguments[4])
    return _hash_grid_backward(cotangent, *arguments, True, False, backend)[0]


def _arguments(x, params, spec, active_levels, compute_dtype) -> tuple:
    """What the registered ops take."""
    backend = backends.choose("hash_grid", x.device)
    active_levels = spec.levels if active_levels is None else active_levels
    if compute_dtype not in (None, *TABLE_DTYPES):
        raise TypeError(f"compute_dtype: expected one of {', '.join(map(str, TABLE_DTYPES))}, got {compute_dtype}")
    half = backend != "reference" and compute_dtype in TABLE_DTYPES[1:]
    return x, params, _half_table(params, compute_dtype) if half else None, spec.key, active_levels, backend


def _check(x, params, table, key, active_levels, backend):
    _check_for(HashGridSpec.parse(key), x, params, table, active_levels, backend)


def _check_for(spec, x, params, table, active_levels, backend):
    dtypes = float_dtypes(backend)
    require_tensor("x", x, ("points", spec.dim), *dtypes)
    require_tensor("params", params, (spec.num_params,), *dtypes)
    require_same_device(x=x, params=params, table=table)
    if table is not None:
        require_tensor("table", table, (_even(spec.num_params),), *TABLE_DTYPES[1:])
    if not 0 <= active_levels <= spec.levels:
        raise ValueError(f"active_levels: expected 0 to {spec.levels}, got {active_levels}")


def _check_backward(cotangent, x, params, table, key, active_levels, need_x, need_params, backend):
    _check(x, params, table, key, active_levels, backend)
    _check_cotangent(HashGridSpec.parse(key), cotangent, x)


def _check_cotangent(spec, cotangent, x):
    require_tensor("cotangent", cotangent, (x.shape[0], spec.output_dim), x.dtype)
    require_same_device(x=x, cotangent=cotangent)


def _rounded(params: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """params with the values of `dtype`; the gradient passes straight through."""
    if dtype in (None, torch.float32):
        return params
    return params + (params.detach().to(dtype).to(params.dtype) - params.detach())


def _even(count: int) -> int:
    return count + count % 2


def _half_table(params: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The rounded table that the kernels read, in whole 4-byte words, kept from the forward pass for the backward.

    Rounded anew in each call: params change by roads that leave no trace (`.data`, a replayed graph), and a cast costs
    no more than reading params once.
    """
    table = params.detach().to(dtype)
    return torch.nn.functional.pad(table, (0, 1)) if params.dim() == 1 and params.numel() % 2 else table


def _run(kernel: str, tensors: tuple, fixed: tuple, spec: HashGridSpec, active_levels: int, backend: str) -> None:
    if backend == "triton":
        from text3d_fast._triton import hash_grid as twin

        getattr(twin, kernel)(*tensors, spec, active_levels)
    else:
        native.call(f"hash_grid_{kernel}", *tensors, *fixed, tensors[0].shape[0], TABLE_DTYPES.index(tensors[1].dtype),
                    *layout(spec, active_levels))


def layout(spec: HashGridSpec, active_levels: int) -> tuple:
    """The fields of HashGridLayout."""
    sides = [side if strides[0] else 0 for side, strides in zip(spec.level_resolutions, spec.level_strides)]
    return (spec.level_scales, sides, spec.level_offsets, spec.level_hashed, spec.offset, spec.dim, spec.features,
            spec.levels, active_levels, INTERPOLATIONS.index(spec.interpolation), spec.dialect == "ngp")


def _read(params: torch.Tensor, table: torch.Tensor | None) -> torch.Tensor:
    """What the kernels read."""
    return native.aligned(params if table is None else table)


def _forward(x, params, table, key, active_levels, backend):
    spec = HashGridSpec.parse(key)
    y = _fake_forward(x, params, table, key, active_levels, backend)
    _run("forward", (native.aligned(x), _read(params, table), y, None), (), spec, active_levels, backend)
    return y


def _fake_forward(x, params, table, key, active_levels, backend):
    return x.new_empty(x.shape[0], HashGridSpec.parse(key).output_dim)


def _grad_forward(x, params, table, key, active_levels, backend):
    spec = HashGridSpec.parse(key)
    y, jacobian = _fake_grad_forward(x, params, table, key, active_levels, backend)
    _run("forward", (native.aligned(x), _read(params, table), y, jacobian), (), spec, active_levels, backend)
    return y, jacobian


def _fake_grad_forward(x, params, table, key, active_levels, backend):
    spec = HashGridSpec.parse(key)
    return x.new_empty(x.shape[0], spec.output_dim), x.new_empty(x.shape[0], spec.output_dim, spec.dim)


def _backward(grad_y, x, params, table, key, active_levels, need_x, need_params, backend):
    return _any_backward(grad_y, None, x, params, table, key, active_levels, need_x, need_params, backend)


def _grad_backward(grad_y, grad_jacobian, x, params, table, key, active_levels, need_x, need_params, backend):
    return _any_backward(grad_y, grad_jacobian, x, params, table, key, active_levels, need_x, need_params, backend)


def _sums_in_fixed_point(params: torch.Tensor, grad_y: torch.Tensor, backend: str) -> bool:
    """Under torch.use_deterministic_algorithms CUDA sums in 64-bit integers; Triton cannot, and raises."""
    if backend == "triton":
        alert_not_deterministic("hash_grid's gradient to params on Triton")
        return False
    cuda = params.device.type == "cuda" or native.emulated()
    return cuda and torch.are_deterministic_algorithms_enabled() and grad_y.numel() > 0


def _fixed_point(params: torch.Tensor, bound: float | torch.Tensor, *grads: torch.Tensor) -> tuple:
    """fixed and fixed_scale of the Params, where sums are in fixed point.

    bound: of the weights that grads are multiplied with. N sums of at most max|grad| bound fit in 2^62.
    """
    largest = torch.stack([grad.abs().amax() for grad in grads]).amax().double() * bound * grads[0].shape[0]
    scale = torch.exp2(torch.floor(60 - torch.log2(largest.clamp(min=1e-30)))).clamp(max=2.0**100)
    return torch.zeros(params.shape, dtype=torch.int64, device=params.device), scale.float()


def _steepest(spec: HashGridSpec) -> float:
    """No weight's derivative by a coordinate exceeds this."""
    return max(spec.level_scales) * (1.5 if spec.interpolation == "smoothstep" else 1.0)


def _any_backward(grad_y, grad_jacobian, x, params, table, key, active_levels, need_x, need_params, backend):
    grad_x, grad_params = _fake_backward(grad_y, x, params, table, key, active_levels, need_x, need_params, backend)
    spec, fixed = HashGridSpec.parse(key), (None, None)
    if grad_jacobian is not None:
        grad_jacobian = native.aligned(grad_jacobian)
    if need_params and _sums_in_fixed_point(params, grad_y, backend):
        if grad_jacobian is None:
            fixed = _fixed_point(params, 1.0, grad_y)
        else:
            fixed = _fixed_point(params, 1.0 + spec.dim * _steepest(spec), grad_y, grad_jacobian)
    tensors = (native.aligned(x), _read(params, table), native.aligned(grad_y), grad_jacobian,
               grad_x if need_x else None, grad_params if need_params else None)
    _run("backward", tensors, fixed, spec, active_levels, backend)
    return grad_x, grad_params


def _fake_backward(grad_y, x, params, table, key, active_levels, need_x, need_params, backend):
    """A gradient that is not needed comes back empty."""
    return x.new_empty(x.shape if need_x else 0), params.new_empty(params.shape if need_params else 0)


def _fake_grad_backward(grad_y, grad_jacobian, x, *rest):
    return _fake_backward(grad_y, x, *rest)


def _second(cotangent_x, cotangent_params, grad_y, x, params, table, key, active_levels, need_x, need_params, backend):
    outputs = _fake_second(cotangent_x, cotangent_params, grad_y, x, params, table, key, active_levels, need_x,
                           need_params, backend)
    grad_grad_y, grad_x, grad_params = outputs
    cotangents = [None if c is None else native.aligned(c) for c in (cotangent_x, cotangent_params)]
    spec, fixed = HashGridSpec.parse(key), (None, None)
    if need_params and _sums_in_fixed_point(params, grad_y, backend):
        fixed = _fixed_point(params, cotangent_x.abs().amax().double() * spec.dim * _steepest(spec), grad_y)
    tensors = (native.aligned(x), _read(params, table), native.aligned(grad_y), *cotangents, grad_grad_y,
               grad_x if need_x else None, grad_params if need_params else None)
    _run("second", tensors, fixed, spec, active_levels, backend)
    return outputs


def _fake_second(cotangent_x, cotangent_params, grad_y, x, params, table, key, active_levels, need_x, need_params,
                 backend):
    grad_x, grad_params = _fake_backward(grad_y, x, params, table, key, active_levels, need_x, need_params, backend)
    return x.new_empty(grad_y.shape), grad_x, grad_params


class _Value:
    @staticmethod
    def setup_context(ctx, inputs, y):
        x, params, table, *ctx.rest = inputs
        ctx.save_for_backward(x, params, table)

    @staticmethod
    def backward(ctx, grad_y):
        need_x, need_params = ctx.needs_input_grad[:2]
        *rest, backend = ctx.rest
        grad_x, grad_params = _hash_grid_backward(grad_y, *ctx.saved_tensors, *rest, need_x, need_params, backend)
        return grad_x if need_x else None, grad_params if need_params else None, *[None] * 4


class _ValueBackward:
    @staticmethod
    def setup_context(ctx, inputs, outputs):
        grad_y, x, params, table, *ctx.rest = inputs
        ctx.save_for_backward(grad_y, x, params, table)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, cotangent_x, cotangent_params):
        key, active_levels, *given, backend = ctx.rest
        cotangent_x, cotangent_params = (c if g else None for c, g in zip((cotangent_x, cotangent_params), given))
        if cotangent_x is None and cotangent_params is None:
            return (None,) * 9
        need_x, need_params = ctx.needs_input_grad[1:3]
        need_params = need_params and cotangent_x is not None  # grad_params does not depend on params
        grads = _hash_grid_second(cotangent_x, cotangent_params, *ctx.saved_tensors, key, active_levels, need_x,
                                  need_params, backend)
        return grads[0], grads[1] if need_x else None, grads[2] if need_params else None, *[None] * 6


class _ValueAndGrad:
    setup_context = _Value.setup_context

    @staticmethod
    def backward(ctx, grad_y, grad_jacobian):
        need_x, need_params = ctx.needs_input_grad[:2]
        *rest, backend = ctx.rest
        grad_x, grad_params = _hash_grid_grad_backward(grad_y, grad_jacobian, *ctx.saved_tensors, *rest, need_x,
                                                       need_params, backend)
        return grad_x if need_x else None, grad_params if need_params else None, *[None] * 4


_GRID = "Tensor x, Tensor params, Tensor? table, str spec, SymInt active_levels"
_NEEDS = "bool need_x, bool need_params, str backend"
_hash_grid = define(f"hash_grid({_GRID}, str backend) -> Tensor", _forward, _fake_forward, _Value, _check)
_hash_grid_backward = define(f"hash_grid_backward(Tensor grad_y, {_GRID}, {_NEEDS}) -> (Tensor, Tensor)",
                             _backward, _fake_backward, _ValueBackward, _check_backward)
_hash_grid_second = define(f"hash_grid_second(Tensor? cotangent_x, Tensor? cotangent_params, Tensor grad_y, {_GRID}, "
                           f"{_NEEDS}) -> (Tensor, Tensor, Tensor)",
                           _second, _fake_second, LastOrder("hash_grid_second"))
_hash_grid_grad = define(f"hash_grid_grad({_GRID}, str backend) -> (Tensor, Tensor)", _grad_forward,
                         _fake_grad_forward, _ValueAndGrad, _check)
_hash_grid_grad_backward = define(
    f"hash_grid_grad_backward(Tensor grad_y, Tensor grad_jacobian, {_GRID}, {_NEEDS}) -> (Tensor, Tensor)",
    _grad_backward, _fake_grad_backward, LastOrder("hash_grid_grad_backward"))
