"""Volume rendering of packed samples along rays."""

from typing import NamedTuple

import torch

from text3d_fast import backends, native
from text3d_fast.ops.checks import float_dtypes, require_same_device, require_tensor
from text3d_fast.ops.registration import LastOrder, define
from text3d_fast.ops.samples import RaySamples, check_samples
from text3d_fast.ops.typed import typed
from text3d_fast.reference.composite import composite as reference_composite

backends.declare("composite", triton=True)


class Composite(NamedTuple):
    """values [R, C], opacity [R], depth [R], depth_variance [R], weights [S]"""

    values: torch.Tensor
    opacity: torch.Tensor
    depth: torch.Tensor
    depth_variance: torch.Tensor
    weights: torch.Tensor


@typed
def composite(sigma: torch.Tensor, values: torch.Tensor, samples: RaySamples, early_stop: float = 1e-4) -> Composite:
    """Composite samples along rays (NeRF quadrature: Mildenhall et al. 2020, eq. 3).

    sigma: float32 [S], density per unit length; values: float32 [S, C], any channels (colour, normal, ...).
    alpha = 1 - exp(-sigma (t_end - t_start)), weight = transmittance * alpha; a ray stops before the first sample
    whose transmittance is below `early_stop`.
    Returns values [R, C] = sum w v, opacity [R] = sum w, depth [R] = sum w m / opacity with m the sample's middle,
    depth_variance [R] = sum w (m - depth)^2 / opacity, weights [S]. Rays without samples are 0.
    Gradients to sigma, values, t_starts and t_ends, from every output; first order only. No host synchronization.
    Kept for the backward pass: 4 bytes a sample and 12 a ray besides the inputs.
    Negative densities follow the formulae: weights, opacity and depth_variance may then be negative.
    Raises ValueError or TypeError for wrong shapes, dtypes or devices and early_stop outside [0, 1]; on a CPU also for
    offsets that do not rise.
    NaN in a sample spreads over its ray and no further.
    """
    arguments = (sigma, values, samples.t_starts, samples.t_ends, samples.ray_ids, samples.ray_offsets, early_stop)
    backend = backends.choose("composite", sigma.device)
    if backend == "reference":
        _check(*arguments, backend)
        return Composite(*reference_composite(*arguments))
    return Composite(*_composite(*arguments, backend))


def _check(sigma, values, t_starts, t_ends, ray_ids, ray_offsets, early_stop, backend):
    dtypes = float_dtypes(backend)
    check_samples(sigma, t_starts, t_ends, ray_ids, ray_offsets, *dtypes)
    require_tensor("values", values, (t_starts.shape[0], "channels"), *dtypes)
    require_same_device(sigma=sigma, values=values)
    if not 0 <= early_stop <= 1:
        raise ValueError(f"early_stop: expected a transmittance from 0 to 1, got {early_stop}")


def _forward(sigma, values, t_starts, t_ends, ray_ids, ray_offsets, early_stop, backend):
    tensors = [native.aligned(x) for x in (sigma, values, t_starts, t_ends, ray_offsets)]
    outputs = _fake_forward(sigma, values, t_starts, t_ends, ray_ids, ray_offsets, early_stop, backend)
    backends.call(backend, "composite_forward", *tensors, *outputs, ray_offsets.shape[0] - 1, sigma.shape[0],
                  values.shape[1], early_stop)
    return outputs


def _fake_forward(sigma, values, t_starts, t_ends, ray_ids, ray_offsets, early_stop, backend):
    rays = ray_offsets.shape[0] - 1
    per_ray = [sigma.new_empty(rays) for _ in range(3)]
    return values.new_empty(rays, values.shape[1]), *per_ray, sigma.new_empty(sigma.shape[0])


def _backward(*arguments):
    *tensors, early_stop, needs_t, backend = arguments
    tensors = [None if x is None else native.aligned(x) for x in tensors]
    outputs = _fake_backward(*arguments)
    targets = outputs if needs_t else (*outputs[:2], None, None)
    sigma, values, ray_offsets = tensors[5], tensors[6], tensors[9]
    backends.call(backend, "composite_backward", *tensors, *targets, ray_offsets.shape[0] - 1, sigma.shape[0],
                  values.shape[1], early_stop)
    return outputs


def _fake_backward(grad_values, grad_opacity, grad_depth, grad_depth_variance, grad_weights, sigma, values, t_starts,
                   t_ends, ray_offsets, opacity, depth, depth_variance, weights, early_stop, needs_t, backend):
    count, for_t = sigma.shape[0], sigma.shape[0] if needs_t else 0
    return (sigma.new_empty(count), values.new_empty(count, values.shape[1]), t_starts.new_empty(for_t),
            t_ends.new_empty(for_t))


class _Derivative:
    @staticmethod
    def setup_context(ctx, inputs, outputs):
        sigma, values, t_starts, t_ends, _, ray_offsets, *ctx.rest = inputs
        ctx.save_for_backward(sigma, values, t_starts, t_ends, ray_offsets, *outputs[1:])
        ctx.set_materialize_grads(False)  # a cotangent that nobody sends costs no zeros and no reading

    @staticmethod
    def backward(ctx, *grads):
        needs_t = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        early_stop, backend = ctx.rest
        gradients = _composite_backward(*grads, *ctx.saved_tensors, early_stop, needs_t, backend)
        for_t = gradients[2:] if needs_t else (None, None)
        return *gradients[:2], *for_t, None, None, None, None


_composite = define(
    "composite(Tensor sigma, Tensor values, Tensor t_starts, Tensor t_ends, Tensor ray_ids, Tensor ray_offsets, "
    "float early_stop, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
    _Derivative,
    _check,
)
_composite_backward = define(
    "composite_backward(Tensor? grad_values, Tensor? grad_opacity, Tensor? grad_depth, Tensor? grad_depth_variance, "
    "Tensor? grad_weights, Tensor sigma, Tensor values, Tensor t_starts, Tensor t_ends, Tensor ray_offsets, "
    "Tensor opacity, Tensor depth, Tensor depth_variance, Tensor weights, float early_stop, "
    "bool needs_t, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    LastOrder("composite_backward"),
)
