"""Triton twin of csrc/march_rays: a program takes several rays, a tile of rays by intervals.

One pass counts, torch sums the counts, one pass writes. Both set the rays up anew, in double precision, and fuse
nothing to a multiply-add but what is spelled out, so that they agree.
"""

import math

import torch

import triton
import triton.language as tl
from text3d_fast._triton.launch import LAUNCH, options, programs

MAX_STEPS = tl.constexpr(float(1 << 24))  # per ray inside the box, as in csrc/march_rays/march_rays.h
LAST_TIME = tl.constexpr(1e38)  # times beyond would not fit single precision
NOT_FINITE, TOO_MANY_STEPS = tl.constexpr(1), tl.constexpr(2)  # entries of info
PADDING_BLOCK = 1024


@triton.jit
def _time(first, step, bend, bend_time, log_growth, k, CONE: tl.constexpr):
    """The lattice's time k, in double precision."""
    time = first + k * step
    if CONE:
        time = tl.where(k > bend, bend_time * tl.exp(tl.where(k > bend, k - bend, 0.0) * log_growth), time)
    return time


@triton.jit
def _index(first, step, bend, bend_time, log_growth, t, CONE: tl.constexpr):
    """The inverse of _time."""
    index = (t - first) / step
    if CONE:
        index = tl.where(t > bend_time, bend + tl.log(tl.where(t > bend_time, t / bend_time, 1.0)) / log_growth, index)
    return index


@triton.jit
def _axis(origins, directions, aabb, r, real, enter, leave, AXIS: tl.constexpr, LEVELS: tl.constexpr):
    """Position and velocity along one axis in box units; narrows the interval inside the outermost box."""
    low, high = tl.load(aabb + AXIS).to(tl.float64), tl.load(aabb + AXIS + 3).to(tl.float64)
    half = 0.5 * (high - low)
    position = (tl.load(origins + 3 * r + AXIS, real, 0.0).to(tl.float64) - 0.5 * (low + high)) / half
    velocity = tl.load(directions + 3 * r + AXIS, real, 0.0).to(tl.float64) / half
    moves, outermost = velocity != 0.0, tl.full(position.shape, 2.0 ** (LEVELS - 1), tl.float64)
    speed = tl.where(moves, velocity, 1.0)
    t0, t1 = (-outermost - position) / speed, (outermost - position) / speed
    t_low, t_high = tl.where(t0 < t1, t0, t1), tl.where(t0 < t1, t1, t0)
    outside = ~moves & ~(tl.abs(position) <= outermost)
    leave = tl.where(outside, -float("inf"), tl.where(moves & (t_high < leave), t_high, leave))
    enter = tl.where(moves & (t_low > enter), t_low, enter)
    finite = (tl.zeros_like(position) + half > 0.0) & (position - position == 0.0) & (velocity - velocity == 0.0)
    return position, velocity, moves, finite, enter, leave


