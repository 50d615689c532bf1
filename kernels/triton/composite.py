"""Triton twin of csrc/composite: a program takes several rays, a tile of rays by samples (by channels).

Sums run in forward order; the backward pass visits a ray twice, first for the total of w dL/dw, then for the suffixes
as total minus prefix.
"""

import torch

import triton
import triton.language as tl
from text3d_fast._triton.launch import LAUNCH, block_for, options, padded, programs

MINIMUM_OPACITY = tl.constexpr(1e-10)


@triton.jit
def _opacity_of(x):
    """1 - exp(-x), accurate also for small x."""
    small = tl.where(tl.abs(x) < 0.1, x, 0.0)
    series = small * (1 - small * (1 / 2 - small * (1 / 6 - small * (1 / 24 - small * (1 / 120 - small / 720)))))
    return tl.where(tl.abs(x) < 0.1, series, 1 - tl.exp(-x))


@triton.jit
def _rays(ray_offsets, rays, RAYS: tl.constexpr):
    """The rays of a program, and where the samples of each begin and end."""
    ray = tl.program_id(0).to(tl.int64) * RAYS + tl.arange(0, RAYS)
    real = ray < rays
    begin, end = tl.load(ray_offsets + ray, real, 0), tl.load(ray_offsets + ray + 1, real, 0)
    return ray, real, begin.to(tl.int64), end.to(tl.int64)


@triton.jit
def _samples(sigma, t_starts, t_ends, i, real, optical_before, early_stop):
    """Of a tile [rays, samples]: t_start, t_end, sigma, optical depth, that up to and including each sample, alpha, and
    whether it is beyond the stop."""
    start = tl.load(t_starts + i, real, 0.0)
    end = tl.load(t_ends + i, real, 0.0)
    density = tl.load(sigma + i, real, 0.0)
    optical = density * (end - start)
    optical = tl.where(optical > 90.0, 90.0, optical)  # opaque; infinity would turn into NaN below. NaN stays NaN
    after = optical_before[:, None] + tl.cumsum(optical, 1)
    stopped = tl.exp(optical - after) < early_stop
    return start, end, density, optical, after, _opacity_of(optical), stopped


