"""Triton twin of csrc/rasterize: the same visibility keys bit for bit (csrc/rasterize/visibility.h says what they
mean). 
A lane draws a small triangle on its own; larger and clipped ones are queued and drawn by tiles of 16 x 16 pixels, the
programs shared out evenly among them. Keys are lowered with 64-bit atomic minima, whose order does not matter. Nothing
is fused to a multiply-add, divisions are exact.

queue: a counter, three words unused, then pairs (image, triangle).
"""

import triton
import triton.language as tl
from text3d_fast._triton.common import add_by_runs, decode_triangle_id, encode_triangle_id, load_corners, round_to_even
from text3d_fast._triton.launch import LAUNCH, options, programs

SMALL_PIXELS = tl.constexpr(128)  # of the bounding box
SMALL_EXTENT = tl.constexpr(64 * 256)  # 32-bit edge functions below
INVALID = tl.constexpr(64)
MINIMUM_W = tl.constexpr(1.17549435e-38)
MINIMUM_DENOMINATOR = tl.constexpr(1e-6)  # of gradients, relative to the triangle's extent
LARGEST = tl.constexpr(3.4028234663852886e38)
NOTHING = tl.constexpr(2**63 - 1)
TILE = tl.constexpr(16)
CORNERS = tl.constexpr(16)  # room for a clipped polygon, at most nine
TILE_PROGRAMS = 2048