@triton.jit
def _set_up(origins, directions, aabb, near, far, jitter, info, r, real, near_high, near_low, far_high, far_low,
            step_high, step_low, cone_high, cone_low, growth_high, growth_low, LEVELS: tl.constexpr, CONE: tl.constexpr,
            HAS_NEAR: tl.constexpr, HAS_FAR: tl.constexpr, HAS_JITTER: tl.constexpr):  # fmt: skip
    """Each ray's part inside the outermost box, relative to the start of its first interval; see MarchRay in
    csrc/march_rays/march_rays.h."""
    zero = tl.zeros_like(r).to(tl.float64)
    step, shift = zero + step_high + step_low, zero
    begin_at, until = zero + near_high + near_low, zero + far_high + far_low
    if HAS_NEAR:
        begin_at = tl.load(near + r, real, 0.0).to(tl.float64)
    if HAS_FAR:
        until = tl.load(far + r, real, 0.0).to(tl.float64)
    if HAS_JITTER:
        shift = tl.load(jitter + r, real, 0.0).to(tl.float64)
    first = begin_at + shift * step
    bend, bend_time, log_growth = zero, first, zero + 1.0
    if CONE:
        bend = tl.ceil((step / (zero + cone_high + cone_low) - first) / step)
        bend = tl.where(bend > 0.0, bend, 0.0)
        bend_time = first + bend * step
        log_growth = zero + growth_high + growth_low
    x, vx, moves_x, finite_x, enter, leave = _axis(origins, directions, aabb, r, real, first, until, 0, LEVELS)
    y, vy, moves_y, finite_y, enter, leave = _axis(origins, directions, aabb, r, real, enter, leave, 1, LEVELS)
    z, vz, moves_z, finite_z, enter, leave = _axis(origins, directions, aabb, r, real, enter, leave, 2, LEVELS)
    nothing = begin_at >= until  # however infinite they are
    finite = finite_x & finite_y & finite_z & ((first - first == 0.0) | nothing) & (until == until)
    finite = finite & (shift >= 0.0) & (shift < 1.0)
    hits = real & finite & (moves_x | moves_y | moves_z) & (enter < leave) & ~nothing
    finite = finite & (~hits | ((tl.abs(enter) < LAST_TIME) & (tl.abs(leave) < LAST_TIME)))
    hits = hits & finite
    enter, leave = tl.where(hits, enter, first), tl.where(hits, leave, first)

    # One interval more on each side than needed: the test of the middle decides.
    begin = tl.floor(_index(first, step, bend, bend_time, log_growth, enter, CONE)) - 1.0
    end = tl.ceil(_index(first, step, bend, bend_time, log_growth, leave, CONE)) + 1.0
    begin = tl.where(begin < 0.0, 0.0, begin)
    beyond = _time(first, step, bend, bend_time, log_growth, end, CONE) > until
    end = tl.where(beyond, tl.where(end - 4.0 < begin, begin, end - 4.0), end)
    for _ in tl.static_range(6):
        short = beyond & (_time(first, step, bend, bend_time, log_growth, end, CONE) < until)
        end = tl.where(short, end + 1.0, end)
    tail = beyond & (_time(first, step, bend, bend_time, log_growth, end, CONE) > until)
    hits = hits & (end > begin)
    fits = end - begin < MAX_STEPS
    tl.store(info + NOT_FINITE + tl.zeros_like(r), tl.full(r.shape, 1, tl.int64), real & ~finite)
    tl.store(info + TOO_MANY_STEPS + tl.zeros_like(r), tl.full(r.shape, 1, tl.int64), hits & ~fits)
    hits = hits & fits

    base = _time(first, step, bend, bend_time, log_growth, begin, CONE)
    count = tl.where(hits, end - begin, 0.0).to(tl.int32)
    time_high = base.to(tl.float32)
    time_low = (base - time_high.to(tl.float64)).to(tl.float32)
    last = _time(first, step, bend, bend_time, log_growth, end - 1.0, CONE)
    tail_middle = tl.where(tail, 0.5 * (last + until) - base, -1.0).to(tl.float32)
    bend = bend - begin
    bend = tl.where(bend <= 0.0, 0.0, tl.where(bend > MAX_STEPS, MAX_STEPS, bend)).to(tl.float32)
    bend_time = base + bend.to(tl.float64) * step
    px, py, pz = (x + base * vx).to(tl.float32), (y + base * vy).to(tl.float32), (z + base * vz).to(tl.float32)
    return (count, time_high, time_low, until.to(tl.float32), tail_middle, bend, bend_time, px, py, pz,
            vx.to(tl.float32), vy.to(tl.float32), vz.to(tl.float32))  # fmt: skip


@triton.jit
def _lattice_time(bend, bend_time, step, rate, j, CONE: tl.constexpr):
    """Time from a ray's base to the start of interval j; all [rays, intervals], rate in double."""
    if CONE:
        j, bend = j.to(tl.float64), bend.to(tl.float64)
        beyond = j - bend
        geometric = bend_time * tl.exp2(tl.where(beyond > 0.0, beyond, 0.0) * rate) - (bend_time - bend * step)
        return tl.where(beyond > 0.0, geometric, j * step).to(tl.float32)
    else:
        return j * step


@triton.jit
def _cell(x, scale, size):
    half = 0.5 * size
    return tl.minimum(tl.maximum(tl.fma(x * scale, half, half), 0.0), size - 1.0).to(tl.int64)


