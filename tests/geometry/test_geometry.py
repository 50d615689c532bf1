"""text3d_fast.geometry: extraction, cleaning, atlas and texture, files that are read back and looked at."""

import errno
import json
import math
import os
import struct

import numpy as np
import pytest
import torch

from text3d_fast import geometry, images


def soft(sdf, sharpness=60.0):
    """The density of a field like those that are trained: the exponential of a distance."""
    return 12 * torch.exp((sharpness * sdf).clamp(-20, 4))


def ball(points, radius=0.6, centre=(0.0, 0.0, 0.0)):
    return radius - (points - points.new_tensor(centre)).norm(dim=-1)


def torus(points):
    ring = points[:, [0, 2]].norm(dim=-1) - 0.5
    return 0.2 - torch.stack([ring, points[:, 1]], -1).norm(dim=-1)


def albedo(points):
    """Red towards +X, green towards +Y, blue towards +Z."""
    return (points + 1) / 2


@pytest.fixture(scope="module")
def textured() -> geometry.Mesh:
    mesh, _ = geometry.extract_mesh(lambda p: soft(torus(p)), 32, 12.0)
    return geometry.bake_texture(geometry.unwrap(mesh.with_normals(), 256), albedo, 256)


@pytest.mark.parametrize("lattice", ["a15", "kuhn"])
def test_extracts_a_ball_at_its_radius(lattice):
    mesh, threshold = geometry.extract_mesh(lambda p: soft(ball(p)), 32, 12.0, lattice=lattice)
    assert threshold == 12.0
    assert mesh.is_closed() and mesh.euler_characteristic() == 2
    # The logarithm of this density is linear, so vertices lie on the ball: bisection leaves 1/32 of an
    # edge, within which the density is not clamped.
    torch.testing.assert_close(mesh.vertices.norm(dim=-1), torch.full((len(mesh.vertices),), 0.6), atol=1e-4, rtol=0)
    assert mesh.volume() == pytest.approx(4 / 3 * math.pi * 0.6**3, rel=0.03)


def test_averaging_closes_pits_that_bisection_finds():
    """A ball whose density is zero in one small ball in three along its surface: Euler 2 only after averaging."""

    def pitted(p):
        phase = (p * 90).sin().prod(-1)  # pits of half a period: 0.035, a tenth deeper than the layer
        return 30 * torch.sigmoid(100 * ball(p)) * (phase < 0.3)

    rough, _ = geometry.extract_mesh(pitted, 64, 8.0)
    smooth, _ = geometry.extract_mesh(geometry.averaged_density(pitted, 0.04, 0.02), 64, 8.0)
    assert rough.euler_characteristic() != 2 and smooth.euler_characteristic() == 2
    radius = smooth.vertices.norm(dim=-1)
    assert float((radius - 0.6).abs().max()) < 0.03  # the width and half a cell


def test_averaged_density_keeps_axes_and_constants():
    density = geometry.averaged_density(lambda p: 5 + 4 * p[:, 0] + 2 * p[:, 1] - p[:, 2], 0.01, 0.02, 64)
    points = torch.tensor([[0.5, 0.0, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 0.5], [-0.3, 0.2, 0.1]])
    # Opacity is not quite linear in density: by (layer * change within a width)^2, far below this.
    torch.testing.assert_close(density(points), torch.tensor([7.0, 6.0, 4.5, 4.1]), atol=2e-3, rtol=0)


def test_automatic_threshold():
    solid = torch.zeros(10000)
    solid[:500] = 200.0
    assert geometry.automatic_threshold(solid) == pytest.approx(16 * math.log(2))
    assert geometry.automatic_threshold(solid / 100) == pytest.approx(1.0)
    mesh, threshold = geometry.extract_mesh(lambda p: 0.4 * (ball(p) > 0), 24)
    assert threshold == pytest.approx(0.2) and mesh.euler_characteristic() == 2


def test_what_touches_the_box_is_closed_there():
    mesh, _ = geometry.extract_mesh(lambda p: soft(ball(p, 1.2)), 16, 12.0)
    assert mesh.is_closed() and mesh.volume() > 0


