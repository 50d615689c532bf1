"""Triangle rasterization with exact visibility, and depth peeling."""

import torch

from text3d_fast.ops.checks import require_same_device, require_tensor
from text3d_fast.reference import rasterize as reference

LARGEST_SIZE = reference.LARGEST_SIZE


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
    triangle is seen, on a tie the last; identical on every device and run. Triangles with a NaN or infinite vertex are
    not drawn.
    Gradients: from u, v and rast_db to x, y, w of pos; z/w and the index pass none.
    Raises ValueError or TypeError for wrong shapes, dtypes, devices, ranges and indices outside of pos.
    """
    rast, rast_db, _ = _rasterize(pos, tri, _checked(pos, tri, resolution, ranges), ranges, grad_db, None)
    return rast, rast_db


def _checked(pos, tri, resolution, ranges) -> tuple[int, int]:
    instanced = isinstance(pos, torch.Tensor) and pos.dim() == 3
    require_tensor("pos", pos, ("batch", "vertices", 4) if instanced else ("vertices", 4))
    require_tensor("tri", tri, ("triangles", 3), torch.int32)
    require_same_device(pos=pos, tri=tri)
    if tri.shape[0] > reference.LARGEST_ID:
        raise ValueError(f"tri: expected at most {reference.LARGEST_ID} triangles, got {tri.shape[0]}")
    try:
        height, width = (int(n) for n in resolution)
    except (TypeError, ValueError):
        raise TypeError(f"resolution: expected two integers (height, width), got {resolution!r}") from None
    if not (0 <= height <= LARGEST_SIZE and 0 <= width <= LARGEST_SIZE):
        raise ValueError(f"resolution: expected sizes from 0 to {LARGEST_SIZE}, got {height} x {width}")
    if instanced:
        if ranges is not None:
            raise ValueError("ranges: expected None for pos of shape [batch, vertices, 4], got a tensor")
        return height, width
    if ranges is None:
        raise ValueError("ranges: expected an int32 tensor [batch, 2] for pos of shape [vertices, 4], got None")
    require_tensor("ranges", ranges, ("batch", 2), torch.int32)
    if ranges.device.type != "cpu":
        raise ValueError(f"ranges: expected device cpu, got {ranges.device}")
    if ranges.numel() and (int(ranges.min()) < 0 or int(ranges.long().sum(1).max()) > tri.shape[0]):
        raise ValueError(f"ranges: expected (start, count) within the {tri.shape[0]} triangles, got {ranges.tolist()}")
    return height, width


def _check_indices(tri, vertices):
    if tri.numel() and (int(tri.min()) < 0 or int(tri.max()) >= vertices):
        raise ValueError(f"tri: expected indices from 0 to {vertices - 1}, got {int(tri.min())} to {int(tri.max())}")


def _rasterize(pos, tri, resolution, ranges, grad_db, previous):
    _check_indices(tri, pos.shape[-2])
    return reference.rasterize(pos, tri, resolution, ranges, grad_db, previous)


class DepthPeeler:
    """Rasterize layer after layer, from the nearest to the farthest; arguments as `rasterize`.

    with ops.DepthPeeler(pos, tri, (H, W)) as peeler:
        rast, rast_db = peeler.rasterize_next_layer()

    Layers are ordered by (depth, then the last triangle first), so coincident triangles come one after the other and
    none is lost. Beyond the last layer everything is background.
    """

    def __init__(
        self,
        pos: torch.Tensor,
        tri: torch.Tensor,
        resolution: tuple[int, int],
        ranges: torch.Tensor | None = None,
        grad_db: bool = True,
    ):
        self._arguments = pos, tri, _checked(pos, tri, resolution, ranges), ranges, grad_db
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
        rast, rast_db, self._keys = _rasterize(*self._arguments, self._keys)
        return rast, rast_db
