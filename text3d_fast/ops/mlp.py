"""Small fully connected networks."""

import torch

from text3d_fast import backends, native
from text3d_fast.ops.checks import float_dtypes, require_same_device, require_tensor
from text3d_fast.ops.registration import LastOrder, define
from text3d_fast.ops.specs import ACTIVATIONS, MLPSpec
from text3d_fast.ops.typed import typed
from text3d_fast.reference.mlp import mlp as reference_mlp

__all__ = ["MLPSpec", "mlp"]

backends.declare("mlp", triton=True)
COMPUTE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GPU_BLOCKS = 264  # that sum gradients of the weights each for itself: two for each multiprocessor of an H100


@typed
def mlp(
    x: torch.Tensor, weights: torch.Tensor, spec: MLPSpec, compute_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """A multilayer perceptron in one kernel: a tile of points goes through all layers in cache.

    x: float32 [..., spec.inputs]; weights: float32 [spec.num_params], laid out as MLPSpec says.
    compute_dtype: what factors of products may be rounded to (float32, float16, bfloat16; None: float32). On CUDA
        tensor cores multiply 16-bit numbers; float32 goes through them in three parts, exact to 2^-21. On a CPU
        nothing is rounded. Sums are float32 whatever it is. Gradients below 6e-8 vanish in float16.
    Returns float32 [..., spec.outputs]. Gradients to x and weights, twice.
    Kept for the backward pass: x and weights themselves; activations are computed again.
    Sums into the gradient of the weights are in an order that does not depend on the number of threads.
    Raises ValueError or TypeError for wrong shapes, dtypes or devices.
    """
    if x.dim() == 0 or x.shape[-1] != spec.inputs:
        raise ValueError(f"x: expected shape [..., {spec.inputs}], got {list(x.shape)}")
    compute_dtype = torch.float32 if compute_dtype is None else compute_dtype
    if compute_dtype not in COMPUTE_DTYPES:
        raise TypeError(f"compute_dtype: expected one of {', '.join(map(str, COMPUTE_DTYPES))}, got {compute_dtype}")
    points = x.reshape(-1, spec.inputs)
    backend = backends.choose("mlp", x.device)
    if backend == "reference":
        _check(points, weights, spec.key, compute_dtype, backend)
        y = reference_mlp(points, weights, spec)
    else:
        y = _mlp(points, weights, spec.key, compute_dtype, backend)
    return y.reshape(*x.shape[:-1], spec.outputs)


def _check(x, weights, key, dtype, backend):
    spec, dtypes = MLPSpec.parse(key), float_dtypes(backend)
    require_tensor("x", x, ("points", spec.inputs), *dtypes)
    require_tensor("weights", weights, (spec.num_params,), *dtypes)
    require_same_device(x=x, weights=weights)


def _check_backward(grad_y, x, weights, key, dtype, need_x, need_weights, backend):
    _check(x, weights, key, dtype, backend)
    require_tensor("grad_y", grad_y, (x.shape[0], MLPSpec.parse(key).outputs), x.dtype)
    require_same_device(x=x, grad_y=grad_y)


def layout(spec: MLPSpec) -> tuple:
    """The fields of MLPLayout."""
    return (spec.inputs, spec.outputs, spec.width, spec.hidden_layers, ACTIVATIONS.index(spec.activation),
            ACTIVATIONS.index(spec.output_activation), spec.bias)


def _forward(x, weights, key, dtype, backend):
    y = _fake_forward(x, weights, key, dtype, backend)
    backends.call(backend, "mlp_forward", native.aligned(x), native.aligned(weights), y, x.shape[0],
                  COMPUTE_DTYPES.index(dtype), *layout(MLPSpec.parse(key)))
    return y


def _fake_forward(x, weights, key, dtype, backend):
    return x.new_empty(x.shape[0], MLPSpec.parse(key).outputs)


def _backward(grad_y, x, weights, key, dtype, need_x, need_weights, backend):
    outputs = _fake_backward(grad_y, x, weights, key, dtype, need_x, need_weights, backend)
    backends.call(backend, "mlp_backward", native.aligned(grad_y), native.aligned(x), native.aligned(weights),
                  *_wanted(outputs, (need_x, need_weights)), *partial_sums(weights, need_weights, backend), x.shape[0],
                  COMPUTE_DTYPES.index(dtype), *layout(MLPSpec.parse(key)))
    return outputs


def _fake_backward(grad_y, x, weights, key, dtype, need_x, need_weights, backend):
    """A gradient that is not needed comes back empty."""
    return x.new_empty(x.shape if need_x else 0), weights.new_empty(weights.shape if need_weights else 0)


def _second(cotangent_x, cotangent_weights, grad_y, x, weights, key, dtype, need_grad_y, need_x, need_weights,
            backend):
    outputs = _fake_second(cotangent_x, cotangent_weights, grad_y, x, weights, key, dtype, need_grad_y, need_x,
                           need_weights, backend)
    inputs = (None if t is None else native.aligned(t) for t in (cotangent_x, cotangent_weights, grad_y, x, weights))
    backends.call(backend, "mlp_second", *inputs, *_wanted(outputs, (need_grad_y, need_x, need_weights)),
                  *partial_sums(weights, need_weights, backend), x.shape[0], COMPUTE_DTYPES.index(dtype),
                  *layout(MLPSpec.parse(key)))
    return outputs


def _fake_second(cotangent_x, cotangent_weights, grad_y, x, weights, key, dtype, need_grad_y, need_x, need_weights,
                 backend):
    grad_x, grad_weights = _fake_backward(grad_y, x, weights, key, dtype, need_x, need_weights, backend)
    return grad_y.new_empty(grad_y.shape if need_grad_y else 0), grad_x, grad_weights


def partial_sums(weights: torch.Tensor, wanted: bool, backend: str) -> tuple[torch.Tensor | None, int]:
    """Where a GPU's blocks sum the gradients of the weights, and how many may."""
    wanted = wanted and backends.runs_gpu_source(backend, weights.device)
    return weights.new_empty(GPU_BLOCKS, weights.shape[0]) if wanted else None, GPU_BLOCKS


def _wanted(outputs, needs):
    return [output if need else None for output, need in zip(outputs, needs)]


class _Value:
    @staticmethod
    def setup_context(ctx, inputs, y):
        x, weights, *ctx.rest = inputs
        ctx.save_for_backward(x, weights)

    @staticmethod
    def backward(ctx, grad_y):
        needs = ctx.needs_input_grad[:2]
        *rest, backend = ctx.rest
        return *_wanted(_mlp_backward(grad_y, *ctx.saved_tensors, *rest, *needs, backend), needs), *[None] * 3


class _ValueBackward:
    @staticmethod
    def setup_context(ctx, inputs, outputs):
        grad_y, x, weights, *ctx.rest = inputs
        ctx.save_for_backward(grad_y, x, weights)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *cotangents):
        key, dtype, *given, backend = ctx.rest
        cotangents = _wanted(cotangents, given)
        if all(c is None for c in cotangents):
            return (None,) * 8
        needs = ctx.needs_input_grad[:3]
        grads = _mlp_second(*cotangents, *ctx.saved_tensors, key, dtype, *needs, backend)
        return *_wanted(grads, needs), *[None] * 5


_NETWORK = "Tensor x, Tensor weights, str spec, ScalarType dtype"
_mlp = define(f"mlp({_NETWORK}, str backend) -> Tensor", _forward, _fake_forward, _Value, _check)
_mlp_backward = define(
    f"mlp_backward(Tensor grad_y, {_NETWORK}, bool need_x, bool need_weights, str backend) -> (Tensor, Tensor)",
    _backward, _fake_backward, _ValueBackward, _check_backward)
_mlp_second = define(
    f"mlp_second(Tensor? cotangent_x, Tensor? cotangent_weights, Tensor grad_y, {_NETWORK}, bool need_grad_y, "
    "bool need_x, bool need_weights, str backend) -> (Tensor, Tensor, Tensor)",
    _second, _fake_second, LastOrder("mlp_second"))
