"""nn.OccupancyGrid: what it learns, forgets, stores; without asking the device anything."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from text3d_fast import nn, ops

BOX = (-1.0, -2.0, -0.5, 1.0, 2.0, 0.5)


def ball(points):
    return (points.norm(dim=-1) < 0.4).float()


def cell_middles(grid, level):
    cells = torch.arange(grid.cells_per_level)
    return grid.cell_points(level, cells, torch.full((len(cells), 3), 0.5)).view(*grid.resolution, 3)


@pytest.mark.parametrize("levels, resolution", [(1, 16), (3, (8, 12, 6))])
def test_warm_up_sees_every_cell(levels, resolution, generator, device):
    grid = nn.OccupancyGrid(BOX, resolution, levels).to(device)
    assert grid.binaries.all() and grid.binaries.shape == (levels, *grid.resolution)
    assert grid.update(0, ball, generator)
    for level in range(levels):
        size = torch.tensor(grid.resolution)
        half_cell = ((grid.aabb[3:] - grid.aabb[:3]).cpu() * 2.0**level / size).norm() / 2
        radius = cell_middles(grid.cpu(), level).norm(dim=-1)
        assert grid.binaries[level][radius < 0.4 - half_cell].all()
        assert not grid.binaries[level][radius > 0.4 + half_cell].any()


def test_points_lie_in_their_cells_and_levels_nest():
    grid = nn.OccupancyGrid(BOX, (4, 5, 6), 2)
    cells = torch.arange(grid.cells_per_level)
    for level in range(2):
        low = grid.cell_points(level, cells, torch.zeros(len(cells), 3))
        torch.testing.assert_close(low[0], grid.aabb[:3] * 2**level)  # BOX is centred at the origin
        high = grid.cell_points(level, cells, torch.ones(len(cells), 3))
        torch.testing.assert_close(high[-1], grid.aabb[3:] * 2**level)
        expected = (grid.aabb[3:] - grid.aabb[:3]) * 2**level / torch.tensor([4, 5, 6])
        torch.testing.assert_close(high - low, expected.expand(len(cells), 3))


def test_only_every_sixteenth_step_and_fewer_cells_after_the_warm_up(generator, device):
    grid = nn.OccupancyGrid(BOX, 16).to(device)
    seen = []

    def count(points):
        seen.append(len(points))
        return ball(points)

    done = [step for step in range(300) if grid.update(step, count, generator)]
    assert done == list(range(0, 300, 16))
    assert seen == [4096] * 16 + [2048] * 3


def test_what_vanished_is_forgotten_and_what_appeared_is_found(generator, device):
    grid = nn.OccupancyGrid((-1, -1, -1, 1, 1, 1), 16).to(device)
    grid.update(0, ball, generator)

    def moved(points):
        return ball(points - points.new_tensor([0.5, 0.0, 0.0]))

    for step in range(256, 256 + 16 * 150, 16):
        grid.update(step, moved, generator)
    radius = (cell_middles(grid.cpu(), 0) - torch.tensor([0.5, 0.0, 0.0])).norm(dim=-1)
    assert grid.binaries[0][radius < 0.3].all()
    assert not grid.binaries[0][radius > 0.55].any()


def test_decay_threshold_and_cells_that_are_never_occupied(device):
    grid = nn.OccupancyGrid(BOX, 4).to(device)
    grid.occs[0, 0] = -1
    grid.update(0, lambda x: torch.full((len(x), 1), 0.5, device=device))
    assert (grid.occs[0, 0] == -1).all() and (grid.occs[0, 1:] == 0.5).all()
    assert not grid.binaries[0, 0].any() and grid.binaries[0, 1:].all()
    grid.update(16, lambda x: torch.zeros(len(x), device=device), decay=0.5)
    assert (grid.occs[0, 1:] == 0.25).all() and grid.binaries[0, 1:].all()  # 0.25 > min(0.01, mean)
    grid.update(32, lambda x: torch.zeros(len(x), device=device), decay=0.01)
    assert not grid.binaries.any()  # 0.0025 is not above the mean, itself


def test_occupied_cells_are_drawn(generator, device):
    grid = nn.OccupancyGrid((-1, -1, -1, 1, 1, 1), 32).to(device)
    quarter = grid.cells_per_level // 4
    for fill in (0.0, 0.01, 0.9):
        grid.binaries.copy_(torch.rand(grid.binaries.shape, generator=generator, device=device) < fill)
        cells = grid._draw_cells(0, False, generator)
        occupied = grid.binaries.view(-1)
        assert len(cells) == 2 * quarter
        if fill > 0:
            assert occupied[cells[quarter:]].all()
        if fill == 0.01:  # they fit: each one is drawn
            assert len(cells[quarter:].unique()) == occupied.sum()
        if fill == 0.9:  # they do not: a fair draw
            assert len(cells[quarter:].unique()) > quarter * 0.8


def test_same_seed_same_grid():
    grids = []
    for _ in range(2):
        grid, generator = nn.OccupancyGrid(BOX, 16, 2), torch.Generator().manual_seed(5)
        for step in range(0, 512, 16):
            grid.update(step, lambda x: x.sum(-1).sin().abs() * 0.02, generator)
        grids.append(grid)
    assert torch.equal(grids[0].occs, grids[1].occs) and torch.equal(grids[0].binaries, grids[1].binaries)


def test_no_host_synchronization():
    """Under fake tensors, reading a value on the host raises."""
    with FakeTensorMode():
        grid = nn.OccupancyGrid.__new__(nn.OccupancyGrid)
        torch.nn.Module.__init__(grid)
        grid.levels, grid.resolution = 2, (8, 8, 8)
        grid.register_buffer("aabb", torch.zeros(6))
        grid.register_buffer("occs", torch.zeros(2, 8, 8, 8))
        grid.register_buffer("binaries", torch.ones(2, 8, 8, 8, dtype=torch.bool))
        grid.update(0, lambda x: x[:, 0])
        grid.update(256, lambda x: x[:, 0])


def test_state_dict_and_moving(generator, device):
    grid = nn.OccupancyGrid(BOX, 8, 2).to(device)
    grid.update(0, ball, generator)
    other = nn.OccupancyGrid((0, 0, 0, 1, 1, 1), 8, 2)
    other.load_state_dict(grid.state_dict())
    rays = torch.tensor([[0.0, 0.0, 3.0]]), torch.tensor([[0.0, 0.0, -1.0]])
    a = ops.march_rays(*rays, other, step=0.1)
    b = ops.march_rays(*(x.to(device) for x in rays), grid, step=0.1)
    assert a.num_samples == b.num_samples > 0


def test_errors():
    for arguments, message in [
        (((0, 0, 0, 1, 1, 0),), "aabb: expected 6 numbers"),
        ((BOX, 0), "resolution"),
        ((BOX, (4, 4)), "resolution"),
        ((BOX, 8, 0), "levels"),
    ]:
        with pytest.raises(ValueError, match=message):
            nn.OccupancyGrid(*arguments)
    with pytest.raises(ValueError, match="density_fn: expected one value for each of 64 points"):
        nn.OccupancyGrid(BOX, 4).update(0, lambda x: x)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_wrong_density_is_forgotten(bad, generator, device):
    """Once infinite, a cell stayed occupied for ever; the others were right all along."""
    grid = nn.OccupancyGrid((-1, -1, -1, 1, 1, 1), 8).to(device)

    def once_bad(points):
        density = ball(points)
        density[0] = bad
        return density

    def rightly(points):
        return ball(points)

    grid.update(0, once_bad, generator)
    assert grid.occs.isfinite().all() and grid.occs.max() <= 1
    assert grid.binaries[0, 0, 0, 0] == (bad == float("inf"))
    for step in range(16, 16 * 120, 16):
        grid.update(step, rightly, generator, warmup=10**6)
    assert not grid.binaries[0, 0, 0, 0] and grid.binaries[0, 3:5, 3:5, 3:5].all()


def test_too_many_cells_are_refused():
    with pytest.raises(ValueError, match="resolution: expected fewer than 2\\^32 cells"):
        nn.OccupancyGrid(BOX, 1024, 4)
