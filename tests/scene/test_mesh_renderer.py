"""Meshes in pictures: geometry against the cameras' own rays, texture orientation, gradients, the view command."""

import math

import pytest
import torch
from PIL import Image

from text3d_fast import ops
from text3d_fast.app import cli
from text3d_fast.app.viewer import ViewSettings, view
from text3d_fast.geometry import Mesh, write_mesh
from text3d_fast.scene.cameras import Cameras
from text3d_fast.scene.lights import Lights
from text3d_fast.scene.mesh_renderer import render_meshes


def ball(radius=0.5, rows=24, columns=48):
    """A UV sphere with poles on the Y axis, every vertex once."""
    theta = torch.linspace(0, math.pi, rows + 1)[1:-1, None]
    phi = torch.linspace(0, 2 * math.pi, columns + 1)[None, :-1]
    xyz = torch.stack(torch.broadcast_tensors(theta.sin() * phi.sin(), theta.cos(), theta.sin() * phi.cos()), -1)
    vertices = torch.cat([torch.tensor([[0.0, 1, 0], [0, -1, 0]]), xyz.reshape(-1, 3)])
    here = torch.arange(columns)
    after = (here + 1) % columns
    faces = [torch.stack([torch.zeros_like(here), here + 2, after + 2], -1)]
    for row in range(rows - 2):
        a, b = row * columns + here + 2, row * columns + after + 2
        faces += [torch.stack([a, a + columns, b], -1), torch.stack([b, a + columns, b + columns], -1)]
    last = (rows - 2) * columns + 2
    faces.append(torch.stack([last + here, torch.ones_like(here), last + after], -1))
    return Mesh(radius * vertices, torch.cat(faces).int())


def camera(azimuth=0.0, elevation=0.0, size=64, distance=2.5):
    return Cameras.orbit(math.radians(elevation), math.radians(azimuth), distance, math.radians(40), size)


def sheet():
    """A unit square facing +Z, its texture red at the top left."""
    vertices = torch.tensor([[-0.5, -0.5, 0.0], [0.5, -0.5, 0], [0.5, 0.5, 0], [-0.5, 0.5, 0]])
    faces = torch.tensor([[0, 1, 2], [0, 2, 3]], dtype=torch.int32)
    texture = torch.zeros(8, 8, 3)
    texture[:4, :4, 0] = 1.0
    uv = vertices[:, :2] + 0.5
    return Mesh(vertices, faces, uv=uv, uv_faces=faces, texture=texture)


def test_a_ball_matches_its_equation():
    cameras = camera(azimuth=40, elevation=20)
    out = render_meshes([ball()], cameras, torch.ones(1, 3), mode="albedo")
    origins, directions = cameras.rays()
    middle = -(origins * directions).sum(-1)
    gap = 0.25 - origins.square().sum(-1) + middle.square()
    hit = gap > 0
    assert ((out.mask > 0.5) != hit).float().mean() < 0.01  # a faceted silhouette is up to 0.2 % inside the true one
    surface = origins + (middle - gap.clamp(min=0).sqrt())[..., None] * directions
    inside = gap > 0.05  # away from the rim, where facets tilt the depth
    depth = ((origins - surface) * cameras.camera_to_world[:, None, None, :3, 2]).sum(-1)
    torch.testing.assert_close(out.depth[inside], depth[inside], atol=8e-3, rtol=0)  # sagitta of facets, tilted
    torch.testing.assert_close(out.normals[inside], 2 * surface[inside], atol=2e-2, rtol=0)


def test_texture_is_upright():
    out = render_meshes([sheet()], camera(), torch.zeros(1, 3), mode="albedo").color[0]
    assert out[20, 20, 0] > 0.9 and out[20, 44, 0] < 0.1 and out[44, 20, 0] < 0.1


def test_meshes_share_depth():
    """A square in front of a ball hides it, and the other way round."""
    front = sheet()
    front.vertices[:, 2] += 0.8
    behind = sheet()
    behind.vertices[:, 2] -= 0.8
    for other, red in ((front, True), (behind, False)):
        color = render_meshes([ball(), other], camera(), torch.zeros(1, 3), mode="albedo").color[0]
        assert (color[24, 24, 0] > 0.9 and color[24, 24, 1] < 0.1) == red


