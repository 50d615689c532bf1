"""Analytic antialiasing of silhouettes in plain torch: the oracle for `ops.antialias`. Any floating dtype."""

import torch

from text3d_fast.reference.rasterize import decode_triangle_ids

SLACK = 1 / 16  # a crossing this far beyond either pixel centre still counts, in pixels
SMALLEST_SPAN = 1e-3  # shorter edges, measured across the pair, are treated as this long by the gradient, in pixels


def opposite_vertices(tri: torch.Tensor) -> torch.Tensor:
    """tri int32 [F, 3] -> int32 [F, 3]: entry k is the vertex opposite to edge k (from corner k + 1 to k + 2) in the
    triangle on its other side, or -1 if there is none. Of more than two triangles at an edge, the next in order.
    """
    faces = tri.shape[0]
    edges = torch.stack([tri[:, [1, 2, 0]], tri[:, [2, 0, 1]]], -1).reshape(-1, 2).long()
    low, high = edges.min(-1).values, edges.max(-1).values
    order = torch.argsort(low * (int(tri.max()) + 1 if faces else 1) + high, stable=True)
    low, high = low[order], high[order]
    own = tri.reshape(-1)[order]
    same = (low[1:] == low[:-1]) & (high[1:] == high[:-1])
    none = torch.full((1,), -1, dtype=tri.dtype, device=tri.device)
    after = torch.cat([torch.where(same, own[1:], none), none]) if faces else own
    before = torch.cat([none, torch.where(same, own[:-1], none)]) if faces else own
    other = torch.where(after >= 0, after, before)
    out = torch.empty_like(other)
    out[order] = other
    return out.reshape(faces, 3)


def _pair_alpha(rast, pos, tri, opposite, height, width, axis):
    """Blend weights of all pairs (p0, p1) along an axis (0: p1 is to the right, 1: p1 is in the next row).

    Returns image, row, column of p0 and alpha of the pairs whose ids differ and whose silhouette crosses between them.
    """
    first = rast[:, :, :-1] if axis == 0 else rast[:, :-1]
    second = rast[:, :, 1:] if axis == 0 else rast[:, 1:]
    id0, id1 = decode_triangle_ids(first[..., 3]), decode_triangle_ids(second[..., 3])
    image, row, column = torch.nonzero(id0 != id1, as_tuple=True)
    id0, id1 = id0[image, row, column], id1[image, row, column]
    nearer0 = first[..., 2][image, row, column] < second[..., 2][image, row, column]
    take0 = (id1 < 0) | ((id0 >= 0) & nearer0)
    face = torch.where(take0, id0, id1).long()
    in_range = (face >= 0) & (face < tri.shape[0])
    image, row, column, face, take0 = (x[in_range] for x in (image, row, column, face, take0))

    corners = tri[face].long()
    vertices = pos[image[:, None], corners] if pos.dim() == 3 else pos[corners]  # [P, 3, 4]
    across = opposite[face].long()
    others = torch.where(across >= 0, across, corners)
    other_vertices = pos[image[:, None], others] if pos.dim() == 3 else pos[others]

    # Homogeneous pixel coordinates relative to the chosen pixel's centre; axis 0 runs along the pair.
    x0 = column + (~take0 if axis == 0 else 0)
    y0 = row + (~take0 if axis == 1 else 0)

    def relative(v):
        x = (v[..., 0] + v[..., 3]) * (0.5 * width) - v[..., 3] * (x0[:, None] + 0.5)
        y = (v[..., 1] + v[..., 3]) * (0.5 * height) - v[..., 3] * (y0[:, None] + 0.5)
        return torch.stack([x, y, v[..., 3]] if axis == 0 else [y, x, v[..., 3]], -1)

    p, q = relative(vertices), relative(other_vertices)
    sign = torch.where(take0, 1.0, -1.0).to(pos.dtype)
    best = torch.full_like(sign, -torch.inf)
    for k in range(3):
        a, b = p[:, (k + 1) % 3], p[:, (k + 2) % 3]
        line = torch.linalg.cross(a, b)
        silhouette = (line * p[:, k]).sum(-1) * (line * q[:, k]).sum(-1) > 0
        visible = (a[:, 2] > 0) & (b[:, 2] > 0)
        one = torch.ones_like(sign)
        wa, wb = torch.where(visible, a[:, 2], one), torch.where(visible, b[:, 2], one)
        along_a, along_b = a[:, 0] / wa, b[:, 0] / wb
        cross_a, cross_b = a[:, 1] / wa, b[:, 1] / wb
        straddles = (cross_a < 0) != (cross_b < 0)
        span = cross_b - cross_a
        steep = span.abs() >= (along_b - along_a).abs()
        usable = silhouette & visible & straddles & steep
        # The value divides by the true span; the gradient by one of at least SMALLEST_SPAN.
        safe = torch.where(usable, span, one)
        at = along_a - cross_a * (along_b - along_a) / safe
        widened = torch.where(safe < 0, -1.0, 1.0) * safe.abs().clamp(min=SMALLEST_SPAN)
        smooth = along_a - cross_a * (along_b - along_a) / widened
        crossing = sign * (smooth + (at - smooth).detach())
        crossing = torch.where(usable, crossing, torch.full_like(crossing, -torch.inf))
        best = torch.where(crossing > best, crossing, best)
    kept = (best > -SLACK) & (best < 1 + SLACK)
    image, row, column, best, sign = (x[kept] for x in (image, row, column, best, sign))
    return image, row, column, sign * (0.5 - best.clamp(0, 1))


def antialias(color, rast, pos, tri, opposite, boost: float = 1.0) -> torch.Tensor:
    """Shapes and meaning as `ops.antialias`, with `opposite` from `opposite_vertices(tri)`."""
    height, width = rast.shape[1:3]
    if boost != 1.0:
        pos = pos.detach() + boost * (pos - pos.detach())
    rast = rast.detach()
    out = color
    for axis in (0, 1):
        image, row, column, alpha = _pair_alpha(rast, pos, tri, opposite, height, width, axis)
        row1, column1 = row + (axis == 1), column + (axis == 0)
        difference = alpha[:, None] * (color[image, row1, column1] - color[image, row, column])
        to_first = alpha > 0
        target = (image, torch.where(to_first, row, row1), torch.where(to_first, column, column1))
        out = out.index_put(target, difference, accumulate=True)
    return out
