"""Triton twin of csrc/antialias: each pixel gathers from its pairs with four neighbours."""

import triton
import triton.language as tl
from text3d_fast._triton.common import decode_triangle_id, load_corners
from text3d_fast._triton.launch import block_for, options, padded, programs

SLACK = tl.constexpr(1.0 / 16.0)  # these two as in csrc/antialias/antialias.h
SMALLEST_SPAN = tl.constexpr(1e-3)


@triton.jit
def _vertex(pos, row, ok):
    """x, y, w in clip space."""
    return tl.load(pos + row * 4, ok, 0.0), tl.load(pos + row * 4 + 1, ok, 0.0), tl.load(pos + row * 4 + 3, ok, 1.0)


@triton.jit
def _relative(x, y, w, x0, y0, width, height, AXIS: tl.constexpr):
    """A vertex relative to a pixel centre, homogeneous, in pixels: along the pair, across it."""
    px = (x + w) * (0.5 * width) - w * x0
    py = (y + w) * (0.5 * height) - w * y0
    if AXIS == 0:
        return px, py
    else:
        return py, px


@triton.jit
def _try_edge(best, chosen_a, chosen_b, ok, sign, pos, first_vertex, across, vertices, va, vb, vc, ax, ay, aw, bx, by,
              bw, cx, cy, cw, x0, y0, width, height, AXIS: tl.constexpr):  # fmt: skip
    """Take edge a-b (corner c opposite) if it is a silhouette that crosses farther out than the best one so far."""
    along_a, across_a = _relative(ax, ay, aw, x0, y0, width, height, AXIS)
    along_b, across_b = _relative(bx, by, bw, x0, y0, width, height, AXIS)
    ok = ok & (aw > 0.0) & (bw > 0.0)
    wa, wb = tl.where(ok, aw, 1.0), tl.where(ok, bw, 1.0)
    along_a, across_a, along_b, across_b = along_a / wa, across_a / wa, along_b / wb, across_b / wb
    span = across_b - across_a
    ok = ok & ((across_a < 0.0) != (across_b < 0.0)) & (tl.abs(span) >= tl.abs(along_b - along_a))
    crossing = sign * (along_a - across_a * (along_b - along_a) / tl.where(ok, span, 1.0))
    ok = ok & (crossing > best)
    # does what lies across the edge fold back to the side of its own triangle?
    there = ok & (across >= 0) & (across < vertices)
    dx, dy, dw = _vertex(pos, first_vertex + across, there)
    dx, dy, dw = tl.where(there, dx, cx), tl.where(there, dy, cy), tl.where(there, dw, cw)
    x, y = ax / wa, ay / wa
    ex, ey = bx - bw * x, by - bw * y
    own, other = ex * (cy - cw * y) - ey * (cx - cw * x), ex * (dy - dw * y) - ey * (dx - dw * x)
    ok = ok & (((own > 0.0) & (other > 0.0)) | ((own < 0.0) & (other < 0.0)))
    return tl.where(ok, crossing, best), tl.where(ok, va, chosen_a), tl.where(ok, vb, chosen_b)


@triton.jit
def _blend(rast, pos, tri, opposite, first, second, row, column, exists, first_vertex, width, height, vertices, faces,
           AXIS: tl.constexpr):  # fmt: skip
    """Pixel `first` at (row, column) with its neighbour along the axis: alpha (0: nothing to blend), whether it moves
    with the crossing, the edge's vertices, the chosen pixel's centre."""
    raw0, raw1 = tl.load(rast + 4 * first + 3, exists, 0.0), tl.load(rast + 4 * second + 3, exists, 0.0)
    z0, z1 = tl.load(rast + 4 * first + 2, exists, 0.0), tl.load(rast + 4 * second + 2, exists, 0.0)
    id0, id1 = decode_triangle_id(raw0), decode_triangle_id(raw1)
    take0 = (id1 < 0) | ((id0 >= 0) & (z0 < z1))
    face = tl.where(take0, id0, id1)
    ok = exists & (raw0.to(tl.int32, bitcast=True) != raw1.to(tl.int32, bitcast=True)) & (face >= 0) & (face < faces)
    face = tl.where(ok, face, 0)
    shift = tl.where(take0, 0.5, 1.5)
    if AXIS == 0:
        x0, y0 = column + shift, row + 0.5
    else:
        x0, y0 = column + 0.5, row + shift
    v0, v1, v2, ok = load_corners(tri, face, ok, vertices)
    ax, ay, aw = _vertex(pos, first_vertex + v0, ok)
    bx, by, bw = _vertex(pos, first_vertex + v1, ok)
    cx, cy, cw = _vertex(pos, first_vertex + v2, ok)
    at = opposite + 3 * face.to(tl.int64)
    across0, across1, across2 = tl.load(at, ok, -1), tl.load(at + 1, ok, -1), tl.load(at + 2, ok, -1)
    sign = tl.where(take0, 1.0, -1.0)
    best = tl.full(sign.shape, -1e30, tl.float32)
    best, a, b = _try_edge(best, v0, v0, ok, sign, pos, first_vertex, across0, vertices, v1, v2, v0, bx, by, bw, cx, cy,
                           cw, ax, ay, aw, x0, y0, width, height, AXIS)  # fmt: skip
    best, a, b = _try_edge(best, a, b, ok, sign, pos, first_vertex, across1, vertices, v2, v0, v1, cx, cy, cw, ax, ay,
                           aw, bx, by, bw, x0, y0, width, height, AXIS)  # fmt: skip
    best, a, b = _try_edge(best, a, b, ok, sign, pos, first_vertex, across2, vertices, v0, v1, v2, ax, ay, aw, bx, by,
                           bw, cx, cy, cw, x0, y0, width, height, AXIS)  # fmt: skip
    ok = ok & (best > -SLACK) & (best < 1.0 + SLACK)
    alpha = tl.where(ok, sign * (0.5 - tl.minimum(tl.maximum(best, 0.0), 1.0)), 0.0)
    return alpha, ok & (best > 0.0) & (best < 1.0), a, b, x0, y0


