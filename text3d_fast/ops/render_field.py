"""Fused volume rendering of a field: encoding, network, shading and compositing with recomputation."""

from typing import NamedTuple

import torch

from text3d_fast import backends, native
from text3d_fast.ops.checks import (
    alert_not_deterministic,
    float_dtypes,
    require_same_device,
    require_tensor,
)
from text3d_fast.ops.composite import composite
from text3d_fast.ops.hash_grid import hash_grid
from text3d_fast.ops.hash_grid import layout as grid_layout
from text3d_fast.ops.mlp import layout as mlp_layout
from text3d_fast.ops.mlp import mlp, partial_sums
from text3d_fast.ops.registration import LastOrder, define
from text3d_fast.ops.samples import RaySamples, check_samples
from text3d_fast.ops.specs import BLOBS, DENSITIES, FieldSpec
from text3d_fast.ops.typed import typed
from text3d_fast.reference.render_field import REFERENCES, Steps
from text3d_fast.reference.render_field import render_field as render_by_steps

__all__ = ["FieldRendering", "FieldSpec", "PointLights", "render_field", "renders_fused"]

backends.declare("render_field", triton=True)
MODES = ("albedo", "lambertian", "textureless")  # in the order of csrc/render_field/render_field.h
OPS = Steps(hash_grid, mlp, lambda sigma, values, t_starts, t_ends, ray_ids, ray_offsets, early_stop:
            composite(sigma, values, RaySamples(ray_ids, t_starts, t_ends, ray_offsets), early_stop))


class PointLights(NamedTuple):
    """position, diffuse and ambient colour [V, 3] of a point light for each view."""

    position: torch.Tensor
    diffuse: torch.Tensor
    ambient: torch.Tensor


class FieldRendering(NamedTuple):
    """values [R, 3], or [R, 6] with normals; opacity, depth, depth_variance [R]; orientation [R] or None"""

    values: torch.Tensor
    opacity: torch.Tensor
    depth: torch.Tensor
    depth_variance: torch.Tensor
    orientation: torch.Tensor | None


@typed
def render_field(
    origins: torch.Tensor,
    directions: torch.Tensor,
    params: torch.Tensor,
    weights: torch.Tensor,
    samples: RaySamples,
    spec: FieldSpec,
    *,
    mode: str = "albedo",
    lights: PointLights | None = None,
    normals: bool = False,
    active_levels: int | None = None,
    early_stop: float = 1e-4,
) -> FieldRendering:
    """Render a field along rays: what `hash_grid`, `mlp`, shading and `composite` give one after the other, in memory
    that does not grow with the number of samples, and without looking at samples behind a stop.

    origins, directions: float32 [R, 3]; samples: along them, as `march_rays` makes them.
    params [spec.grid.num_params], weights [spec.mlp.num_params]: float32, of the field.
    mode: "albedo"; "lambertian", albedo * (diffuse max(0, n . l) + ambient); or "textureless", the same in white.
    lights: one for each of V views, needed by the lit modes; rays r R/V to (r+1) R/V - 1 are those of view r.
    normals: also composite the normals n = -v / |v|, v the gradient of the raw density; always with the lit modes.
    active_levels: of the grid, as `hash_grid`. early_stop: as `composite`.
    Returns values [R, 3] = sum w colour, or [R, 6] with the normals after it; opacity, depth and depth_variance as
    `composite`; orientation [R] = sum stopgrad(w) max(0, n . direction)^2 (Verbin et al. 2022, eq. 11), or None.
    Gradients to params and weights, from every output, first order; rays, samples and lights must not require any.
    Kept for the backward pass: inputs and outputs alone. On Triton the parts are its ops, one after the other, and what
    they keep grows with the samples.
    Raises ValueError or TypeError for wrong shapes, dtypes or devices; on a CPU also for offsets that do not rise.
    """
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    normals = normals or mode != "albedo"
    if mode == "albedo":
        lights = None
    elif lights is None:
        raise ValueError(f"lights: expected PointLights with mode {mode!r}, got None")
    active_levels = spec.grid.levels if active_levels is None else active_levels
    tensors = (origins, directions, params, weights, samples.t_starts, samples.t_ends, samples.ray_ids,
               samples.ray_offsets, *(lights or (None, None, None)))
    if torch.is_grad_enabled():
        names = ("origins", "directions", "samples.t_starts", "samples.t_ends", "lights.position", "lights.diffuse",
                 "lights.ambient")
        for name, tensor in zip(names, (*tensors[:2], *tensors[4:6], *tensors[8:])):
            if tensor is not None and tensor.requires_grad:
                raise ValueError(f"{name}: expected no gradient to be required; only params and weights get one")
    backend = backends.choose("render_field", params.device)
    rest = (spec.key, active_levels, early_stop, mode, normals, backend)
    if backend != "native":
        _check(*tensors, *rest)
        steps = OPS if backend == "triton" else REFERENCES
        return FieldRendering(*render_by_steps(*tensors[:8], lights, spec, *rest[1:-1], steps))
    values, opacity, depth, variance, orientation = _render_field(*tensors, *rest)
    return FieldRendering(values, opacity, depth, variance, orientation if normals else None)


@typed
def renders_fused(device: torch.device) -> bool:
    """Whether `render_field` on this device is a fused kernel; otherwise it is the ops or references one by one.

    Not on CUDA under torch.use_deterministic_algorithms, where its gradient would raise.
    """
    wanted = backends.requested() or "native"
    if wanted != "native" or (native.runs_cuda_source(device) and torch.are_deterministic_algorithms_enabled()):
        return False
    return backends.reason_against("native", "render_field", device.type) is None


