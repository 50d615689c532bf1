import math

import pytest
import torch

from text3d_fast.evaluation import matching, metrics
from text3d_fast.evaluation.observe import (
    as_mesh,
    pictures,
    projected_inside,
    seen_surface,
    silhouettes,
    true_mesh,
)
from text3d_fast.geometry import Mesh
from text3d_fast.toybox.captions import parse
from text3d_fast.toybox.objects import COLORS
from text3d_fast.toybox.scenes import Scene, build_scene, sample_parameters


@pytest.fixture(autouse=True)
def one_thread():
    """Small operations: threads that wait for one another only cost time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    yield
    torch.set_grad_enabled(True)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def mug():
    with torch.no_grad():
        scene = build_scene(parse("a red mug"))
        return scene, metrics.Truth(scene), true_mesh(scene, 48)


def test_the_true_mesh_scores_one(mug):
    _, truth, mesh = mug
    score = metrics.score(mesh, truth)
    # a grid of 48 cells rounds the rims and thickens the 0.06 wall by at most half a cell (0.02)
    assert score.f5 > 0.995 and score.f2 > 0.97
    assert score.silhouette_iou > 0.97 and score.volume_iou > 0.93
    assert score.normal_error < 8 and score.color_error < 0.01
    assert (score.euler, score.true_euler, score.components) == (0, 0, 1)


def test_a_scene_against_itself_is_perfect(mug):
    score = metrics.score(mug[0], mug[1])
    assert score.f5 == score.f2 == score.silhouette_iou == score.volume_iou == 1.0
    assert score.normal_error < 0.1 and score.color_error == 0.0


def test_a_solid_mug_has_the_silhouette_but_not_the_surface(mug):
    scene, truth, _ = mug
    solid = _filled(scene)
    score = metrics.score(solid, truth)
    assert score.silhouette_iou > 0.97  # what silhouettes cannot see
    assert score.volume_iou < 0.6 and score.f5 < 0.9


def _filled(scene: Scene) -> Scene:
    radius = scene.parameters["thing"]["radius"]
    height = scene.parameters["thing"]["height"]

    class Filled(Scene):
        def sdf(self, points):
            x, y, z = self.groups[0].natural(points)
            plug = torch.maximum((x.square() + z.square()).sqrt() - radius + 0.02, y.abs() - height / 2 + 0.02)
            return torch.minimum(super().sdf(points), plug * self.groups[0].scale)

    return Filled(scene.description, scene.parameters, scene.groups)


def test_ball_against_ball_has_closed_forms():
    truth = metrics.Truth(build_scene(parse("a red ball"), {"scene": {"fill": 1.0}, "thing": {"height": 1.0}}))
    radius = float(-truth.scene.sdf(torch.zeros(1, 3)))
    small = metrics.score(metrics.ball_mesh(0.8 * radius, color=COLORS["red"]), truth)
    # gap 0.2 r against 5 % of the diameter 2 r
    assert small.f5 == 0.0 and math.isnan(small.normal_error)
    assert small.volume_iou == pytest.approx(0.8**3, abs=0.01)
    # at distance 2.7 silhouettes are cones: tan(asin(r / d)) squared
    ratio = (1 / (2.7 / (0.8 * radius)) ** 2 / (1 - (0.8 * radius / 2.7) ** 2)) * (
        (1 - (radius / 2.7) ** 2) * (2.7 / radius) ** 2
    )
    assert small.silhouette_iou == pytest.approx(ratio, abs=0.015)
    near = metrics.score(metrics.ball_mesh(0.97 * radius, color=COLORS["blue"]), truth)
    assert near.f5 == 1.0 and near.f2 > 0.9  # a gap of 0.03 r, below 2 % of 2 r
    assert near.color_error == pytest.approx((0.76 + 0.17 + 0.76) / 3, abs=0.02)
    assert near.euler == 2


def test_a_wrong_class_and_a_ball_score_low(mug):
    _, truth, _ = mug
    chair = metrics.score(metrics.wrong_classes(parse("a red mug"))["chair"], truth)
    ball = metrics.score(metrics.best_ball(truth), truth)
    assert chair.f5 < 0.5 and chair.silhouette_iou < 0.6
    assert ball.f5 < 0.6 and 0.6 < ball.silhouette_iou < 0.8


def test_the_visual_hull_fills_the_cup(mug):
    _, truth, _ = mug
    hull = metrics.visual_hull(truth, 40)
    inside = metrics.inside_mesh(hull, 32)
    assert inside[16 - 3, 16, 16]  # on the mug's axis, which lies left of the middle, half way up
    score = metrics.score(hull, truth)
    assert score.silhouette_iou > 0.9 and score.f5 < 0.95


def test_an_empty_mesh_scores_zero_and_a_bad_one_is_refused(mug):
    empty = Mesh(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int32))
    score = metrics.score(empty, mug[1])
    assert score.f5 == score.silhouette_iou == score.volume_iou == 0.0 and math.isnan(score.normal_error)
    with pytest.raises(ValueError, match=r"vertices: expected shape \[n, 3\]"):
        as_mesh((torch.zeros(4, 2), torch.zeros(1, 3)))
    with pytest.raises(ValueError, match="colors: expected 4 rows like vertices, got 3"):
        as_mesh((torch.zeros(4, 3), torch.zeros(1, 3), torch.zeros(3, 3)))


def test_meshes_come_from_files_textures_and_tuples(mug, tmp_path):
    from text3d_fast import geometry

    _, _, mesh = mug
    geometry.write_mesh(tmp_path / "mesh.glb", mesh)
    for other in (as_mesh(tmp_path / "mesh.glb"), as_mesh(mesh), as_mesh((mesh.vertices, mesh.faces, mesh.colors))):
        assert torch.equal(other.faces, mesh.faces)
        assert torch.allclose(other.vertices, mesh.vertices, atol=1e-6)
        assert torch.allclose(other.colors, mesh.colors, atol=1e-3)
    triangle = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    corners = torch.tensor([[0, 1, 2]], dtype=torch.int32)
    uv = torch.tensor([[0.1, 0.1], [0.9, 0.1], [0.1, 0.9]])
    texture = torch.zeros(2, 2, 3)
    texture[1, 0, 0] = texture[1, 1, 1] = texture[0, 0, 2] = 1  # red at v = 0, green to its right, blue above
    painted = as_mesh(geometry.Mesh(triangle, corners, uv=uv, uv_faces=corners, texture=texture))
    assert torch.equal(painted.colors, torch.eye(3))
    with pytest.raises(ValueError, match="mesh: expected a tuple"):
        as_mesh(3)


def test_mesh_and_scene_are_seen_alike(mug):
    scene, _, mesh = mug
    cameras = metrics.held_out_cameras(4)
    gap = (pictures(mesh, cameras) - pictures(scene, cameras)).abs().mean()
    assert gap < 0.02  # flat faces of a coarse mesh against smooth normals
    points = scene.mesh(24)[0]
    mask = silhouettes(seen_surface(scene, cameras, 128))
    assert projected_inside(mask, cameras, 0.97 * points).float().mean() > 0.97
    assert not projected_inside(mask, cameras, points + 1.5).any()


def test_inside_of_overlapping_pieces_is_their_union():
    ball = metrics.ball_mesh(0.4)
    other = metrics.ball_mesh(0.4, (0.2, 0.0, 0.0))
    both = Mesh(torch.cat([ball.vertices, other.vertices]), torch.cat([ball.faces, other.faces + len(ball.vertices)]))
    union = metrics.inside_mesh(ball) | metrics.inside_mesh(other)
    assert torch.equal(metrics.inside_mesh(both), union)
    assert int(union.sum()) * (2 / 64) ** 3 == pytest.approx(0.5362 - 0.1696, rel=0.02)  # lens of two balls 0.2 apart
    assert metrics.topology(both) == (4, 2)


def test_fit_finds_the_member(mug):
    description = parse("a red mug")
    scene = build_scene(description, sample_parameters(description, torch.Generator().manual_seed(3)))
    fitted = metrics.fit_member(description, true_mesh(scene, 48))
    score = metrics.score(fitted, scene)
    assert score.f5 > 0.99 and score.f2 > 0.85 and score.silhouette_iou > 0.95
    assert score.f2 > metrics.score(mug[0], scene).f2 - 0.02


def test_retrieval_names_other_members():
    gallery = matching.Gallery()
    generator = torch.Generator().manual_seed(5)
    for prompt in ("a red mug", "a blue chair", "a white snowman", "a black clock", "a yellow cone"):
        description = parse(prompt)
        scene = build_scene(description, sample_parameters(description, generator))
        assert gallery.retrieve(scene).rank(description) == 1
    assert gallery.retrieve(build_scene(parse("a red car"))).rank(parse("a blue table")) > 5


class _Doubled(Scene):
    """The front half mirrored onto the back (z -> |z|)."""

    def sdf(self, points):
        return super().sdf(torch.cat([points[..., :2], points[..., 2:].abs()], -1))

    def albedo(self, points):
        return super().albedo(torch.cat([points[..., :2], points[..., 2:].abs()], -1))


@pytest.mark.parametrize("kind", ["snowman", "car", "clock"])
def test_a_second_front_is_janus(kind):
    scene = build_scene(parse(f"a {kind}"))
    right = matching.facing(scene, scene)
    doubled = matching.facing(_Doubled(scene.description, scene.parameters, scene.groups), scene)
    assert right.directional and not right.janus and right.agreement > 0.95  # edge-on, both sides of a clock look alike
    assert doubled.janus and doubled.agreement < 0.8


def test_a_turned_object_is_no_janus_but_disagrees():
    class Turned(Scene):
        def sdf(self, points):
            return super().sdf(points * torch.tensor([-1.0, 1.0, -1.0]))

        def albedo(self, points):
            return super().albedo(points * torch.tensor([-1.0, 1.0, -1.0]))

    scene = build_scene(parse("a car"))
    turned = matching.facing(Turned(scene.description, scene.parameters, scene.groups), scene)
    assert turned.agreement == 0.0


def test_wilson_interval():
    low, high = matching.wilson_interval(9, 10)
    assert (low, high) == (pytest.approx(0.596, abs=1e-3), pytest.approx(0.982, abs=1e-3))
    assert matching.wilson_interval(0, 0) == (0.0, 1.0)
