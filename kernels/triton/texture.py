"""Triton twin of csrc/texture: a tile of pixels by channels; each pixel selects the addresses of its mip levels."""

import triton
import triton.language as tl
from text3d_fast._triton.launch import block_for, options, padded, programs

NEAREST, LINEAR, MIP_NEAREST, MIP_LINEAR = (tl.constexpr(i) for i in range(4))
WRAP, CLAMP, ZERO, CUBE = (tl.constexpr(i) for i in range(4))
LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _clamp(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def _pick(x, y, z, axis):
    return tl.where(axis == 0, x, tl.where(axis == 1, y, z))


@triton.jit
def _cube_face(face):
    """Of OpenGL's faces +X -X +Y -Y +Z -Z: axis, sign, then axis and sign of s and of t."""
    axis = face // 2
    s_sign, t_sign = tl.where((face == 0) | (face == 5), -1, 1), tl.where(face == 2, 1, -1)
    return axis, 1 - 2 * (face % 2), tl.where(axis == 0, 2, 0), s_sign, tl.where(axis == 1, 2, 1), t_sign


@triton.jit
def _place(uv, i, real, BOUNDARY: tl.constexpr):
    """Where each pixel samples: s, t in [0, 1] on a face (0 unless a cube), the major axis' length, whether finite."""
    if BOUNDARY == CUBE:
        x, y = tl.load(uv + 3 * i, real, 0.0), tl.load(uv + 3 * i + 1, real, 0.0)
        z = tl.load(uv + 3 * i + 2, real, 0.0)
        ax, ay, az = tl.abs(x), tl.abs(y), tl.abs(z)
        axis = tl.where((az > ax) & (az > ay), 2, tl.where(ay > ax, 1, 0))
        along = _pick(x, y, z, axis)
        face, major = 2 * axis + tl.where(along < 0.0, 1, 0), tl.abs(along)
        valid = (major > 0.0) & (ax <= LARGEST) & (ay <= LARGEST) & (az <= LARGEST)
        _, _, s_axis, s_sign, t_axis, t_sign = _cube_face(face)
        major = tl.where(valid, major, 1.0)
        s = tl.where(valid, 0.5 * (_pick(x, y, z, s_axis) * s_sign / major) + 0.5, 0.5)
        t = tl.where(valid, 0.5 * (_pick(x, y, z, t_axis) * t_sign / major) + 0.5, 0.5)
        return s, t, face, major, valid
    else:
        s, t = tl.load(uv + 2 * i, real, 0.0), tl.load(uv + 2 * i + 1, real, 0.0)
        valid = (tl.abs(s) <= LARGEST) & (tl.abs(t) <= LARGEST)
        s, t = tl.where(valid, s, 0.0), tl.where(valid, t, 0.0)
        if BOUNDARY == WRAP:
            s, t = s - tl.floor(s), t - tl.floor(t)
        return s, t, tl.zeros_like(s).to(tl.int32), tl.full(s.shape, 1.0, tl.float32), valid


@triton.jit
def _cube_texel(face, column, row, size):
    """Index of a texel that may lie over one edge of its face (-1 over a corner), and whether it lies over a corner."""
    s, t = 2 * column + 1 - size, 2 * row + 1 - size
    off_s, off_t = (s > size) | (s < -size), (t > size) | (t < -size)
    corner = off_s & off_t
    axis, sign, s_axis, s_sign, t_axis, t_sign = _cube_face(face)
    # Surface coordinates in half texels; folded over the edge, the coordinate that overshot becomes the major one.
    on_axis, on_s, on_t = sign * (size - 1), s_sign * _clamp(s, -size, size), t_sign * _clamp(t, -size, size)
    x = tl.where(axis == 0, on_axis, tl.where(s_axis == 0, on_s, on_t))
    y = tl.where(axis == 1, on_axis, tl.where(s_axis == 1, on_s, on_t))
    z = tl.where(axis == 2, on_axis, tl.where(s_axis == 2, on_s, on_t))
    major = tl.where(off_s, s_axis, t_axis)
    new_face = 2 * major + tl.where(_pick(x, y, z, major) < 0, 1, 0)
    _, _, s_axis, s_sign, t_axis, t_sign = _cube_face(new_face)
    new_column = tl.maximum(_pick(x, y, z, s_axis) * s_sign + size - 1, 0) // 2
    new_row = tl.maximum(_pick(x, y, z, t_axis) * t_sign + size - 1, 0) // 2
    over = off_s | off_t
    face, column, row = tl.where(over, new_face, face), tl.where(over, new_column, column), tl.where(over, new_row, row)
    return tl.where(corner, -1, (face * size + row) * size + column), corner


@triton.jit
def _position(coordinate, size, BOUNDARY: tl.constexpr):
    """Position along one side in texels, clamped as the boundary says, and its slope."""
    raw = coordinate * size - 0.5
    position = raw
    if BOUNDARY == CLAMP:
        position = _clamp(raw, 0.0, size - 1.0)
    if BOUNDARY == ZERO:
        position = _clamp(raw, -1.0, size * 1.0)
    return position, tl.where(position == raw, size * 1.0, 0.0)


@triton.jit
def _tap(face, column, row, fx, fy, slope_s, slope_t, width, height, DX: tl.constexpr, DY: tl.constexpr,
         BOUNDARY: tl.constexpr):  # fmt: skip
    """One of a level's four texels: index (-1: none), whether it lies over a cube's corner, weight, its slopes."""
    i, j = column + DX, row + DY
    wx, wy = (fx if DX else 1.0 - fx), (fy if DY else 1.0 - fy)
    weight, ds, dt = wx * wy, (slope_s if DX else -slope_s) * wy, (slope_t if DY else -slope_t) * wx
    corner = tl.zeros_like(i) != 0
    if BOUNDARY == CUBE:
        index, corner = _cube_texel(face, i, j, width)
    elif BOUNDARY == ZERO:
        index = tl.where((i >= 0) & (i < width) & (j >= 0) & (j < height), j * width + i, -1)
    elif BOUNDARY == CLAMP:
        index = _clamp(j, 0, height - 1) * width + _clamp(i, 0, width - 1)
    else:
        i, j = i % width, j % height
        index = tl.where(j < 0, j + height, j) * width + tl.where(i < 0, i + width, i)
    return index, corner, weight, ds, dt


@triton.jit
def _share(corner, missing, value):
    return tl.where(corner, 0.0, value + missing)


@triton.jit
def _taps(s, t, face, width, height, BOUNDARY: tl.constexpr):
    """The four texels of one level: indices, weights, and the weights' derivatives by s and t."""
    x, slope_s = _position(s, width, BOUNDARY)
    y, slope_t = _position(t, height, BOUNDARY)
    left, low = tl.floor(x), tl.floor(y)
    column, row, fx, fy = left.to(tl.int32), low.to(tl.int32), x - left, y - low
    i0, c0, w0, s0, t0 = _tap(face, column, row, fx, fy, slope_s, slope_t, width, height, 0, 0, BOUNDARY)
    i1, c1, w1, s1, t1 = _tap(face, column, row, fx, fy, slope_s, slope_t, width, height, 1, 0, BOUNDARY)
    i2, c2, w2, s2, t2 = _tap(face, column, row, fx, fy, slope_s, slope_t, width, height, 0, 1, BOUNDARY)
    i3, c3, w3, s3, t3 = _tap(face, column, row, fx, fy, slope_s, slope_t, width, height, 1, 1, BOUNDARY)
    if BOUNDARY == CUBE:  # the texel over a corner is the mean of the other three
        weight = tl.where(c0, w0, tl.where(c1, w1, tl.where(c2, w2, tl.where(c3, w3, 0.0)))) / 3.0
        ds = tl.where(c0, s0, tl.where(c1, s1, tl.where(c2, s2, tl.where(c3, s3, 0.0)))) / 3.0
        dt = tl.where(c0, t0, tl.where(c1, t1, tl.where(c2, t2, tl.where(c3, t3, 0.0)))) / 3.0
        w0, w1, w2, w3 = _share(c0, weight, w0), _share(c1, weight, w1), _share(c2, weight, w2), _share(c3, weight, w3)
        s0, s1, s2, s3 = _share(c0, ds, s0), _share(c1, ds, s1), _share(c2, ds, s2), _share(c3, ds, s3)
        t0, t1, t2, t3 = _share(c0, dt, t0), _share(c1, dt, t1), _share(c2, dt, t2), _share(c3, dt, t3)
    return (i0, i1, i2, i3), (w0, w1, w2, w3), (s0, s1, s2, s3), (t0, t1, t2, t3)


@triton.jit
def _nearest(s, t, face, width, height, BOUNDARY: tl.constexpr):
    column = tl.floor(_clamp(s * width, -1.0, width * 1.0)).to(tl.int32)
    row = tl.floor(_clamp(t * height, -1.0, height * 1.0)).to(tl.int32)
    index = (face * height + _clamp(row, 0, height - 1)) * width + _clamp(column, 0, width - 1)
    if BOUNDARY == ZERO:
        index = tl.where((column >= 0) & (column < width) & (row >= 0) & (row < height), index, -1)
    return index


@triton.jit
def _scales(face, s, t, major, width, height, BOUNDARY: tl.constexpr):
    """From derivatives of a pixel's uv to texels of level 0, along s and t."""
    if BOUNDARY == CUBE:
        return width * 0.5 / major, height * 0.5 / major
    else:
        return tl.zeros_like(s) + width, tl.zeros_like(s) + height


@triton.jit
def _footprint(uv_da, i, real, face, s, t, major, width, height, BOUNDARY: tl.constexpr):
    """Derivatives of the position in texels of level 0: of s by X, of s by Y, of t by X, of t by Y."""
    scale_s, scale_t = _scales(face, s, t, major, width, height, BOUNDARY)
    if BOUNDARY == CUBE:
        axis, sign, s_axis, s_sign, t_axis, t_sign = _cube_face(face)
        row = uv_da + 6 * i
        mx, my = tl.load(row + 2 * axis, real, 0.0) * sign, tl.load(row + 2 * axis + 1, real, 0.0) * sign
        sx, sy = tl.load(row + 2 * s_axis, real, 0.0) * s_sign, tl.load(row + 2 * s_axis + 1, real, 0.0) * s_sign
        tx, ty = tl.load(row + 2 * t_axis, real, 0.0) * t_sign, tl.load(row + 2 * t_axis + 1, real, 0.0) * t_sign
        s, t = 2.0 * s - 1.0, 2.0 * t - 1.0
        return scale_s * (sx - s * mx), scale_s * (sy - s * my), scale_t * (tx - t * mx), scale_t * (ty - t * my)
    else:
        sx, sy = tl.load(uv_da + 4 * i, real, 0.0), tl.load(uv_da + 4 * i + 1, real, 0.0)
        tx, ty = tl.load(uv_da + 4 * i + 2, real, 0.0), tl.load(uv_da + 4 * i + 3, real, 0.0)
        return scale_s * sx, scale_s * sy, scale_t * tx, scale_t * ty


@triton.jit
def _level(uv_da, bias, i, real, face, s, t, major, width, height, LEVELS: tl.constexpr, FILTER: tl.constexpr,
           BOUNDARY: tl.constexpr, HAS_DA: tl.constexpr, HAS_BIAS: tl.constexpr):  # fmt: skip
    """First level, weight of the next one, and the level before it is clamped to the stack."""
    raw = tl.zeros_like(s)
    if HAS_DA:
        sx, sy, tx, ty = _footprint(uv_da, i, real, face, s, t, major, width, height, BOUNDARY)
        a, b, c = sx * sx + tx * tx, sy * sy + ty * ty, sx * sy + tx * ty
        root = tl.sqrt(tl.maximum(0.25 * (a - b) * (a - b) + c * c, 1e-30))
        raw = 0.5 * tl.log2(tl.maximum(0.5 * (a + b) + root, 1e-30))
    if HAS_BIAS:
        raw += tl.load(bias + i, real, 0.0)
    clamped = _clamp(raw, 0.0, LEVELS - 1.0)
    if FILTER == MIP_NEAREST:
        return _clamp(tl.floor(clamped + 0.5).to(tl.int32), 0, LEVELS - 1), tl.zeros_like(s), raw
    else:
        low = _clamp(tl.floor(clamped).to(tl.int32), 0, LEVELS - 2 if LEVELS > 1 else 0)
        return low, clamped - low, raw


@triton.jit
def _of_level(mips, heights, widths, batched, level, image, channels, LEVELS: tl.constexpr, BOUNDARY: tl.constexpr):
    """Of each pixel's level: address of this image's texels, width, height."""
    FACES: tl.constexpr = 6 if BOUNDARY == CUBE else 1
    zero = tl.zeros_like(level)
    texels = mips[0] + zero
    width, height, own = zero + widths[0], zero + heights[0], zero + batched[0]
    for l in tl.static_range(1, LEVELS):
        here = level == l
        texels = tl.where(here, mips[l] + zero, texels)
        width, height = tl.where(here, widths[l], width), tl.where(here, heights[l], height)
        own = tl.where(here, batched[l], own)
    return texels + image * own * FACES * height * width * channels, width, height


@triton.jit
def _sum_taps(texels, taps, weights, wanted, c, channels):
    value = tl.zeros((wanted.shape[0], c.shape[1]), tl.float32)
    for k in tl.static_range(4):
        at = (wanted & (taps[k] >= 0))[:, None] & (c < channels)
        value += weights[k][:, None] * tl.load(texels[:, None] + taps[k].to(tl.int64)[:, None] * channels + c, at, 0.0)
    return value


@triton.jit
def forward_kernel(
    mips, heights, widths, batched, uv, uv_da, bias, out, pixels, channels: tl.constexpr, LEVELS: tl.constexpr,
    FILTER: tl.constexpr, BOUNDARY: tl.constexpr, HAS_DA: tl.constexpr, HAS_BIAS: tl.constexpr,
    PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64)
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real, i = j < pixels, image * pixels + j
    s, t, face, major, valid = _place(uv, i, real, BOUNDARY)
    valid = valid & real
    c = tl.arange(0, PADDED)[None, :]
    if FILTER == NEAREST:
        texels, width, height = _of_level(mips, heights, widths, batched, tl.zeros_like(j), image, channels, 1,
                                          BOUNDARY)  # fmt: skip
        index = _nearest(s, t, face, width, height, BOUNDARY)
        at = (valid & (index >= 0))[:, None] & (c < channels)
        value = tl.load(texels[:, None] + index.to(tl.int64)[:, None] * channels + c, at, 0.0)
    else:
        low, fraction = tl.zeros_like(j), tl.zeros_like(s)
        if FILTER != LINEAR:
            low, fraction, _ = _level(uv_da, bias, i, valid, face, s, t, major, widths[0], heights[0], LEVELS, FILTER,
                                      BOUNDARY, HAS_DA, HAS_BIAS)  # fmt: skip
        texels, width, height = _of_level(mips, heights, widths, batched, low, image, channels, LEVELS, BOUNDARY)
        taps, weights, _, _ = _taps(s, t, face, width, height, BOUNDARY)
        value = _sum_taps(texels, taps, weights, valid, c, channels)
        if FILTER == MIP_LINEAR and LEVELS > 1:
            texels, width, height = _of_level(mips, heights, widths, batched, low + 1, image, channels, LEVELS,
                                              BOUNDARY)  # fmt: skip
            taps, weights, _, _ = _taps(s, t, face, width, height, BOUNDARY)
            higher = _sum_taps(texels, taps, weights, valid & (fraction > 0.0), c, channels)
            value = (1.0 - fraction)[:, None] * value + fraction[:, None] * higher
    tl.store(out + i[:, None] * channels + c, value, real[:, None] & (c < channels))


@triton.jit
def _wanted(level, WANTED: tl.constexpr, LEVELS: tl.constexpr):
    """Is the gradient to this pixel's level wanted?"""
    wanted = tl.zeros_like(level)
    for l in tl.static_range(LEVELS):
        wanted = tl.where(level == l, tl.full(level.shape, WANTED >> l & 1, tl.int32), wanted)
    return wanted != 0


@triton.jit
def _level_gradient(
    mips, grad_mips, heights, widths, batched, level, scale, s, t, face, valid, image, g, c, channels: tl.constexpr,
    LEVELS: tl.constexpr, BOUNDARY: tl.constexpr, WANTED: tl.constexpr,
):  # fmt: skip
    """Adds to the level's texels; returns its value . g, and scale times the derivatives of that by s and t."""
    texels, width, height = _of_level(mips, heights, widths, batched, level, image, channels, LEVELS, BOUNDARY)
    targets, _, _ = _of_level(grad_mips, heights, widths, batched, level, image, channels, LEVELS, BOUNDARY)
    adds = valid & _wanted(level, WANTED, LEVELS)
    taps, weights, along_s, along_t = _taps(s, t, face, width, height, BOUNDARY)
    value, ds, dt = tl.zeros_like(s), tl.zeros_like(s), tl.zeros_like(s)
    for k in tl.static_range(4):
        there = taps[k] >= 0
        at = (valid & there)[:, None] & (c < channels)
        offset = taps[k].to(tl.int64)[:, None] * channels + c
        if WANTED != 0:
            adding = (adds & there)[:, None] & (c < channels)
            share = ((scale * weights[k])[:, None] * g).to(tl.float64)
            tl.atomic_add(targets[:, None] + offset, share, adding, sem="relaxed")
        dot = tl.sum(g * tl.load(texels[:, None] + offset, at, 0.0), 1)
        value += weights[k] * dot
        ds += scale * along_s[k] * dot
        dt += scale * along_t[k] * dot
    return value, ds, dt


@triton.jit
def _store_on_axes(to, i, real, face, on_axis, on_s, on_t, STRIDE: tl.constexpr, OFFSET: tl.constexpr):
    """Components along a cube face's own axis, s and t, with their signs, to x, y, z."""
    axis, sign, s_axis, s_sign, t_axis, t_sign = _cube_face(face)
    row = to + 3 * STRIDE * i + OFFSET
    tl.store(row + STRIDE * axis, on_axis * sign, real)
    tl.store(row + STRIDE * s_axis, on_s * s_sign, real)
    tl.store(row + STRIDE * t_axis, on_t * t_sign, real)


@triton.jit
def _store_uv(grad_uv, i, real, face, s, t, major, ds, dt, BOUNDARY: tl.constexpr):
    if BOUNDARY == CUBE:
        scale = 0.5 / major
        along = ds * (2.0 * s - 1.0) + dt * (2.0 * t - 1.0)
        _store_on_axes(grad_uv, i, real, face, -scale * along, scale * ds, scale * dt, 1, 0)
    else:
        tl.store(grad_uv + 2 * i, ds, real)
        tl.store(grad_uv + 2 * i + 1, dt, real)


@triton.jit
def _store_da(grad_uv_da, uv_da, i, real, valid, face, s, t, major, width, height, d_level, BOUNDARY: tl.constexpr):
    sx, sy, tx, ty = _footprint(uv_da, i, valid, face, s, t, major, width, height, BOUNDARY)
    a, b, c = sx * sx + tx * tx, sy * sy + ty * ty, sx * sy + tx * ty
    square = 0.25 * (a - b) * (a - b) + c * c
    root = tl.sqrt(tl.maximum(square, 1e-30))
    largest = 0.5 * (a + b) + root
    d_largest = tl.where(largest > 1e-30, d_level * 0.72134752 / tl.maximum(largest, 1e-30), 0.0)  # 1 / (2 ln 2)
    tilt = tl.where(square > 1e-30, 0.25 * (a - b) / root, 0.0)
    da, db = d_largest * (0.5 + tilt), d_largest * (0.5 - tilt)
    dc = tl.where(square > 1e-30, d_largest * c / root, 0.0)
    scale_s, scale_t = _scales(face, s, t, major, width, height, BOUNDARY)
    gsx, gsy = scale_s * (2.0 * da * sx + dc * sy), scale_s * (2.0 * db * sy + dc * sx)
    gtx, gty = scale_t * (2.0 * da * tx + dc * ty), scale_t * (2.0 * db * ty + dc * tx)
    number = largest <= LARGEST  # NaN or infinity chose its level without a slope
    gsx, gsy, gtx, gty = (tl.where(number, gsx, 0.0), tl.where(number, gsy, 0.0), tl.where(number, gtx, 0.0),
                          tl.where(number, gty, 0.0))  # fmt: skip
    if BOUNDARY == CUBE:
        s, t = 2.0 * s - 1.0, 2.0 * t - 1.0
        _store_on_axes(grad_uv_da, i, real, face, -(gsx * s + gtx * t), gsx, gtx, 2, 0)
        _store_on_axes(grad_uv_da, i, real, face, -(gsy * s + gty * t), gsy, gty, 2, 1)
    else:
        tl.store(grad_uv_da + 4 * i, gsx, real)
        tl.store(grad_uv_da + 4 * i + 1, gsy, real)
        tl.store(grad_uv_da + 4 * i + 2, gtx, real)
        tl.store(grad_uv_da + 4 * i + 3, gty, real)


@triton.jit
def backward_kernel(
    grad_out, mips, heights, widths, batched, uv, uv_da, bias, grad_mips, grad_uv, grad_uv_da, grad_bias, pixels,
    channels: tl.constexpr, LEVELS: tl.constexpr, FILTER: tl.constexpr, BOUNDARY: tl.constexpr, HAS_DA: tl.constexpr,
    HAS_BIAS: tl.constexpr, WANTED: tl.constexpr, TO_UV: tl.constexpr, TO_DA: tl.constexpr, TO_BIAS: tl.constexpr,
    PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """WANTED: bit l says whether the gradient to level l is."""
    image = tl.program_id(1).to(tl.int64)
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real, i = j < pixels, image * pixels + j
    s, t, face, major, valid = _place(uv, i, real, BOUNDARY)
    valid = valid & real
    c = tl.arange(0, PADDED)[None, :]
    g = tl.load(grad_out + i[:, None] * channels + c, valid[:, None] & (c < channels), 0.0)
    ds, dt, d_level = tl.zeros_like(s), tl.zeros_like(s), tl.zeros_like(s)
    if FILTER == NEAREST:
        if WANTED != 0:
            targets, width, height = _of_level(grad_mips, heights, widths, batched, tl.zeros_like(j), image, channels,
                                               1, BOUNDARY)  # fmt: skip
            index = _nearest(s, t, face, width, height, BOUNDARY)
            at = (valid & (index >= 0))[:, None] & (c < channels)
            offset = index.to(tl.int64)[:, None] * channels + c
            tl.atomic_add(targets[:, None] + offset, g.to(tl.float64), at, sem="relaxed")
    else:
        low, fraction, raw = tl.zeros_like(j), tl.zeros_like(s), tl.zeros_like(s)
        if FILTER != LINEAR:
            low, fraction, raw = _level(uv_da, bias, i, valid, face, s, t, major, widths[0], heights[0], LEVELS, FILTER,
                                        BOUNDARY, HAS_DA, HAS_BIAS)  # fmt: skip
        value, ds, dt = _level_gradient(mips, grad_mips, heights, widths, batched, low, 1.0 - fraction, s, t, face,
                                        valid, image, g, c, channels, LEVELS, BOUNDARY, WANTED)  # fmt: skip
        if FILTER == MIP_LINEAR and LEVELS > 1:
            higher, more_s, more_t = _level_gradient(
                mips, grad_mips, heights, widths, batched, low + 1, fraction, s, t, face, valid, image, g, c, channels,
                LEVELS, BOUNDARY, WANTED,
            )  # fmt: skip
            ds, dt = ds + more_s, dt + more_t
            d_level = tl.where((raw >= 0.0) & (raw <= LEVELS - 1.0), higher - value, 0.0)
    # g is 0 where a pixel is not valid, and so is everything below
    if TO_UV:
        _store_uv(grad_uv, i, real, face, s, t, major, ds, dt, BOUNDARY)
    if TO_BIAS:
        tl.store(grad_bias + i, tl.where(valid, d_level, 0.0), real)
    if TO_DA:
        _store_da(grad_uv_da, uv_da, i, real, valid, face, s, t, major, widths[0], heights[0], d_level, BOUNDARY)


def texture_forward(mips, heights, widths, batched, uv, uv_da, bias, out, batch, pixels, channels, levels, filter,
                    boundary):
    block = block_for("texture", channels)
    if batch * pixels * channels:
        forward_kernel[programs(pixels, block), batch](
            tuple(mips), tuple(heights), tuple(widths), tuple(batched), uv, uv if uv_da is None else uv_da,
            uv if bias is None else bias, out, pixels, channels, levels, filter, boundary,
            uv_da is not None, bias is not None, padded(channels), block,
            **options("texture"),
        )  # fmt: skip


def texture_backward(grad_out, mips, heights, widths, batched, uv, uv_da, bias, grad_mips, grad_uv, grad_uv_da,
                     grad_bias, batch, pixels, channels, levels, filter, boundary):
    block = block_for("texture", channels)
    wanted = sum(1 << level for level, target in enumerate(grad_mips) if target is not None)
    given = [target for target in grad_mips if target is not None]
    targets = tuple((given or [uv])[0] if target is None else target for target in grad_mips)
    others = [(uv if x is None else x) for x in (uv_da, bias, grad_uv, grad_uv_da, grad_bias)]
    if batch * pixels * channels:
        backward_kernel[programs(pixels, block), batch](
            grad_out, tuple(mips), tuple(heights), tuple(widths), tuple(batched), uv, *others[:2], targets, *others[2:],
            pixels, channels, levels, filter, boundary, uv_da is not None, bias is not None, wanted,
            grad_uv is not None, grad_uv_da is not None, grad_bias is not None, padded(channels), block,
            **options("texture"),
        )  # fmt: skip
    else:
        for target in (grad_uv, grad_uv_da, grad_bias):
            if target is not None:
                target.zero_()


def compile_cases():
    """(kernel, signature, constants) for the ahead-of-time check."""
    cases = [(filter, boundary) for filter in range(4) for boundary in range(4)]
    for filter, boundary in cases:
        levels = 3 if filter >= 2 else 1
        fixed = {"channels": 3, "LEVELS": levels, "FILTER": filter, "BOUNDARY": boundary, "HAS_DA": filter >= 2,
                 "HAS_BIAS": filter >= 2, "WANTED": 2**levels - 1, "TO_UV": filter > 0,
                 "TO_DA": filter == 3, "TO_BIAS": filter == 3, "PADDED": 4, "BLOCK": 128}
        types = dict.fromkeys(("heights", "widths", "batched"), ("i32",) * levels) | {"pixels": "i32"}
        types |= {"mips": ("*fp32",) * levels, "grad_mips": ("*fp64",) * levels}
        for kernel in (forward_kernel, backward_kernel):
            constants = {name: value for name, value in fixed.items() if name in kernel.arg_names}
            signature = {n: "constexpr" if n in constants else types.get(n, "*fp32") for n in kernel.arg_names}
            yield kernel, signature, constants