@triton.jit
def _neighbour(i, row, column, width, height, AXIS: tl.constexpr, BACK: tl.constexpr):
    """The pair of pixel i with a neighbour: first and second pixel, the first's row and column, whether it exists."""
    if AXIS == 0:
        if BACK:
            return i - 1, i, row, column - 1, column > 0
        else:
            return i, i + 1, row, column, column + 1 < width
    else:
        if BACK:
            return i - width, i, row - 1, column, row > 0
        else:
            return i, i + width, row, column, row + 1 < height


@triton.jit
def forward_kernel(
    color, rast, pos, tri, opposite, out, instanced, height, width, vertices, faces, channels: tl.constexpr,
    PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64)
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real, i = j < height * width, image * height * width + j
    row, column = j // width, j % width
    first_vertex = image * instanced * vertices
    c = tl.arange(0, PADDED)[None, :]
    here = real[:, None] & (c < channels)
    value = tl.load(color + i[:, None] * channels + c, here, 0.0)
    for k in tl.static_range(4):
        first, second, r, q, exists = _neighbour(i, row, column, width, height, k // 2, k % 2)
        alpha, _, _, _, _, _ = _blend(rast, pos, tri, opposite, first, second, r, q, exists & real, first_vertex, width,
                                      height, vertices, faces, k // 2)  # fmt: skip
        mine = (alpha != 0.0) & (tl.where(alpha > 0.0, first, second) == i)
        at = mine[:, None] & (c < channels)
        value += alpha[:, None] * (tl.load(color + second[:, None] * channels + c, at, 0.0) -
                                   tl.load(color + first[:, None] * channels + c, at, 0.0))  # fmt: skip
    tl.store(out + i[:, None] * channels + c, value, here)


@triton.jit
def _scatter(grad_pos, vertex, moves, x, y, w, d_along, d_across, x0, y0, along, across, half_width, half_height, boost,
             AXIS: tl.constexpr):  # fmt: skip
    if AXIS == 0:
        dx, dy, px, py = d_along / w, d_across / w, along, across
    else:
        dx, dy, px, py = d_across / w, d_along / w, across, along
    to = grad_pos + vertex * 4
    tl.atomic_add(to, boost * dx * half_width, moves, sem="relaxed")
    tl.atomic_add(to + 1, boost * dy * half_height, moves, sem="relaxed")
    gw = dx * (half_width - x0 - px) + dy * (half_height - y0 - py)
    tl.atomic_add(to + 3, boost * gw, moves, sem="relaxed")


@triton.jit
def _position_gradient(grad_pos, pos, a, b, moves, d_alpha, x0, y0, width, height, boost, AXIS: tl.constexpr):
    """Through a movable pair's crossing to the ends of its edge."""
    ax, ay, aw = _vertex(pos, a, moves)
    bx, by, bw = _vertex(pos, b, moves)
    aw, bw = tl.where(moves, aw, 1.0), tl.where(moves, bw, 1.0)
    along_a, across_a = _relative(ax, ay, aw, x0, y0, width, height, AXIS)
    along_b, across_b = _relative(bx, by, bw, x0, y0, width, height, AXIS)
    along_a, across_a, along_b, across_b = along_a / aw, across_a / aw, along_b / bw, across_b / bw
    along, raw = along_b - along_a, across_b - across_a
    short = tl.abs(raw) < SMALLEST_SPAN
    span = tl.where(short, tl.where(raw < 0.0, -SMALLEST_SPAN, SMALLEST_SPAN), raw)
    ratio, d_crossing = across_a / span, -d_alpha
    d_span = tl.where(short, 0.0, d_crossing * ratio * along / span)
    half_width, half_height = 0.5 * width, 0.5 * height
    _scatter(grad_pos, a, moves, ax, ay, aw, d_crossing * (1.0 + ratio), -d_crossing * along / span - d_span, x0, y0,
             along_a, across_a, half_width, half_height, boost, AXIS)  # fmt: skip
    _scatter(grad_pos, b, moves, bx, by, bw, -d_crossing * ratio, d_span, x0, y0, along_b, across_b, half_width,
             half_height, boost, AXIS)  # fmt: skip


@triton.jit
def backward_kernel(
    grad_out, color, rast, pos, tri, opposite, grad_color, grad_pos, instanced, height, width, vertices, faces, boost,
    channels: tl.constexpr, TO_COLOR: tl.constexpr, TO_POS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64)
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real, i = j < height * width, image * height * width + j
    row, column = j // width, j % width
    first_vertex = image * instanced * vertices
    c = tl.arange(0, PADDED)[None, :]
    here = real[:, None] & (c < channels)
    value = tl.load(grad_out + i[:, None] * channels + c, here, 0.0)
    for k in tl.static_range(4):
        first, second, r, q, exists = _neighbour(i, row, column, width, height, k // 2, k % 2)
        alpha, movable, a, b, x0, y0 = _blend(rast, pos, tri, opposite, first, second, r, q, exists & real,
                                              first_vertex, width, height, vertices, faces, k // 2)  # fmt: skip
        at = (alpha != 0.0)[:, None] & (c < channels)
        g = tl.load(grad_out + tl.where(alpha > 0.0, first, second)[:, None] * channels + c, at, 0.0)
        value += (alpha if k % 2 else -alpha)[:, None] * g
        if TO_POS and k % 2 == 0:  # each pair once, at its first pixel
            difference = tl.load(color + second[:, None] * channels + c, at, 0.0)
            difference -= tl.load(color + first[:, None] * channels + c, at, 0.0)
            d_alpha = tl.sum(g * difference, 1)
            _position_gradient(grad_pos, pos, first_vertex + a, first_vertex + b, movable & (alpha != 0.0), d_alpha, x0,
                               y0, width, height, boost, k // 2)  # fmt: skip
    if TO_COLOR:
        tl.store(grad_color + i[:, None] * channels + c, value, here)


def antialias_forward(color, rast, pos, tri, opposite, out, flags, batch, pos_batch, height, width, vertices, faces,
                      channels):
    block = block_for("antialias", channels)
    if batch * height * width * channels:
        forward_kernel[programs(height * width, block), batch](
            color, rast, pos, tri, opposite, out, int(pos_batch > 1), height, width, vertices, faces, channels,
            padded(channels), block, **options("antialias"),
        )  # fmt: skip


def antialias_backward(grad_out, color, rast, pos, tri, opposite, flags, grad_color, grad_pos, batch, pos_batch, height,
                       width, vertices, faces, channels, boost):
    block = block_for("antialias", channels)
    if batch * height * width * channels:
        backward_kernel[programs(height * width, block), batch](
            grad_out, color, rast, pos, tri, opposite, color if grad_color is None else grad_color,
            pos if grad_pos is None else grad_pos, int(pos_batch > 1), height, width, vertices, faces, boost, channels,
            grad_color is not None, grad_pos is not None, padded(channels), block, **options("antialias"),
        )  # fmt: skip


def compile_cases():
    """(kernel, signature, constants) for the ahead-of-time check."""
    integers = dict.fromkeys(("instanced", "height", "width", "vertices", "faces"), "i32")
    types = {"tri": "*i32", "opposite": "*i32", "boost": "fp32", **integers}
    for kernel in (forward_kernel, backward_kernel):
        for channels in (1, 3):
            fixed = {"channels": channels, "TO_COLOR": True, "TO_POS": True, "PADDED": padded(channels), "BLOCK": 128}
            fixed = {name: value for name, value in fixed.items() if name in kernel.arg_names}
            yield kernel, {n: "constexpr" if n in fixed else types.get(n, "*fp32") for n in kernel.arg_names}, fixed