def test_an_empty_field_gives_no_faces(tmp_path):
    for threshold in ("auto", 3.0):
        mesh, _ = geometry.extract_mesh(lambda p: torch.zeros(len(p)), 16, threshold)
        assert len(mesh.faces) == 0 and len(mesh.vertices) == 0
        cleaned, report = geometry.clean_mesh(mesh)
        assert len(cleaned.faces) == 0 and report.kept == 0
        assert geometry.bake_texture(geometry.unwrap(mesh), albedo, 8).texture.shape == (8, 8, 3)
        with pytest.raises(ValueError, match="at least one face"):
            geometry.write_mesh(tmp_path / "empty.glb", mesh)
    assert not list(tmp_path.iterdir())


def test_floaters_and_cavities_go_and_are_reported():
    def density(p):
        hollow = torch.minimum(ball(p, 0.5), -ball(p, 0.25))  # a ball with a cavity in it
        return soft(torch.maximum(hollow, ball(p, 0.08, (0.8, 0.8, 0.8))))

    mesh, _ = geometry.extract_mesh(density, 64, 12.0)
    assert mesh.euler_characteristic() == 6
    cleaned, report = geometry.clean_mesh(mesh)
    assert cleaned.euler_characteristic() == 2 and cleaned.is_closed()
    assert cleaned.volume() == pytest.approx(4 / 3 * math.pi * 0.5**3, rel=0.03)
    assert [d.reason for d in report.dropped] == ["cavity", "floater"]
    assert report.dropped[0].volume < 0 < report.dropped[1].volume
    assert report.dropped[1].centre == pytest.approx((0.8, 0.8, 0.8), abs=0.02)
    assert report.kept_area + report.dropped_area == pytest.approx(mesh.area(), rel=1e-4)
    assert json.loads(json.dumps(report.to_dict()))["kept"] == 1
    assert len(geometry.clean_mesh(mesh, 0.0, cavities=False)[0].faces) == len(mesh.faces)
    assert geometry.clean_mesh(mesh, 0.0, most=1)[1].dropped[-1].reason == "beyond the largest"


def test_components_are_numbered_by_their_first_faces():
    faces = torch.tensor([[6, 7, 8], [0, 1, 2], [8, 9, 6], [2, 1, 3]])
    mesh = geometry.Mesh(torch.zeros(10, 3), faces)
    assert mesh.components().tolist() == [0, 1, 0, 1]


def test_texture_holds_the_colour_of_each_surface_point(textured):
    """Sampled at random points of random faces, the texture gives the field's colour, seams included."""
    generator = torch.Generator().manual_seed(3)
    count = 4000
    face = torch.randint(len(textured.faces), (count,), generator=generator)
    weights = -torch.log(1 - torch.rand(count, 3, generator=generator))  # normalized: uniform over the triangle
    weights = weights / weights.sum(1, keepdim=True)
    point = (textured.corners()[face] * weights[..., None]).sum(1)
    uv = (textured.uv[textured.uv_faces.long()][face] * weights[..., None]).sum(1)
    location = torch.stack([2 * uv[:, 0] - 1, 1 - 2 * uv[:, 1]], -1)
    image = textured.texture.permute(2, 0, 1)[None]
    sampled = torch.nn.functional.grid_sample(image, location[None, None], align_corners=False)[0, :, 0].T
    # A texel is about 0.02 wide here, and colour changes by half of the way moved.
    assert (sampled - albedo(point)).abs().max() < 0.03
    assert (sampled - albedo(point)).abs().mean() < 0.003


def ripples(points):
    """Normals of a finer surface than the torus has."""
    ring = torch.nn.functional.normalize(points * points.new_tensor([1.0, 0, 1.0]), dim=1) * 0.5
    return torch.nn.functional.normalize(points - ring, dim=1) + 0.3 * torch.sin(12 * points)