@triton.jit
def _hits(binaries, ray, j, step, rate, X, Y, Z, LEVELS: tl.constexpr, CONE: tl.constexpr):
    """Does the middle of interval j lie in an occupied cell? [rays, intervals]"""
    count, _, _, _, tail_middle, bend, bend_time, px, py, pz, vx, vy, vz = ray
    number = j.to(tl.float32)[None, :]
    if CONE:
        start = _lattice_time(bend[:, None], bend_time[:, None], step, rate, number, CONE)
        time = 0.5 * (start + _lattice_time(bend[:, None], bend_time[:, None], step, rate, number + 1.0, CONE))
    else:
        time = tl.broadcast_to((number + 0.5) * step, (count.shape[0], j.shape[0]))
    real = j[None, :] < count[:, None]
    cut = (j[None, :] == count[:, None] - 1) & (tail_middle >= 0.0)[:, None]
    time = tl.where(cut, tail_middle[:, None], time)
    x = tl.fma(tl.broadcast_to(vx[:, None], time.shape), time, tl.broadcast_to(px[:, None], time.shape))
    y = tl.fma(tl.broadcast_to(vy[:, None], time.shape), time, tl.broadcast_to(py[:, None], time.shape))
    z = tl.fma(tl.broadcast_to(vz[:, None], time.shape), time, tl.broadcast_to(pz[:, None], time.shape))
    reach = tl.maximum(tl.abs(x), tl.maximum(tl.abs(y), tl.abs(z)))
    level = (reach.to(tl.int32, bitcast=True) >> 23) - 126
    level = tl.minimum(tl.maximum(level, 0), LEVELS - 1)
    scale = ((127 - level) << 23).to(tl.float32, bitcast=True)
    cell = ((level * X + _cell(x, scale, X)) * Y + _cell(y, scale, Y)) * Z + _cell(z, scale, Z)
    inside = real & (reach <= 2.0 ** (LEVELS - 1))
    return tl.load(binaries + cell, inside, 0) != 0


