"""Analytic antialiasing of silhouettes, which makes visibility differentiable."""

import torch

from text3d_fast import backends, native
from text3d_fast.ops.checks import (
    alert_not_deterministic,
    check_values,
    float_dtypes,
    require_indices,
    require_same_device,
    require_tensor,
)
from text3d_fast.ops.registration import LastOrder, define
from text3d_fast.ops.typed import typed
from text3d_fast.reference.antialias import antialias as reference_antialias
from text3d_fast.reference.antialias import opposite_vertices
from text3d_fast.reference.rasterize import decode_triangle_ids

backends.declare("antialias", triton=True)


@typed
def antialias_topology(tri: torch.Tensor) -> torch.Tensor:
    """Which vertex lies across each edge: int32 [F, 3] -> int32 [F, 3], -1 at a boundary.

    Depends on the indices only: compute it once for a mesh and pass it to `antialias`. Vertices that coincide but have
    different indices do not connect their triangles. No host synchronization beyond finding the largest index.
    """
    require_tensor("tri", tri, ("triangles", 3), torch.int32)
    return opposite_vertices(tri) if tri.device.type != "meta" else torch.empty_like(tri)


@typed
def antialias(
    color: torch.Tensor,
    rast: torch.Tensor,
    pos: torch.Tensor,
    tri: torch.Tensor,
    topology: torch.Tensor | None = None,
    pos_gradient_boost: float = 1.0,
) -> torch.Tensor:
    """Blend neighbouring pixels where a silhouette crosses between their centres (Laine et al. 2020, section 3.6).

    color: float32 [B, H, W, C]; rast, pos, tri: as given to and returned by `rasterize` (pos [B, V, 4] or [V, 4]).
    topology: `antialias_topology(tri)`, computed here if None. pos_gradient_boost multiplies the gradient to pos.
    Returns [B, H, W, C]. Gradients to color, and to x, y, w of pos through the blend weights: this is what moves a
    silhouette. None to rast. First order; on a CPU bitwise deterministic. On CUDA the gradient to pos adds in any
    order, and torch.use_deterministic_algorithms(True) makes it raise, as torch's own. No host synchronization with a
    topology.
    Kept for the backward pass: the inputs, and on a CPU a byte a pixel.
    Only triangles that cover a pixel centre can be blended: a silhouette whose triangles are thinner than a pixel and
    fall between the centres is neither smoothed nor does it pass a gradient (as in the method's original).
    Raises ValueError or TypeError for wrong shapes, dtypes and devices, on a CPU also for triangles of rast and
    vertices of tri and topology out of range, as far as pixels see them; on CUDA such pairs are not blended, or raise
    if the environment has TEXT3D_CHECK=1.
    """
    backend = backends.choose("antialias", rast.device)
    if topology is None:
        topology = antialias_topology(tri)
    arguments = (color, rast, pos, tri, topology, pos_gradient_boost, backend)
    if backend != "reference":
        return _antialias(*arguments)[0]
    _check(*arguments)
    _check_values(rast, pos, tri, topology)
    batch = rast.shape[0]
    return reference_antialias(color, rast, pos.expand(batch, -1, -1) if pos.dim() == 3 else pos, tri, topology,
                               pos_gradient_boost)


def _check(color, rast, pos, tri, topology, boost, backend):
    dtypes = float_dtypes(backend)
    require_tensor("rast", rast, ("batch", "height", "width", 4), *dtypes)
    batch, height, width, _ = rast.shape
    require_tensor("color", color, (batch, height, width, "channels"), *dtypes)
    require_tensor("tri", tri, ("triangles", 3), torch.int32)
    instanced = pos.dim() == 3 and pos.shape[0] != 1
    require_tensor("pos", pos, (*((batch if instanced else 1,) if pos.dim() == 3 else ()), "vertices", 4), *dtypes)
    require_tensor("topology", topology, tuple(tri.shape), torch.int32)
    require_same_device(rast=rast, color=color, pos=pos, tri=tri, topology=topology)


def _check_values(rast, pos, tri, topology):
    require_indices("tri", tri, pos.shape[-2])
    require_indices("topology", topology, pos.shape[-2], -1)
    require_indices("rast", decode_triangle_ids(rast[..., 3]), tri.shape[0], -1)


def _sizes(rast, pos, tri):
    pos_batch = pos.shape[0] if pos.dim() == 3 else 1
    return rast.shape[0], pos_batch, rast.shape[1], rast.shape[2], pos.shape[-2], tri.shape[0]


def _forward(color, rast, pos, tri, topology, boost, backend):
    if backends.runs_gpu_source(backend, tri.device) and check_values():
        _check_values(rast, pos, tri, topology)
    out, flags = _fake_forward(color, rast, pos, tri, topology, boost, backend)
    tensors = [native.aligned(x) for x in (color, rast, pos, tri, topology)]
    backends.call(backend, "antialias_forward", *tensors, out, flags, *_sizes(rast, pos, tri), color.shape[3])
    return out, flags


def _fake_forward(color, rast, pos, tri, topology, boost, backend):
    batch, height, width, _ = rast.shape
    # where the CPU kernel found silhouettes: a byte a pixel, read eight at a time
    flags = 0 if backends.runs_gpu_source(backend, rast.device) else batch * height * width + 8
    return (torch.empty_like(color, memory_format=torch.contiguous_format),
            torch.empty(flags, dtype=torch.uint8, device=rast.device))


def _backward(grad, color, rast, pos, tri, topology, flags, boost, wanted, backend):
    outputs = _fake_backward(grad, color, rast, pos, tri, topology, flags, boost, wanted, backend)
    outputs[1].zero_()
    if backends.runs_gpu_source(backend, rast.device) and wanted[1]:
        alert_not_deterministic("antialias' gradient to pos")
    tensors = [native.aligned(x) for x in (grad, color, rast, pos, tri, topology)]
    backends.call(backend, "antialias_backward", *tensors, flags, *(g if w else None for g, w in zip(outputs, wanted)),
                  *_sizes(rast, pos, tri), color.shape[3], boost)
    return outputs


def _fake_backward(grad, color, rast, pos, tri, topology, flags, boost, wanted, backend):
    return tuple(x.new_empty(x.shape if w else (0,)) for x, w in zip((color, pos), wanted))


class _Derivative:
    @staticmethod
    def setup_context(ctx, inputs, outputs):
        *tensors, ctx.boost, ctx.backend = inputs
        flags = outputs[1]
        ctx.save_for_backward(*tensors, flags)
        ctx.mark_non_differentiable(flags)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad, _):
        if grad is None:
            return (None,) * 7
        wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[2]]
        grad_color, grad_pos = _antialias_backward(grad, *ctx.saved_tensors, ctx.boost, wanted, ctx.backend)
        return grad_color if wanted[0] else None, None, grad_pos if wanted[1] else None, *[None] * 4


_antialias = define(
    "antialias(Tensor color, Tensor rast, Tensor pos, Tensor tri, Tensor topology, float boost, str backend) "
    "-> (Tensor, Tensor)",
    _forward,
    _fake_forward,
    _Derivative,
    _check,
)
_antialias_backward = define(
    "antialias_backward(Tensor grad, Tensor color, Tensor rast, Tensor pos, Tensor tri, Tensor topology, Tensor flags, "
    "float boost, bool[] wanted, str backend) -> (Tensor, Tensor)",
    _backward,
    _fake_backward,
    LastOrder("antialias_backward"),
)