@triton.jit
def forward_kernel(
    sigma, values, t_starts, t_ends, ray_offsets, out_values, out_opacity, out_depth, out_variance, weights, rays,
    early_stop, C: tl.constexpr, C_PADDED: tl.constexpr, RAYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    ray, there, begin, end = _rays(ray_offsets, rays, RAYS)
    lanes, c = tl.arange(0, BLOCK)[None, :], tl.arange(0, C_PADDED)
    has = begin < end
    # Moments about the first middle: the variance is a small difference of large numbers otherwise.
    origin = 0.5 * (tl.load(t_starts + begin, has, 0.0) + tl.load(t_ends + begin, has, 0.0))
    zero = tl.zeros((RAYS,), tl.float32)
    optical, opacity, first, second, least = zero, zero, zero, zero, zero
    sums = tl.zeros((RAYS, C_PADDED), tl.float32)
    i0 = begin
    while tl.max(((i0 < end) & (tl.exp(-optical) >= early_stop)).to(tl.int32)) > 0:
        i = i0[:, None] + lanes
        real = (i < end[:, None]) & (tl.exp(-optical) >= early_stop)[:, None]
        t0, t1, _, own, after, alpha, stopped = _samples(sigma, t_starts, t_ends, i, real, optical, early_stop)
        weight = tl.where(stopped | ~real, 0.0, tl.exp(own - after) * alpha)
        middle = tl.where(real, 0.5 * (t0 + t1) - origin[:, None], 0.0)
        tl.store(weights + i, weight, real)
        opacity += tl.sum(weight, 1)
        first += tl.sum(weight * middle, 1)
        second += tl.sum(weight * middle * middle, 1)
        least = tl.minimum(least, tl.min(weight, 1))
        at = real[:, :, None] & (c < C)[None, None, :]
        tile = tl.load(values + i[:, :, None] * C + c[None, None, :], at, 0.0)
        sums += tl.sum(weight[:, :, None] * tile, 1)
        optical += tl.sum(own, 1)
        i0 += BLOCK
    seen = opacity > MINIMUM_OPACITY
    mean = tl.where(seen, first / tl.where(seen, opacity, 1.0), 0.0)
    variance = second / tl.where(seen, opacity, 1.0) - mean * mean
    variance = tl.where((variance < 0.0) & (least >= 0.0), 0.0, variance)  # only rounding made it so
    tl.store(out_values + ray[:, None] * C + c[None, :], sums, there[:, None] & (c < C)[None, :])
    tl.store(out_opacity + ray, opacity, there)
    tl.store(out_depth + ray, tl.where(seen, origin + mean, 0.0), there)
    tl.store(out_variance + ray, tl.where(seen, variance, 0.0), there)


@triton.jit
def _weight_gradient(values, grad_weights, cotangent, i, real, offset, g_opacity, g_depth, g_variance, variance, c,
                     C: tl.constexpr, HAS_WEIGHTS: tl.constexpr):  # fmt: skip
    at = real[:, :, None] & (c < C)[None, None, :]
    tile = tl.load(values + i[:, :, None] * C + c[None, None, :], at, 0.0)
    gradient = g_opacity[:, None] + g_depth[:, None] * offset
    gradient += g_variance[:, None] * (offset * offset - variance[:, None])
    gradient += tl.sum(tile * cotangent[:, None, :], 2)
    if HAS_WEIGHTS:
        gradient += tl.load(grad_weights + i, real, 0.0)
    return gradient


@triton.jit
def backward_kernel(
    grad_values, grad_opacity, grad_depth, grad_variance, grad_weights, sigma, values, t_starts, t_ends, ray_offsets,
    opacity, depth, depth_variance, weights, grad_sigma, grad_sample_values, grad_t_starts, grad_t_ends, rays,
    early_stop, C: tl.constexpr, C_PADDED: tl.constexpr, RAYS: tl.constexpr, BLOCK: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr, NEEDS_T: tl.constexpr,
):  # fmt: skip
    ray, there, begin, end = _rays(ray_offsets, rays, RAYS)
    lanes, c = tl.arange(0, BLOCK)[None, :], tl.arange(0, C_PADDED)
    cotangent = tl.load(grad_values + ray[:, None] * C + c[None, :], there[:, None] & (c < C)[None, :], 0.0)
    all_opacity = tl.load(opacity + ray, there, 0.0)
    by = tl.where(all_opacity > MINIMUM_OPACITY, 1.0 / tl.maximum(all_opacity, MINIMUM_OPACITY), 0.0)
    g_opacity = tl.load(grad_opacity + ray, there, 0.0)
    g_depth, g_variance = tl.load(grad_depth + ray, there, 0.0) * by, tl.load(grad_variance + ray, there, 0.0) * by
    mean, variance = tl.load(depth + ray, there, 0.0), tl.load(depth_variance + ray, there, 0.0)

    suffix = tl.zeros((RAYS,), tl.float32)
    for start in range(0, tl.max(end - begin), BLOCK):
        i = begin[:, None] + start + lanes
        real = i < end[:, None]
        middle = 0.5 * (tl.load(t_starts + i, real, 0.0) + tl.load(t_ends + i, real, 0.0))
        gradient = _weight_gradient(values, grad_weights, cotangent, i, real, middle - mean[:, None], g_opacity,
                                    g_depth, g_variance, variance, c, C, HAS_WEIGHTS)  # fmt: skip
        suffix += tl.sum(tl.where(real, tl.load(weights + i, real, 0.0) * gradient, 0.0), 1)

    optical = tl.zeros((RAYS,), tl.float32)
    i0 = begin
    while tl.max(((i0 < end) & (tl.exp(-optical) >= early_stop)).to(tl.int32)) > 0:
        i = i0[:, None] + lanes
        real = (i < end[:, None]) & (tl.exp(-optical) >= early_stop)[:, None]
        t0, t1, density, own, after, _, stopped = _samples(sigma, t_starts, t_ends, i, real, optical, early_stop)
        offset = 0.5 * (t0 + t1) - mean[:, None]
        gradient = _weight_gradient(values, grad_weights, cotangent, i, real, offset, g_opacity, g_depth, g_variance,
                                    variance, c, C, HAS_WEIGHTS)  # fmt: skip
        weight = tl.load(weights + i, real, 0.0)
        share = tl.where(real, weight * gradient, 0.0)
        to_optical = tl.exp(-after) * gradient - (suffix[:, None] - tl.cumsum(share, 1))
        to_optical = tl.where(stopped, 0.0, to_optical)
        tl.store(grad_sigma + i, to_optical * (t1 - t0), real)
        at = real[:, :, None] & (c < C)[None, None, :]
        own_values = weight[:, :, None] * cotangent[:, None, :]
        tl.store(grad_sample_values + i[:, :, None] * C + c[None, None, :], own_values, at)
        if NEEDS_T:
            moved = 0.5 * weight * (g_depth[:, None] + 2 * g_variance[:, None] * offset)
            tl.store(grad_t_starts + i, moved - to_optical * density, real)
            tl.store(grad_t_ends + i, moved + to_optical * density, real)
        suffix -= tl.sum(share, 1)
        optical += tl.sum(own, 1)
        i0 += BLOCK


def _tile(channels):
    """C, C_PADDED, RAYS, BLOCK."""
    rays = LAUNCH["composite"].rays if channels <= 16 else 1
    return channels, padded(channels), rays, block_for("composite", channels, rays)


def composite_forward(sigma, values, t_starts, t_ends, ray_offsets, out_values, opacity, depth, depth_variance, weights,
                      rays, samples, channels, early_stop):
    weights.zero_()  # samples beyond the stop, and padding of capacity mode
    tile = _tile(channels)
    if rays:
        forward_kernel[(programs(rays, tile[2]),)](sigma, values, t_starts, t_ends, ray_offsets, out_values, opacity,
                                                   depth, depth_variance, weights, rays, early_stop, *tile,
                                                   **options("composite"))


def composite_backward(grad_values, grad_opacity, grad_depth, grad_depth_variance, grad_weights, sigma, values,
                       t_starts, t_ends, ray_offsets, opacity, depth, depth_variance, weights, grad_sigma,
                       grad_sample_values, grad_t_starts, grad_t_ends, rays, samples, channels, early_stop):
    for target in (grad_sigma, grad_sample_values, grad_t_starts, grad_t_ends):
        if target is not None:
            target.zero_()
    if not rays:
        return
    per_ray = [torch.zeros_like(opacity) if g is None else g for g in (grad_opacity, grad_depth, grad_depth_variance)]
    cotangent = values.new_zeros(rays, channels) if grad_values is None else grad_values
    tile = _tile(channels)
    backward_kernel[(programs(rays, tile[2]),)](
        cotangent, *per_ray, grad_weights if grad_weights is not None else sigma, sigma, values, t_starts, t_ends,
        ray_offsets, opacity, depth, depth_variance, weights, grad_sigma, grad_sample_values,
        grad_t_starts if grad_t_starts is not None else sigma, grad_t_ends if grad_t_ends is not None else sigma, rays,
        early_stop, *tile, grad_weights is not None, grad_t_starts is not None, **options("composite"),
    )  # fmt: skip


def compile_cases():
    """(kernel, signature, constants) for the ahead-of-time check."""
    types = {"early_stop": "fp32", "ray_offsets": "*i32", "rays": "i32"}
    for kernel in (forward_kernel, backward_kernel):
        for channels in (3, 7):
            fixed = dict(zip(("C", "C_PADDED", "RAYS", "BLOCK"), _tile(channels)))
            if kernel is backward_kernel:
                fixed |= {"HAS_WEIGHTS": True, "NEEDS_T": True}
            yield kernel, {n: "constexpr" if n in fixed else types.get(n, "*fp32") for n in kernel.arg_names}, fixed