def test_a_mesh_looks_the_same_beside_another_and_is_looked_up_once(monkeypatch):
    """Texture and normal map: its triangles have other numbers there, and its place in the atlas is found once."""
    mesh = sheet()
    mesh.normals = torch.tensor([[0.0, 0.0, 1.0]]).repeat(4, 1)
    mesh.normal_map = torch.rand(8, 8, 3, generator=torch.Generator().manual_seed(0))
    lights = Lights(torch.tensor([[2.0, 1.0, 3.0]]), torch.ones(1, 3), torch.zeros(1, 3))
    hidden = ball(0.2)
    hidden.vertices[:, 2] -= 1.0
    alone, calls = render_meshes([mesh], camera(), torch.zeros(1, 3), lights), []
    interpolate = ops.interpolate
    monkeypatch.setattr(ops, "interpolate", lambda *args: calls.append(args[0].shape[-1]) or interpolate(*args))
    both = render_meshes([hidden, mesh], camera(), torch.zeros(1, 3), lights)
    torch.testing.assert_close(both.color, alone.color)
    torch.testing.assert_close(both.normals, alone.normals)
    assert both.normals[0, 32, 32].sub(torch.tensor([0.0, 0.0, 1.0])).norm() > 0.1  # the map is seen
    assert sorted(calls) == [2, 4, 6]  # the atlas; tangents; positions with normals


def test_light_comes_from_where_it_is():
    lights = Lights(torch.tensor([[1e3, 0.0, 0.0]]), torch.ones(1, 3), torch.zeros(1, 3))
    color = render_meshes([ball()], camera(), torch.zeros(1, 3), lights).color[0]
    assert color[32, 42, 0] > 0.3 and color[32, 22].max() == 0  # +X is on the right in a front view


def test_vertices_get_gradients_through_silhouettes():
    # Large facets: where a silhouette triangle is thinner than a pixel, antialias does not see its edge.
    mesh = ball(rows=4, columns=6)

    def area(scale):
        grown = Mesh(mesh.vertices.detach() * scale, mesh.faces)
        return render_meshes([grown], camera(size=128), torch.zeros(1, 3), mode="albedo").mask.sum()

    expected = (area(1.02) - area(0.98)).item() / 0.04
    mesh.vertices.requires_grad_()
    mask = render_meshes([mesh], camera(size=128), torch.zeros(1, 3), mode="albedo").mask
    growth = (torch.autograd.grad(mask.sum(), mesh.vertices)[0] * mesh.vertices).sum()
    assert growth.item() == pytest.approx(expected, rel=0.08)  # corners lose up to two pixels each of about 300


def test_view_composites_into_a_scene(tmp_path):
    mesh = ball()
    picture = view(mesh, ViewSettings(size=48, azimuth=0, elevation=0, background=(0.0, 0.0, 1.0))).color[0]
    assert picture[0, 0].tolist() == [0, 0, 1] and picture[24, 24, 2] < 0.9
    write_mesh(tmp_path / "mesh.glb", mesh)
    write_mesh(tmp_path / "room.ply", sheet())
    Image.new("RGB", (20, 10), "green").save(tmp_path / "wall.png")
    out = tmp_path / "out.png"
    command = ["view", str(tmp_path / "mesh.glb"), "--out", str(out), "--scene", str(tmp_path / "room.ply"),
               "--size", "40", "--background-image", str(tmp_path / "wall.png"), "--light", "0", "1", "0"]
    assert cli.main(command) == 0
    assert Image.open(out).size == (40, 40) and Image.open(out).getpixel((0, 0)) == (0, 128, 0)


def test_view_mistakes_are_errors(tmp_path, capsys):
    broken = tmp_path / "broken.glb"
    broken.write_bytes(b"no mesh")
    for command, message in [
        (["view", str(broken)], "not a readable mesh"),
        (["view", str(tmp_path / "missing.glb")], "missing.glb"),
        (["view", str(tmp_path / "mesh.fbx")], "expected a name ending in"),
    ]:
        assert cli.main([*command, "--out", str(tmp_path / "x.png")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()
