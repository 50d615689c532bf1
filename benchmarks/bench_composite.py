"""composite, and march + composite, against packed plain torch (cumsum, index_add). Checks, then times.

"plain torch" is the fastest that is right where all is finite: one running sum over all rays in double precision (in
float32 it is 7e-2 wrong at 16384 rays of 64 samples). "reference" sums each ray on its own, so that a NaN stays there.

    pytest benchmarks/bench_composite.py --benchmark-only
"""

import importlib.util

import pytest
import torch
from bench_march import STEP, make_case, plain_torch

from text3d_fast import ops
from text3d_fast.reference.composite import composite as reference_composite

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def reference(sigma, values, samples):
    return reference_composite(sigma, values, samples.t_starts, samples.t_ends, samples.ray_ids, samples.ray_offsets,
                               1e-4)


def plain_composite(sigma, values, samples):
    ids, first = samples.ray_ids.long(), samples.ray_offsets[:-1].long()
    optical = sigma * (samples.t_ends - samples.t_starts)
    before = optical.cumsum(0, dtype=torch.float64) - optical
    before = (before - before[first.clamp(max=len(sigma) - 1)][ids]).float()
    transmittance = torch.exp(-before)
    weights = transmittance * -torch.expm1(-optical)
    weights = torch.where(transmittance < 1e-4, 0, weights)
    per_ray = torch.zeros(samples.num_rays, values.shape[1] + 2, device=sigma.device)
    together = torch.cat([values, torch.ones_like(sigma)[:, None], samples.t_middles[:, None]], 1)
    sums = per_ray.index_add(0, ids, weights[:, None] * together)
    opacity = sums[:, -2]
    return sums[:, :-2], opacity, sums[:, -1] / opacity.clamp(min=1e-10)


COMPILED = torch.compile(plain_composite, dynamic=True)


def nerfacc_composite(sigma, values, samples):
    import nerfacc

    ids, rays = samples.ray_ids.long(), samples.num_rays
    times = samples.t_starts, samples.t_ends
    weights, _, _ = nerfacc.render_weight_from_density(*times, sigma, ray_indices=ids, n_rays=rays)
    middle = samples.t_middles[:, None]
    return [nerfacc.accumulate_along_rays(weights, x, ids, rays) for x in (values, None, middle)]


KINDS = {"ours": ops.composite, "plain torch": plain_composite, "reference": reference, "torch.compile": COMPILED,
         "nerfacc": nerfacc_composite}


def rays_of(case, device):
    """W1: a frame of 64^2 rays through a full grid; "R x N": R rays of N samples over a length of 3."""
    if case == "W1":
        origins, directions, grid, jitter = make_case("full", device)
        return ops.march_rays(origins, directions, grid, 0.0, 1e3, STEP, jitter)
    rays, each = map(int, case.split(" x "))
    ids = torch.arange(rays, device=device, dtype=torch.int32).repeat_interleave(each)
    starts = (torch.arange(each, device=device) * (3 / each) + 1).repeat(rays)
    offsets = torch.arange(rays + 1, device=device, dtype=torch.int32) * each
    return ops.RaySamples(ids, starts, starts + 3 / each, offsets)


def field(samples, channels, density):
    """sigma and values as leaves."""
    generator = torch.Generator().manual_seed(1)
    sigma = torch.rand(samples.num_samples, generator=generator) * 2 * density
    values = torch.rand(samples.num_samples, channels, generator=generator)
    return [x.to(samples.t_starts.device).requires_grad_() for x in (sigma, values)]


def forward_backward(kind, sigma, values, samples):
    out = KINDS[kind](sigma, values, samples)
    sigma.grad = values.grad = None
    (out[0].sum() + out[1].sum() + out[2].sum()).backward()
    return sigma.grad, values.grad


def time_it(benchmark, kind, device, work):
    if kind == "nerfacc" and (device == "cpu" or importlib.util.find_spec("nerfacc") is None):
        pytest.skip("nerfacc is not installed" if device == "cuda" else "nerfacc has no CPU code")

    def timed():
        work()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(timed, rounds=40 if kind == "ours" else 4, warmup_rounds=1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("density", [0.5, 5.0])
@pytest.mark.parametrize("channels", [3, 7])
@pytest.mark.parametrize("direction", ["forward", "forward + backward"])
@pytest.mark.parametrize("case", ["W1", "4096 x 128"])
@pytest.mark.parametrize("kind", KINDS)
def test_composite(benchmark, kind, case, direction, channels, density, device):
    samples = rays_of(case, device)
    sigma, values = field(samples, channels, density)
    want = forward_backward("reference", sigma, values, samples)
    for kind_too in ("ours", "plain torch"):
        for a, b in zip(forward_backward(kind_too, sigma, values, samples), want):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    benchmark.group = f"composite {direction}, {channels} channels, density {density}, {case}, {device}"
    if direction == "forward":
        with torch.no_grad():
            time_it(benchmark, kind, device, lambda: KINDS[kind](sigma, values, samples))
    else:
        time_it(benchmark, kind, device, lambda: forward_backward(kind, sigma, values, samples))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["full", "shell"])
@pytest.mark.parametrize("kind", ["ours", "plain torch"])
def test_march_and_composite(benchmark, kind, name, device):
    origins, directions, grid, jitter = make_case(name, device)

    def march():
        if kind == "ours":
            return ops.march_rays(origins, directions, grid, 0.0, 1e3, STEP, jitter)
        return plain_torch(origins, directions, grid, 1e3, STEP, jitter)

    sigma, values = field(march(), 3, 5.0)
    benchmark.group = f"march + composite forward + backward, {name}, {len(sigma)} samples, {device}"
    time_it(benchmark, kind, device, lambda: forward_backward(kind, sigma, values, march()))
