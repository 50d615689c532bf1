"""Triton twin of csrc/composite: one program a ray, tiles of its samples.

Sums run in forward order; the backward pass visits a ray twice, first for the total of w dL/dw, then for the suffixes
as total minus prefix.
"""

import torch

import triton
import triton.language as tl

MINIMUM_OPACITY = tl.constexpr(1e-10)
BLOCK = 64


@triton.jit
def _opacity_of(x):
    """1 - exp(-x), accurate also for small x."""
    small = tl.where(tl.abs(x) < 0.1, x, 0.0)
    series = small * (1 - small * (1 / 2 - small * (1 / 6 - small * (1 / 24 - small * (1 / 120 - small / 720)))))
    return tl.where(tl.abs(x) < 0.1, series, 1 - tl.exp(-x))


@triton.jit
def _samples(sigma, t_starts, t_ends, i, real, optical_before, early_stop):
    """Of a tile: t_start, t_end, sigma, optical depth up to and including each sample, alpha, and whether it is
    beyond the stop."""
    start = tl.load(t_starts + i, real, 0.0)
    end = tl.load(t_ends + i, real, 0.0)
    density = tl.load(sigma + i, real, 0.0)
    optical = density * (end - start)
    optical = tl.where(optical > 90.0, 90.0, optical)  # opaque; infinity would turn into NaN below. NaN stays NaN
    after = optical_before + tl.cumsum(optical, 0)
    stopped = tl.exp(optical - after) < early_stop
    return start, end, density, optical, after, _opacity_of(optical), stopped


