"""Triangle rasterization in plain torch: the oracle for `ops.rasterize` and `ops.DepthPeeler`.

Visibility is exact and has one definition for every backend, bit for bit:

1. Triangles that leave the frustum's near (z >= -w) or far (z <= w) plane, or the guard band |x|, |y| <= guard * w, are
   clipped in homogeneous space, in the order of PLANES. An intersection is computed from the inside vertex towards the
   outside one, so both triangles at an edge get the same point.
2. Vertices are projected in float32 and snapped to 1/256 pixel. Edge functions are integers.
3. A pixel belongs to a triangle if its centre, moved by an infinitesimal (e, e^2), is inside: on a shared edge exactly
   one of the two owns it (the top-left rule in memory order, row 0 first). A clipped polygon covers a pixel if the
   signed count of its fan's triangles there is not zero, with the smallest of their depths.
4. Depth is affine in the snapped triangle, its vertices ordered from the smallest (x, y) counter-clockwise, so that
   coincident triangles tie exactly however they are wound. key = ordered(depth) << 32 | ~id; the smallest key is seen:
   the nearest triangle and, on a tie, the last one.
"""

import torch

SUBPIXELS = 256
PLANES = ("near", "far", "right", "left", "top", "bottom")
INVALID = 1 << len(PLANES)
MINIMUM_W = 1.17549435e-38  # the smallest normal float32: nearer to the camera's centre a point has no projection
NOTHING = torch.iinfo(torch.int64).max  # the key of a pixel that no triangle covers
MINIMUM_DENOMINATOR = 1e-6  # of gradients, relative to the triangle's extent
LARGEST_SIZE = 1 << 20  # pixels a side
LARGEST_FLOAT_ID = 1 << 24  # ids above are stored as bit patterns
ID_BITS_OFFSET = 0x4A800000
LARGEST_ID = 0x7F800000 - ID_BITS_OFFSET - 1
FRAGMENTS_AT_ONCE = 1 << 22


def encode_triangle_ids(ids: torch.Tensor) -> torch.Tensor:
    """int32 triangle indices (-1: background) -> the float32 id channel: index + 1, as bits above 2^24."""
    plus_one = ids.int() + 1
    return torch.where(plus_one <= LARGEST_FLOAT_ID, plus_one.float(), (plus_one + ID_BITS_OFFSET).view(torch.float32))


def decode_triangle_ids(channel: torch.Tensor) -> torch.Tensor:
    """The float32 id channel of rast -> int32 triangle indices, -1 at the background."""
    channel = channel.detach().float().contiguous()
    bits = channel.view(torch.int32) - ID_BITS_OFFSET
    return torch.where(channel <= LARGEST_FLOAT_ID, channel.clamp(0, LARGEST_FLOAT_ID).int(), bits) - 1


def guard_band(height: int, width: int) -> float:
    """How far beyond the frustum's sides vertices may lie, so that snapped coordinates stay below 2^28."""
    return float((LARGEST_SIZE * 2) >> (max(height, width, 1) - 1).bit_length())


def plane_distances(pos: torch.Tensor, guard: float) -> torch.Tensor:
    """Signed distances [..., 6] of clip-space points [..., 4] from PLANES, >= 0 inside."""
    x, y, z, w = pos.unbind(-1)
    wide = guard * w
    return torch.stack([z + w, w - z, wide - x, wide + x, wide - y, wide + y], -1)


def outcodes(pos: torch.Tensor, guard: float) -> torch.Tensor:
    """int64 [...]: bit k is set outside PLANES[k]; INVALID where a point cannot be projected at all."""
    bits = 1 << torch.arange(len(PLANES), device=pos.device)
    code = torch.where(plane_distances(pos, guard) >= 0, 0, bits).sum(-1)
    no_projection = ~pos.isfinite().all(-1) | ((code == 0) & (pos[..., 3] < MINIMUM_W))
    return torch.where(no_projection, INVALID, code)


