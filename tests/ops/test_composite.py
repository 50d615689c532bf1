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


@pytest.mark.parametrize("backend", [None, "reference"])
def test_real_sizes_in_single_precision(backend, device, generator):
    """16384 rays of 64 samples: a running sum over all of them, as one thinks of first, is 7e-2 wrong in float32."""
    rays, each = 16384, 64
    ids = torch.arange(rays, device=device, dtype=torch.int32).repeat_interleave(each)
    ends = (torch.arange(each, device=device) + 1).repeat(rays) * 0.02 + 1
    offsets = torch.arange(rays + 1, device=device, dtype=torch.int32) * each
    samples = ops.RaySamples(ids, ends - 0.02, ends, offsets)
    sigma = torch.rand(rays * each, generator=generator, device=device) * 8
    values = torch.rand(rays * each, 3, generator=generator, device=device)
    shapes = [(rays, 3), *[(rays,)] * 3, (rays * each,)]
    cotangents = [torch.randn(s, generator=generator, device=device) for s in shapes]
    with use_backend(backend):
        outputs, grads = gradients(sigma, values, samples, 0.0, cotangents)
    dense = [x.view(rays, each).double().requires_grad_() for x in (sigma, samples.t_starts, samples.t_ends)]
    colours = values.view(rays, each, 3).double().requires_grad_()
    optical = dense[0] * (dense[2] - dense[1])
    weights = torch.exp(-(optical.cumsum(1) - optical)) * -torch.expm1(-optical)
    middles, opacity = 0.5 * (dense[1] + dense[2]), weights.sum(1)
    depth = (weights * middles).sum(1) / opacity
    variance = (weights * (middles - depth[:, None]) ** 2).sum(1) / opacity
    expected = (weights[..., None] * colours).sum(1), opacity, depth, variance, weights.flatten()
    wanted = torch.autograd.grad(expected, (dense[0], colours, dense[1], dense[2]), [c.double() for c in cotangents])
    # t of 2 in float32 leaves 1e-7 in intervals of 0.02: 6e-6 of an optical depth of 0.16, of which 64 add up
    for got, want in zip(outputs, expected):
        torch.testing.assert_close(got, want.float().reshape(got.shape), rtol=2e-5, atol=2e-5)
    for got, want in zip(grads, wanted):
        torch.testing.assert_close(got, want.float().reshape(got.shape), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_nan_spoils_no_other_ray(backend, device, generator):
    sigma, values, samples = make_inputs((40, 30, 3), generator, device=device)
    first = int(samples.ray_ids[0])
    with use_backend(backend):
        expected = ops.composite(sigma, values, samples)
        sigma[0] = math.nan
        sigma.requires_grad_()
        got = ops.composite(sigma, values, samples)
        others = torch.arange(40, device=device) != first
        grad = torch.autograd.grad(got.values[others].sum(), sigma)[0]
    assert got.values[first].isnan().all() and got.opacity[first].isnan()
    for a, b in zip(got[:4], expected[:4]):
        assert torch.equal(a[others], b[others])
    assert grad[samples.ray_ids != first].isfinite().all()


@pytest.mark.parametrize("backend", [None, "reference"])
def test_negative_densities_follow_the_formulae(backend, device):
    """Weights -0.65 and 1.43 at 0.5 and 1.5: opacity 0.78, depth 2.3, a negative variance."""
    ids = torch.zeros(2, dtype=torch.int32, device=device)
    starts = torch.arange(2.0, device=device)
    samples = ops.RaySamples(ids, starts, starts + 1, torch.tensor([0, 2], dtype=torch.int32, device=device))
    sigma = torch.tensor([-0.5, 2.0], device=device)
    with use_backend(backend):
        out = ops.composite(sigma, torch.ones(2, 1, device=device), samples, 0.0)
    weights, transmittance = [], 1.0
    for one in sigma.tolist():
        weights.append(transmittance * -math.expm1(-one))
        transmittance *= math.exp(-one)
    opacity = sum(weights)
    depth = sum(w * (i + 0.5) for i, w in enumerate(weights)) / opacity
    variance = sum(w * (i + 0.5 - depth) ** 2 for i, w in enumerate(weights)) / opacity
    assert variance < -1
    assert out.depth.item() == pytest.approx(depth, rel=1e-5)
    assert out.depth_variance.item() == pytest.approx(variance, rel=1e-5)


def test_variance_is_never_negative_by_rounding(device, generator):
    """A single thin sample far away: the mean square less the square of the mean is nothing but rounding."""
    count = 4096
    starts = torch.rand(count, generator=generator, device=device) * 1000
    ids = torch.arange(count, dtype=torch.int32, device=device)
    samples = ops.RaySamples(ids, starts, starts + 1e-3, torch.arange(count + 1, dtype=torch.int32, device=device))
    sigma = torch.rand(count, generator=generator, device=device) * 100
    assert (ops.composite(sigma, sigma[:, None], samples).depth_variance >= 0).all()


def test_errors_name_the_argument(generator):
    sigma, values, samples = make_inputs((3, 4, 2), torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"values: expected shape \["):
        ops.composite(sigma, values[:-1], samples)
    with pytest.raises(TypeError, match=r"sigma: expected torch.float32, got torch.float64"):
        ops.composite(sigma.double(), values, samples)
    with pytest.raises(TypeError, match="ray_offsets"):
        ops.composite(sigma, values, dataclasses.replace(samples, ray_offsets=samples.ray_offsets.long()))
    with pytest.raises(ValueError, match="ray_offsets: expected shape .*at least one"):
        ops.composite(sigma, values, dataclasses.replace(samples, ray_offsets=samples.ray_offsets[:0]))
    for early_stop in (math.nan, -0.1, 1.5):
        with pytest.raises(ValueError, match="early_stop: expected a transmittance from 0 to 1"):
            ops.composite(sigma, values, samples, early_stop)


@pytest.mark.parametrize("name", ["t_starts", "t_ends", "ray_ids", "ray_offsets"])
def test_every_field_is_on_the_same_device(name):
    sigma, values, samples = make_inputs((3, 4, 2), torch.Generator().manual_seed(0))
    elsewhere = dataclasses.replace(samples, **{name: getattr(samples, name).to("meta")})
    for call in (lambda: ops.composite(sigma, values, elsewhere), lambda: ops.prune_samples(elsewhere, sigma)):
        with pytest.raises(ValueError, match=rf"samples.{name}: expected device cpu"):
            call()


@pytest.mark.skipif("TEXT3D_EMULATE" in os.environ, reason="CUDA kernels do not look at values")
def test_wrong_offsets_are_noticed_on_a_cpu():
    sigma, values, samples = make_inputs((3, 4, 2), torch.Generator().manual_seed(0))
    for offsets in (samples.ray_offsets.flip(0), samples.ray_offsets + 1):
        with pytest.raises(ValueError, match="ray_offsets: expected to rise"):
            ops.composite(sigma, values, dataclasses.replace(samples, ray_offsets=offsets))
