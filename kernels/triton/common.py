"""Device functions that several twins share; each has its counterpart in csrc/common."""

import triton
import triton.language as tl


@triton.jit
def decode_triangle_id(channel):
    """The id channel of a rasterized image -> triangle index, -1 at the background (csrc/common/triangle_id.h)."""
    small = tl.where(channel <= 16777216.0, channel, 0.0).to(tl.int32)
    large = channel.to(tl.int32, bitcast=True) - 0x4A800000
    return tl.where(channel > 0.0, tl.where(channel <= 16777216.0, small, large) - 1, -1)


@triton.jit
def encode_triangle_id(triangle):
    """Triangle index -> the id channel; 0 for -1."""
    large = (triangle + 1 + 0x4A800000).to(tl.float32, bitcast=True)
    return tl.where(triangle < 16777216, (triangle + 1).to(tl.float32), large)


@triton.jit
def load_corners(tri, triangle, seen, vertices):
    """The three vertices of each lane's triangle (0 where it has none), and which lanes have valid ones."""
    at = tri + 3 * triangle.to(tl.int64)
    v0, v1, v2 = tl.load(at, seen, 0), tl.load(at + 1, seen, 0), tl.load(at + 2, seen, 0)
    good = seen & (v0 >= 0) & (v0 < vertices) & (v1 >= 0) & (v1 < vertices) & (v2 >= 0) & (v2 < vertices)
    return tl.where(good, v0, 0), tl.where(good, v1, 0), tl.where(good, v2, 0), good


@triton.jit
def _add_within_run(sum_a, starts_a, sum_b, starts_b):
    return tl.where(starts_b != 0, sum_b, sum_a + sum_b), starts_a | starts_b


@triton.jit
def add_by_runs(target, values, starts, ends):
    """target[...] += values, [lanes] or [lanes, channels], one addition a run of lanes (csrc/common/segmented.h).

    All of one shape; starts: int32, 1 where a run begins; ends: bool, true where the sum of a run is to be added.
    """
    sums, _ = tl.associative_scan((values, starts), 0, _add_within_run)
    tl.atomic_add(target, sums, ends, sem="relaxed")


@triton.jit
def popcount(word):
    """Set bits of each uint64."""
    word = word - ((word >> 1) & 0x5555555555555555)
    word = (word & 0x3333333333333333) + ((word >> 2) & 0x3333333333333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F0F0F0F0F
    word = word + (word >> 8)
    word = word + (word >> 16)
    return ((word + (word >> 32)) & 0x7F).to(tl.int32)


@triton.jit
def bits_below(count):
    """uint64 with the lowest `count` bits set; count [...] int32 of 0 or more, all bits from 64."""
    few = tl.where(count < 64, count, 0).to(tl.uint64)
    one = tl.full(few.shape, 1, tl.uint64)
    return tl.where(count < 64, (one << few) - one, ~(one - one))


@triton.jit
def round_to_even(x):
    """rintf: to the nearest integer, halves to the even one."""
    below = tl.floor(x)
    rest = x - below
    odd = below - 2.0 * tl.floor(0.5 * below) == 1.0
    return below + tl.where((rest > 0.5) | ((rest == 0.5) & odd), 1.0, 0.0)