def clip(polygons: torch.Tensor, guard: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Clip triangles [T, 3, 4] by PLANES (Sutherland and Hodgman 1974): polygons [T, 9, 4] and their counts [T].

    In float64, since a vertex far behind the camera would leave no correct digit in a float32 intersection.
    """
    total, slots = polygons.shape[0], 3 + len(PLANES)
    polygons = torch.cat([polygons, polygons.new_zeros(total, len(PLANES), 4)], 1).double()
    count = torch.full((total, 1), 3, device=polygons.device)
    index = torch.arange(slots, device=polygons.device).expand(total, slots)
    for plane in range(len(PLANES)):
        following = torch.where(index + 1 < count, index + 1, 0)
        after = polygons.gather(1, following[..., None].expand(-1, -1, 4))
        here, there = (plane_distances(p, guard)[..., plane] for p in (polygons, after))
        present = index < count
        leaving, entering = (here >= 0) & (there < 0), (here < 0) & (there >= 0)
        inner = torch.where(entering[..., None], after, polygons)
        outer = torch.where(entering[..., None], polygons, after)
        near, far = torch.where(entering, there, here), torch.where(entering, here, there)
        crossing = inner + (near / (near - far))[..., None] * (outer - inner)
        points = torch.stack([polygons, crossing], 2).flatten(1, 2)
        kept = torch.stack([present & (here >= 0), present & (leaving | entering)], 2).flatten(1, 2)
        order = torch.sort((~kept).to(torch.uint8), dim=1, stable=True).indices[:, :slots]
        polygons = points.gather(1, order[..., None].expand(-1, -1, 4))
        count = kept.sum(1, keepdim=True)
    return polygons.float(), torch.where(count > slots, 0, count)[:, 0]


def snap(points: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Project clip-space points [..., 4]: x, y in 1/256 pixel (int64) and depth z/w (float32)."""
    inverse = torch.ones_like(points[..., 3]) / points[..., 3]
    half_width, half_height = width * (SUBPIXELS // 2), height * (SUBPIXELS // 2)
    x = torch.round((points[..., 0] * inverse) * float(half_width)).long() + half_width
    y = torch.round((points[..., 1] * inverse) * float(half_height)).long() + half_height
    return x, y, points[..., 2] * inverse


def visible_keys(
    pos: torch.Tensor, tri: torch.Tensor, ids: torch.Tensor, height: int, width: int, previous: torch.Tensor | None
) -> torch.Tensor:
    """The smallest key of each pixel, int64 [H, W], NOTHING where no triangle is seen.

    pos float32 [V, 4], tri [F, 3], ids [T]: the triangles to draw; previous int64 [H, W]: only keys behind it count.
    """
    keys = torch.full((height * width,), NOTHING, dtype=torch.int64, device=pos.device)
    corners, guard = pos[tri[ids].long()], guard_band(height, width)
    codes = outcodes(corners, guard)
    out_of_any, out_of_one = codes[:, 0] | codes[:, 1] | codes[:, 2], codes[:, 0] & codes[:, 1] & codes[:, 2]
    simple = out_of_any == 0
    crossing = ~simple & (out_of_any < INVALID) & (out_of_one == 0)
    groups = [(corners[simple], torch.full_like(ids[simple], 3), ids[simple])]
    if crossing.any():
        polygons, count = clip(corners[crossing], guard)
        present = torch.arange(polygons.shape[1], device=pos.device) < count[:, None]
        w = polygons[..., 3]
        projects = polygons.isfinite().all(-1) & (w >= MINIMUM_W)
        bounded = (polygons[..., :2].abs() <= 2 * guard * w[..., None]).all(-1) & (polygons[..., 2].abs() <= 2 * w)
        fine = (count >= 3) & (projects & bounded | ~present).all(1)
        first = torch.where(present[..., None], polygons, polygons[:, :1])  # unused corners repeat the first
        groups.append((first[fine], count[fine], ids[crossing][fine]))
    for polygons, _, group_ids in groups:
        if len(group_ids):
            _draw(keys, *snap(polygons, height, width), group_ids, height, width, previous)
    return keys.view(height, width)


def _draw(keys, x, y, depth, ids, height, width, previous):
    """Lower `keys` [H * W] to those of snapped polygons [T, P]."""
    centre = SUBPIXELS // 2
    # Pixels whose centres lie within the bounding box: ceil of the lower, floor of the upper bound.
    left = (-((centre - x.amin(1)) // SUBPIXELS)).clamp(min=0)
    right = ((x.amax(1) - centre) // SUBPIXELS).clamp(max=width - 1)
    bottom = (-((centre - y.amin(1)) // SUBPIXELS)).clamp(min=0)
    top = ((y.amax(1) - centre) // SUBPIXELS).clamp(max=height - 1)
    columns, rows = (right - left + 1).clamp(min=0), (top - bottom + 1).clamp(min=0)
    ends = (columns * rows).cumsum(0)
    begin = 0
    while begin < len(ids):
        done = int(ends[begin - 1]) if begin else 0
        end = max(begin + 1, int(torch.searchsorted(ends, done + FRAGMENTS_AT_ONCE, right=True)))
        some = slice(begin, end)
        counts = (columns * rows)[some]
        which = torch.repeat_interleave(torch.arange(begin, end, device=x.device), counts)
        within = torch.arange(len(which), device=x.device) - (ends[some] - counts - done)[which - begin]
        begin = end
        column = left[which] + within % columns[which]
        row = bottom[which] + within // columns[which]
        covered, z = _cover(x[which], y[which], depth[which], column * SUBPIXELS + centre, row * SUBPIXELS + centre)
        pixel, key = (row * width + column)[covered], depth_keys(z[covered], ids[which[covered]])
        if previous is not None:
            behind = key > previous.reshape(-1)[pixel]
            pixel, key = pixel[behind], key[behind]
        keys.scatter_reduce_(0, pixel, key, "amin")


def _cover(x, y, depth, px, py):
    """For polygons [N, P] and points [N]: which are covered, and the smallest depth there."""
    winding, z = torch.zeros_like(px), torch.full_like(depth[:, 0], 2)
    for k in range(1, x.shape[1] - 1):
        fan = torch.tensor([0, k, k + 1], device=x.device)
        inside, orientation, triangle_z = _cover_triangle(x[:, fan], y[:, fan], depth[:, fan], px, py)
        winding = winding + inside * orientation
        z = torch.where(inside & (triangle_z < z), triangle_z, z)
    return winding != 0, z


def _cover_triangle(x, y, depth, px, py):
    first = torch.zeros_like(px)
    for k in (1, 2):
        smallest_x, smallest_y = x.gather(1, first[:, None])[:, 0], y.gather(1, first[:, None])[:, 0]
        first = torch.where((x[:, k] < smallest_x) | ((x[:, k] == smallest_x) & (y[:, k] < smallest_y)), k, first)
    x, y, depth = ([t.gather(1, ((first + k) % 3)[:, None])[:, 0] for k in range(3)] for t in (x, y, depth))
    area = (x[1] - x[0]) * (y[2] - y[0]) - (y[1] - y[0]) * (x[2] - x[0])
    turned = area < 0
    for values in (x, y, depth):
        values[1], values[2] = torch.where(turned, values[2], values[1]), torch.where(turned, values[1], values[2])
    area = area.abs()
    edges, inside = [], area > 0
    for k in range(3):
        a, b = (k + 1) % 3, (k + 2) % 3
        dx, dy = x[b] - x[a], y[b] - y[a]
        edge = dx * (py - y[a]) - dy * (px - x[a])
        owns_its_points = (dy < 0) | ((dy == 0) & (dx > 0))
        inside = inside & ((edge > 0) | ((edge == 0) & owns_its_points))
        edges.append(edge.float())
    inverse = torch.ones_like(depth[0]) / area.float()
    slope1, slope2 = (depth[1] - depth[0]) * inverse, (depth[2] - depth[0]) * inverse
    z = (depth[0] + edges[1] * slope1) + edges[2] * slope2
    z = torch.where(z < -1, -torch.ones_like(z), torch.where(z > 1, torch.ones_like(z), z))
    return inside, torch.where(turned, -1, 1), z


def depth_keys(depth: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """float32 depths and triangle indices -> int64 keys whose order is (depth, then the larger index first)."""
    bits = depth.contiguous().view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered.long() << 32) | (0xFFFFFFFF - ids.long())


def image_triangles(image: int, tri: torch.Tensor, ranges: torch.Tensor | None) -> torch.Tensor:
    """int64 indices of the triangles drawn in one image."""
    start, count = (0, tri.shape[0]) if ranges is None else ranges[image].tolist()
    return torch.arange(start, start + count, device=tri.device)


def barycentrics(corners: torch.Tensor, fx: torch.Tensor, fy: torch.Tensor, height: int, width: int, guarded: bool):
    """Perspective-correct u, v, their pixel derivatives [N, 4] and z/w at points of [-1, 1]^2.

    corners [N, 3, 4] clip space; guarded: denominators at least 1e-6 of a triangle of this extent, as gradients need.
    """
    x, y, z, w = corners.unbind(-1)
    qx, qy = x - fx[:, None] * w, y - fy[:, None] * w
    a = [qx[:, i] * qy[:, j] - qy[:, i] * qx[:, j] for i, j in ((1, 2), (2, 0), (0, 1))]
    # a_k is affine in (fx, fy); these are its slopes.
    slope_x = [w[:, j] * qy[:, i] - w[:, i] * qy[:, j] for i, j in ((1, 2), (2, 0), (0, 1))]
    slope_y = [w[:, i] * qx[:, j] - w[:, j] * qx[:, i] for i, j in ((1, 2), (2, 0), (0, 1))]
    total = a[0] + a[1] + a[2]
    if guarded:
        least = MINIMUM_DENOMINATOR * (qx.square() + qy.square()).sum(1).detach()
        bounded = torch.where(total < 0, torch.minimum(total, -least), torch.maximum(total, least))
        total = total + (bounded - total).detach()
    inverse = _reciprocal(total)
    u, v = a[0] * inverse, a[1] * inverse
    sum_x, sum_y = slope_x[0] + slope_x[1] + slope_x[2], slope_y[0] + slope_y[1] + slope_y[2]
    scale_x, scale_y = inverse * (2.0 / width), inverse * (2.0 / height)
    db = torch.stack([(slope_x[0] - u * sum_x) * scale_x, (slope_y[0] - u * sum_y) * scale_y,
                      (slope_x[1] - v * sum_x) * scale_x, (slope_y[1] - v * sum_y) * scale_y], -1)
    denominator = w[:, 0] * a[0] + w[:, 1] * a[1] + w[:, 2] * a[2]
    depth = (z[:, 0] * a[0] + z[:, 1] * a[1] + z[:, 2] * a[2]) * _reciprocal(denominator)
    return u, v, db, depth.clamp(-1, 1)


def _reciprocal(x):
    return torch.where(x == 0, torch.zeros_like(x), 1 / torch.where(x == 0, torch.ones_like(x), x))


def pixel_centres(pixel: torch.Tensor, height: int, width: int, dtype: torch.dtype):
    """fx, fy in [-1, 1] of flat pixel indices [N] of one or several images."""
    column, row = pixel % width, (pixel // width) % height
    return (2 * column + 1).to(dtype) / width - 1, (2 * row + 1).to(dtype) / height - 1


def resolve(
    pos: torch.Tensor, tri: torch.Tensor, keys: torch.Tensor, grad_db: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """rast and rast_db [B, H, W, 4] from the visible keys [B, H, W]; differentiable in pos."""
    batch, height, width = keys.shape
    flat = keys.reshape(-1)
    pixel = (flat != NOTHING).nonzero()[:, 0]
    ids = 0xFFFFFFFF - (flat[pixel] & 0xFFFFFFFF)
    vertices = tri[ids].long()
    corners = pos[vertices] if pos.dim() == 2 else pos[(pixel // (height * width))[:, None], vertices]
    fx, fy = pixel_centres(pixel, height, width, pos.dtype)
    with torch.no_grad():
        u, v, db, depth = barycentrics(corners, fx, fy, height, width, guarded=False)
        u, v = u.clamp(0, 1), v.clamp(0, 1)
        total = (u + v).clamp(min=1)
        u, v = u / total, v / total
    if torch.is_grad_enabled() and pos.requires_grad:  # values as above, gradients of the guarded, unclamped formula
        gu, gv, gdb, _ = barycentrics(corners, fx, fy, height, width, guarded=True)
        u, v = u + (gu - gu.detach()), v + (gv - gv.detach())
        db = db + (gdb - gdb.detach()) if grad_db else db
    channel = encode_triangle_ids(ids).to(pos.dtype)
    covered = torch.stack([u, v, depth, channel], -1)
    empty = covered.new_zeros(batch * height * width, 4)
    shape = (batch, height, width, 4)
    return empty.index_copy(0, pixel, covered).view(shape), empty.index_copy(0, pixel, db).view(shape)


def rasterize(
    pos: torch.Tensor,
    tri: torch.Tensor,
    resolution: tuple[int, int],
    ranges: torch.Tensor | None = None,
    grad_db: bool = True,
    previous: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """rast, rast_db and the keys [B, H, W]; shapes and meaning as `ops.rasterize`.

    Any floating dtype (visibility is decided in float32); differentiable any number of times in pos.
    previous: the keys of the layer before, to draw only what lies behind it.
    """
    height, width = resolution
    batch = pos.shape[0] if pos.dim() == 3 else ranges.shape[0]
    if height == 0 or width == 0:
        nothing = pos.new_zeros(batch, height, width, 4)
        return nothing, nothing.clone(), torch.zeros((batch, height, width), dtype=torch.int64, device=pos.device)
    single = pos.detach().float()
    keys = [
        visible_keys(single[b] if pos.dim() == 3 else single, tri, image_triangles(b, tri, ranges), height, width,
                     None if previous is None else previous[b])
        for b in range(batch)
    ]
    keys = torch.stack(keys) if keys else torch.zeros((0, height, width), dtype=torch.int64, device=pos.device)
    return *resolve(pos, tri, keys, grad_db), keys