@triton.jit
def clear_kernel(keys, count, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(keys + i, tl.full((BLOCK,), NOTHING, tl.int64), i < count)


@triton.jit
def _snap(x, y, z, w, drawable, height, width):
    """Snapped x, y in 1/256 pixel from the lower left corner, and z / w."""
    inverse = tl.div_rn(1.0, tl.where(drawable, w, 1.0))
    sx = round_to_even(tl.where(drawable, (x * inverse) * (width * 128.0), 0.0))
    sy = round_to_even(tl.where(drawable, (y * inverse) * (height * 128.0), 0.0))
    return sx.to(tl.int32) + width * 128, sy.to(tl.int32) + height * 128, z * inverse


@triton.jit
def snap_kernel(pos, snapped, count, height, width, guard, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = i < count
    x, y = tl.load(pos + 4 * i, real, 0.0), tl.load(pos + 4 * i + 1, real, 0.0)
    z, w = tl.load(pos + 4 * i + 2, real, 0.0), tl.load(pos + 4 * i + 3, real, 1.0)
    wide = guard * w
    code = tl.where(z + w >= 0.0, 0, 1) | tl.where(w - z >= 0.0, 0, 2) | tl.where(wide - x >= 0.0, 0, 4)
    code |= tl.where(wide + x >= 0.0, 0, 8) | tl.where(wide - y >= 0.0, 0, 16) | tl.where(wide + y >= 0.0, 0, 32)
    finite = (tl.abs(x) <= LARGEST) & (tl.abs(y) <= LARGEST) & (tl.abs(z) <= LARGEST) & (tl.abs(w) <= LARGEST)
    code = tl.where(finite & ((code != 0) | (w >= MINIMUM_W)), code, INVALID)
    sx, sy, depth = _snap(x, y, z, w, code == 0, height, width)
    tl.store(snapped + 4 * i, sx, real)
    tl.store(snapped + 4 * i + 1, sy, real)
    tl.store(snapped + 4 * i + 2, depth.to(tl.int32, bitcast=True), real)
    tl.store(snapped + 4 * i + 3, code, real)


@triton.jit
def _owned(dx, dy):
    """0 if the edge owns the points on it, otherwise 1."""
    return tl.where((dy < 0) | ((dy == 0) & (dx > 0)), 0, 1)


@triton.jit
def _canonical(ax, ay, az, bx, by, bz, cx, cy, cz):
    """Corners in canonical order, the smallest (x, y) first, then counter-clockwise: x, y, z of each, twice the area,
    orientation; then depth at corner 0 and its slopes."""
    first = (bx < ax) | ((bx == ax) & (by < ay))
    x0, x1, x2 = tl.where(first, bx, ax), tl.where(first, cx, bx), tl.where(first, ax, cx)
    y0, y1, y2 = tl.where(first, by, ay), tl.where(first, cy, by), tl.where(first, ay, cy)
    z0, z1, z2 = tl.where(first, bz, az), tl.where(first, cz, bz), tl.where(first, az, cz)
    second = (cx < x0) | ((cx == x0) & (cy < y0))
    x0, x1, x2 = tl.where(second, cx, x0), tl.where(second, ax, x1), tl.where(second, bx, x2)
    y0, y1, y2 = tl.where(second, cy, y0), tl.where(second, ay, y1), tl.where(second, by, y2)
    z0, z1, z2 = tl.where(second, cz, z0), tl.where(second, az, z1), tl.where(second, bz, z2)
    area = (x1 - x0).to(tl.int64) * (y2 - y0) - (y1 - y0).to(tl.int64) * (x2 - x0)
    orientation = tl.where(area > 0, 1, tl.where(area < 0, -1, 0))
    swap = area < 0
    x1, x2 = tl.where(swap, x2, x1), tl.where(swap, x1, x2)
    y1, y2 = tl.where(swap, y2, y1), tl.where(swap, y1, y2)
    z1, z2 = tl.where(swap, z2, z1), tl.where(swap, z1, z2)
    area = tl.where(swap, -area, area)
    inverse = tl.div_rn(1.0, tl.where(area == 0, 1, area).to(tl.float32))
    return x0, y0, x1, y1, x2, y2, area, orientation, z0, (z1 - z0) * inverse, (z2 - z0) * inverse


@triton.jit
def _depth(z, slope1, slope2, e1, e2):
    depth = (z + e1 * slope1) + e2 * slope2
    return tl.where(depth < -1.0, -1.0, tl.where(depth > 1.0, 1.0, depth))


@triton.jit
def _lower(keys, previous, cell, depth, triangle, covered, PEEL: tl.constexpr):
    """Keys order by depth, then by the larger triangle index."""
    bits = depth.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = (ordered.to(tl.int64) << 32) | ((~triangle).to(tl.int64) & 0xFFFFFFFF)
    covered = covered & (key < tl.load(keys + cell, covered, 0))  # a stale value is only larger
    if PEEL:
        covered = covered & (key > tl.load(previous + cell, covered, 0))
    tl.atomic_min(keys + cell, key, covered, sem="relaxed")


@triton.jit
def _pixels_between(low, high, size):
    """First and last pixel whose centres lie between two snapped coordinates, within the image."""
    return tl.maximum((low + 127) >> 8, 0), tl.minimum((high - 128) >> 8, size - 1)


@triton.jit
def draw_triangles_kernel(
    tri, ranges, previous, snapped, keys, queue, vertices, largest_count, height, width, instanced,
    HAS_RANGES: tl.constexpr, PEEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1)
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if HAS_RANGES:
        real = number < tl.load(ranges + 2 * image + 1)
        triangle = number + tl.load(ranges + 2 * image)
    else:
        real = number < largest_count
        triangle = number
    v0, v1, v2, real = load_corners(tri, triangle, real, vertices)
    first = image.to(tl.int64) * instanced * vertices
    a, b, c = snapped + 4 * (first + v0), snapped + 4 * (first + v1), snapped + 4 * (first + v2)
    code_a, code_b, code_c = tl.load(a + 3, real, 0), tl.load(b + 3, real, 0), tl.load(c + 3, real, 0)
    outside = code_a | code_b | code_c
    real = real & (outside < INVALID) & ((code_a & code_b & code_c) == 0)
    x0, y0, x1, y1, x2, y2, area, orientation, z, slope1, slope2 = _canonical(
        tl.load(a, real, 0), tl.load(a + 1, real, 0), tl.load(a + 2, real, 0).to(tl.float32, bitcast=True),
        tl.load(b, real, 0), tl.load(b + 1, real, 0), tl.load(b + 2, real, 0).to(tl.float32, bitcast=True),
        tl.load(c, real, 0), tl.load(c + 1, real, 0), tl.load(c + 2, real, 0).to(tl.float32, bitcast=True),
    )  # fmt: skip
    clipped = real & (outside != 0)
    high_x = tl.maximum(x1, x2)
    low_y, high_y = tl.minimum(y0, tl.minimum(y1, y2)), tl.maximum(y0, tl.maximum(y1, y2))
    left, right = _pixels_between(x0, high_x, width)
    bottom, top = _pixels_between(low_y, high_y, height)
    drawn = real & ~clipped & (orientation != 0) & (left <= right) & (bottom <= top)
    columns = tl.where(drawn, right - left + 1, 1)
    count = tl.where(drawn, columns.to(tl.int64) * (top - bottom + 1), 0)
    narrow = (high_x - x0 < SMALL_EXTENT) & (high_y - low_y < SMALL_EXTENT)
    small = drawn & narrow & (count <= SMALL_PIXELS)
    queued = clipped | (drawn & ~small)
    place = tl.atomic_add(queue + tl.zeros_like(triangle), 1, queued, sem="relaxed").to(tl.int64)
    tl.store(queue + 4 + 2 * place, tl.zeros_like(triangle) + image, queued)
    tl.store(queue + 5 + 2 * place, triangle, queued)

    dx1, dy1, dx2, dy2 = x0 - x2, y0 - y2, x1 - x0, y1 - y0
    owned0, owned1, owned2 = _owned(x2 - x1, y2 - y1), _owned(dx1, dy1), _owned(dx2, dy2)
    pixels, area32 = tl.where(small, count, 0).to(tl.int32), area.to(tl.int32)
    for k in range(tl.max(pixels)):
        x, y = left + k % columns, bottom + k // columns
        px, py = x * 256 + 128, y * 256 + 128
        e1, e2 = dx1 * (py - y2) - dy1 * (px - x2), dx2 * (py - y0) - dy2 * (px - x0)
        inside = ((area32 - e1 - e2 - owned0) | (e1 - owned1) | (e2 - owned2)) >= 0
        depth = _depth(z, slope1, slope2, e1.to(tl.float32), e2.to(tl.float32))
        cell = (image.to(tl.int64) * height + y) * width + x
        _lower(keys, previous, cell, depth, triangle, inside & (k < pixels), PEEL)


@triton.jit
def _clip_plane(x, y, z, w, count, guard, PLANE: tl.constexpr):
    """Sutherland and Hodgman on lanes, in double; each intersection goes from the inside corner to the outside one."""
    lane = tl.arange(0, CORNERS)
    if PLANE == 0:
        distance = z + w
    elif PLANE == 1:
        distance = w - z
    elif PLANE == 2:
        distance = guard * w - x
    elif PLANE == 3:
        distance = guard * w + x
    elif PLANE == 4:
        distance = guard * w - y
    else:
        distance = guard * w + y
    following = tl.where(lane + 1 < count, lane + 1, 0)
    xn, yn = tl.gather(x, following, 0), tl.gather(y, following, 0)
    zn, wn = tl.gather(z, following, 0), tl.gather(w, following, 0)
    distance_n = tl.gather(distance, following, 0)
    live = lane < count
    inside, inside_n = distance >= 0.0, distance_n >= 0.0
    keeps, crosses = live & inside, live & (inside != inside_n)
    near, far = tl.where(inside, distance, distance_n), tl.where(inside, distance_n, distance)
    t = near / tl.where(crosses, near - far, 1.0)
    ix, ox, iy, oy = tl.where(inside, x, xn), tl.where(inside, xn, x), tl.where(inside, y, yn), tl.where(inside, yn, y)
    iz, oz, iw, ow = tl.where(inside, z, zn), tl.where(inside, zn, z), tl.where(inside, w, wn), tl.where(inside, wn, w)
    cx, cy, cz, cw = ix + t * (ox - ix), iy + t * (oy - iy), iz + t * (oz - iz), iw + t * (ow - iw)
    upto = tl.cumsum(keeps.to(tl.int32) + crosses.to(tl.int32), 0)
    # where the corners of the new polygon come from
    source = tl.minimum(tl.sum((upto[:, None] <= lane[None, :]).to(tl.int32), 0), CORNERS - 1)
    before = tl.gather(upto - keeps.to(tl.int32) - crosses.to(tl.int32), source, 0)
    own = (before == lane) & (tl.gather(keeps.to(tl.int32), source, 0) != 0)
    x = tl.where(own, tl.gather(x, source, 0), tl.gather(cx, source, 0))
    y = tl.where(own, tl.gather(y, source, 0), tl.gather(cy, source, 0))
    z = tl.where(own, tl.gather(z, source, 0), tl.gather(cz, source, 0))
    w = tl.where(own, tl.gather(w, source, 0), tl.gather(cw, source, 0))
    count = tl.max(upto)
    return x, y, z, w, tl.where((count < 3) | (count > 9), 0, count)


@triton.jit
def _clip(pos, v0, v1, v2, guard, height, width):
    """The snapped corners that remain of a triangle: x, y, bits of z, and their number."""
    lane = tl.arange(0, CORNERS)
    row = pos + 4 * tl.where(lane == 0, v0, tl.where(lane == 1, v1, v2))
    x, y = tl.load(row, lane < 3, 0.0).to(tl.float64), tl.load(row + 1, lane < 3, 0.0).to(tl.float64)
    z, w = tl.load(row + 2, lane < 3, 0.0).to(tl.float64), tl.load(row + 3, lane < 3, 0.0).to(tl.float64)
    count = (v0 * 0 + 3).to(tl.int32)
    for plane in tl.static_range(6):
        x, y, z, w, count = _clip_plane(x, y, z, w, count, guard, plane)
    x, y, z, w = x.to(tl.float32), y.to(tl.float32), z.to(tl.float32), w.to(tl.float32)
    live, bound = lane < count, 2.0 * guard * w
    good = (w >= MINIMUM_W) & (tl.abs(x) <= bound) & (tl.abs(y) <= bound) & (tl.abs(z) <= 2.0 * w)
    sx, sy, depth = _snap(x, y, z, w, live & good, height, width)
    bad = tl.sum((live & ~good).to(tl.int32))
    return sx, sy, depth.to(tl.int32, bitcast=True), tl.where(bad > 0, 0, count)


@triton.jit
def _corner(x, y, z, lane, k):
    """Corner k of a polygon whose corners lie on lanes; z as bits."""
    here = lane == k
    depth = tl.sum(tl.where(here, z, 0)).to(tl.float32, bitcast=True)
    return tl.sum(tl.where(here, x, 0)), tl.sum(tl.where(here, y, 0)), depth


@triton.jit
def _largest_in_tile(x, y, dx, dy, px, py):
    """An edge function at the corner of a tile where it is largest; (px, py): the tile's first pixel centre."""
    across = (TILE - 1) * 256
    ex, ey = tl.where(dy < 0, px + across, px), tl.where(dx > 0, py + across, py)
    return dx.to(tl.int64) * (ey - y) - dy.to(tl.int64) * (ex - x)


@triton.jit
def draw_tiles_kernel(pos, tri, previous, snapped, keys, queue, vertices, height, width, guard, instanced,
                      PEEL: tl.constexpr, PROGRAMS: tl.constexpr):  # fmt: skip
    count = tl.load(queue)
    sharing = tl.maximum(PROGRAMS // tl.maximum(count, 1), 1)  # programs for one triangle
    groups = PROGRAMS // sharing
    item, part = tl.program_id(0) // sharing, tl.program_id(0) % sharing
    item = tl.where(item < groups, item, count)
    lane = tl.arange(0, CORNERS)
    pixel = tl.arange(0, TILE * TILE)
    while item < count:
        image, triangle = tl.load(queue + 4 + 2 * item.to(tl.int64)), tl.load(queue + 5 + 2 * item.to(tl.int64))
        at = tri + 3 * triangle.to(tl.int64)
        first = image.to(tl.int64) * instanced * vertices
        v0, v1, v2 = first + tl.load(at), first + tl.load(at + 1), first + tl.load(at + 2)
        outside = tl.load(snapped + 4 * v0 + 3) | tl.load(snapped + 4 * v1 + 3) | tl.load(snapped + 4 * v2 + 3)
        row = snapped + 4 * tl.where(lane == 0, v0, tl.where(lane == 1, v1, v2))
        x, y, z = tl.load(row, lane < 3, 0), tl.load(row + 1, lane < 3, 0), tl.load(row + 2, lane < 3, 0)
        corners = (v0 * 0 + 3).to(tl.int32)
        if outside != 0:
            x, y, z, corners = _clip(pos, v0, v1, v2, guard, height, width)
        live = lane < corners
        left, right = _pixels_between(tl.min(tl.where(live, x, 2**30)), tl.max(tl.where(live, x, -(2**30))), width)
        bottom, top = _pixels_between(tl.min(tl.where(live, y, 2**30)), tl.max(tl.where(live, y, -(2**30))), height)
        columns = tl.maximum((right - left) // TILE + 1, 1)
        tiles = tl.where((left <= right) & (bottom <= top), columns * ((top - bottom) // TILE + 1), 0)
        tile = part
        while tile < tiles:
            tile_x, tile_y = left + tile % columns * TILE, bottom + tile // columns * TILE
            px, py = (tile_x + pixel % TILE) * 256 + 128, (tile_y + pixel // TILE) * 256 + 128
            winding = tl.zeros((TILE * TILE,), tl.int32)
            depth = tl.full((TILE * TILE,), 2.0, tl.float32)
            ax, ay, az = _corner(x, y, z, lane, 0)
            for k in range(1, corners - 1):
                bx, by, bz = _corner(x, y, z, lane, k)
                cx, cy, cz = _corner(x, y, z, lane, k + 1)
                x0, y0, x1, y1, x2, y2, area, orientation, z0, slope1, slope2 = _canonical(ax, ay, az, bx, by, bz, cx,
                                                                                           cy, cz)
                dx0, dy0, dx1, dy1, dx2, dy2 = x2 - x1, y2 - y1, x0 - x2, y0 - y2, x1 - x0, y1 - y0
                tx, ty = tile_x * 256 + 128, tile_y * 256 + 128
                touched = (_largest_in_tile(x1, y1, dx0, dy0, tx, ty) >= 0) & (orientation != 0)
                touched = touched & (_largest_in_tile(x2, y2, dx1, dy1, tx, ty) >= 0)
                touched = touched & (_largest_in_tile(x0, y0, dx2, dy2, tx, ty) >= 0)
                if touched:
                    e1 = dx1.to(tl.int64) * (py - y2) - dy1.to(tl.int64) * (px - x2)
                    e2 = dx2.to(tl.int64) * (py - y0) - dy2.to(tl.int64) * (px - x0)
                    signs = (area - e1 - e2 - _owned(dx0, dy0)) | (e1 - _owned(dx1, dy1)) | (e2 - _owned(dx2, dy2))
                    inside = signs >= 0
                    own = _depth(z0, slope1, slope2, e1.to(tl.float32), e2.to(tl.float32))
                    winding += tl.where(inside, orientation, 0)
                    depth = tl.where(inside & (own < depth), own, depth)
            column, line = tile_x + pixel % TILE, tile_y + pixel // TILE
            covered = (winding != 0) & (column <= right) & (line <= top)
            cell = (image.to(tl.int64) * height + line) * width + column
            _lower(keys, previous, cell, depth, triangle, covered, PEEL)
            tile += sharing
        item += groups


@triton.jit
def _reciprocal(x):
    return tl.where(x != 0.0, tl.div_rn(1.0, tl.where(x != 0.0, x, 1.0)), 0.0)


@triton.jit
def _clamp(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def _edges(pos, r0, r1, r2, seen, fx, fy):
    """The corners relative to a pixel's centre (x, y, w of each) and the homogeneous edge functions."""
    w0, w1, w2 = tl.load(pos + r0 + 3, seen, 1.0), tl.load(pos + r1 + 3, seen, 1.0), tl.load(pos + r2 + 3, seen, 1.0)
    x0, y0 = tl.load(pos + r0, seen, 0.0) - fx * w0, tl.load(pos + r0 + 1, seen, 0.0) - fy * w0
    x1, y1 = tl.load(pos + r1, seen, 0.0) - fx * w1, tl.load(pos + r1 + 1, seen, 0.0) - fy * w1
    x2, y2 = tl.load(pos + r2, seen, 0.0) - fx * w2, tl.load(pos + r2 + 1, seen, 0.0) - fy * w2
    return x0, y0, w0, x1, y1, w1, x2, y2, w2, x1 * y2 - y1 * x2, x2 * y0 - y2 * x0, x0 * y1 - y0 * x1


@triton.jit
def _centre(pixel, size):
    return tl.div_rn((2 * pixel + 1).to(tl.float32), size.to(tl.float32)) - 1.0


@triton.jit
def resolve_kernel(pos, tri, keys, rast, rast_db, vertices, height, width, instanced, BLOCK: tl.constexpr):
    image = tl.program_id(1).to(tl.int64)
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real, i = j < height * width, image * height * width + j
    key = tl.load(keys + i, real, NOTHING)
    triangle = tl.where(key == NOTHING, -1, ~key.to(tl.int32))
    v0, v1, v2, seen = load_corners(tri, tl.where(triangle >= 0, triangle, 0), triangle >= 0, vertices)
    first = image * instanced * vertices
    r0, r1, r2 = 4 * (first + v0), 4 * (first + v1), 4 * (first + v2)
    columns, rows = tl.zeros_like(j) + width, tl.zeros_like(j) + height
    fx, fy = _centre(j % width, columns), _centre(j // width, rows)
    scale_x, scale_y = tl.div_rn(2.0, columns.to(tl.float32)), tl.div_rn(2.0, rows.to(tl.float32))
    x0, y0, w0, x1, y1, w1, x2, y2, w2, a0, a1, a2 = _edges(pos, r0, r1, r2, seen, fx, fy)
    inverse = _reciprocal(a0 + a1 + a2)
    u, v = a0 * inverse, a1 * inverse
    sx0, sy0 = w2 * y1 - w1 * y2, w1 * x2 - w2 * x1
    sx1, sy1 = w0 * y2 - w2 * y0, w2 * x0 - w0 * x2
    sum_x, sum_y = sx0 + sx1 + (w1 * y0 - w0 * y1), sy0 + sy1 + (w0 * x1 - w1 * x0)
    sx, sy = inverse * scale_x, inverse * scale_y
    z0, z1, z2 = tl.load(pos + r0 + 2, seen, 0.0), tl.load(pos + r1 + 2, seen, 0.0), tl.load(pos + r2 + 2, seen, 0.0)
    depth = (z0 * a0 + z1 * a1 + z2 * a2) * _reciprocal(w0 * a0 + w1 * a1 + w2 * a2)
    u1, v1 = _clamp(u, 0.0, 1.0), _clamp(v, 0.0, 1.0)
    shrink = tl.div_rn(1.0, tl.maximum(u1 + v1, 1.0))
    tl.store(rast + 4 * i, tl.where(seen, u1 * shrink, 0.0), real)
    tl.store(rast + 4 * i + 1, tl.where(seen, v1 * shrink, 0.0), real)
    tl.store(rast + 4 * i + 2, tl.where(seen, _clamp(depth, -1.0, 1.0), 0.0), real)
    tl.store(rast + 4 * i + 3, encode_triangle_id(tl.where(seen, triangle, -1)), real)
    tl.store(rast_db + 4 * i, tl.where(seen, (sx0 - u * sum_x) * sx, 0.0), real)
    tl.store(rast_db + 4 * i + 1, tl.where(seen, (sy0 - u * sum_y) * sy, 0.0), real)
    tl.store(rast_db + 4 * i + 2, tl.where(seen, (sx1 - v * sum_x) * sx, 0.0), real)
    tl.store(rast_db + 4 * i + 3, tl.where(seen, (sy1 - v * sum_y) * sy, 0.0), real)


@triton.jit
def _to_corner(out, row, j, gx, gy, gw, fx, fy, starts, ends, real, TO_PIXELS: tl.constexpr):
    """The gradient of a corner relative to the pixel's centre, to x, y, w: to the pixel's place, or by runs."""
    gw = gw - fx * gx - fy * gy
    if TO_PIXELS:
        tl.store(out + j, gx, real)
        tl.store(out + j + 1, gy, real)
        tl.store(out + j + 3, gw, real)
    else:
        add_by_runs(out + row, gx, starts, ends)
        add_by_runs(out + row + 1, gy, starts, ends)
        add_by_runs(out + row + 3, gw, starts, ends)


@triton.jit
def gradient_kernel(
    pos, tri, rast, grad_rast, grad_db, out, vertices, triangles, height, width, instanced, DERIVATIVES: tl.constexpr,
    TO_PIXELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    j = tl.program_id(0) * BLOCK + lane
    real, i = j < height * width, image * height * width + j
    raw = tl.load(rast + 4 * i + 3, real, 0.0)
    triangle = decode_triangle_id(raw)
    seen = (triangle >= 0) & (triangle < triangles)
    v0, v1, v2, seen = load_corners(tri, tl.where(seen, triangle, 0), seen, vertices)
    starts = ((lane == 0) | (raw != tl.load(rast + 4 * i - 1, real & (lane > 0), 0.0))).to(tl.int32)
    last = (lane == BLOCK - 1) | (j == height * width - 1)
    ends = seen & (last | (raw != tl.load(rast + 4 * i + 7, real & ~last, 0.0)))

    first = image * instanced * vertices
    r0, r1, r2 = 4 * (first + v0), 4 * (first + v1), 4 * (first + v2)
    columns, rows = tl.zeros_like(j) + width, tl.zeros_like(j) + height
    fx, fy = _centre(j % width, columns), _centre(j // width, rows)
    x0, y0, w0, x1, y1, w1, x2, y2, w2, a0, a1, a2 = _edges(pos, r0, r1, r2, seen, fx, fy)
    total = a0 + a1 + a2
    least = MINIMUM_DENOMINATOR * (x0 * x0 + y0 * y0 + x1 * x1 + y1 * y1 + x2 * x2 + y2 * y2)
    total = tl.where(total < 0.0, tl.minimum(total, -least), tl.maximum(total, least))
    inverse = _reciprocal(total)
    u, v = a0 * inverse, a1 * inverse
    gu, gv = tl.load(grad_rast + 4 * i, seen, 0.0), tl.load(grad_rast + 4 * i + 1, seen, 0.0)
    zero = tl.zeros_like(u)
    beyond, gsx0, gsx1, gsx2, gsy0, gsy1, gsy2 = zero, zero, zero, zero, zero, zero, zero
    if DERIVATIVES:
        sx0, sy0 = w2 * y1 - w1 * y2, w1 * x2 - w2 * x1
        sx1, sy1 = w0 * y2 - w2 * y0, w2 * x0 - w0 * x2
        sum_x, sum_y = sx0 + sx1 + (w1 * y0 - w0 * y1), sy0 + sy1 + (w0 * x1 - w1 * x0)
        scale_x, scale_y = inverse * (2.0 / columns), inverse * (2.0 / rows)
        gux, guy = tl.load(grad_db + 4 * i, seen, 0.0) * scale_x, tl.load(grad_db + 4 * i + 1, seen, 0.0) * scale_y
        gvx, gvy = tl.load(grad_db + 4 * i + 2, seen, 0.0) * scale_x, tl.load(grad_db + 4 * i + 3, seen, 0.0) * scale_y
        gu, gv = gu - gux * sum_x - guy * sum_y, gv - gvx * sum_x - gvy * sum_y
        beyond = gux * (sx0 - u * sum_x) + guy * (sy0 - u * sum_y) + gvx * (sx1 - v * sum_x) + gvy * (sy1 - v * sum_y)
        gsx2, gsy2 = -(gux * u + gvx * v), -(guy * u + gvy * v)
        gsx0, gsx1, gsy0, gsy1 = gux + gsx2, gvx + gsx2, guy + gsy2, gvy + gsy2
    g2 = -inverse * (gu * u + gv * v + beyond)
    g0, g1 = gu * inverse + g2, gv * inverse + g2
    # corner n is the first factor of edge n + 2 and the second of edge n + 1; see resolve_gradient of rasterize.h
    _to_corner(out, r0, 12 * i, g2 * y1 - g1 * y2 + gsy1 * w2 - gsy2 * w1, g1 * x2 - g2 * x1 + gsx2 * w1 - gsx1 * w2,
               gsx1 * y2 - gsx2 * y1 + gsy2 * x1 - gsy1 * x2, fx, fy, starts, ends, seen, TO_PIXELS)  # fmt: skip
    _to_corner(out, r1, 12 * i + 4, g0 * y2 - g2 * y0 + gsy2 * w0 - gsy0 * w2,
               g2 * x0 - g0 * x2 + gsx0 * w2 - gsx2 * w0, gsx2 * y0 - gsx0 * y2 + gsy0 * x2 - gsy2 * x0, fx,
               fy, starts, ends, seen, TO_PIXELS)  # fmt: skip
    _to_corner(out, r2, 12 * i + 8, g1 * y0 - g0 * y1 + gsy0 * w1 - gsy1 * w0,
               g0 * x1 - g1 * x0 + gsx1 * w0 - gsx0 * w1, gsx0 * y1 - gsx1 * y0 + gsy1 * x0 - gsy0 * x1, fx,
               fy, starts, ends, seen, TO_PIXELS)  # fmt: skip


def _guard(height, width):
    return float((1 << 21) >> (max(height, width, 1) - 1).bit_length())


def rasterize_forward(pos, tri, ranges, previous, snapped, keys, queue, rast, rast_db, batch, vertices, triangles,
                      largest_count, queue_capacity, height, width, instanced):
    pixels, guard = height * width, _guard(height, width)
    if not batch * pixels:
        return
    small, wide = LAUNCH["rasterize_triangles"], LAUNCH["rasterize_pixels"]
    clear_kernel[(programs(batch * pixels, 1024),)](keys, batch * pixels, 1024, **options("fill"))
    if batch * largest_count:
        queue[:4].zero_()
        count = vertices * (batch if instanced else 1)
        if count:
            snap_kernel[(programs(count, wide.block),)](pos, snapped, count, height, width, guard, wide.block,
                                                        **options("rasterize_pixels"))
        draw_triangles_kernel[programs(largest_count, small.block), batch](
            tri, tri if ranges is None else ranges, keys if previous is None else previous, snapped, keys, queue,
            vertices, largest_count, height, width, instanced, ranges is not None, previous is not None, small.block,
            **options("rasterize_triangles"),
        )  # fmt: skip
        share = min(TILE_PROGRAMS, batch * largest_count * programs(height, 16) * programs(width, 16))
        draw_tiles_kernel[(share,)](
            pos, tri, keys if previous is None else previous, snapped, keys, queue, vertices, height, width, guard,
            instanced, previous is not None, share, **options("rasterize_tiles"),
        )  # fmt: skip
    resolve_kernel[programs(pixels, wide.block), batch](pos, tri, keys, rast, rast_db, vertices, height, width,
                                                        instanced, wide.block, **options("rasterize_pixels"))


def rasterize_backward(pos, tri, rast, grad_rast, grad_db, grad_pos, contributions, batch, vertices, triangles, height,
                       width, instanced):
    wide = LAUNCH["rasterize_pixels"]
    if batch * height * width and triangles:
        gradient_kernel[programs(height * width, wide.block), batch](
            pos, tri, rast, grad_rast, rast if grad_db is None else grad_db,
            grad_pos if contributions is None else contributions, vertices, triangles, height, width, instanced,
            grad_db is not None, contributions is not None, wide.block, **options("rasterize_pixels"),
        )  # fmt: skip


def compile_cases():
    """(kernel, signature, constants) for the ahead-of-time check."""
    types = dict.fromkeys(("tri", "ranges", "snapped", "queue"), "*i32")
    types |= dict.fromkeys(("previous", "keys"), "*i64") | {"guard": "fp32"}
    types |= dict.fromkeys(("vertices", "triangles", "largest_count", "height", "width", "instanced", "count"), "i32")
    flags = [
        (clear_kernel, {"BLOCK": 1024}),
        (snap_kernel, {"BLOCK": 128}),
        (draw_triangles_kernel, {"HAS_RANGES": False, "PEEL": False, "BLOCK": 32}),
        (draw_triangles_kernel, {"HAS_RANGES": True, "PEEL": True, "BLOCK": 32}),
        (draw_tiles_kernel, {"PEEL": False, "PROGRAMS": TILE_PROGRAMS}),
        (draw_tiles_kernel, {"PEEL": True, "PROGRAMS": TILE_PROGRAMS}),
        (resolve_kernel, {"BLOCK": 128}),
        (gradient_kernel, {"DERIVATIVES": True, "TO_PIXELS": False, "BLOCK": 128}),
        (gradient_kernel, {"DERIVATIVES": False, "TO_PIXELS": True, "BLOCK": 128}),
    ]
    for kernel, fixed in flags:
        yield kernel, {n: "constexpr" if n in fixed else types.get(n, "*fp32") for n in kernel.arg_names}, fixed
