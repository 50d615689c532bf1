"""ops.prune_samples against a loop over rays."""

import itertools
import math

import pytest
import torch
from test_composite import make_inputs

from text3d_fast import ops


def expected_indices(samples, sigma, early_stop, alpha_threshold):
    kept, offsets = [], samples.ray_offsets.tolist()
    lengths = (samples.t_ends - samples.t_starts).tolist()
    for begin, end in itertools.pairwise(offsets):
        transmittance = 1.0
        for i in range(begin, end):
            alpha = -math.expm1(-sigma[i].item() * lengths[i])
            if transmittance >= early_stop and alpha >= alpha_threshold:
                kept.append(i)
            transmittance *= 1 - alpha
    return kept


@pytest.mark.parametrize("early_stop, alpha_threshold", [(0.0, 0.0), (1e-2, 0.0), (1e-3, 0.3)])
@pytest.mark.parametrize("case", [(1, 1, 1), (31, 40, 1), (5, 0, 1), (0, 0, 1)])
def test_keeps_the_right_ones(case, early_stop, alpha_threshold, device, generator):
    sigma, _, samples = make_inputs(case, generator, device=device)
    want = expected_indices(samples, sigma, early_stop, alpha_threshold)
    pruned, kept = ops.prune_samples(samples, sigma, early_stop, alpha_threshold)
    assert kept.tolist() == want
    for name in ("ray_ids", "t_starts", "t_ends"):
        assert torch.equal(getattr(pruned, name), getattr(samples, name)[kept])
    assert torch.equal(torch.bincount(pruned.ray_ids, minlength=case[0]), pruned.ray_offsets.diff())
    for capacity in (len(want) + 7, len(want), len(want) // 2):
        cut, cut_kept = ops.prune_samples(samples, sigma, early_stop, alpha_threshold, capacity)
        size = min(capacity, len(want))
        assert cut_kept.tolist() == want[:size] + [0] * (capacity - size)
        assert bool(cut.overflow) == (capacity < len(want))
        assert torch.equal(cut.ray_offsets, pruned.ray_offsets.clamp(max=capacity))
        assert (cut.t_ends[size:] == 0).all() and (cut.ray_ids[size:] == 0).all()


def test_image_stays_the_same(device, generator):
    sigma, values, samples = make_inputs((40, 60, 3), generator, device=device)
    full = ops.composite(sigma, values, samples, 1e-3)
    pruned, kept = ops.prune_samples(samples, sigma, 1e-3)
    assert len(kept) < 0.8 * len(sigma)
    fewer = ops.composite(sigma[kept], values[kept], pruned, 0.0)
    for a, b in zip(full[:4], fewer[:4]):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_wall_hides_only_its_own_ray(device):
    ids = torch.tensor([0, 0, 1, 1], dtype=torch.int32, device=device)
    t = torch.tensor([1.0, 2.0, 1.0, 2.0], device=device)
    samples = ops.RaySamples(ids, t, t + 1, torch.tensor([0, 2, 4], dtype=torch.int32, device=device))
    sigma = torch.tensor([math.inf, 1.0, 1.0, 1.0], device=device)
    assert ops.prune_samples(samples, sigma)[1].tolist() == [0, 2, 3]


@pytest.mark.parametrize("capacity", [None, 10])
def test_nan_switches_the_stop_off_on_its_own_ray_only(capacity, device):
    ids = torch.arange(3, dtype=torch.int32, device=device).repeat_interleave(3)
    t = torch.arange(3.0, device=device).repeat(3)
    samples = ops.RaySamples(ids, t, t + 1, torch.tensor([0, 3, 6, 9], dtype=torch.int32, device=device))
    sigma = torch.tensor([math.nan, 50.0, 1.0, 50.0, 1.0, 1.0, 1.0, -math.inf, 50.0], device=device)
    pruned, kept = ops.prune_samples(samples, sigma, 1e-2, capacity=capacity)
    assert kept[:6].tolist() == [0, 1, 2, 3, 6, 8] and pruned.ray_offsets.tolist() == [0, 3, 4, 6]


def test_real_sizes_keep_their_digits(device, generator):
    """A million samples behind each other in memory: a ray's stop does not move."""
    rays, each = 16384, 64
    t = torch.arange(each, device=device).repeat(rays) * 0.02
    ids = torch.arange(rays, dtype=torch.int32, device=device).repeat_interleave(each)
    samples = ops.RaySamples(ids, t, t + 0.02, torch.arange(rays + 1, dtype=torch.int32, device=device) * each)
    sigma = (torch.rand(each, generator=generator, device=device) * 100).repeat(rays)
    _, kept = ops.prune_samples(samples, sigma)
    counts = torch.bincount(ids[kept].long(), minlength=rays)
    assert (counts == counts[0]).all() and 0 < counts[0] < each


def test_errors(generator):
    sigma, _, samples = make_inputs((3, 4, 1), torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="sigma: expected shape"):
        ops.prune_samples(samples, sigma[:-1])
    with pytest.raises(ValueError, match="early_stop"):
        ops.prune_samples(samples, sigma, 1.0)
    with pytest.raises(ValueError, match="alpha_threshold"):
        ops.prune_samples(samples, sigma, 0.1, -1.0)
