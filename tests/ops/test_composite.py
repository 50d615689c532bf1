"""ops.composite against its reference: values, every gradient, early stop, empty rays, compile."""

import contextlib
import dataclasses
import math
import os

import pytest
import torch

from text3d_fast import backends, ops, use_backend
from text3d_fast.reference.composite import composite as reference_composite

# (rays, longest ray, channels): odd sizes, single rays, empty everything
CASES = [(1, 1, 1), (7, 13, 3), (129, 33, 4), (5, 0, 3), (0, 0, 2), (67, 90, 7)]


def make_samples(rays, longest, generator, dtype=torch.float32, device="cpu"):
    counts = torch.randint(0, longest + 1, (rays,), generator=generator, device=device)
    offsets = torch.zeros(rays + 1, dtype=torch.int32, device=device)
    offsets[1:] = counts.cumsum(0)
    ids = torch.repeat_interleave(torch.arange(rays, device=device), counts).int()
    steps = torch.rand(len(ids), generator=generator, device=device, dtype=dtype) * 0.1 + 0.01
    ends = steps.cumsum(0) + 0.5
    return ops.RaySamples(ids, ends - steps, ends, offsets)


def make_inputs(case, generator, dtype=torch.float32, device="cpu"):
    rays, longest, channels = case
    samples = make_samples(rays, longest, generator, dtype, device)
    count = samples.num_samples
    sigma = torch.rand(count, generator=generator, device=device, dtype=dtype) * 20
    values = torch.randn(count, channels, generator=generator, device=device, dtype=dtype)
    return sigma, values, samples


def gradients(sigma, values, samples, early_stop, cotangents):
    leaves = [x.clone().requires_grad_() for x in (sigma, values, samples.t_starts, samples.t_ends)]
    moved = dataclasses.replace(samples, t_starts=leaves[2], t_ends=leaves[3])
    outputs = ops.composite(leaves[0], leaves[1], moved, early_stop)
    return outputs, torch.autograd.grad(outputs, leaves, cotangents)


@pytest.mark.parametrize("early_stop", [0.0, 1e-2])
@pytest.mark.parametrize("case", CASES)
def test_matches_reference(case, early_stop, device, generator, poisoned_empty):
    sigma, values, samples = make_inputs(case, generator, device=device)
    shapes = [(case[0], case[2]), *[(case[0],)] * 3, (samples.num_samples,)]
    cotangents = [torch.randn(s, generator=generator, device=device) for s in shapes]
    outputs, grads = gradients(sigma, values, samples, early_stop, cotangents)
    double = dataclasses.replace(samples, t_starts=samples.t_starts.double(), t_ends=samples.t_ends.double())
    with use_backend("reference"):
        expected, expected_grads = gradients(sigma.double(), values.double(), double, early_stop,
                                             [c.double() for c in cotangents])
    # fp32 sums of at most 90 terms of order 1, divided by opacities of order 1
    for got, want in zip((*outputs, *grads), (*expected, *expected_grads)):
        torch.testing.assert_close(got, want.float(), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("wanted", range(5))
def test_one_cotangent_at_a_time(wanted, device, generator, poisoned_empty):
    """Outputs that nobody uses send no cotangent at all; t gets no gradient when it needs none."""
    sigma, values, samples = make_inputs((9, 40, 4), generator, device=device)
    results = []
    for backend, dtype in ((None, torch.float32), ("reference", torch.float64)):
        leaves = [sigma.to(dtype).requires_grad_(), values.to(dtype).requires_grad_()]
        moved = dataclasses.replace(samples, t_starts=samples.t_starts.to(dtype), t_ends=samples.t_ends.to(dtype))
        with contextlib.nullcontext() if backend is None else use_backend(backend):
            output = ops.composite(*leaves, moved)[wanted]
            grads = torch.autograd.grad(output.square().sum(), leaves, allow_unused=backend is not None)
        results.append([torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves)])
    for got, want in zip(*results):
        torch.testing.assert_close(got, want.float(), rtol=2e-4, atol=2e-4)


def test_thin_and_thick_samples(device):
    """1 - exp(-x) keeps its digits at both ends; infinite density is a wall, not a NaN."""
    sigma = torch.tensor([1e-6, 1e-3, 1.0, 88.0, 1e4, math.inf], device=device)
    count = len(sigma)
    ids = torch.arange(count, dtype=torch.int32, device=device)
    ones = torch.ones(count, device=device)
    samples = ops.RaySamples(ids, 0 * ones, ones, torch.arange(count + 1, dtype=torch.int32, device=device))
    out = ops.composite(sigma, ones[:, None], samples)
    torch.testing.assert_close(out.opacity, -torch.expm1(-sigma.double()).float(), rtol=1e-6, atol=0)