@triton.jit
def forward_kernel(
    sigma, values, t_starts, t_ends, ray_offsets, out_values, out_opacity, out_depth, out_variance, weights,
    early_stop, C: tl.constexpr, C_PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    ray = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(ray_offsets + ray).to(tl.int64), tl.load(ray_offsets + ray + 1).to(tl.int64)
    lanes, channels = tl.arange(0, BLOCK), tl.arange(0, C_PADDED)
    origin = tl.load(t_starts + begin, begin < end, 0.0)  # moments about a time on the ray
    optical, opacity, first, second, least = 0.0, 0.0, 0.0, 0.0, 0.0
    sums = tl.zeros((C_PADDED,), tl.float32)
    i0 = begin
    while (i0 < end) & (tl.exp(-optical) >= early_stop):
        i = i0 + lanes
        real = i < end
        t0, t1, _, own, after, alpha, stopped = _samples(sigma, t_starts, t_ends, i, real, optical, early_stop)
        weight = tl.where(stopped, 0.0, tl.exp(own - after) * alpha)
        middle = tl.where(real, 0.5 * (t0 + t1) - origin, 0.0)
        tl.store(weights + i, weight, real)
        opacity += tl.sum(weight)
        first += tl.sum(weight * middle)
        second += tl.sum(weight * middle * middle)
        least = tl.minimum(least, tl.min(weight))
        tile = tl.load(values + i[:, None] * C + channels[None, :], real[:, None] & (channels < C)[None, :], 0.0)
        sums += tl.sum(weight[:, None] * tile, 0)
        optical += tl.sum(own)
        i0 += BLOCK
    seen = opacity > MINIMUM_OPACITY
    mean = tl.where(seen, first / tl.where(seen, opacity, 1.0), 0.0)
    variance = second / tl.where(seen, opacity, 1.0) - mean * mean
    tl.store(out_values + ray * C + channels, sums, channels < C)
    tl.store(out_opacity + ray, opacity)
    tl.store(out_depth + ray, tl.where(seen, origin + mean, 0.0))
    variance = tl.where(least < 0, variance, tl.maximum(variance, 0.0))  # only rounding makes it negative otherwise
    tl.store(out_variance + ray, tl.where(seen, variance, 0.0))


@triton.jit
def _weight_gradient(values, grad_weights, cotangent, i, real, middle, g_opacity, g_depth, g_variance, depth, variance,
                     channels, C: tl.constexpr, HAS_WEIGHTS: tl.constexpr):  # fmt: skip
    tile = tl.load(values + i[:, None] * C + channels[None, :], real[:, None] & (channels < C)[None, :], 0.0)
    offset = middle - depth
    gradient = g_opacity + g_depth * offset + g_variance * (offset * offset - variance)
    gradient += tl.sum(tile * cotangent[None, :], 1)
    if HAS_WEIGHTS:
        gradient += tl.load(grad_weights + i, real, 0.0)
    return gradient


@triton.jit
def backward_kernel(
    grad_values, grad_opacity, grad_depth, grad_variance, grad_weights, sigma, values, t_starts, t_ends, ray_offsets,
    opacity, depth, depth_variance, weights, grad_sigma, grad_sample_values, grad_t_starts, grad_t_ends, early_stop,
    C: tl.constexpr, C_PADDED: tl.constexpr, BLOCK: tl.constexpr, HAS_WEIGHTS: tl.constexpr, NEEDS_T: tl.constexpr,
):  # fmt: skip
    ray = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(ray_offsets + ray).to(tl.int64), tl.load(ray_offsets + ray + 1).to(tl.int64)
    lanes, channels = tl.arange(0, BLOCK), tl.arange(0, C_PADDED)
    cotangent = tl.load(grad_values + ray * C + channels, channels < C, 0.0)
    all_opacity = tl.load(opacity + ray)
    by = tl.where(all_opacity > MINIMUM_OPACITY, 1.0 / tl.maximum(all_opacity, MINIMUM_OPACITY), 0.0)
    g_opacity = tl.load(grad_opacity + ray)
    g_depth, g_variance = tl.load(grad_depth + ray) * by, tl.load(grad_variance + ray) * by
    mean, variance = tl.load(depth + ray), tl.load(depth_variance + ray)

    suffix = 0.0
    i0 = begin
    while i0 < end:
        i = i0 + lanes
        real = i < end
        middle = 0.5 * (tl.load(t_starts + i, real, 0.0) + tl.load(t_ends + i, real, 0.0))
        gradient = _weight_gradient(values, grad_weights, cotangent, i, real, middle, g_opacity, g_depth, g_variance,
                                    mean, variance, channels, C, HAS_WEIGHTS)  # fmt: skip
        suffix += tl.sum(tl.load(weights + i, real, 0.0) * gradient)
        i0 += BLOCK

    optical = 0.0
    i0 = begin
    while (i0 < end) & (tl.exp(-optical) >= early_stop):
        i = i0 + lanes
        real = i < end
        t0, t1, density, own, after, _, stopped = _samples(sigma, t_starts, t_ends, i, real, optical, early_stop)
        middle = 0.5 * (t0 + t1)
        gradient = _weight_gradient(values, grad_weights, cotangent, i, real, middle, g_opacity, g_depth, g_variance,
                                    mean, variance, channels, C, HAS_WEIGHTS)  # fmt: skip
        weight = tl.load(weights + i, real, 0.0)
        prefix = tl.cumsum(weight * gradient, 0)
        to_optical = tl.where(stopped, 0.0, tl.exp(-after) * gradient - (suffix - prefix))
        tl.store(grad_sigma + i, to_optical * (t1 - t0), real)
        where = real[:, None] & (channels < C)[None, :]
        tl.store(grad_sample_values + i[:, None] * C + channels[None, :], weight[:, None] * cotangent[None, :], where)
        if NEEDS_T:
            moved = 0.5 * weight * (g_depth + 2 * g_variance * (middle - mean))
            tl.store(grad_t_starts + i, moved - to_optical * density, real)
            tl.store(grad_t_ends + i, moved + to_optical * density, real)
        suffix -= tl.sum(weight * gradient)
        optical += tl.sum(own)
        i0 += BLOCK


def _tile(channels):
    """C, C_PADDED, BLOCK: at most 2048 values a tile."""
    padded = triton.next_power_of_2(max(channels, 1))
    return channels, padded, max(16, min(BLOCK, 2048 // padded))


def composite_forward(sigma, values, t_starts, t_ends, ray_offsets, out_values, opacity, depth, depth_variance, weights,
                      early_stop):
    rays, channels = out_values.shape
    weights.zero_()  # samples beyond the stop, and padding of capacity mode
    if rays:
        forward_kernel[(rays,)](sigma, values, t_starts, t_ends, ray_offsets, out_values, opacity, depth,
                                depth_variance, weights, early_stop, *_tile(channels))


def composite_backward(grad_values, grad_opacity, grad_depth, grad_depth_variance, grad_weights, sigma, values,
                       t_starts, t_ends, ray_offsets, opacity, depth, depth_variance, weights, grad_sigma,
                       grad_sample_values, grad_t_starts, grad_t_ends, early_stop):
    rays, channels = opacity.shape[0], values.shape[1]
    for target in (grad_sigma, grad_sample_values, grad_t_starts, grad_t_ends):
        if target is not None:
            target.zero_()
    if not rays:
        return
    per_ray = [torch.zeros_like(opacity) if g is None else g for g in (grad_opacity, grad_depth, grad_depth_variance)]
    cotangent = values.new_zeros(rays, channels) if grad_values is None else grad_values
    backward_kernel[(rays,)](
        cotangent, *per_ray, grad_weights if grad_weights is not None else sigma, sigma, values, t_starts, t_ends,
        ray_offsets, opacity, depth, depth_variance, weights, grad_sigma, grad_sample_values,
        grad_t_starts if grad_t_starts is not None else sigma, grad_t_ends if grad_t_ends is not None else sigma,
        early_stop, *_tile(channels), grad_weights is not None,
        grad_t_starts is not None,
    )  # fmt: skip


def compile_cases():
    """(kernel, signature, constants) for the ahead-of-time check."""
    flags = {
        forward_kernel: {"BLOCK": BLOCK},
        backward_kernel: {"BLOCK": BLOCK, "HAS_WEIGHTS": True, "NEEDS_T": True},
    }
    for kernel, constants in flags.items():
        for channels in (3, 7):
            fixed = {"C": channels, "C_PADDED": triton.next_power_of_2(channels), **constants}
            signature = {
                name: "constexpr" if name in fixed else "fp32" if name == "early_stop" else
                "*i32" if name == "ray_offsets" else "*fp32" for name in kernel.arg_names
            }  # fmt: skip
            yield kernel, signature, fixed
