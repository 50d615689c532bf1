"""ops.march_rays against a brute-force enumeration of the lattice, and at the edges: far, parallel, wrong rays."""

import math
from types import SimpleNamespace

import pytest
import torch

from text3d_fast import nn, ops, use_backend

BOX = (-1.0, -0.5, -2.0, 1.0, 0.75, 2.0)


def make_grid(levels, resolution, device="cpu", fill=0.3, seed=0):
    grid = nn.OccupancyGrid(BOX, resolution, levels).to(device)
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(levels, *(-(-n // 4) for n in grid.resolution), generator=generator) < fill
    fine = coarse.repeat_interleave(4, 1).repeat_interleave(4, 2).repeat_interleave(4, 3)
    x, y, z = grid.resolution
    grid.binaries.copy_(fine[:, :x, :y, :z])
    return grid


def make_rays(count, device="cpu", spread=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    origins = torch.randn(count, 3, generator=generator) * spread
    directions = torch.nn.functional.normalize(torch.randn(count, 3, generator=generator) - origins * 0.7, dim=-1)
    return origins.to(device), directions.to(device)


def enumerate_lattice(origin, direction, grid, near, far, step, jitter, cone_angle, longest=20000):
    """[(t_start, t_end, 'yes' | 'maybe')] of one ray in Python floats (float64): step by step, nothing clever.

    'maybe': the middle is so near a face between cells that single precision may see either of them.
    """
    box = grid.aabb.double().tolist()
    size, levels = grid.resolution, grid.levels
    binaries = grid.binaries.cpu()
    t, found = near + jitter * step, []
    for _ in range(longest):
        if not t < far:
            break
        following = t + max(step, cone_angle * t)
        end = min(following, far)
        middle = 0.5 * (t + end)
        unit = [(o + middle * d - 0.5 * (box[a] + box[a + 3])) / (0.5 * (box[a + 3] - box[a]))
                for a, (o, d) in enumerate(zip(origin, direction))]
        reach = max(map(abs, unit))
        if reach <= 2.0 ** (levels - 1) + 1e-5:
            level = min(max(0, math.frexp(reach)[1] if reach >= 1 else 0), levels - 1)
            cells = [(u * 0.5**level + 1) * 0.5 * n for u, n in zip(unit, size)]
            # an error of a few 1e-7 box units in the point is this much of a cell
            near_face = any(abs(c - round(c)) < 1e-5 * n for c, n in zip(cells, size))
            near_level = abs(math.log2(reach) - round(math.log2(reach))) < 1e-5 if reach > 0.9 else False
            index = [min(max(int(c), 0), n - 1) for c, n in zip(cells, size)]
            if near_face or near_level:
                found.append((t, end, "maybe"))
            elif binaries[(level, *index)]:
                found.append((t, end, "yes"))
        t = following
    return found


def check_against_enumeration(samples, origins, directions, grid, near, far, step, jitter, cone_angle=0.0):
    assert samples.ray_offsets[0] == 0 and samples.ray_offsets[-1] == samples.num_samples
    offsets, certain = samples.ray_offsets.tolist(), 0
    for r in range(len(origins)):
        mine = slice(offsets[r], offsets[r + 1])
        assert (samples.ray_ids[mine] == r).all()
        got = list(zip(samples.t_starts[mine].tolist(), samples.t_ends[mine].tolist()))
        def pick(value, r=r):
            return float(value[r]) if isinstance(value, torch.Tensor) else value
        wanted = enumerate_lattice(origins[r].double().tolist(), directions[r].double().tolist(), grid, pick(near),
                                   pick(far), step, 0.0 if jitter is None else pick(jitter), cone_angle)
        position = 0
        for start, end, sure in wanted:
            # single precision of a time of order 10, and of the step times its index
            close = position < len(got) and all(
                abs(a - b) < 4e-6 * max(1, abs(b)) for a, b in zip(got[position], (start, end)))
            assert close or sure == "maybe", f"ray {r}: [{start}, {end}] is missing, got {got[position:position + 2]}"
            position += close
            certain += sure == "yes"
        assert position == len(got), f"ray {r}: a sample that is not on the lattice or not occupied: {got[position]}"
    return certain


@pytest.mark.parametrize("levels, resolution", [(1, (16, 9, 33)), (3, 12), (2, (8, 40, 5))])
@pytest.mark.parametrize("cone_angle", [0.0, 0.02])
@pytest.mark.parametrize("limits", ["numbers", "tensors"])
def test_every_sample_and_no_other(levels, resolution, cone_angle, limits, device, poisoned_empty):
    grid = make_grid(levels, resolution, device)
    origins, directions = make_rays(41, device)
    generator = torch.Generator().manual_seed(2)
    if limits == "numbers":
        near, far, jitter = 0.3, 5.03, None
    else:
        near, far, jitter = (torch.rand(41, generator=generator).to(device) * k for k in (1.0, 12.0, 1.0))
    samples = ops.march_rays(origins, directions, grid, near, far, 0.037, jitter, cone_angle)
    certain = check_against_enumeration(samples, origins, directions, grid, near, far, 0.037, jitter, cone_angle)
    assert certain > 200  # the test looks at something


@pytest.mark.parametrize("step", [0.003, 0.5, 30.0])
def test_steps_much_smaller_and_larger_than_cells(step, device, poisoned_empty):
    grid = make_grid(1, 32, device, fill=0.02)
    origins, directions = make_rays(23, device)
    samples = ops.march_rays(origins, directions, grid, 0.0, 9.0, step)
    check_against_enumeration(samples, origins, directions, grid, 0.0, 9.0, step, None)


def test_checkerboard_has_more_runs_than_are_remembered(device, poisoned_empty):
    grid = nn.OccupancyGrid(BOX, 64).to(device)
    x, y, z = torch.meshgrid(*[torch.arange(64)] * 3, indexing="ij")
    grid.binaries.copy_(((x + y + z) % 2 == 0)[None])
    origins, directions = make_rays(31, device, spread=0.3)
    samples = ops.march_rays(origins, directions, grid, 0.0, 20.0, 0.004)
    check_against_enumeration(samples, origins, directions, grid, 0.0, 20.0, 0.004, None)
    changes = (samples.t_starts[1:] != samples.t_ends[:-1]).sum()
    assert changes > 31 * 20
    capacity = samples.num_samples * 2 // 3
    cut = ops.march_rays(origins, directions, grid, 0.0, 20.0, 0.004, capacity=capacity)
    assert torch.equal(cut.t_starts, samples.t_starts[:capacity])


@pytest.mark.parametrize("cone_angle", [0.0, 0.01])
def test_skipping_changes_nothing(cone_angle, device):
    """Bit for bit: the same rays with the grid full, filtered by looking each sample up, except at faces of cells."""
    grid = make_grid(3, 40, device, fill=0.03)
    origins, directions = make_rays(500, device)
    got = ops.march_rays(origins, directions, grid, 0.0, 30.0, 0.011, None, cone_angle)
    with use_backend("reference"):
        want = ops.march_rays(origins, directions, grid, 0.0, 30.0, 0.011, None, cone_angle)
    keys = [set(zip(s.ray_ids.tolist(), (s.t_middles / 0.004).round().tolist())) for s in (got, want)]
    assert len(keys[1]) > 5000
    assert len(keys[0] ^ keys[1]) <= 1e-3 * len(keys[1])  # middles at faces, and rounding of the keys


def test_far_away_rays_neither_stall_nor_drift(device):
    """From t = 1e4, where single precision resolves 1e-3, the count is that of the same ray started nearby."""
    grid = nn.OccupancyGrid((-1, -1, -1, 1, 1, 1), 32).to(device)
    for distance in (1e4, 3.3e4, 1e6):
        origins = torch.tensor([[0.03, 0.01, distance]], device=device)
        directions = torch.tensor([[0.0, 0.0, -1.0]], device=device)
        samples = ops.march_rays(origins, directions, grid, 0.0, math.inf, 0.01)
        assert abs(samples.num_samples - 200) <= 1
        assert (samples.t_ends >= samples.t_starts).all()
        assert samples.t_starts[0] >= distance - 1.01 and samples.t_ends[-1] <= distance + 1.01
        assert (samples.t_ends[:-1] == samples.t_starts[1:]).all()
        cone = ops.march_rays(origins, directions, grid, 0.0, math.inf, 0.01, cone_angle=1e-7)
        assert cone.num_samples > 0


def test_inside_parallel_and_missing_rays(device, poisoned_empty):
    grid = nn.OccupancyGrid((-1, -1, -1, 1, 1, 1), 8).to(device)
    rays = [  # origin, direction, first time and last time
        ((0.0, 0.0, 0.0), (1.0, 0.0, 0.0), 0.0, 1.0),
        ((0.1, 0.2, 0.3), (-0.0, -1.0, 0.0), 0.0, 1.2),
        ((0.0, 0.0, 3.0), (0.0, -0.0, -1.0), 2.0, 4.0),
        ((0.0, 0.0, 3.0), (0.0, 0.0, 1.0), None, None),  # looks away
        ((0.0, 1.5, 0.0), (1.0, 0.0, 0.0), None, None),  # parallel, outside
        ((0.5, 0.5, 0.5), (0.0, 0.0, 0.0), None, None),  # no direction
        ((0.0, 0.0, 3.0), (0.0, 0.0, -2.0), 1.0, 2.0),   # t counts in lengths of the direction
        ((5.0, 5.0, 5.0), (1e-30, 1e-30, -1.0), None, None),
    ]
    origins, directions = (torch.tensor([r[i] for r in rays], device=device) for i in (0, 1))
    for grid_levels in (grid, nn.OccupancyGrid((-0.25, -0.25, -0.25, 0.25, 0.25, 0.25), 8, levels=3).to(device)):
        samples = ops.march_rays(origins, directions, grid_levels, 0.0, 100.0, 0.01)
        offsets = samples.ray_offsets.tolist()
        for r, (_, _, first, last) in enumerate(rays):
            mine = slice(offsets[r], offsets[r + 1])
            if first is None:
                assert offsets[r] == offsets[r + 1]
                continue
            assert abs(samples.t_starts[mine][0] - first) < 0.0051 and abs(samples.t_ends[mine][-1] - last) < 0.0051
            assert (samples.t_ends[mine][:-1] == samples.t_starts[mine][1:]).all()


def test_no_sample_beyond_far_and_none_lost_before_it(device):
    grid = nn.OccupancyGrid((-1, -1, -1, 1, 1, 1), 8).to(device)
    origins, directions = make_rays(200, device, spread=0.3)
    far = torch.linspace(-0.1, 1.2, 200, device=device)
    samples = ops.march_rays(origins, directions, grid, 0.0, far, 0.07)
    ids = samples.ray_ids.long()
    assert (samples.t_ends <= far[ids]).all() and (samples.t_starts < far[ids]).all()
    reached = torch.zeros(200, device=device).scatter_reduce(0, ids, samples.t_ends, "amax")
    inside = (origins + far[:, None].clamp(min=0) * directions).abs().amax(1) < 0.95
    torch.testing.assert_close(reached[inside], far[inside].clamp(min=0))


def test_capacity_mode(device, poisoned_empty):
    grid = make_grid(2, 16, device)
    rays = make_rays(97, device)
    exact = ops.march_rays(*rays, grid, 0.0, 20.0, 0.05)
    count = exact.num_samples
    assert exact.overflow is None and count > 500
    for capacity in (count + 1000, count, count - 1, count // 2, 1, 0):
        got = ops.march_rays(*rays, grid, 0.0, 20.0, 0.05, capacity=capacity)
        kept = min(count, capacity)
        assert got.num_samples == capacity and bool(got.overflow) == (count > capacity)
        assert torch.equal(got.ray_offsets, exact.ray_offsets.clamp(max=capacity))
        for name in ("ray_ids", "t_starts", "t_ends"):
            assert torch.equal(getattr(got, name)[:kept], getattr(exact, name)[:kept])
            assert (getattr(got, name)[kept:] == 0).all()


def test_empty_inputs(device):
    grid = make_grid(1, 8, device)
    none = torch.zeros(0, 3, device=device)
    assert ops.march_rays(none, none, grid).ray_offsets.tolist() == [0]
    assert ops.march_rays(none, none, grid, capacity=5).ray_ids.tolist() == [0] * 5
    grid.binaries.zero_()
    samples = ops.march_rays(*make_rays(9, device), grid)
    assert samples.num_samples == 0 and samples.ray_offsets.tolist() == [0] * 10


def test_wrong_values(device):
    grid = nn.OccupancyGrid((-1, -1, -1, 1, 1, 1), 8).to(device)
    origins, directions = make_rays(5, device)
    good = ops.march_rays(origins, directions, grid)
    for value in (math.nan, math.inf, -math.inf):
        broken = directions.clone()
        broken[2, 1] = value
        if device.type == "cpu":
            with pytest.raises(ValueError, match="finite"):
                ops.march_rays(origins, broken, grid)
            continue
        samples = ops.march_rays(origins, broken, grid)
        assert (samples.ray_ids != 2).all() and samples.num_samples == (good.ray_ids != 2).sum()
    for box in ((1, -1, -1, -1, 1, 1), (-1, 1, -1, 1, 1, 1), (-1, -1, -1, math.nan, 1, 1)):  # inverted, flat, NaN
        wrong = SimpleNamespace(aabb=torch.tensor(box, dtype=torch.float32, device=device), binaries=grid.binaries)
        if device.type == "cpu":
            with pytest.raises(ValueError, match="occupancy.aabb"):
                ops.march_rays(origins, directions, wrong)
        else:
            assert ops.march_rays(origins, directions, wrong).num_samples == 0
        with use_backend("reference"):
            assert ops.march_rays(origins, directions, wrong).num_samples == 0
    with pytest.raises(ValueError, match="2\\^24"):
        ops.march_rays(origins * 0, directions, grid, step=1e-9)
    with pytest.raises(ValueError, match="finite"):
        ops.march_rays(origins.cpu(), directions.cpu(), grid.cpu(), jitter=torch.full((5,), 1.5))


def test_errors_name_the_argument():
    grid = nn.OccupancyGrid(BOX, 8)
    origins, directions = make_rays(4)
    for arguments, error, message in [
        ((origins[:, :2], directions, grid), ValueError, r"origins: expected shape \[rays, 3\]"),
        ((origins, directions[:3], grid), ValueError, r"directions: expected shape \[4, 3\]"),
        ((origins.double(), directions, grid), TypeError, "origins: expected torch.float32"),
        ((origins, directions, grid, torch.zeros(3)), ValueError, r"near: expected shape \[4\]"),
        ((origins, directions, grid, 0.0, 1.0, 0.0), ValueError, "step: expected a positive number, got 0"),
        ((origins, directions, grid, 0.0, 1.0, 0.1, None, -1.0), ValueError, "cone_angle"),
        ((origins, directions, grid, 0.0, 1.0, 0.1, None, 0.0, -3), ValueError, "capacity"),
        ((origins, directions, SimpleNamespace(aabb=grid.aabb, binaries=grid.occs)), TypeError, "occupancy.binaries"),
    ]:
        with pytest.raises(error, match=message):
            ops.march_rays(*arguments)


def test_opcheck(device):
    grid = make_grid(2, 8, device)
    rays = make_rays(7, device)
    for capacity in (-1, 50):
        jitter = torch.rand(7, device=device)
        arguments = (*rays, grid.binaries, grid.aabb, None, None, jitter, 0.1, 6.0, 0.1, 0.0, capacity, "native")
        torch.library.opcheck(torch.ops.text3d.march_rays.default, arguments)


@pytest.mark.parametrize("capacity", [None, 400])
def test_compiles_whole_with_composite(capacity, device):
    grid = make_grid(1, 16, device)
    origins, directions = make_rays(19, device)

    def render(origins, directions, density):
        samples = ops.march_rays(origins, directions, grid, 0.0, 6.0, 0.05, capacity=capacity)
        points = samples.positions(origins, directions)
        sigma = density * (-points.square().sum(-1)).exp()
        return ops.composite(sigma, points, samples)

    density = torch.tensor(3.0, device=device, requires_grad=True)
    compiled = torch.compile(render, fullgraph=True, backend="aot_eager")
    results = []
    for function in (render, compiled):
        out = function(origins, directions, density)
        results.append((out.values, torch.autograd.grad(out.values.square().sum() + out.depth.sum(), density)[0]))
    torch.testing.assert_close(results[1], results[0])
    if capacity is None:  # another number of samples, the same graph
        grid.binaries.logical_not_()
        torch.testing.assert_close(compiled(origins, directions, density), render(origins, directions, density))


def test_gradients_reach_rays_through_positions(device):
    grid = make_grid(1, 16, device)
    origins, directions = (x.requires_grad_() for x in make_rays(19, device))
    samples = ops.march_rays(origins, directions, grid, 0.0, 6.0, 0.05)
    assert not samples.t_starts.requires_grad
    positions = samples.positions(origins, directions)
    ids = samples.ray_ids.long()
    torch.testing.assert_close(positions, origins[ids] + samples.t_middles[:, None] * directions[ids])
    grads = torch.autograd.grad(positions.sum(), (origins, directions))
    counts = torch.bincount(ids, minlength=19).float()
    torch.testing.assert_close(grads[0], counts[:, None].expand(-1, 3))


def test_sizes_that_cannot_be_indexed_are_refused(device):
    origins, directions = make_rays(3, device)
    box = torch.tensor(BOX, device=device)
    for shape in [(0, 4, 4, 4), (1, 0, 4, 4), (2, 4, 4, 0), (65, 1, 1, 1), (4, 1024, 1024, 1024), (2, 2**31, 1, 1)]:
        binaries = torch.ones(1, dtype=torch.bool, device=device).expand(shape)  # one byte of memory
        with pytest.raises(ValueError, match="occupancy.binaries: expected 1 to 64 levels"):
            ops.march_rays(origins, directions, SimpleNamespace(aabb=box, binaries=binaries))


@pytest.mark.parametrize("box", [(-1e30, -1, -1, 1, 1, 1), (-1, -1, -1, 1, 1e30, 1), (-1e30,) * 3 + (1e30,) * 3])
def test_huge_boxes(box, device):
    """Where rounding decides what lies inside, kernels round as the reference does."""
    origins, directions = make_rays(33, device)
    grid = SimpleNamespace(aabb=torch.tensor(box, dtype=torch.float32, device=device),
                           binaries=torch.rand(1, 3, 2, 5, generator=torch.Generator().manual_seed(1)).to(device) > 0.3)
    samples = ops.march_rays(origins, directions, grid, far=9.0, step=0.1)
    with use_backend("reference"):
        expected = ops.march_rays(origins, directions, grid, far=9.0, step=0.1)
    assert samples.num_samples > 0
    torch.testing.assert_close(samples.ray_offsets, expected.ray_offsets)


@pytest.mark.parametrize("levels", [31, 32, 33, 64])
def test_many_levels(levels, device):
    """32 of them and more once shifted a 1 out of its integer: no samples."""
    origins, directions = make_rays(5, device)
    grid = SimpleNamespace(aabb=torch.tensor(BOX, device=device),
                           binaries=torch.ones(levels, 2, 3, 2, dtype=torch.bool, device=device))
    got = ops.march_rays(origins, directions, grid, 0.1, 9.0, 0.3)
    with use_backend("reference"):
        want = ops.march_rays(origins, directions, grid, 0.1, 9.0, 0.3)
    assert got.num_samples == 5 * 30 and torch.equal(got.ray_offsets, want.ray_offsets)
    torch.testing.assert_close(got.t_starts, want.t_starts)


def test_infinite_limits(device):
    grid = make_grid(1, 8, device, fill=1.0)
    rays = make_rays(9, device)
    infinite = torch.full((9,), math.inf, device=device)
    for near, far in [(math.inf, math.inf), (infinite, infinite), (infinite, 3.0), (2.0, -math.inf)]:
        for capacity in (None, 4):
            samples = ops.march_rays(*rays, grid, near, far, capacity=capacity)
            assert samples.ray_offsets.tolist() == [0] * 10


@pytest.mark.parametrize("backend", [None, "reference"])
def test_times_beyond_single_precision(backend, device):
    """A ray so slow that it crosses the box at t = 1e40 has no float32 times: refused, not given as infinity."""
    grid = nn.OccupancyGrid((-1, -1, -1, 1, 1, 1), 8).to(device)
    origins = torch.tensor([[-3.0, 0, 0], [-3.0, 0, 0]], device=device)
    directions = torch.tensor([[1e-40, 0, 0], [1.0, 0, 0]], device=device)
    with use_backend(backend):
        if backend is None and device.type == "cpu":
            with pytest.raises(ValueError, match="1e38"):
                ops.march_rays(origins, directions, grid, step=1e36)
        else:
            samples = ops.march_rays(origins, directions, grid, step=0.5)
            assert samples.ray_ids.unique().tolist() == [1] and samples.t_ends.isfinite().all()


def test_no_rays_in_capacity_mode_on_the_reference(device):
    none = torch.zeros(0, 3, device=device)
    with use_backend("reference"):
        samples = ops.march_rays(none, none, make_grid(1, 8, device), capacity=5)
        out = ops.composite(torch.rand(5, device=device), torch.rand(5, 3, device=device), samples)
    assert samples.ray_ids.tolist() == [0] * 5 and out.values.shape == (0, 3) and out.weights.tolist() == [0] * 5
