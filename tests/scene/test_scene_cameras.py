import math

import pytest
import torch

from text3d_fast.scene import CameraDistribution, Cameras


def degrees(*values):
    return torch.deg2rad(torch.tensor(values))


def test_positions_follow_the_convention():
    cameras = Cameras.orbit(degrees(0.0, 0.0, 0.0, 0.0, 90.0), degrees(0.0, 90.0, 180.0, 270.0, 0.0), 2.0,
                            math.radians(40), 4)
    expected = torch.tensor([[0, 0, 2], [2, 0, 0], [0, 0, -2], [-2, 0, 0], [0, 2, 0]]).float()
    assert torch.allclose(cameras.position, expected, atol=1e-6)
    assert cameras.condition.shape == (5, 3)


def test_rays_are_unit_and_the_top_row_looks_up():
    cameras = Cameras.orbit(0.0, degrees(0.0, 77.0), 2.0, math.radians(60), (5, 7))
    origins, directions = cameras.rays()
    assert origins.shape == directions.shape == (2, 5, 7, 3)
    assert torch.allclose(directions.norm(dim=-1), torch.ones(2, 5, 7), atol=1e-6)
    assert (directions[:, 0, :, 1] > 0).all() and (directions[:, -1, :, 1] < 0).all()
    # the middle ray passes through the origin
    middle = origins[:, 2, 3] + 2.0 * directions[:, 2, 3]
    assert middle.abs().max() < 1e-5
    # seen from the front, the right of the picture is +X
    assert directions[0, 2, -1, 0] > 0


def test_angle_between_outermost_rays():
    cameras = Cameras.orbit(0.3, 1.0, 2.0, math.radians(40), 400)
    _, directions = cameras.rays()
    cosine = (directions[0, 0, 200] * directions[0, -1, 200]).sum()
    assert math.degrees(math.acos(cosine)) == pytest.approx(40, abs=0.2)


def test_projection_agrees_with_the_rays():
    cameras = Cameras.orbit(degrees(20.0, -5.0), degrees(130.0, 5.0), torch.tensor([2.5, 3.0]), math.radians(40),
                            (6, 8))
    origins, directions = cameras.rays()
    points = origins + 2.0 * directions
    homogeneous = torch.cat([points, torch.ones_like(points[..., :1])], -1)
    clip = torch.einsum("bij,bhwj->bhwi", cameras.projection() @ cameras.world_to_camera(), homogeneous)
    device = clip[..., :2] / clip[..., 3:]
    x = (torch.arange(8) + 0.5) * 2 / 8 - 1
    y = 1 - (torch.arange(6) + 0.5) * 2 / 6
    assert torch.allclose(device[..., 0], x.expand(2, 6, 8), atol=1e-5)
    assert torch.allclose(device[..., 1], y[:, None].expand(2, 6, 8), atol=1e-5)


def test_straight_down_is_the_limit_of_steep():
    steep = Cameras.orbit(math.radians(89.9), 0.7, 2.0, 0.7, 3).camera_to_world
    down = Cameras.orbit(math.radians(90), 0.7, 2.0, 0.7, 3).camera_to_world
    assert torch.allclose(steep, down, atol=0.01)
    assert torch.linalg.det(down[:, :3, :3]) == pytest.approx(1.0, abs=1e-5)


def test_sampling_stays_in_range_and_repeats():
    distribution = CameraDistribution(elevation=(-10, 60), distance=(2.5, 3.0))
    first = distribution.sample(64, 8, torch.Generator().manual_seed(3))
    again = distribution.sample(64, 8, torch.Generator().manual_seed(3))
    assert torch.equal(first.camera_to_world, again.camera_to_world)
    elevation = torch.rad2deg(first.elevation)
    assert elevation.min() >= -10.01 and elevation.max() <= 60.01
    assert first.distance.min() >= 2.5 and first.distance.max() <= 3.0
    # one camera in each of the 64 sectors
    sectors = ((torch.rad2deg(first.azimuth) - torch.rad2deg(first.azimuth).min()) / (360 / 64)).round().long() % 64
    assert len(sectors.unique()) > 32


def test_dreamfusion_ranges():
    distribution = CameraDistribution.dreamfusion(64)
    assert distribution.fov_y == pytest.approx((40.6, 71.1), abs=0.1)
    cameras = distribution.sample(4000, 8, torch.Generator().manual_seed(0))
    elevation = torch.rad2deg(cameras.elevation)
    # half uniform in angle (mean 40), half in area (mean of asin over U(sin -10, 1) about 28.5)
    assert elevation.mean() == pytest.approx(34.3, abs=2.0)
    assert distribution.scaled(2).distance == (2.0, 3.0)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="camera_to_world"):
        Cameras(torch.eye(4), torch.ones(1), 2, 2)
    with pytest.raises(ValueError, match="fov_y"):
        Cameras(torch.eye(4)[None], torch.ones(2), 2, 2)
    with pytest.raises(ValueError, match="elevation"):
        CameraDistribution(elevation=(10, 0))


def test_indexing():
    cameras = Cameras.orbit(0.0, degrees(0.0, 90.0, 180.0), 2.0, 0.7, 4)
    assert len(cameras[1]) == 1 and len(cameras[-1]) == 1 and len(cameras[:2]) == 2
    assert torch.equal(cameras[-1].position, cameras.position[2:])
