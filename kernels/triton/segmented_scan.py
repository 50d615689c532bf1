"""Triton twin of csrc/segmented_scan: a program takes several segments, a tile of segments by values."""

import triton
import triton.language as tl
from text3d_fast._triton.launch import LAUNCH, options, programs


@triton.jit
def _multiply(a, b):
    return a * b


@triton.jit
def _one_after_the_other(a0, b0, a1, b1):
    """The linear function x -> a1 (a0 x + b0) + b1."""
    return a0 * a1, a1 * b0 + b1


@triton.jit
def _segments(offsets, segments, SEGMENTS: tl.constexpr, REVERSE: tl.constexpr):
    """Of a program's segments: where the first value in the order of the scan is, the step to the next, how many."""
    segment = tl.program_id(0).to(tl.int64) * SEGMENTS + tl.arange(0, SEGMENTS)
    real = segment < segments
    begin = tl.load(offsets + segment, real, 0).to(tl.int64)
    end = tl.load(offsets + segment + 1, real, 0).to(tl.int64)
    return (end - 1 if REVERSE else begin)[:, None], -1 if REVERSE else 1, (end - begin)[:, None]


@triton.jit
def _scan(values, out, first, step, length, PRODUCT: tl.constexpr, EXCLUSIVE: tl.constexpr, SEGMENTS: tl.constexpr,
          BLOCK: tl.constexpr):
    nothing = 1.0 if PRODUCT else 0.0
    carry = tl.full((SEGMENTS,), nothing, tl.float32)
    longest = tl.max(length)
    start = tl.zeros_like(longest)
    while start < longest:
        k = start + tl.arange(0, BLOCK)[None, :]
        source = k - 1 if EXCLUSIVE else k
        own = tl.load(values + first + step * source, (source >= 0) & (source < length), nothing)
        if PRODUCT:
            upto = carry[:, None] * tl.associative_scan(own, 1, _multiply)
            carry = tl.sum(tl.where(tl.arange(0, BLOCK)[None, :] == BLOCK - 1, upto, 0.0), 1)
        else:
            upto = carry[:, None] + tl.cumsum(own, 1)
            carry += tl.sum(own, 1)
        tl.store(out + first + step * k, upto, k < length)
        start += BLOCK


@triton.jit
def forward_kernel(
    values, offsets, out, segments, PRODUCT: tl.constexpr, EXCLUSIVE: tl.constexpr, REVERSE: tl.constexpr,
    SEGMENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first, step, length = _segments(offsets, segments, SEGMENTS, REVERSE)
    _scan(values, out, first, step, length, PRODUCT, EXCLUSIVE, SEGMENTS, BLOCK)


@triton.jit
def backward_kernel(
    grad, values, offsets, before, grad_values, segments, EXCLUSIVE: tl.constexpr, REVERSE: tl.constexpr,
    SEGMENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first, step, length = _segments(offsets, segments, SEGMENTS, REVERSE)
    behind = tl.zeros((SEGMENTS,), tl.float32)
    lanes = tl.arange(0, BLOCK)[None, :]
    start = tl.zeros_like(length)  # counted from the end of each segment
    while tl.max(length - start) > 0:
        j = length - 1 - start - lanes
        real, ahead = j >= 0, j + (1 if EXCLUSIVE else 0)
        a = tl.load(values + first + step * (j + 1), real & (j + 1 < length), 0.0)
        b = tl.load(grad + first + step * ahead, real & (ahead < length), 0.0)
        all_a, all_b = tl.associative_scan((a, b), 1, _one_after_the_other)
        h = all_a * behind[:, None] + all_b
        at = first + step * j
        tl.store(grad_values + at, tl.load(before + at, real, 0.0) * h, real)
        behind = tl.sum(tl.where(lanes == BLOCK - 1, h, 0.0), 1)
        start += BLOCK


def _tile():
    """SEGMENTS, BLOCK."""
    return LAUNCH["segmented_scan"].rays, LAUNCH["segmented_scan"].block


def segmented_scan_forward(values, offsets, out, segments, count, product, exclusive, reverse):
    out.zero_()  # beyond the last offset
    if segments and count:
        forward_kernel[(programs(segments, _tile()[0]),)](values, offsets, out, segments, product, exclusive, reverse,
                                                          *_tile(), **options("segmented_scan"))


def segmented_scan_backward(grad, values, offsets, grad_values, segments, count, exclusive, reverse):
    before = values.new_empty(values.shape)
    segmented_scan_forward(values, offsets, before, segments, count, True, True, reverse)
    grad_values.zero_()
    if segments and count:
        backward_kernel[(programs(segments, _tile()[0]),)](grad, values, offsets, before, grad_values, segments,
                                                           exclusive, reverse, *_tile(), **options("segmented_scan"))


def compile_cases():
    """(kernel, signature, constants) for the ahead-of-time check."""
    types = {"offsets": "*i32", "segments": "i32"}
    for kernel in (forward_kernel, backward_kernel):
        for product in (False, True) if kernel is forward_kernel else (None,):
            fixed = dict(zip(("SEGMENTS", "BLOCK"), _tile())) | {"EXCLUSIVE": True, "REVERSE": False}
            fixed |= {} if product is None else {"PRODUCT": product}
            yield kernel, {n: "constexpr" if n in fixed else types.get(n, "*fp32") for n in kernel.arg_names}, fixed