def _check(origins, directions, params, weights, t_starts, t_ends, ray_ids, ray_offsets, light_position,
           light_diffuse, light_ambient, key, active_levels, early_stop, mode, normals, backend):
    spec, dtypes = FieldSpec.parse(key), float_dtypes(backend)
    check_samples(t_starts, t_starts, t_ends, ray_ids, ray_offsets, *dtypes)
    rays = ray_offsets.shape[0] - 1
    require_tensor("origins", origins, (rays, 3), *dtypes)
    require_tensor("directions", directions, (rays, 3), *dtypes)
    require_tensor("params", params, (spec.grid.num_params,), *dtypes)
    require_tensor("weights", weights, (spec.mlp.num_params,), *dtypes)
    lights = {"lights.position": light_position, "lights.diffuse": light_diffuse, "lights.ambient": light_ambient}
    if mode != "albedo":
        for name, light in lights.items():
            require_tensor(name, light, ("views", 3), *dtypes)
            if light.shape != light_position.shape or light.shape[0] == 0 or rays % light.shape[0]:
                raise ValueError(f"{name}: expected as many views in each, of which {rays} rays are a multiple, "
                                 f"got shape {list(light.shape)}")
    fixed = {"origins": origins, "directions": directions, "samples.t_starts": t_starts, "samples.t_ends": t_ends}
    require_same_device(params=params, weights=weights, **fixed, **lights)
    if not 0 <= active_levels <= spec.grid.levels:
        raise ValueError(f"active_levels: expected 0 to {spec.grid.levels}, got {active_levels}")
    if not 0 <= early_stop <= 1:
        raise ValueError(f"early_stop: expected a transmittance from 0 to 1, got {early_stop}")


def _inputs(origins, directions, params, weights, t_starts, t_ends, ray_ids, ray_offsets, light_position,
            light_diffuse, light_ambient, key, active_levels, early_stop, mode, normals, backend) -> tuple:
    """The fields of RenderFieldInputs."""
    spec, rays = FieldSpec.parse(key), origins.shape[0]
    tensors = (origins, directions, params, weights, t_starts, t_ends, ray_offsets, light_position, light_diffuse,
               light_ambient)
    views = 1 if light_position is None else light_position.shape[0]
    pointers = [None if t is None else native.aligned(t) for t in tensors]
    return (*pointers, rays, t_starts.shape[0], max(rays // views, 1),
            MODES.index(mode), normals, early_stop, *grid_layout(spec.grid, active_levels),
            *mlp_layout(spec.mlp), spec.radius, spec.sharpness, spec.blob_scale, spec.blob_width,
            DENSITIES.index(spec.density), BLOBS.index(spec.blob))


def _forward(*arguments):
    outputs = _fake_forward(*arguments)
    *per_ray, orientation = outputs
    native.call("render_field_forward", *_inputs(*arguments), *per_ray, orientation if arguments[-2] else None)
    return outputs


def _fake_forward(origins, *rest):
    rays, normals = origins.shape[0], rest[-2]
    return (origins.new_empty(rays, 6 if normals else 3), *(origins.new_empty(rays) for _ in range(3)),
            origins.new_empty(rays if normals else 0))


def _backward(*arguments):
    cotangents, outputs, inputs = arguments[:5], arguments[5:9], arguments[9:]
    gradients = _fake_backward(*arguments)
    if native.runs_cuda_source(gradients[0].device):
        alert_not_deterministic("render_field's gradient to params")
    cotangents = [None if t is None else native.aligned(t) for t in cotangents]
    native.call("render_field_backward", *_inputs(*inputs), *cotangents, *(native.aligned(t) for t in outputs),
                *gradients, *partial_sums(gradients[1], True, arguments[-1]))
    return gradients


def _fake_backward(*arguments):
    params, weights = arguments[11:13]
    return params.new_empty(params.shape), weights.new_empty(weights.shape)


class _Derivative:
    @staticmethod
    def setup_context(ctx, inputs, outputs):
        *tensors, key, active_levels, early_stop, mode, normals, backend = inputs
        ctx.save_for_backward(*tensors, *outputs[:4])
        ctx.rest = key, active_levels, early_stop, mode, normals, backend
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *cotangents):
        *tensors, values, opacity, depth, variance = ctx.saved_tensors
        if not ctx.rest[-2]:
            cotangents = (*cotangents[:4], None)
        gradients = _render_field_backward(*cotangents, values, opacity, depth, variance, *tensors, *ctx.rest)
        needs = ctx.needs_input_grad[2:4]
        return None, None, *(g if need else None for g, need in zip(gradients, needs)), *[None] * 13


_INPUTS = ("Tensor origins, Tensor directions, Tensor params, Tensor weights, Tensor t_starts, Tensor t_ends, "
           "Tensor ray_ids, Tensor ray_offsets, Tensor? light_position, Tensor? light_diffuse, Tensor? light_ambient, "
           "str spec, SymInt active_levels, float early_stop, str mode, bool normals, str backend")
_render_field = define(f"render_field({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
                       _forward, _fake_forward, _Derivative, _check)
_render_field_backward = define(
    "render_field_backward(Tensor? grad_values, Tensor? grad_opacity, Tensor? grad_depth, "
    "Tensor? grad_depth_variance, Tensor? grad_orientation, Tensor values, Tensor opacity, Tensor depth, "
    f"Tensor depth_variance, {_INPUTS}) -> (Tensor, Tensor)",
    _backward, _fake_backward, LastOrder("render_field_backward"))
