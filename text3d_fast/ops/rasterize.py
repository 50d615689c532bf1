"""Triangle rasterization with exact visibility, and depth peeling."""

import torch
from torch.utils.weak import WeakIdKeyDictionary

from text3d_fast import backends, native
from text3d_fast.ops.checks import (
    check_values,
    float_dtypes,
    require_finite,
    require_indices,
    require_same_device,
    require_tensor,
)
from text3d_fast.ops.registration import LastOrder, define
from text3d_fast.ops.typed import typed
from text3d_fast.reference import rasterize as reference

backends.declare("rasterize", triton=True)
LARGEST_SIZE = reference.LARGEST_SIZE


@typed
def rasterize(
    pos: torch.Tensor,
    tri: torch.Tensor,
    resolution: tuple[int, int],
    ranges: torch.Tensor | None = None,
    grad_db: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rasterize triangles given in clip space.

    pos: float32 [B, V, 4] (instanced: every image draws all of tri) or [V, 4] with ranges; clip space x, y, z, w,
    y upwards. tri: int32 [F, 3]. resolution: (H, W). ranges: int32 [B, 2] on the CPU, (start, count) of the triangles
    of each image. grad_db: let gradients flow through rast_db.
    Returns rast [B, H, W, 4] = (u, v, z/w, triangle index + 1) and rast_db [B, H, W, 4] = (du/dX, du/dY, dv/dX, dv/dY)
    per pixel; 0 where no triangle is seen. Row 0 is the bottom. Vertex 0 has (u, v) = (1, 0), vertex 1 (0, 1), vertex 2
    (0, 0); both are perspective-correct, clamped to [0, 1] and scaled to a sum of at most 1. z/w is clamped to
    [-1, 1]. Indices above 2^24 are stored as bits, see reference.rasterize.decode_triangle_ids.

    No face is culled; all are clipped to the near and far planes, so w <= 0 is fine. Coverage is watertight: vertices
    are snapped to 1/256 pixel, and of two triangles at an edge exactly one owns a pixel centre on it. The nearest
    triangle is seen, on a tie the last; identical on every device and run.
    Gradients: from u, v and rast_db to x, y, w of pos (of the formulae without the clamps, denominators at least 1e-6
    of what a triangle of that extent has when it is not thin); z/w and the index pass none. First order only.
    Reproducible bit for bit on a CPU, and on CUDA under torch.use_deterministic_algorithms(True). No host
    synchronization on CUDA.
    Scratch: 16 bytes a vertex, and on CUDA 8 a pixel and 8 a triangle and image. Kept for the backward pass: rast.
    Triangles with a NaN or infinite vertex are not drawn; vertices that no triangle uses may be anything.
    Raises ValueError or TypeError for wrong shapes, dtypes, devices and ranges, on a CPU also for vertex indices out of
    range, whose triangles are not drawn on CUDA. With TEXT3D_CHECK=1 in the environment those raise on CUDA too, and
    NaN or infinite positions everywhere.
    """
    backend = backends.choose("rasterize", pos.device)
    return _layer(pos, tri, ranges, None, resolution, grad_db, False, backend)[:2]


def _layer(pos, tri, ranges, previous, resolution, grad_db, want_keys, backend):
    arguments = (pos, tri, ranges, previous, *resolution, grad_db, want_keys, backend)
    if backend != "reference":
        return _rasterize(*arguments)
    _check(*arguments)
    require_indices("tri", tri, pos.shape[-2])
    _check_values(pos, tri, ranges)
    return reference.rasterize(pos, tri, resolution, ranges, grad_db, previous)


def _check(pos, tri, ranges, previous, height, width, grad_db, want_keys, backend):
    instanced = pos.dim() == 3
    require_tensor("pos", pos, ("batch", "vertices", 4) if instanced else ("vertices", 4), *float_dtypes(backend))
    require_tensor("tri", tri, ("triangles", 3), torch.int32)
    require_same_device(pos=pos, tri=tri, previous=previous)
    if tri.shape[0] > reference.LARGEST_ID:
        raise ValueError(f"tri: expected at most {reference.LARGEST_ID} triangles, got {tri.shape[0]}")
    if not (0 <= height <= LARGEST_SIZE and 0 <= width <= LARGEST_SIZE):
        raise ValueError(f"resolution: expected sizes from 0 to {LARGEST_SIZE}, got {height} x {width}")
    if instanced:
        if ranges is not None:
            raise ValueError("ranges: expected None for pos of shape [batch, vertices, 4], got a tensor")
        return
    if ranges is None:
        raise ValueError("ranges: expected an int32 tensor [batch, 2] for pos of shape [vertices, 4], got None")
    require_tensor("ranges", ranges, ("batch", 2), torch.int32)
    if ranges.device.type != ("meta" if pos.device.type == "meta" else "cpu"):
        raise ValueError(f"ranges: expected device cpu, got {ranges.device}")


def _check_values(pos, tri, ranges):
    drawn = ranges is not None and ranges.numel() > 0
    if drawn and (int(ranges.min()) < 0 or int(ranges.long().sum(1).max()) > tri.shape[0]):
        raise ValueError(f"ranges: expected (start, count) within {tri.shape[0]} triangles, got {ranges.tolist()}")
    if check_values():
        require_indices("tri", tri, pos.shape[-2])
        require_finite("pos", pos)


class DepthPeeler:
    """Rasterize layer after layer, from the nearest to the farthest; arguments as `rasterize`.

    with ops.DepthPeeler(pos, tri, (H, W)) as peeler:
        rast, rast_db = peeler.rasterize_next_layer()

    Layers are ordered by (depth, then the last triangle first), so coincident triangles come one after the other and
    none is lost. Beyond the last layer everything is background.
    """

    @typed
    def __init__(
        self,
        pos: torch.Tensor,
        tri: torch.Tensor,
        resolution: tuple[int, int],
        ranges: torch.Tensor | None = None,
        grad_db: bool = True,
    ):
        backend = backends.choose("rasterize", pos.device)
        _check(pos, tri, ranges, None, *resolution, grad_db, True, backend)
        self._arguments = pos, tri, ranges, resolution, grad_db, backend
        self._keys: torch.Tensor | None = None
        self._open = False

    def __enter__(self) -> "DepthPeeler":
        self._open, self._keys = True, None
        return self

    def __exit__(self, *error) -> None:
        self._open, self._keys = False, None

    def rasterize_next_layer(self) -> tuple[torch.Tensor, torch.Tensor]:
        """rast and rast_db of the next layer. Raises RuntimeError outside of the `with` block."""
        if not self._open:
            raise RuntimeError("DepthPeeler: rasterize_next_layer works only within `with DepthPeeler(...) as peeler:`")
        pos, tri, ranges, resolution, grad_db, backend = self._arguments
        rast, rast_db, self._keys = _layer(pos, tri, ranges, self._keys, resolution, grad_db, True, backend)
        return rast, rast_db


def _forward(pos, tri, ranges, previous, height, width, grad_db, want_keys, backend):
    _check_values(pos, tri, ranges)
    pos, tri = native.aligned(pos), native.aligned(tri)
    on_gpu = backends.runs_gpu_source(backend, pos.device)
    rast, rast_db, keys = _fake_forward(pos, tri, ranges, previous, height, width, grad_db, want_keys or on_gpu,
                                        backend)
    instanced, vertices = pos.dim() == 3, pos.shape[-2]
    largest = tri.shape[0] if instanced else int(ranges[:, 1].max()) if ranges.numel() else 0
    snapped = pos.new_empty(pos.shape, dtype=torch.int32)
    capacity = rast.shape[0] * largest if on_gpu else 0
    queue = pos.new_empty(4 + 2 * capacity, dtype=torch.int32) if on_gpu else None
    if ranges is not None:
        ranges = _on_device(ranges, pos.device)
    backends.call(backend, "rasterize_forward", pos, tri, ranges, previous, snapped, keys if keys.numel() else None,
                  queue, rast, rast_db, rast.shape[0], vertices, tri.shape[0], largest, capacity, height, width,
                  int(instanced))
    return rast, rast_db, keys if want_keys else keys.new_empty(0)


_copies = WeakIdKeyDictionary()


def _on_device(ranges, device):
    """ranges on the device, copied once: a CUDA graph cannot capture a copy from the host's memory."""
    version, copy = _copies.get(ranges, (None, None))
    if version != ranges._version or copy.device != device:
        copy = native.aligned(ranges).to(device)
        _copies[ranges] = ranges._version, copy
    return copy


def _fake_forward(pos, tri, ranges, previous, height, width, grad_db, want_keys, backend):
    batch = pos.shape[0] if pos.dim() == 3 else ranges.shape[0]
    rast = pos.new_empty(batch, height, width, 4)
    shape = (batch, height, width) if want_keys else (0,)
    return rast, pos.new_empty(batch, height, width, 4), pos.new_empty(shape, dtype=torch.int64)


def _backward(grad_rast, grad_db, pos, tri, rast, backend):
    grad_rast, pos, tri, rast = (native.aligned(x) for x in (grad_rast, pos, tri, rast))
    grad_db = None if grad_db is None else native.aligned(grad_db)
    grad_pos = torch.zeros_like(pos)
    batch, height, width, _ = rast.shape
    by_pixel = None
    if backends.runs_gpu_source(backend, pos.device) and torch.are_deterministic_algorithms_enabled():
        by_pixel = pos.new_zeros(batch, height, width, 3, 4)
    backends.call(backend, "rasterize_backward", pos, tri, rast, grad_rast, grad_db, grad_pos, by_pixel, batch,
                  pos.shape[-2], tri.shape[0], height, width, int(pos.dim() == 3))
    if by_pixel is not None:
        _add_in_order(grad_pos, by_pixel, tri, rast)
    return grad_pos


def _add_in_order(grad_pos, by_pixel, tri, rast):
    """grad_pos += the contributions [B, H, W, 3, 4] of pixels, with torch's deterministic index_put."""
    ids = reference.decode_triangle_ids(rast[..., 3]).long()
    vertices = torch.where(ids[..., None] >= 0, tri[ids.clamp(min=0)].long(), 0)
    if grad_pos.dim() == 3:
        images = torch.arange(grad_pos.shape[0], device=grad_pos.device)[:, None, None, None]
        vertices = vertices + images * grad_pos.shape[1]
    grad_pos.view(-1, 4).index_put_((vertices.reshape(-1),), by_pixel.view(-1, 4), accumulate=True)


def _fake_backward(grad_rast, grad_db, pos, tri, rast, backend):
    return torch.empty_like(pos, memory_format=torch.contiguous_format)


class _Derivative:
    @staticmethod
    def setup_context(ctx, inputs, outputs):
        pos, tri, *_, ctx.grad_db, _, ctx.backend = inputs
        rast, rast_db, keys = outputs
        ctx.save_for_backward(pos, tri, rast)
        ctx.mark_non_differentiable(keys, *(() if ctx.grad_db else (rast_db,)))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_rast, grad_db, _):
        nothing = (None,) * 8
        if grad_rast is None and grad_db is None:
            return None, *nothing
        pos, tri, rast = ctx.saved_tensors
        if grad_rast is None:
            grad_rast = torch.zeros_like(rast)
        grad_pos = _rasterize_backward(grad_rast, grad_db if ctx.grad_db else None, pos, tri, rast, ctx.backend)
        return grad_pos, *nothing


_rasterize = define(
    "rasterize(Tensor pos, Tensor tri, Tensor? ranges, Tensor? previous, SymInt height, SymInt width, bool grad_db, "
    "bool want_keys, str backend) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
    _Derivative,
    _check,
)
_rasterize_backward = define(
    "rasterize_backward(Tensor grad_rast, Tensor? grad_db, Tensor pos, Tensor tri, Tensor rast, str backend) -> Tensor",
    _backward,
    _fake_backward,
    LastOrder("rasterize_backward"),
)
