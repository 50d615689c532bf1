"""Triton twin of csrc/interpolate: a program takes neighbouring pixels of one image, a tile of pixels by attributes.

Gradients to vertices are summed over runs of pixels that see one triangle before they are added to memory.
"""

import triton
import triton.language as tl
from text3d_fast._triton.common import add_by_runs, decode_triangle_id, load_corners
from text3d_fast._triton.launch import block_for, options, padded, programs


@triton.jit
def _pixel(rast, tri, i, real, vertices, triangles):
    """Of each pixel: triangle (-1 where none is seen), its vertices, u, v."""
    triangle = decode_triangle_id(tl.load(rast + 4 * i + 3, real, 0.0))
    seen = (triangle >= 0) & (triangle < triangles)
    v0, v1, v2, seen = load_corners(tri, tl.where(seen, triangle, 0), seen, vertices)
    u, v = tl.load(rast + 4 * i, seen, 0.0), tl.load(rast + 4 * i + 1, seen, 0.0)
    return tl.where(seen, triangle, -1), v0, v1, v2, u, v


@triton.jit
def _columns(chosen, attributes: tl.constexpr, derivatives: tl.constexpr, PADDED: tl.constexpr, CHOSEN: tl.constexpr):
    """The attributes whose derivatives are wanted, and which lanes stand for one."""
    d = tl.arange(0, PADDED)
    c = tl.load(chosen + d, d < derivatives, 0) if CHOSEN else d
    return d, c, d < derivatives


@triton.jit
def forward_kernel(
    attr, rast, tri, rast_db, chosen, out, out_da, pixels, vertices, triangles, attributes: tl.constexpr,
    derivatives: tl.constexpr, SHARED: tl.constexpr, CHOSEN: tl.constexpr, A_PADDED: tl.constexpr,
    D_PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64)
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real, i = j < pixels, image * pixels + j
    triangle, v0, v1, v2, u, v = _pixel(rast, tri, i, real, vertices, triangles)
    first = 0 if SHARED else image * vertices
    seen, w = triangle >= 0, tl.where(triangle >= 0, 1.0 - u - v, 0.0)
    row0, row1, row2 = (first + v0) * attributes, (first + v1) * attributes, (first + v2) * attributes

    c = tl.arange(0, A_PADDED)
    here = seen[:, None] & (c < attributes)[None, :]
    a0 = tl.load(attr + row0[:, None] + c[None, :], here, 0.0)
    a1 = tl.load(attr + row1[:, None] + c[None, :], here, 0.0)
    a2 = tl.load(attr + row2[:, None] + c[None, :], here, 0.0)
    value = u[:, None] * a0 + v[:, None] * a1 + w[:, None] * a2
    tl.store(out + i[:, None] * attributes + c[None, :], value, real[:, None] & (c < attributes)[None, :])
    if derivatives > 0:
        d, c, wanted = _columns(chosen, attributes, derivatives, D_PADDED, CHOSEN)
        here = seen[:, None] & wanted[None, :]
        a2 = tl.load(attr + row2[:, None] + c[None, :], here, 0.0)
        along_u = tl.load(attr + row0[:, None] + c[None, :], here, 0.0) - a2
        along_v = tl.load(attr + row1[:, None] + c[None, :], here, 0.0) - a2
        ux, uy = tl.load(rast_db + 4 * i, seen, 0.0)[:, None], tl.load(rast_db + 4 * i + 1, seen, 0.0)[:, None]
        vx, vy = tl.load(rast_db + 4 * i + 2, seen, 0.0)[:, None], tl.load(rast_db + 4 * i + 3, seen, 0.0)[:, None]
        to = out_da + (i[:, None] * derivatives + d[None, :]) * 2
        tl.store(to, along_u * ux + along_v * vx, real[:, None] & wanted[None, :])
        tl.store(to + 1, along_u * uy + along_v * vy, real[:, None] & wanted[None, :])


