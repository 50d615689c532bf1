"""The nerfacc drop-in against what its documentation says, ray by ray in plain torch."""

import numpy as np
import pytest
import torch

import text3d_fast.compat.nerfacc as nerfacc
from text3d_fast.compat.nerfacc._walk import walk
from text3d_fast.compat.nerfacc.cameras import (
    _opencv_lens_distortion,
    _opencv_lens_distortion_fisheye,
    opencv_lens_undistortion,
    opencv_lens_undistortion_fisheye,
)
from text3d_fast.compat.nerfacc.estimators.prop_net import get_proposal_requires_grad_fn
from text3d_fast.compat.nerfacc.grid import _enlarge_aabb, _query, march
from text3d_fast.compat.nerfacc.volrend import accumulate_along_rays_

COUNTS = (3, 0, 1, 17, 0, 40, 2)
RAYS = torch.arange(len(COUNTS)).repeat_interleave(torch.tensor(COUNTS))
N = len(RAYS)


def rows(x):
    return x.split(COUNTS)


def rays(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    origins = torch.randn(count, 3, generator=generator) * 1.5
    return origins, torch.nn.functional.normalize(torch.randn(count, 3, generator=generator), dim=-1)


def grids(levels, size=(8, 6, 7), share=0.3):
    box = torch.tensor([-1.0, -0.8, -1.2, 1.0, 1.1, 0.9])
    aabbs = torch.stack([_enlarge_aabb(box, 2.0**i) for i in range(levels)])
    return torch.rand(levels, *size, generator=torch.Generator().manual_seed(1)) < share, aabbs


SCANS = {
    "inclusive_sum": lambda x: x.cumsum(0),
    "exclusive_sum": lambda x: torch.cat([x.new_zeros(1), x.cumsum(0)[:-1]]) if len(x) else x,
    "inclusive_prod": lambda x: x.cumprod(0),
    "exclusive_prod": lambda x: torch.cat([x.new_ones(1), x.cumprod(0)[:-1]]) if len(x) else x,
}


@pytest.mark.parametrize("name", SCANS)
@pytest.mark.parametrize("zeros", [False, True])
def test_scans_and_their_gradients(name, zeros):
    x = torch.randn(N, dtype=torch.float64)
    if zeros:
        x[torch.rand(N) < 0.2] = 0
        x[4:6] = 0
    x.requires_grad_()
    scan = getattr(nerfacc, name)
    expected = torch.cat([SCANS[name](row) for row in rows(x)])
    cotangent = torch.randn(N, dtype=torch.float64)
    wanted = torch.autograd.grad(expected, x, cotangent)[0]
    for how in ({"indices": RAYS}, {"packed_info": nerfacc.pack_info(RAYS, len(COUNTS))}):
        got = scan(x, **how)
        # Logarithms and differences of running sums cost a few bits of 53.
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(torch.autograd.grad(got, x, cotangent)[0], wanted, rtol=1e-10, atol=1e-11)
    batched = torch.randn(3, 5)
    torch.testing.assert_close(scan(batched), torch.stack([SCANS[name](row) for row in batched]))


def test_sums_are_twice_differentiable():
    x = torch.randn(N, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: nerfacc.exclusive_sum(x, indices=RAYS).square(), x)


@pytest.mark.parametrize("name", SCANS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_what_is_infinite_stays_in_its_ray(name, value):
    x = torch.rand(N) + 0.5
    x[8] = value
    expected = torch.cat([SCANS[name](row.double()).float() for row in rows(x)])
    torch.testing.assert_close(getattr(nerfacc, name)(x, indices=RAYS), expected, equal_nan=True)


def plain_weights(t0, t1, sigma):
    alpha = 1 - torch.exp(-sigma * (t1 - t0))
    trans = torch.exp(-SCANS["exclusive_sum"](sigma * (t1 - t0)))
    return trans * alpha, trans, alpha


def samples(dtype=torch.float32):
    t0 = torch.rand(N, dtype=dtype).sort()[0]
    t1 = t0 + 0.1 * torch.rand(N, dtype=dtype)
    sigma, rgb = 5 * torch.rand(N, dtype=dtype), torch.rand(N, 3, dtype=dtype)
    return [x.requires_grad_() for x in (t0, t1, sigma, rgb)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("expected_depths", [True, False])
def test_rendering_and_its_gradients(dtype, expected_depths):
    """float32 goes through ops.composite, float64 through the plain sums."""
    torch.manual_seed(0)
    t0, t1, sigma, rgb = inputs = samples(dtype)
    background = torch.rand(3, dtype=dtype)
    got = nerfacc.rendering(t0, t1, RAYS, len(COUNTS), rgb_sigma_fn=lambda a, b, r: (rgb, sigma),
                            render_bkgd=background, expected_depths=expected_depths)  # fmt: skip
    expected = [[], [], [], []]
    for a, b, s, c in zip(*map(rows, inputs)):
        weights, *_ = plain_weights(a, b, s)
        opacity = weights.sum()
        depth = (weights * (a + b) / 2).sum()
        expected[0].append((weights[:, None] * c).sum(0) + background * (1 - opacity))
        expected[1].append(opacity[None])
        expected[2].append((depth / opacity.clamp(min=torch.finfo(dtype).eps) if expected_depths else depth)[None])
        expected[3].append(weights)
    expected = [*map(torch.stack, expected[:3]), torch.cat(expected[3])]
    cotangents = [torch.randn_like(x) for x in expected]
    got = [*got[:3], got[3]["weights"]]
    tolerance = {torch.float32: {"rtol": 2e-5, "atol": 2e-5}, torch.float64: {"rtol": 1e-10, "atol": 1e-10}}[dtype]
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, **tolerance)
    for a, b in zip(torch.autograd.grad(got, inputs, cotangents), torch.autograd.grad(expected, inputs, cotangents)):
        torch.testing.assert_close(a, b, **tolerance)


def test_extras_are_what_the_single_functions_say():
    torch.manual_seed(0)
    t0, t1, sigma, rgb = samples()
    packed = {"ray_indices": RAYS, "n_rays": len(COUNTS)}
    *_, extras = nerfacc.rendering(t0, t1, **packed, rgb_sigma_fn=lambda a, b, r: (rgb, sigma))
    weights, trans, alphas = nerfacc.render_weight_from_density(t0, t1, sigma, **packed)
    assert set(extras) == {"weights", "trans", "alphas", "sigmas", "rgbs"}
    for name, value in {"weights": weights, "trans": trans, "alphas": alphas, "sigmas": sigma, "rgbs": rgb}.items():
        torch.testing.assert_close(dict(extras)[name], value)
        torch.testing.assert_close(extras.get(name), value)
    *_, by_alpha = nerfacc.rendering(t0, t1, **packed, rgb_alpha_fn=lambda a, b, r: (rgb, alphas))
    torch.testing.assert_close(by_alpha["weights"], weights, rtol=1e-5, atol=1e-6)
    expected = torch.cat([torch.stack(plain_weights(a, b, s), 1) for a, b, s in zip(*map(rows, (t0, t1, sigma)))])
    torch.testing.assert_close(torch.stack([weights, trans, alphas], 1), expected)
    prefix = torch.rand(N)
    dimmed, _ = nerfacc.render_transmittance_from_density(t0, t1, sigma, **packed, prefix_trans=prefix)
    torch.testing.assert_close(dimmed, trans * prefix)
    visible = nerfacc.render_visibility_from_density(t0, t1, sigma, **packed, early_stop_eps=0.5, alpha_thre=0.1)
    assert torch.equal(visible, (trans >= 0.5) & (alphas >= 0.1)) and 0 < visible.sum() < N


def test_rendering_nothing():
    empty = torch.empty(0)
    sigma, rgb = torch.empty(0, requires_grad=True), torch.empty(0, 3, requires_grad=True)
    colours, opacity, depth, extras = nerfacc.rendering(empty, empty, empty.long(), 4, lambda *_: (rgb, sigma))
    assert (colours == 0).all() and colours.shape == (4, 3) and opacity.shape == depth.shape == (4, 1)
    assert extras["trans"].shape == (0,)
    (colours.sum() + depth.sum()).backward()
    assert sigma.grad.shape == (0,) and rgb.grad.shape == (0, 3)


def test_accumulation_of_unsorted_and_batched():
    weights, values, order = torch.rand(N), torch.rand(N, 2), torch.randperm(N)
    expected = torch.stack([(w[:, None] * v).sum(0) for w, v in zip(rows(weights), rows(values))])
    got = nerfacc.accumulate_along_rays(weights[order], values[order], RAYS[order], len(COUNTS))
    torch.testing.assert_close(got, expected)
    outputs = torch.ones(len(COUNTS), 2)
    accumulate_along_rays_(weights, values, RAYS, outputs)
    torch.testing.assert_close(outputs, expected + 1)
    batched = nerfacc.accumulate_along_rays(weights[:12].view(3, 4), values[:12].view(3, 4, 2))
    torch.testing.assert_close(batched, (weights[:12, None] * values[:12]).view(3, 4, 2).sum(1))
    with pytest.raises(ValueError, match="n_rays"):
        nerfacc.accumulate_along_rays(weights, None, RAYS)


def test_distortion_is_the_double_sum():
    t0, _, weights, _ = (x.detach().double() for x in samples())
    t1 = t0 + 0.1  # the middles rise along the ray, as they do
    expected = []
    for a, b, w in zip(rows(t0), rows(t1), rows(weights)):
        middle = (a + b) / 2
        expected.append((w**2 * (b - a)).sum() / 3 + (w[:, None] * w * (middle[:, None] - middle).abs()).sum())
    got = nerfacc.distortion(weights, t0, t1, RAYS, len(COUNTS))
    torch.testing.assert_close(got, torch.stack(expected)[:, None], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("levels", [1, 3])
@pytest.mark.parametrize("cone", [0.0, 0.02])
def test_marching_is_the_walk(levels, cone):
    """ops.march_rays in nested grids against the general walk, which looks at every interval of the lattice."""
    torch.manual_seed(0)
    origins, directions = rays(400)
    binaries, aabbs = grids(levels)
    near, far = torch.rand(400), 1 + 3 * torch.rand(400)
    got = march(origins, directions, binaries, aabbs[0], near, far, 0.03, cone)
    wanted = walk(origins, directions, binaries, aabbs, near, far, 0.03, cone)
    found = {(int(r), round(float(t), 3)) for r, t in zip(got[0], got[1])}
    expected = {(int(r), round(float(t), 3)) for r, t in zip(wanted[0], wanted[1])}
    assert len(expected) > 300
    assert len(found ^ expected) <= 0.005 * len(expected)  # middles within a rounding of a face fall on either side
    middles = (got[1] + got[2]) / 2
    assert (middles < far[got[0]]).all() and (middles >= near[got[0]]).all()
    assert _query(origins[got[0]] + middles[:, None] * directions[got[0]], binaries, aabbs[0])[0].float().mean() > 0.998


def test_intervals_and_samples_are_one_thing():
    origins, directions = rays(40)
    binaries, aabbs = grids(2)
    mask = torch.arange(40) % 5 != 0
    options = {"step_size": 0.05, "rays_mask": mask}
    intervals, found, stop = nerfacc.traverse_grids(origins, directions, binaries, aabbs, **options)
    starts, ends = intervals.vals[intervals.is_left], intervals.vals[intervals.is_right]
    torch.testing.assert_close((starts + ends) / 2, found.vals)
    assert len(intervals.vals) < 2 * len(starts)  # neighbours share an edge
    assert torch.equal(intervals.ray_indices[intervals.is_left], found.ray_indices)
    for spec in (intervals, found):
        assert torch.equal(nerfacc.pack_info(spec.ray_indices, 40), spec.packed_info)
    assert found.is_valid.all() and (found.packed_info[~mask, 1] == 0).all() and (found.packed_info[mask, 1] > 0).any()
    assert (stop[found.ray_indices] >= ends - 1e-6).all()


def test_traversal_in_portions_is_the_whole():
    """A limit, and going on from the termination planes, as renderers of large pictures do."""
    origins, directions = rays(30)
    binaries, aabbs = grids(2)
    _, whole, _ = nerfacc.traverse_grids(origins, directions, binaries, aabbs, step_size=0.05)
    parts, stop, mask = [], None, None
    for _ in range(40):
        _, part, stop = nerfacc.traverse_grids(origins, directions, binaries, aabbs, near_planes=stop, step_size=0.05,
                                               traverse_steps_limit=4, over_allocate=True, rays_mask=mask)  # fmt: skip
        parts.append(part.packed_info[:, 1])
        assert parts[-1].max() <= 4
        mask = parts[-1] == 4
        if not mask.any():
            break
    total = torch.stack(parts).sum(0)
    assert len(parts) > 3 and not mask.any()
    assert ((total - whole.packed_info[:, 1]).abs() <= 1).all()  # the lattice goes on from rounded times


def test_one_interval_per_cell():
    """step <= 0: together they are as long as the ray's way through occupied cells."""
    origins, directions = rays(25)
    binaries, aabbs = grids(2)
    intervals, found, _ = nerfacc.traverse_grids(origins, directions, binaries, aabbs, step_size=0.0)
    starts, ends = intervals.vals[intervals.is_left], intervals.vals[intervals.is_right]
    points = origins[found.ray_indices] + found.vals[:, None] * directions[found.ray_indices]
    assert _query(points, binaries, aabbs[0])[0][ends - starts > 1e-4].all()  # shorter ones are roundings at a corner
    _, fine, _ = nerfacc.traverse_grids(origins, directions, binaries, aabbs, step_size=1e-3)
    length = torch.zeros(25).index_add_(0, found.ray_indices, ends - starts)
    torch.testing.assert_close(length, fine.packed_info[:, 1] * 1e-3, atol=0.03, rtol=0)  # 1e-3 at ~30 faces
    assert (length > 0.5).any()


def test_boxes_side_by_side():
    """Boxes that do not nest: what is in the box entered last counts."""
    origins, directions = torch.tensor([[-2.0, 0.5, 0.5]]), torch.tensor([[1.0, 0.0, 0.0]])
    aabbs = torch.tensor([[0.0, 0, 0, 1, 1, 1], [2.0, 0, 0, 3, 1, 1]])
    binaries = torch.zeros(2, 2, 2, 2, dtype=torch.bool)
    binaries[0, 0], binaries[1, 1] = True, True
    _, found, stop = nerfacc.traverse_grids(origins, directions, binaries, aabbs, step_size=0.1)
    x = found.vals - 2
    assert len(x) == 10 and ((x > 0) & (x < 0.5)).sum() == 5 and ((x > 2.5) & (x < 3)).sum() == 5
    torch.testing.assert_close(stop, torch.tensor([5.0]))


def test_boxes_hit_and_missed():
    origins = torch.tensor([[0.0, 0, -3], [0, 0, 0], [0, 0, 3], [5, 5, -3], [-1, 0, -3]])
    directions = torch.tensor([[0.0, 0, 1]]).expand(5, 3)
    box = torch.tensor([[-1.0, -1, -1, 1, 1, 1]])
    t0, t1, hit = nerfacc.ray_aabb_intersect(origins, directions, box, 0.5, 100.0, -7)
    assert hit[:, 0].tolist() == [True, True, False, False, True]
    assert t0[:, 0].tolist() == [2, 0.5, -7, -7, 2] and t1[:, 0].tolist() == [4, 1, -7, -7, 4]


@pytest.mark.parametrize("packed_keys", [False, True])
def test_searching_along_rays(packed_keys):
    keys, queries = torch.rand(4, 9).sort(-1)[0], torch.rand(4, 6) * 1.4 - 0.2
    upper = torch.searchsorted(keys, queries, right=True)
    left, right = (upper - 1).clamp(0, 8), upper.clamp(max=8)
    left = torch.where(upper == 9, 7, left)  # beyond the last key: as if in the last interval
    info = torch.stack([torch.arange(4) * 9, torch.full((4,), 9)], -1)
    values = nerfacc.RayIntervals(queries)
    if packed_keys:
        values = nerfacc.RayIntervals(queries.flatten(), torch.stack([torch.arange(4) * 6, torch.full((4,), 6)], -1))
        left, right = ((x + info[:, :1]).flatten() for x in (left, right))
    spec = nerfacc.RayIntervals(keys.flatten(), info) if packed_keys else nerfacc.RayIntervals(keys)
    got = nerfacc.searchsorted(spec, values)
    assert torch.equal(got[0], left) and torch.equal(got[1], right)


def test_importance_sampling_inverts_the_distribution():
    """Per ray: middles at the quantiles (i + 1/2) / n; packed and batched agree; gradients reach the distribution."""
    vals, cdfs = torch.rand(3, 12).sort(-1)[0], torch.rand(3, 12).sort(-1)[0].requires_grad_()
    intervals, found = nerfacc.importance_sampling(nerfacc.RayIntervals(vals), cdfs, 7)
    assert intervals.vals.shape == (3, 8)
    for row in range(3):
        low, high = cdfs[row, 0].item(), cdfs[row, -1].item()
        u = low + (torch.arange(7) + 0.5) / 7 * (high - low)
        expected = torch.from_numpy(np.interp(u, cdfs[row].detach(), vals[row])).float()
        torch.testing.assert_close(found.vals[row], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(intervals.vals[row, 1:-1], (found.vals[row, 1:] + found.vals[row, :-1]) / 2)
    assert torch.autograd.grad(found.vals.sum(), cdfs)[0].abs().sum() > 0
    info = torch.stack([torch.arange(3) * 12, torch.full((3,), 12)], -1)
    packed, packed_found = nerfacc.importance_sampling(
        nerfacc.RayIntervals(vals.flatten(), info), cdfs.flatten(), torch.tensor([7, 0, 7])
    )
    torch.testing.assert_close(packed_found.vals.view(2, 7), found.vals[[0, 2]])
    torch.testing.assert_close(packed.vals.view(2, 8), intervals.vals[[0, 2]])
    assert packed.packed_info.tolist() == [[0, 8], [8, 0], [8, 8]]
    assert packed.is_left.tolist() == ([True] * 7 + [False]) * 2
    assert packed.is_right.tolist() == ([False] + [True] * 7) * 2
    jittered = [nerfacc.importance_sampling(nerfacc.RayIntervals(vals), cdfs, 7, True)[1].vals for _ in range(2)]
    assert not torch.equal(*jittered) and (jittered[0].diff(dim=-1) >= 0).all()


def test_estimator_learns_where_something_is():
    torch.manual_seed(0)
    estimator = nerfacc.OccGridEstimator([-1, -1, -1, 1, 1, 1], [8, 6, 4], levels=2)
    assert list(estimator.state_dict()) == ["resolution", "aabbs", "occs", "binaries"]
    assert estimator.binaries.shape == (2, 8, 6, 4) and estimator.occs.shape == (2 * 192,)
    ball = lambda x: (x.norm(dim=-1, keepdim=True) < 0.5).float()
    for step in range(0, 320, 16):
        estimator.update_every_n_steps(step, ball)
        estimator.update_every_n_steps(step + 1, None)  # not a step to look
    low = estimator.grid_coords / estimator.resolution * 2 - 1
    nearest = torch.maximum(low, torch.minimum(low + 2 / estimator.resolution, torch.zeros(3)))
    empty = nearest.norm(dim=-1) > 0.5  # no point of the cell is in the ball
    assert not estimator.binaries[0].flatten()[empty].any()
    assert estimator.binaries[0, 3:5, 2:4, 1:3].all()
    origins, directions = torch.tensor([[0.0, 0, -3]]), torch.tensor([[0.0, 0, 1]])
    indices, starts, ends = estimator.sampling(origins, directions, render_step_size=0.1)
    assert indices.dtype == torch.int64 and len(indices) and (ends - starts - 0.1).abs().max() < 1e-5
    seen = []
    kept = estimator.sampling(origins, directions, sigma_fn=lambda *s: seen.append(s) or torch.full_like(s[0], 50.0),
                              render_step_size=0.1, early_stop_eps=1e-2)  # fmt: skip
    assert len(kept[0]) == 1 and len(seen[0][0]) == len(indices)  # exp(-5) < 1e-2: the second sample is in the dark
    thin = estimator.sampling(origins, directions, alpha_fn=lambda *s: torch.zeros_like(s[0]), render_step_size=0.1,
                              alpha_thre=0.5)  # fmt: skip
    assert len(thin[0]) == 0
    near = estimator.sampling(origins, directions, render_step_size=0.1, t_min=torch.tensor([2.9]), far_plane=3.1)
    assert 1 <= len(near[0]) < len(indices)
    shifted = estimator.sampling(origins, directions, render_step_size=0.1, stratified=True)[1]
    assert not torch.equal(shifted[:1], starts[:1])
    with pytest.raises(RuntimeError, match="training"):
        estimator.eval().update_every_n_steps(0, ball)
    with pytest.raises(ValueError, match="contraction_type"):
        nerfacc.OccGridEstimator([0] * 6, 4, contraction_type=1)


def test_cells_that_no_camera_sees_stay_empty():
    estimator = nerfacc.OccGridEstimator([-1, -1, -1, 1, 1, 1], 9)
    K = torch.tensor([[[50.0, 0, 50], [0, 50, 50], [0, 0, 1]]])  # 90 degrees
    pose = torch.eye(4)[None]  # at the origin, looking along +z
    estimator.mark_invisible_cells(K, pose, 100, 100, near_plane=0.1)
    x, y, z = (estimator.grid_coords / 8.0 * 2 - 1).unbind(1)
    seen = (z >= 0.1) & (x >= -z) & (x < z) & (y >= -z) & (y < z)
    assert torch.equal(estimator.occs, seen.float() - 1)
    estimator.update_every_n_steps(0, lambda points: torch.ones(len(points), 1))
    assert torch.equal(estimator.binaries.flatten(), seen)


def test_proposals_learn():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(1, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1), torch.nn.Softplus())
    estimator = nerfacc.PropNetEstimator(torch.optim.Adam(net.parameters(), 3e-2))
    wall = lambda a, b: 40.0 * ((a + b) / 2 - 3).abs().lt(0.2).float()
    losses = []
    for _ in range(40):
        a, b = estimator.sampling([lambda a, b: net((a + b)[..., None] / 2)[..., 0]], [24], 16, 20, 1.0, 6.0, "uniform",
                                  stratified=True, requires_grad=True)  # fmt: skip
        trans, _ = nerfacc.render_transmittance_from_density(a, b, wall(a, b))
        losses.append(estimator.update_every_n_steps(trans, requires_grad=True))
    assert a.shape == (20, 16) and (b > a).all() and not estimator.prop_cache
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    learns = get_proposal_requires_grad_fn(2.0, 10)
    assert [learns(step) for step in range(100, 107)] == [False, False, False, True, False, False, True]


def test_lenses_are_inverted():
    torch.manual_seed(0)
    uv = torch.rand(3, 100, 2) - 0.3
    for size in (1, 2, 4, 8):
        params = 0.02 * torch.rand(size)
        all_params = torch.nn.functional.pad(params, (0, 8 - size))
        back = _opencv_lens_distortion(opencv_lens_undistortion(uv, params), all_params)
        torch.testing.assert_close(back, uv, atol=1e-6, rtol=1e-5)
    params = 0.02 * torch.rand(100, 4)
    back = _opencv_lens_distortion_fisheye(opencv_lens_undistortion_fisheye(uv, params), params)
    torch.testing.assert_close(back, uv, atol=1e-6, rtol=1e-5)
    assert (opencv_lens_undistortion_fisheye(uv, torch.tensor([-3.0, 2, -5, 1]), iters=1) == 0).any()  # none found
    assert opencv_lens_undistortion(uv, torch.empty(0)) is uv


def test_compiled_whole():
    """No graph break in what a training step calls."""
    torch.manual_seed(0)
    t0, t1, sigma, rgb = samples()

    def step(t0, t1, rays, sigma, rgb):
        colours, opacity, depth, extras = nerfacc.rendering(t0, t1, rays, 7, lambda *_: (rgb, sigma))
        weights, trans, alphas = nerfacc.render_weight_from_density(t0, t1, sigma, ray_indices=rays, n_rays=7)
        loss = nerfacc.distortion(weights, t0, t1, rays, 7)
        return colours.sum() + (depth + opacity).sum() + loss.sum() + (extras["trans"] * weights).sum()

    arguments = (t0.detach(), t1.detach(), RAYS, sigma, rgb)
    expected = step(*arguments)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*arguments)
    torch.testing.assert_close(got, expected)
    for a, b in zip(torch.autograd.grad(got, (sigma, rgb)), torch.autograd.grad(expected, (sigma, rgb))):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_exported_and_in_half_precision():
    """torch.export takes it in whole; half fields are composited in float32, to the rounding of their inputs."""
    t0, t1, sigma, rgb = (x.detach() for x in samples())

    class Renderer(torch.nn.Module):
        def forward(self, t0, t1, rays, sigma, rgb):
            weights = nerfacc.render_weight_from_density(t0, t1, sigma, ray_indices=rays, n_rays=7)[0]
            loss = nerfacc.distortion(weights, t0, t1, rays, 7)
            return *nerfacc.rendering(t0, t1, rays, 7, lambda *_: (rgb, sigma))[:3], loss

    arguments = (t0, t1, RAYS, sigma, rgb)
    expected = Renderer()(*arguments)
    for a, b in zip(torch.export.export(Renderer(), arguments).module()(*arguments), expected):
        torch.testing.assert_close(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        for a, b in zip(Renderer()(*arguments), expected):
            torch.testing.assert_close(a, b)
    half = Renderer()(t0, t1, RAYS, sigma.bfloat16(), rgb.bfloat16())
    assert half[0].dtype == torch.float32
    torch.testing.assert_close(half[0], expected[0], atol=2e-2, rtol=0)  # bfloat16 has 8 bits
