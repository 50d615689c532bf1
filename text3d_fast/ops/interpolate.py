"""Interpolation of vertex attributes over rasterized triangles."""

import functools
from collections.abc import Sequence

import torch

from text3d_fast import backends, native
from text3d_fast.ops.checks import check_values, float_dtypes, require_indices, require_same_device, require_tensor
from text3d_fast.ops.registration import LastOrder, define
from text3d_fast.ops.typed import typed
from text3d_fast.reference.interpolate import interpolate as reference_interpolate
from text3d_fast.reference.rasterize import decode_triangle_ids

backends.declare("interpolate", triton=True)


@typed
def interpolate(
    attr: torch.Tensor,
    rast: torch.Tensor,
    tri: torch.Tensor,
    rast_db: torch.Tensor | None = None,
    diff_attrs: Sequence[int] | str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Interpolate vertex attributes at the pixels of `rasterize`.

    attr: float32 [B, V, A], [1, V, A] or [V, A], the last two for all images. rast [B, H, W, 4] and tri int32 [F, 3] as
    of rasterize. rast_db with diff_attrs: a list of attribute indices, or "all": also give their pixel derivatives.
    Returns values [B, H, W, A] = u a0 + v a1 + (1 - u - v) a2 and derivatives [B, H, W, 2 * len(diff_attrs)],
    (d/dX, d/dY) for each attribute in turn; 0 at the background. Without diff_attrs the latter has no channels.
    Gradients to attr, u and v of rast, and rast_db; first order only; reproducible as those of rasterize.
    Kept for the backward pass: the inputs.
    Raises ValueError or TypeError for wrong shapes, dtypes, devices or diff_attrs, on a CPU also for triangles of rast
    and vertices of tri that do not exist, as far as pixels see them; on CUDA such pixels are background, or raise if
    the environment has TEXT3D_CHECK=1.
    """
    chosen = _chosen(diff_attrs, attr.shape[-1] if attr.dim() else 0)
    if chosen and rast_db is None:
        raise ValueError("rast_db: expected a tensor, since diff_attrs asks for derivatives, got None")
    backend = backends.choose("interpolate", attr.device)
    if rast_db is not None and not chosen:  # not read, but wrong all the same
        require_tensor("rast_db", rast_db, tuple(rast.shape), *float_dtypes(backend))
        require_same_device(attr=attr, rast_db=rast_db)
    arguments = (attr, rast, tri, rast_db if chosen else None, chosen)
    if backend == "reference":
        _check(*arguments, backend)
        return reference_interpolate(*arguments)
    return _interpolate(*arguments, backend)


def _check(attr, rast, tri, rast_db, diff_attrs, backend):
    dtypes = float_dtypes(backend)
    batched = attr.dim() == 3
    shape = ("vertices", "attributes")
    require_tensor("attr", attr, ("batch", *shape) if batched else shape, *dtypes)
    require_tensor("rast", rast, ("batch", "height", "width", 4), *dtypes)
    require_tensor("tri", tri, ("triangles", 3), torch.int32)
    if batched and attr.shape[0] not in (1, rast.shape[0]):
        raise ValueError(f"attr: expected a batch of 1 or {rast.shape[0]} like rast, got {attr.shape[0]}")
    if rast_db is not None:
        require_tensor("rast_db", rast_db, tuple(rast.shape), *dtypes)
    require_same_device(attr=attr, rast=rast, tri=tri, rast_db=rast_db)


def _chosen(diff_attrs: Sequence[int] | str | None, attributes: int) -> list[int]:
    if diff_attrs is None:
        return []
    if isinstance(diff_attrs, str):
        if diff_attrs != "all":
            raise ValueError(f"diff_attrs: expected a list of indices, 'all' or None, got {diff_attrs!r}")
        return list(range(attributes))
    chosen = list(diff_attrs)
    if any(not 0 <= i < attributes for i in chosen):
        raise ValueError(f"diff_attrs: expected indices from 0 to {attributes - 1}, got {chosen}")
    return chosen


def _indices(diff_attrs, attr) -> torch.Tensor | None:
    """The chosen attributes for the kernel; None stands for all of them."""
    return None if diff_attrs == list(range(attr.shape[-1])) else _on_device(tuple(diff_attrs), attr.device)


@functools.lru_cache(64)  # copied to a device once: a CUDA graph cannot capture a copy from the host's memory
def _on_device(indices: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(indices, dtype=torch.int32, device="cpu").to(device)


def _sizes(attr, rast, tri, diff_attrs):
    images, height, width, _ = rast.shape
    shared = attr.dim() == 2 or attr.shape[0] == 1
    return images, height * width, attr.shape[-2], tri.shape[0], attr.shape[-1], len(diff_attrs), int(shared)


def _forward(attr, rast, tri, rast_db, diff_attrs, backend):
    attr, rast, tri = native.aligned(attr), native.aligned(rast), native.aligned(tri)
    rast_db = None if rast_db is None else native.aligned(rast_db)
    if backends.runs_gpu_source(backend, attr.device) and check_values():
        require_indices("tri", tri, attr.shape[-2])
        require_indices("rast", decode_triangle_ids(rast[..., 3]), tri.shape[0], -1)
    out, out_da = _fake_forward(attr, rast, tri, rast_db, diff_attrs, backend)
    backends.call(backend, "interpolate_forward", attr, rast, tri, rast_db, _indices(diff_attrs, attr), out, out_da,
                  *_sizes(attr, rast, tri, diff_attrs))
    return out, out_da


def _fake_forward(attr, rast, tri, rast_db, diff_attrs, backend):
    shape = rast.shape[:3]
    return attr.new_empty(*shape, attr.shape[-1]), attr.new_empty(*shape, 2 * len(diff_attrs))


def _backward(grad_out, grad_da, attr, rast, tri, rast_db, diff_attrs, want_attr, backend):
    grad_out, grad_da, attr, rast, tri = (native.aligned(x) for x in (grad_out, grad_da, attr, rast, tri))
    rast_db = None if rast_db is None else native.aligned(rast_db)
    on_gpu = backends.runs_gpu_source(backend, attr.device)
    in_order = want_attr and on_gpu and torch.are_deterministic_algorithms_enabled()
    grad_attr = torch.zeros_like(attr) if want_attr else attr.new_empty(0)
    grad_rast = torch.empty_like(rast)
    grad_db = rast.new_empty(0) if rast_db is None else torch.empty_like(rast_db)
    backends.call(backend, "interpolate_backward", attr, rast, tri, rast_db, _indices(diff_attrs, attr), grad_out,
                  grad_da, grad_attr if want_attr and not in_order else None, grad_rast, grad_db,
                  *_sizes(attr, rast, tri, diff_attrs))
    if in_order:
        _add_in_order(grad_attr, grad_out, grad_da, rast, tri, rast_db, diff_attrs)
    return grad_attr, grad_rast, grad_db


def _add_in_order(grad_attr, grad_out, grad_da, rast, tri, rast_db, diff_attrs):
    """The gradient to attr with torch's deterministic index_put."""
    ids = decode_triangle_ids(rast[..., 3]).reshape(-1)
    pixel = ((ids >= 0) & (ids < tri.shape[0])).nonzero()[:, 0]
    vertices = tri[ids[pixel].long()].long()
    inside = ((vertices >= 0) & (vertices < grad_attr.shape[-2])).all(1)
    pixel, vertices = pixel[inside], vertices[inside]
    u, v = rast.reshape(-1, 4)[pixel, :2].unbind(-1)
    values = torch.stack([u, v, 1 - u - v], -1)[..., None] * grad_out.flatten(0, 2)[pixel, None]
    if diff_attrs:
        along = torch.einsum("nkx,ndx->nkd", rast_db.reshape(-1, 2, 2)[pixel],
                             grad_da.reshape(-1, len(diff_attrs), 2)[pixel])
        along = torch.cat([along, -along.sum(1, keepdim=True)], 1)
        for d, c in enumerate(diff_attrs):
            values[..., c] += along[..., d]
    if grad_attr.dim() == 3 and grad_attr.shape[0] > 1:
        vertices = vertices + (pixel // (rast.shape[1] * rast.shape[2]) * grad_attr.shape[1])[:, None]
    channels = grad_attr.shape[-1]
    grad_attr.view(-1, channels).index_put_((vertices.reshape(-1),), values.reshape(-1, channels), accumulate=True)


def _fake_backward(grad_out, grad_da, attr, rast, tri, rast_db, diff_attrs, want_attr, backend):
    contiguous = torch.contiguous_format
    grad_attr = torch.empty_like(attr, memory_format=contiguous) if want_attr else attr.new_empty(0)
    grad_db = rast.new_empty(0) if rast_db is None else torch.empty_like(rast_db, memory_format=contiguous)
    return grad_attr, torch.empty_like(rast, memory_format=contiguous), grad_db


class _Derivative:
    @staticmethod
    def setup_context(ctx, inputs, outputs):
        *tensors, ctx.diff_attrs, ctx.backend = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad_out, grad_da):
        attr, rast, tri, rast_db = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        grad_attr, grad_rast, grad_db = _interpolate_backward(
            grad_out, grad_da, attr, rast, tri, rast_db, ctx.diff_attrs, wanted[0], ctx.backend
        )
        return grad_attr if wanted[0] else None, grad_rast, None, grad_db if rast_db is not None else None, None, None


_interpolate = define(
    "interpolate(Tensor attr, Tensor rast, Tensor tri, Tensor? rast_db, int[] diff_attrs, str backend) "
    "-> (Tensor, Tensor)",
    _forward,
    _fake_forward,
    _Derivative,
    _check,
)
_interpolate_backward = define(
    "interpolate_backward(Tensor grad_out, Tensor grad_da, Tensor attr, Tensor rast, Tensor tri, Tensor? rast_db, "
    "int[] diff_attrs, bool want_attr, str backend) -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    LastOrder("interpolate_backward"),
)