@triton.jit
def backward_kernel(
    attr, rast, tri, rast_db, chosen, grad_out, grad_da, grad_attr, grad_rast, grad_db, pixels, vertices, triangles,
    attributes: tl.constexpr, derivatives: tl.constexpr, SHARED: tl.constexpr, CHOSEN: tl.constexpr,
    WANTED: tl.constexpr, A_PADDED: tl.constexpr, D_PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    j = tl.program_id(0) * BLOCK + lane
    real, i = j < pixels, image * pixels + j
    triangle, v0, v1, v2, u, v = _pixel(rast, tri, i, real, vertices, triangles)
    first = 0 if SHARED else image * vertices
    seen, w = triangle >= 0, tl.where(triangle >= 0, 1.0 - u - v, 0.0)
    row0, row1, row2 = (first + v0) * attributes, (first + v1) * attributes, (first + v2) * attributes
    raw = tl.load(rast + 4 * i + 3, real, 0.0)
    starts = ((lane == 0) | (raw != tl.load(rast + 4 * i - 1, real & (lane > 0), 0.0))).to(tl.int32)
    last = (lane == BLOCK - 1) | (j == pixels - 1)
    ends = seen & (last | (raw != tl.load(rast + 4 * i + 7, real & ~last, 0.0)))

    c = tl.arange(0, A_PADDED)
    here = seen[:, None] & (c < attributes)[None, :]
    a2 = tl.load(attr + row2[:, None] + c[None, :], here, 0.0)
    g = tl.load(grad_out + i[:, None] * attributes + c[None, :], here, 0.0)
    gu = tl.sum(g * (tl.load(attr + row0[:, None] + c[None, :], here, 0.0) - a2), 1)
    gv = tl.sum(g * (tl.load(attr + row1[:, None] + c[None, :], here, 0.0) - a2), 1)
    tl.store(grad_rast + 4 * i, gu, real)
    tl.store(grad_rast + 4 * i + 1, gv, real)
    tl.store(grad_rast + 4 * i + 2, tl.zeros_like(gu), real)
    tl.store(grad_rast + 4 * i + 3, tl.zeros_like(gu), real)
    if WANTED:
        adds, begins = ends[:, None] & (c < attributes)[None, :], tl.broadcast_to(starts[:, None], g.shape)
        add_by_runs(grad_attr + row0[:, None] + c[None, :], u[:, None] * g, begins, adds)
        add_by_runs(grad_attr + row1[:, None] + c[None, :], v[:, None] * g, begins, adds)
        add_by_runs(grad_attr + row2[:, None] + c[None, :], w[:, None] * g, begins, adds)
    if derivatives > 0:
        d, c, wanted = _columns(chosen, attributes, derivatives, D_PADDED, CHOSEN)
        here = seen[:, None] & wanted[None, :]
        a2 = tl.load(attr + row2[:, None] + c[None, :], here, 0.0)
        along_u = tl.load(attr + row0[:, None] + c[None, :], here, 0.0) - a2
        along_v = tl.load(attr + row1[:, None] + c[None, :], here, 0.0) - a2
        gx = tl.load(grad_da + (i[:, None] * derivatives + d[None, :]) * 2, here, 0.0)
        gy = tl.load(grad_da + (i[:, None] * derivatives + d[None, :]) * 2 + 1, here, 0.0)
        tl.store(grad_db + 4 * i, tl.sum(gx * along_u, 1), real)
        tl.store(grad_db + 4 * i + 1, tl.sum(gy * along_u, 1), real)
        tl.store(grad_db + 4 * i + 2, tl.sum(gx * along_v, 1), real)
        tl.store(grad_db + 4 * i + 3, tl.sum(gy * along_v, 1), real)
        if WANTED:
            ux, uy = tl.load(rast_db + 4 * i, seen, 0.0)[:, None], tl.load(rast_db + 4 * i + 1, seen, 0.0)[:, None]
            vx, vy = tl.load(rast_db + 4 * i + 2, seen, 0.0)[:, None], tl.load(rast_db + 4 * i + 3, seen, 0.0)[:, None]
            g0, g1, adds = gx * ux + gy * uy, gx * vx + gy * vy, ends[:, None] & wanted[None, :]
            begins = tl.broadcast_to(starts[:, None], g0.shape)
            add_by_runs(grad_attr + row0[:, None] + c[None, :], g0, begins, adds)
            add_by_runs(grad_attr + row1[:, None] + c[None, :], g1, begins, adds)
            add_by_runs(grad_attr + row2[:, None] + c[None, :], -g0 - g1, begins, adds)


def _launch(images, pixels, attributes, derivatives):
    channels = max(attributes, derivatives)
    block = block_for("interpolate", channels)
    return (programs(pixels, block), images), (padded(attributes), padded(derivatives), block)


def interpolate_forward(attr, rast, tri, rast_db, chosen, out, out_da, images, pixels, vertices, triangles, attributes,
                        derivatives, shared):
    grid, tile = _launch(images, pixels, attributes, derivatives)
    if images and pixels:
        forward_kernel[grid](
            attr, rast, tri, rast if rast_db is None else rast_db, tri if chosen is None else chosen, out, out_da,
            pixels, vertices, triangles, attributes, derivatives, shared, chosen is not None, *tile,
            **options("interpolate"),
        )  # fmt: skip


def interpolate_backward(attr, rast, tri, rast_db, chosen, grad_out, grad_da, grad_attr, grad_rast, grad_db, images,
                         pixels, vertices, triangles, attributes, derivatives, shared):
    grid, tile = _launch(images, pixels, attributes, derivatives)
    if images and pixels:
        backward_kernel[grid](
            attr, rast, tri, rast if rast_db is None else rast_db, tri if chosen is None else chosen, grad_out, grad_da,
            rast if grad_attr is None else grad_attr, grad_rast, grad_db, pixels, vertices, triangles, attributes,
            derivatives, shared, chosen is not None, grad_attr is not None, *tile,
            **options("interpolate"),
        )  # fmt: skip


def compile_cases():
    """(kernel, signature, constants) for the ahead-of-time check."""
    for kernel in (forward_kernel, backward_kernel):
        for attributes, derivatives, chosen in ((3, 0, 0), (4, 4, 0), (17, 2, 1)):
            grid, tile = _launch(1, 1, attributes, derivatives)
            fixed = {"attributes": attributes, "derivatives": derivatives, "SHARED": 0, "CHOSEN": bool(chosen),
                     "WANTED": True, **dict(zip(("A_PADDED", "D_PADDED", "BLOCK"), tile))}
            fixed = {name: value for name, value in fixed.items() if name in kernel.arg_names}
            integers = {"tri": "*i32", "chosen": "*i32", "pixels": "i32", "vertices": "i32", "triangles": "i32"}
            yield kernel, {n: "constexpr" if n in fixed else integers.get(n, "*fp32") for n in kernel.arg_names}, fixed