@triton.jit
def count_kernel(
    origins, directions, binaries, aabb, near, far, jitter, info, ray_offsets, ray_count, X, Y, Z, near_high, near_low,
    far_high, far_low, step_high, step_low, cone_high, cone_low, growth_high, growth_low, rate_high, rate_low,
    LEVELS: tl.constexpr, CONE: tl.constexpr, HAS_NEAR: tl.constexpr, HAS_FAR: tl.constexpr, HAS_JITTER: tl.constexpr,
    RAYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * RAYS + tl.arange(0, RAYS)
    real = r < ray_count
    ray = _set_up(origins, directions, aabb, near, far, jitter, info, r, real, near_high, near_low, far_high, far_low,
                  step_high, step_low, cone_high, cone_low, growth_high, growth_low, LEVELS, CONE, HAS_NEAR, HAS_FAR,
                  HAS_JITTER)  # fmt: skip
    rate = tl.zeros((1, 1), tl.float64) + rate_high + rate_low
    found = tl.zeros((RAYS,), tl.int32)
    for begin in range(0, tl.max(ray[0]), BLOCK):
        j = begin + tl.arange(0, BLOCK)
        found += tl.sum(_hits(binaries, ray, j, step_high, rate, X, Y, Z, LEVELS, CONE).to(tl.int32), 1)
    tl.store(ray_offsets + 1 + r, found, real)


@triton.jit
def emit_kernel(
    origins, directions, binaries, aabb, near, far, jitter, info, ray_offsets, ray_ids, t_starts, t_ends, ray_count, X,
    Y, Z, near_high, near_low, far_high, far_low, step_high, step_low, cone_high, cone_low, growth_high, growth_low,
    rate_high, rate_low, LEVELS: tl.constexpr, CONE: tl.constexpr, HAS_NEAR: tl.constexpr, HAS_FAR: tl.constexpr,
    HAS_JITTER: tl.constexpr, RAYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * RAYS + tl.arange(0, RAYS)
    real = r < ray_count
    place = tl.load(ray_offsets + r, real, 0).to(tl.int64)
    end = tl.load(ray_offsets + r + 1, real, 0).to(tl.int64)
    if tl.max(end - place) > 0:
        ray = _set_up(origins, directions, aabb, near, far, jitter, info, r, real, near_high, near_low, far_high,
                      far_low, step_high, step_low, cone_high, cone_low, growth_high, growth_low, LEVELS, CONE,
                      HAS_NEAR, HAS_FAR, HAS_JITTER)  # fmt: skip
        count, time_high, time_low, until, _, bend, bend_time, _, _, _, _, _, _ = ray
        rate = tl.zeros((1, 1), tl.float64) + rate_high + rate_low
        bend, bend_time = bend[:, None], bend_time[:, None]
        for begin in range(0, tl.max(count), BLOCK):
            j = begin + tl.arange(0, BLOCK)
            hits = _hits(binaries, ray, j, step_high, rate, X, Y, Z, LEVELS, CONE)
            upto = tl.cumsum(hits.to(tl.int32), 1)
            slot = place[:, None] + upto - 1
            kept = hits & (slot < end[:, None])
            number = tl.broadcast_to(j.to(tl.float32)[None, :], hits.shape)
            start = _lattice_time(bend, bend_time, step_high, rate, number, CONE)
            stop = _lattice_time(bend, bend_time, step_high, rate, number + 1.0, CONE)
            tl.store(ray_ids + slot, tl.broadcast_to(r.to(tl.int32)[:, None], hits.shape), kept)
            tl.store(t_starts + slot, time_high[:, None] + (time_low[:, None] + start), kept)
            t_end = tl.minimum(time_high[:, None] + (time_low[:, None] + stop), until[:, None])
            tl.store(t_ends + slot, t_end, kept)
            place += tl.sum(hits.to(tl.int32), 1)


@triton.jit
def pad_kernel(ray_offsets, ray_ids, t_starts, t_ends, ray_count, capacity, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    padding = (i >= tl.load(ray_offsets + ray_count)) & (i < capacity)
    tl.store(ray_ids + i, tl.zeros((BLOCK,), tl.int32), padding)
    tl.store(t_starts + i, tl.zeros((BLOCK,), tl.float32), padding)
    tl.store(t_ends + i, tl.zeros((BLOCK,), tl.float32), padding)


def _parts(*numbers):
    """Each number as two floats that sum to it within 2^-48: Triton passes Python's floats in single precision."""
    for number in numbers:
        high = torch.tensor(number, dtype=torch.float32).item()
        yield high
        yield number - high if math.isfinite(high) else 0.0


def _march(kernel, origins, directions, binaries, aabb, near, far, jitter, info, outputs, ray_count, levels, x, y, z,
           near_number, far_number, step, cone_angle):
    launch, growth = LAUNCH["march_rays"], math.log1p(cone_angle)
    kernel[(programs(ray_count, launch.rays),)](
        origins, directions, binaries.view(torch.uint8), aabb, *(origins if t is None else t for t in (near, far,
        jitter)), info, *outputs, ray_count, x, y, z,
        *_parts(near_number, far_number, step, cone_angle, growth, growth / math.log(2.0)), levels, cone_angle > 0,
        near is not None, far is not None, jitter is not None, launch.rays, launch.block, **options("march_rays"),
    )  # fmt: skip


def march_rays_count(origins, directions, binaries, aabb, near, far, jitter, bits, blocks, rays, runs, ray_offsets,
                     info, overflow, ray_ids, t_starts, t_ends, ray_count, capacity, levels, x, y, z, near_number,
                     far_number, step, cone_angle):
    info.zero_()
    ray_offsets[:1].zero_()
    if not ray_count:
        overflow.zero_()
        return
    _march(count_kernel, origins, directions, binaries, aabb, near, far, jitter, info, [ray_offsets], ray_count, levels,
           x, y, z, near_number, far_number, step, cone_angle)
    sums = torch.cumsum(ray_offsets[1:], 0, dtype=torch.int64)
    limit = capacity if capacity >= 0 else 2**31 - 1
    ray_offsets[1:].copy_(sums.clamp(max=limit))
    info[:1].copy_(sums[-1:])
    torch.gt(sums[-1], limit, out=overflow)
    if capacity < 0:
        info[3].copy_(overflow)
        overflow.zero_()


def march_rays_emit(origins, directions, binaries, aabb, near, far, jitter, bits, blocks, rays, runs, ray_offsets, info,
                    overflow, ray_ids, t_starts, t_ends, ray_count, capacity, levels, x, y, z, near_number, far_number,
                    step, cone_angle):
    if not capacity:
        return
    pad_kernel[(programs(capacity, PADDING_BLOCK),)](ray_offsets, ray_ids, t_starts, t_ends, ray_count, capacity,
                                                     PADDING_BLOCK, **options("fill"))
    if ray_count:
        _march(emit_kernel, origins, directions, binaries, aabb, near, far, jitter, info,
               [ray_offsets, ray_ids, t_starts, t_ends], ray_count, levels, x, y, z, near_number, far_number, step,
               cone_angle)


def compile_cases():
    """(kernel, signature, constants) for the ahead-of-time check."""
    types = dict.fromkeys(("ray_count", "capacity", "X", "Y", "Z"), "i32") | {"binaries": "*u8", "info": "*i64"}
    types |= dict.fromkeys(("ray_offsets", "ray_ids"), "*i32")
    pointers = ("origins", "directions", "aabb", "near", "far", "jitter", "t_starts", "t_ends")
    types |= dict.fromkeys(pointers, "*fp32")
    launch = LAUNCH["march_rays"]
    for cone in (False, True):
        fixed = {"LEVELS": 1 + cone, "CONE": cone, "HAS_NEAR": cone, "HAS_FAR": cone, "HAS_JITTER": True,
                 "RAYS": launch.rays, "BLOCK": launch.block}
        for kernel in (count_kernel, emit_kernel):
            yield kernel, {n: "constexpr" if n in fixed else types.get(n, "fp32") for n in kernel.arg_names}, fixed
    yield pad_kernel, {n: types.get(n, "constexpr") for n in pad_kernel.arg_names}, {"BLOCK": PADDING_BLOCK}
