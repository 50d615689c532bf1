"""The mesh as it is exported: fewer faces, with colours and normals of all of them."""

import dataclasses

import torch

from text3d_fast import geometry, ops
from text3d_fast.pipelines.surface import asset
from text3d_fast.scene.cameras import Cameras
from text3d_fast.scene.mesh_renderer import render_meshes


def rippled_ball():
    grid = ops.TetGrid.kuhn(40)
    radius = grid.positions.norm(dim=1)
    ripples = 0.02 * torch.sin(20 * grid.positions).sum(1)
    vertices, faces = ops.marching_tets(grid.positions, 0.7 + ripples - radius, grid)
    return geometry.Mesh(vertices, faces.int())


def albedo(points):
    return (0.5 + 0.3 * torch.sin(9 * points)).clamp(0, 1)


def normals_at_texels(mesh, mapped):
    """World normals of the texels, as a viewer finds them: interpolated ones, or with the map."""
    rast, texels = geometry.bake._rasterized(mesh, 512)
    at = geometry.bake._at_texels
    unit = torch.nn.functional.normalize
    points, normals = at(mesh.vertices, rast, mesh.faces, texels), unit(at(mesh.normals, rast, mesh.faces, texels))
    if not mapped:
        return points, normals
    frame = at(mesh.tangents(), rast, mesh.uv_faces, texels)
    x, y, z = (2 * mesh.normal_map.flip(0).reshape(-1, 3)[texels] - 1).split(1, dim=1)
    return points, unit(x * frame[:, :3] + y * frame[:, 3:] * torch.linalg.cross(normals, frame[:, :3]) + z * normals)


def test_fewer_faces_wear_the_colours_and_normals_of_all():
    whole = rippled_ball().with_normals()
    mesh = asset(whole, albedo, faces=1500, texture=512)
    assert len(mesh.faces) <= 1500 < len(whole.faces) / 5
    errors = []
    for mapped in (False, True):
        points, normals = normals_at_texels(mesh, mapped)
        nearest = whole.normals[torch.cdist(points[::37], whole.vertices).argmin(1)]
        errors.append(torch.rad2deg(torch.arccos((normals[::37] * nearest).sum(1).clamp(-1, 1))).mean())
    assert errors[1] < 0.4 * errors[0]  # 10.8 and 2.3 degrees
    assert (mesh.colors - albedo(mesh.vertices)).abs().max() < 1e-6 and mesh.texture.shape == (512, 512, 3)


def test_pictures_show_the_normal_map_also_of_a_file(tmp_path):
    whole = rippled_ball().with_normals()
    mesh = asset(whole, albedo, faces=1500, texture=512)
    geometry.write_mesh(tmp_path / "mesh.glb", mesh)
    cameras = Cameras.orbit(torch.tensor([0.3, -0.8]), torch.tensor([0.4, 2.0]), 2.6, 0.7, 96)

    def normals(mesh):
        return render_meshes([mesh], cameras, torch.ones(1, 3), mode="albedo").normals

    true = normals(whole)
    bare = dataclasses.replace(mesh, normal_map=None)
    seen = (true.norm(dim=-1) > 0.5) & (normals(bare).norm(dim=-1) > 0.5)
    errors = [torch.rad2deg(torch.arccos((normals(m) * true).sum(-1)[seen].clamp(-1, 1))).mean()
              for m in (bare, mesh, geometry.read_mesh(tmp_path / "mesh.glb"))]
    assert errors[1] < 0.5 * errors[0] and errors[2] < 0.5 * errors[0]
    wrong = dataclasses.replace(mesh, normal_map=mesh.normal_map * torch.tensor([1.0, -1.0, 1.0]) +
                                torch.tensor([0.0, 1.0, 0.0]))  # green the other way round, as DirectX has it
    assert torch.rad2deg(torch.arccos((normals(wrong) * true).sum(-1)[seen].clamp(-1, 1))).mean() > errors[0]


def test_all_faces_need_no_normal_map():
    whole = rippled_ball()
    mesh = asset(whole, albedo, faces=0, texture=0)
    assert mesh.texture is None and mesh.normal_map is None and len(mesh.faces) == len(whole.faces)
    few = asset(whole, albedo, faces=1000, texture=0)
    assert few.normal_map is None and len(few.faces) <= 1000 and few.colors.shape == few.vertices.shape