def test_nan_stays_on_its_ray(device, generator):
    sigma, values, samples = make_inputs((9, 40, 3), generator, device=device)
    expected = ops.composite(sigma, values, samples)
    ray = int(samples.ray_ids[len(sigma) // 2])
    sigma[samples.ray_offsets[ray]] = math.nan
    got = ops.composite(sigma, values, samples)
    others = torch.arange(9, device=device) != ray
    assert got.values[ray].isnan().all() and torch.equal(got.values[others], expected.values[others])


def test_long_rays_keep_small_gradients(device, generator):
    """2000 samples, nearly opaque: the gradients at the far end are 1e-4 of those at the near end and still right."""
    steps = torch.full((2000,), 0.005, device=device)
    ends = steps.cumsum(0)
    offsets = torch.tensor([0, 2000], dtype=torch.int32, device=device)
    samples = ops.RaySamples(torch.zeros(2000, dtype=torch.int32, device=device), ends - steps, ends, offsets)
    sigma = torch.rand(2000, generator=generator, device=device).requires_grad_()
    values = torch.rand(2000, 3, generator=generator, device=device)
    got = torch.autograd.grad(ops.composite(sigma, values, samples, 0.0).values.sum(), sigma)[0]
    double = sigma.detach().double().requires_grad_()
    exact = dataclasses.replace(samples, t_starts=samples.t_starts.double(), t_ends=samples.t_ends.double())
    with use_backend("reference"):
        output = ops.composite(double, values.double(), exact, 0.0)
        want = torch.autograd.grad(output.values.sum(), double)[0].float()
    # the native kernels add up suffixes from behind; Triton's total minus prefix leaves 1e-7 of the total
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-9)


def test_reference_gradcheck():
    generator = torch.Generator().manual_seed(1)
    sigma, values, samples = make_inputs((4, 5, 2), generator, torch.float64)

    def run(*leaves):
        return reference_composite(*leaves, samples.ray_ids, samples.ray_offsets, 0.0)

    leaves = [x.requires_grad_() for x in (sigma, values, samples.t_starts, samples.t_ends)]
    torch.autograd.gradcheck(run, leaves)


def test_padding_beyond_the_last_offset_weighs_nothing(device, generator, poisoned_empty):
    sigma, values, samples = make_inputs((6, 9, 3), generator, device=device)
    expected = ops.composite(sigma, values, samples)
    pad = 11

    def padded(x):
        return torch.cat([x, x.new_zeros(pad, *x.shape[1:])])

    longer = ops.RaySamples(*map(padded, (samples.ray_ids, samples.t_starts, samples.t_ends)), samples.ray_offsets)
    leaves = [padded(sigma).requires_grad_(), padded(values).requires_grad_()]
    got = ops.composite(*leaves, longer)
    for a, b in zip(got[:4], expected[:4]):
        torch.testing.assert_close(a, b)
    grads = torch.autograd.grad(got.values.sum() + got.depth.sum(), leaves)
    assert all(g[samples.num_samples :].eq(0).all() for g in grads)


def test_opcheck(device, generator):
    sigma, values, samples = make_inputs((7, 5, 3), generator, device=device)
    sigma.requires_grad_(), values.requires_grad_()
    arguments = (sigma, values, samples.t_starts, samples.t_ends, samples.ray_ids, samples.ray_offsets, 1e-4,
                 backends.choose("composite", device))
    torch.library.opcheck(torch.ops.text3d.composite.default, arguments)


def test_compiles_whole(device, generator):
    sigma, values, samples = make_inputs((7, 5, 3), generator, device=device)
    sigma.requires_grad_()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(sigma):
        return ops.composite(sigma.exp(), values, samples).values.square().sum()

    expected = torch.autograd.grad(ops.composite(sigma.exp(), values, samples).values.square().sum(), sigma)
    torch.testing.assert_close(torch.autograd.grad(loss(sigma), sigma), expected)


def test_errors_name_the_argument(generator):
    sigma, values, samples = make_inputs((3, 4, 2), torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"values: expected shape \["):
        ops.composite(sigma, values[:-1], samples)
    with pytest.raises(TypeError, match=r"sigma: expected torch.float32, got torch.float64"):
        ops.composite(sigma.double(), values, samples)
    with pytest.raises(TypeError, match="ray_offsets"):
        ops.composite(sigma, values, dataclasses.replace(samples, ray_offsets=samples.ray_offsets.long()))


@pytest.mark.skipif("TEXT3D_EMULATE" in os.environ, reason="CUDA kernels do not look at values")
def test_wrong_offsets_are_noticed_on_a_cpu():
    sigma, values, samples = make_inputs((3, 4, 2), torch.Generator().manual_seed(0))
    for offsets in (samples.ray_offsets.flip(0), samples.ray_offsets + 1):
        with pytest.raises(ValueError, match="ray_offsets: expected to rise"):
            ops.composite(sigma, values, dataclasses.replace(samples, ray_offsets=offsets))