def test_normal_map_gives_back_the_fine_normals(textured):
    """As glTF says: normal, tangent and their cross product, interpolated, weigh the map's three numbers."""
    mesh = geometry.bake_normals(textured, ripples, 256)
    rast, texels = geometry.bake._rasterized(mesh, 256)
    points, normals, frame = (geometry.bake._at_texels(values, rast, faces, texels) for values, faces in (
        (mesh.vertices, mesh.faces), (mesh.normals, mesh.faces), (mesh.tangents(), mesh.uv_faces)))
    unit = torch.nn.functional.normalize
    normals, along = unit(normals, dim=1), unit(frame[:, :3], dim=1)
    weights = unit(2 * mesh.normal_map.flip(0).reshape(-1, 3)[texels] - 1, dim=1)
    seen = weights[:, :1] * along + weights[:, 1:2] * frame[:, 3:] * torch.linalg.cross(normals, along)
    seen = unit(seen + weights[:, 2:] * normals, dim=1)
    angle = torch.rad2deg(torch.arccos((seen * unit(ripples(points), dim=1)).sum(1).clamp(-1, 1)))
    assert angle.mean() < 1 and angle.quantile(0.99) < 8  # interpolated tangents are not quite perpendicular
    # u grows along the tangent, v along sign * cross(normal, tangent)
    corners, places = mesh.corners(), mesh.uv[mesh.uv_faces.long()]
    edge, step = corners[:, 1] - corners[:, 0], places[:, 1] - places[:, 0]
    first = mesh.tangents()[mesh.uv_faces[:, 0].long()]
    up = first[:, 3:] * torch.linalg.cross(mesh.normals[mesh.faces[:, 0].long()], first[:, :3])
    for axis, k in ((first[:, :3], 0), (up, 1)):
        grown = (edge * axis).sum(1)
        assert torch.corrcoef(torch.stack([grown, step[:, k]]))[0, 1] > 0.9


def test_watertight_means_closed_and_turned_one_way(textured):
    assert textured.is_watertight()
    turned = geometry.Mesh(textured.vertices, textured.faces.clone())
    turned.faces[0] = turned.faces[0].flip(0)
    assert turned.is_closed() and not turned.is_watertight()
    assert not geometry.Mesh(textured.vertices, textured.faces[1:]).is_watertight()


def test_decimation_keeps_the_shape(textured):
    pytest.importorskip("fast_simplification", reason="fast-simplification is not installed")
    few = geometry.decimate(textured, 400)
    assert 200 < len(few.faces) <= 400 and few.euler_characteristic() == 0 and few.is_watertight()
    assert few.volume() == pytest.approx(textured.volume(), rel=0.05)
    moved = geometry.Mesh(textured.vertices * 1e-3 + 1, textured.faces)
    assert geometry.decimate(moved, 400).area() == pytest.approx(few.area() * 1e-6, rel=0.05)
    assert geometry.decimate(few, 400) is few


def test_atlas_charts_do_not_overlap_and_are_filled(textured):
    uv = textured.uv[textured.uv_faces.long()].double()
    a, b = uv[:, 1] - uv[:, 0], uv[:, 2] - uv[:, 0]
    area = (a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]).abs().sum() / 2
    _, texels = geometry.bake._rasterized(textured, 256)
    assert len(texels) / 256**2 == pytest.approx(float(area), rel=0.03)  # overlaps would make it smaller
    assert area > 0.3


def glb_tree(path):
    data = path.read_bytes()
    magic, version, length, size, kind = struct.unpack("<4sIII4s", data[:20])
    assert (magic, version, length, kind) == (b"glTF", 2, len(data), b"JSON")
    return json.loads(data[20 : 20 + size])


def test_glb_round_trip_with_texture(textured, tmp_path):
    assert geometry.write_mesh(tmp_path / "a.glb", textured) == [tmp_path / "a.glb"]
    again = geometry.read_mesh(tmp_path / "a.glb")
    assert again.is_closed() and again.euler_characteristic() == 0
    assert again.volume() == pytest.approx(textured.volume(), rel=1e-4)
    torch.testing.assert_close(again.corners(), textured.corners(), atol=1e-6, rtol=0)
    torch.testing.assert_close(again.uv[again.uv_faces.long()], textured.uv[textured.uv_faces.long()])
    torch.testing.assert_close(again.texture, textured.texture, atol=0.51 / 255, rtol=0)
    torch.testing.assert_close(again.normals[again.faces.long()], textured.normals[textured.faces.long()], atol=1e-3,
                               rtol=0)
    tree = glb_tree(tmp_path / "a.glb")
    (material,) = tree["materials"]
    assert material["pbrMetallicRoughness"]["roughnessFactor"] == 1
    assert material["pbrMetallicRoughness"]["metallicFactor"] == 0
    assert "baseColorTexture" in material["pbrMetallicRoughness"]
    assert all("matrix" not in node or np.allclose(node["matrix"], np.eye(4).ravel()) for node in tree["nodes"])


@pytest.mark.parametrize("suffix", [".glb", ".ply", ".obj"])
def test_vertex_colours_round_trip(suffix, textured, tmp_path):
    mesh = geometry.Mesh(textured.vertices, textured.faces, textured.normals, albedo(textured.vertices))
    geometry.write_mesh(tmp_path / f"a{suffix}", mesh)
    again = geometry.read_mesh(tmp_path / f"a{suffix}")
    torch.testing.assert_close(again.corners(), mesh.corners(), atol=1e-6, rtol=0)
    tolerance = 1e-4 if suffix == ".glb" else 1.01 / 255  # 16 bits linear, 13 times coarser in the dark; 8 bits
    torch.testing.assert_close(again.colors[again.faces.long()], mesh.colors[mesh.faces.long()], atol=tolerance, rtol=0)
    if suffix == ".glb":
        tree = glb_tree(tmp_path / "a.glb")
        assert tree["materials"][tree["meshes"][0]["primitives"][0]["material"]]["pbrMetallicRoughness"] == {
            "metallicFactor": 0.0, "roughnessFactor": 1.0}  # fmt: skip


def test_obj_round_trip_with_texture(textured, tmp_path):
    names = [p.name for p in geometry.write_mesh(tmp_path / "a.obj", textured)]
    assert names == ["a.png", "a.mtl", "a.obj"] and sorted(os.listdir(tmp_path)) == sorted(names)
    again = geometry.read_mesh(tmp_path / "a.obj")
    assert again.is_closed() and again.euler_characteristic() == 0
    torch.testing.assert_close(again.texture, textured.texture, atol=0.51 / 255, rtol=0)
    torch.testing.assert_close(again.uv[again.uv_faces.long()], textured.uv[textured.uv_faces.long()], atol=1e-6,
                               rtol=0)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(textured, tmp_path, monkeypatch):
    path = tmp_path / "mesh.glb"
    path.write_bytes(b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    frames = torch.rand(3, 8, 8, 3)
    for write in (lambda: geometry.write_mesh(path, textured), lambda: images.write_turntable(path, frames),
                  lambda: images.write_views(path, frames)):  # fmt: skip
        with pytest.raises(OSError, match="No space"):
            write()
        assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["mesh.glb"]


def test_turntable_and_views(tmp_path):
    from PIL import Image

    frames = torch.zeros(7, 24, 32, 3)
    for i in range(7):
        frames[i, :, 4 * i : 4 * i + 4, i % 3] = 1
    images.write_turntable(tmp_path / "t.gif", frames, fps=10)
    with Image.open(tmp_path / "t.gif") as gif:
        assert gif.n_frames == 7 and gif.info["loop"] == 0 and gif.info["duration"] == 100
        for i in range(7):
            gif.seek(i)
            got = torch.from_numpy(np.array(gif.convert("RGB"), np.float32)) / 255
            assert (got - frames[i]).abs().max() < 0.05
    images.write_views(tmp_path / "v.png", frames, [str(i) for i in range(7)], columns=4)
    with Image.open(tmp_path / "v.png") as sheet:
        pixels = np.array(sheet)
        assert sheet.size == (4 * 36 + 4, 2 * 44 + 4)
        assert pixels[48, 4 + 36 + 21].tolist() == [0, 0, 255]  # frame 5: second row, second column, 21 pixels in
    with pytest.raises(ValueError, match="labels: expected 7"):
        images.write_views(tmp_path / "w.png", frames, ["one"])
    with pytest.raises(ValueError, match="frames: expected"):
        images.write_turntable(tmp_path / "w.gif", frames[:0])


def test_errors_name_the_argument(textured, tmp_path):
    with pytest.raises(ValueError, match="density_fn: expected a tensor of shape"):
        geometry.extract_mesh(lambda p: p, 8)
    with pytest.raises(ValueError, match="density_fn: expected finite"):
        geometry.extract_mesh(lambda p: torch.full((len(p),), math.nan), 8)
    with pytest.raises(ValueError, match="threshold"):
        geometry.extract_mesh(lambda p: p[:, 0], 8, -1.0)
    with pytest.raises(ValueError, match="lattice"):
        geometry.extract_mesh(lambda p: p[:, 0], 8, lattice="cubic")
    with pytest.raises(ValueError, match="expected one with an atlas"):
        geometry.bake_texture(geometry.Mesh(textured.vertices, textured.faces), albedo)
    with pytest.raises(ValueError, match="color_fn: expected a tensor of shape"):
        geometry.bake_texture(textured, lambda p: p[:, :1], 16)
    with pytest.raises(ValueError, match="path: expected a name ending in"):
        geometry.write_mesh(tmp_path / "a.fbx", textured)
    with pytest.raises(ValueError, match="colors: expected"):
        geometry.Mesh(textured.vertices, textured.faces, colors=textured.vertices[:-1])
    (tmp_path / "bad.glb").write_bytes(b"not a mesh")
    with pytest.raises(ValueError, match="not a readable mesh"):
        geometry.read_mesh(tmp_path / "bad.glb")
    with pytest.raises(OSError):
        geometry.write_mesh(tmp_path / "missing" / "a.glb", textured)


def test_normals_by_angle_do_not_count_slivers():
    """A ball of marching tetrahedra, whose normals are known."""
    mesh, _ = geometry.extract_mesh(lambda p: soft(ball(p)), 32, 12.0)
    true = torch.nn.functional.normalize(mesh.vertices, dim=1)

    def error(normals):
        return float(torch.rad2deg(torch.arccos((normals * true).sum(1).clamp(-1, 1))).mean())

    by_area = error(geometry.vertex_normals(mesh.vertices, mesh.faces, "area"))
    assert error(mesh.with_normals().normals) < min(2.5, 0.75 * by_area)


def test_gradients_of_normals_by_area_are_those_of_large_faces():
    """Three faces round a vertex, one of them a cap as low as `height`: by angle the gradient grows as 1 / height."""

    def gradient(height, weights):
        around = torch.tensor([[1.0, -height, 0.0], [0.0, 1.0, 0.3], [-1.0, -height, 0.0]])
        vertices = torch.cat([torch.zeros(1, 3), around]).double().requires_grad_()
        faces = torch.tensor([[0, 1, 2], [0, 2, 3], [0, 3, 1]], dtype=torch.int32)
        normal = geometry.vertex_normals(vertices, faces, weights)[0]
        return float(torch.autograd.grad(normal.sum(), vertices)[0].norm())

    assert gradient(1e-5, "area") == pytest.approx(gradient(1e-2, "area"), rel=0.05)
    assert gradient(1e-5, "angle") > 500 * gradient(1e-2, "angle")


def test_normals_have_right_gradients_and_take_nothing():
    vertices = torch.tensor([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1], [5, 5, 5]]).double().requires_grad_()
    faces = torch.tensor([[0, 1, 2], [0, 3, 1], [0, 2, 3], [1, 3, 2]], dtype=torch.int32)
    for weights in ("angle", "area"):
        normals = geometry.vertex_normals(vertices, faces, weights)
        torch.testing.assert_close(normals[:4], torch.nn.functional.normalize(vertices[:4], dim=1))
        assert normals[4].eq(0).all()  # no face is there
        assert torch.autograd.gradcheck(lambda v, w=weights: geometry.vertex_normals(v, faces, w)[:4], (vertices,))
        assert geometry.vertex_normals(vertices[:0], faces[:0], weights).shape == (0, 3)
    with pytest.raises(ValueError, match="weights: expected 'angle' or 'area', got 'none'"):
        geometry.vertex_normals(vertices, faces, "none")
