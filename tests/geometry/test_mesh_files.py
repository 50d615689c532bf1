"""Files that other programs write: materials, colours, transforms, polygons; each with the value that is right."""

import base64
import json
import math
import struct

import numpy as np
import pytest
import torch

from text3d_fast.geometry import Mesh, MeshWarning, glb_bytes, read_mesh, write_mesh

TRIANGLE = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]], "<f4")
SQUARE = "v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nvt 0 0\nvt 1 0\nvt 1 1\nvt 0 1\n"


def gltf(path, primitives, nodes=None, **more):
    """A .gltf of primitives: name -> array, and material or indices."""
    data, views, accessors = b"", [], []

    def accessor(values, normalized=False):
        nonlocal data
        code = {"<f4": 5126, "<u2": 5123, "<u4": 5125, "|u1": 5121}[values.dtype.str]
        views.append({"buffer": 0, "byteOffset": len(data), "byteLength": values.nbytes})
        accessors.append({"bufferView": len(views) - 1, "componentType": code, "count": len(values),
                          "type": "SCALAR" if values.ndim == 1 else f"VEC{values.shape[1]}", "normalized": normalized})
        data += values.tobytes() + bytes(-values.nbytes % 4)
        return len(accessors) - 1

    made = []
    for primitive in primitives:
        primitive = dict(primitive)
        entry = {k: primitive.pop(k) for k in ("material", "mode", "extensions") if k in primitive}
        if "indices" in primitive:
            entry["indices"] = accessor(primitive.pop("indices"))
        entry["attributes"] = {k: accessor(v, v.dtype.kind == "u") for k, v in primitive.items()}
        made.append(entry)
    uri = "data:application/octet-stream;base64," + base64.b64encode(data).decode()
    tree = {"asset": {"version": "2.0"}, "buffers": [{"byteLength": len(data), "uri": uri}], "bufferViews": views,
            "accessors": accessors, "meshes": [{"primitives": made}], "nodes": nodes or [{"mesh": 0}], **more}
    path.write_text(json.dumps(tree))
    return path


def png(path, pixels):
    from PIL import Image

    Image.fromarray(pixels).save(path)
    return path


def seen(mesh):
    """The colour at the middle of each face [F, 3]."""
    if mesh.texture is None:
        return mesh.colors[mesh.faces.long()].mean(1)
    uv = mesh.uv[mesh.uv_faces.long()].mean(1)
    grid = torch.stack([2 * uv[:, 0] - 1, 1 - 2 * uv[:, 1]], -1)[None, None]
    image = mesh.texture.permute(2, 0, 1)[None]
    return torch.nn.functional.grid_sample(image, grid, align_corners=False, padding_mode="border")[0, :, 0].T


def test_base_color_factors_of_several_materials(tmp_path):
    def metal(*factor):
        return {"pbrMetallicRoughness": {"baseColorFactor": [*factor, 1]}}

    primitives = [{"POSITION": TRIANGLE, "material": 0}, {"POSITION": TRIANGLE + np.float32(2), "material": 1}]
    one = read_mesh(gltf(tmp_path / "one.gltf", primitives[:1], materials=[metal(1, 0, 0)]))
    torch.testing.assert_close(seen(one), torch.tensor([[1.0, 0, 0]]))
    two = read_mesh(gltf(tmp_path / "two.gltf", primitives, materials=[metal(1, 0, 0), metal(0, 0.2140, 1)]))
    # linear 0.2140 is sRGB 0.5
    torch.testing.assert_close(seen(two), torch.tensor([[1.0, 0, 0], [0, 0.5, 1]]), atol=1e-3, rtol=0)


def test_dark_vertex_colours_survive_a_glb(tmp_path):
    ramp = torch.linspace(0, 40 / 255, 123)
    vertices = torch.rand(123, 3, generator=torch.Generator().manual_seed(0))
    mesh = Mesh(vertices, torch.arange(123).view(-1, 3).int(), colors=ramp[:, None].expand(-1, 3).contiguous())
    write_mesh(tmp_path / "dark.glb", mesh)
    again = read_mesh(tmp_path / "dark.glb")
    # half a step of 16 bits linear, at a slope of 12.92
    torch.testing.assert_close(again.colors, mesh.colors, atol=12.92 * 0.6 / 65535, rtol=0)
    tree = json.loads(glb_bytes(mesh)[20:].split(b"BIN\0")[0][:-4])
    accessor = tree["accessors"][tree["meshes"][0]["primitives"][0]["attributes"]["COLOR_0"]]
    assert accessor["componentType"] == 5123 and accessor["normalized"] is True


def test_byte_and_factor_colours(tmp_path):
    colors = np.array([[255, 0, 0, 255], [255, 0, 0, 255], [255, 0, 0, 255]], "u1")
    path = gltf(tmp_path / "a.gltf", [{"POSITION": TRIANGLE, "COLOR_0": colors, "material": 0}],
                materials=[{"pbrMetallicRoughness": {"baseColorFactor": [0.2140, 1, 1, 1]}}])
    torch.testing.assert_close(seen(read_mesh(path)), torch.tensor([[0.5, 0, 0]]), atol=1e-3, rtol=0)


def test_glb_has_smooth_unit_normals():
    generator = torch.Generator().manual_seed(1)
    vertices = torch.nn.functional.normalize(torch.randn(40, 3, generator=generator), dim=-1)
    mesh = Mesh(torch.cat([vertices, torch.zeros(1, 3)]), torch.randint(0, 40, (50, 3), generator=generator).int())
    data = glb_bytes(mesh)
    size = struct.unpack_from("<I", data, 12)[0]
    tree, binary = json.loads(data[20 : 20 + size]), data[28 + size :]
    attributes = tree["meshes"][0]["primitives"][0]["attributes"]
    accessor = tree["accessors"][attributes["NORMAL"]]
    view = tree["bufferViews"][accessor["bufferView"]]
    normals = np.frombuffer(binary, "<f4", accessor["count"] * 3, view["byteOffset"]).reshape(-1, 3)
    np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1, atol=1e-6)
    used = mesh.faces.unique().long()
    expected = mesh.with_normals().normals[used]
    np.testing.assert_allclose(normals[expected.norm(dim=1) > 0.5], expected[expected.norm(dim=1) > 0.5], atol=1e-6)


def test_obj_names_without_blanks(tmp_path):
    mesh = Mesh(torch.from_numpy(TRIANGLE), torch.tensor([[0, 1, 2]]), uv=torch.rand(3, 2),
                uv_faces=torch.tensor([[0, 1, 2]]), texture=torch.rand(4, 4, 3))
    names = [path.name for path in write_mesh(tmp_path / "my red mug.obj", mesh)]
    assert names == ["my_red_mug.png", "my_red_mug.mtl", "my red mug.obj"]
    lines = (tmp_path / names[2]).read_text().splitlines() + (tmp_path / names[1]).read_text().splitlines()
    assert "mtllib my_red_mug.mtl" in lines and "map_Kd my_red_mug.png" in lines
    torch.testing.assert_close(read_mesh(tmp_path / names[2]).texture, mesh.texture, atol=0.51 / 255, rtol=0)


def test_obj_colours_of_its_materials(tmp_path):
    (tmp_path / "a.mtl").write_text("newmtl red one\nKd 0.9 0.1 0.1\nnewmtl blue\nKd 0 0 1\n")
    text = f"mtllib a.mtl\n{SQUARE}usemtl red one\nf 1 2 3\nusemtl blue\nf 1 3 4\n"
    (tmp_path / "a.obj").write_text(text)
    mesh = read_mesh(tmp_path / "a.obj")
    torch.testing.assert_close(seen(mesh), torch.tensor([[0.9, 0.1, 0.1], [0, 0, 1]]), atol=1e-6, rtol=0)
    assert len(mesh.vertices) == 4  # the two materials share an edge
    (tmp_path / "b.obj").write_text(text.replace("usemtl blue", "usemtl red one"))
    torch.testing.assert_close(seen(read_mesh(tmp_path / "b.obj")), torch.tensor([[0.9, 0.1, 0.1]] * 2))
    (tmp_path / "c.obj").write_text(text.replace("usemtl blue", "usemtl none"))
    with pytest.warns(MeshWarning, match="'none' is not defined"):
        read_mesh(tmp_path / "c.obj")


def test_obj_missing_texture_is_said(tmp_path):
    (tmp_path / "a.mtl").write_text("newmtl m\nKd 0 1 0\nmap_Kd not there.png\n")
    (tmp_path / "a.obj").write_text(f"mtllib a.mtl\n{SQUARE}usemtl m\nf 1/1 2/2 3/3\n")
    with pytest.warns(MeshWarning, match="not there"):
        mesh = read_mesh(tmp_path / "a.obj")
    torch.testing.assert_close(seen(mesh), torch.tensor([[0.0, 1, 0]]))
    (tmp_path / "b.obj").write_text(f"mtllib nowhere.mtl\n{SQUARE}f 1/1 2/2 3/3\n")
    with pytest.warns(MeshWarning, match="nowhere.mtl"):
        read_mesh(tmp_path / "b.obj")


@pytest.mark.parametrize("place", ["../secret.png", "/etc/hostname", "https://example.org/a.png"])
def test_files_outside_the_folder_are_not_read(place, tmp_path):
    (tmp_path / "in").mkdir()
    png(tmp_path / "secret.png", np.full((2, 2, 3), 255, np.uint8))
    (tmp_path / "in" / "a.mtl").write_text(f"newmtl m\nKd 0 1 0\nmap_Kd {place}\n")
    (tmp_path / "in" / "a.obj").write_text(f"mtllib a.mtl\n{SQUARE}usemtl m\nf 1/1 2/2 3/3\n")
    with pytest.warns(MeshWarning, match="outside|address"):
        mesh = read_mesh(tmp_path / "in" / "a.obj")
    torch.testing.assert_close(seen(mesh), torch.tensor([[0.0, 1, 0]]))


def test_sixteen_bit_textures(tmp_path):
    png(tmp_path / "grey.png", np.full((4, 4), 0x8080, np.uint16))
    (tmp_path / "a.mtl").write_text("newmtl m\nmap_Kd -s 1 1 1 grey.png\n")
    (tmp_path / "a.obj").write_text(f"mtllib a.mtl\n{SQUARE}usemtl m\nf 1/1 2/2 3/3 4/4\n")
    torch.testing.assert_close(read_mesh(tmp_path / "a.obj").texture, torch.full((4, 4, 3), 128 / 255))


@pytest.mark.parametrize("scale", [3, 2.5, -2, 0.5])
def test_repeated_texture_coordinates(scale, tmp_path):
    """Of columns red, green, blue, black, each point of the square shows the one that repetition brings there."""
    pixels = np.zeros((4, 4, 3), np.uint8)
    for k in range(3):
        pixels[:, k, k] = 255
    png(tmp_path / "t.png", pixels)
    (tmp_path / "a.mtl").write_text("newmtl m\nmap_Kd t.png\n")
    coordinates = f"vt 0 0\nvt {scale} 0\nvt {scale} 1\nvt 0 1\n"
    (tmp_path / "a.obj").write_text("mtllib a.mtl\n" + SQUARE.split("vt")[0] + coordinates
                                    + "usemtl m\nf 1/1 2/2 3/3 4/4\n")
    mesh = read_mesh(tmp_path / "a.obj")
    assert float(mesh.uv.min()) >= 0 and float(mesh.uv.max()) <= 1
    height, width = mesh.texture.shape[:2]
    for face in range(2):
        uv, corners = mesh.uv[mesh.uv_faces[face].long()], mesh.vertices[mesh.faces[face].long()]
        for weights in ([0.683, 0.121, 0.196], [0.107, 0.737, 0.156], [0.213, 0.271, 0.516]):
            weights = torch.tensor(weights)
            u = float(weights @ corners[:, 0]) * scale
            place = weights @ uv
            texel = mesh.texture[height // 2, min(int(float(place[0]) * width), width - 1)]
            expected = torch.zeros(3)
            if (column := math.floor(u * 4) % 4) < 3:
                expected[column] = 1
            assert torch.equal(texel, expected), (u, place)


def test_textures_of_two_materials(tmp_path):
    for name, color in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        png(tmp_path / f"{name}.png", np.broadcast_to(np.array(color, np.uint8), (16, 8, 3)).copy())
    (tmp_path / "a.mtl").write_text("newmtl r\nmap_Kd red.png\nnewmtl b\nmap_Kd blue.png\nnewmtl g\nKd 0 1 0\n")
    (tmp_path / "a.obj").write_text(f"mtllib a.mtl\n{SQUARE}v 5 5 5\nusemtl r\nf 1/1 2/2 3/3\nusemtl b\n"
                                    "f 1/1 3/3 4/4\nusemtl g\nf 1 2 5\n")
    torch.testing.assert_close(seen(read_mesh(tmp_path / "a.obj")), torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, 1, 0]]))


def test_scene_graphs_with_transforms(tmp_path):
    nodes = [{"children": [1, 2], "translation": [10, 0, 0]}, {"mesh": 0, "scale": [-2, 2, 2]},
             {"mesh": 0, "rotation": [0, 0, math.sqrt(0.5), math.sqrt(0.5)]}]
    normals = np.array([[0, 0, 1]] * 3, "<f4")
    path = gltf(tmp_path / "a.gltf", [{"POSITION": TRIANGLE, "NORMAL": normals}], nodes, scenes=[{"nodes": [0]}])
    mesh = read_mesh(path)
    # the reflected one looks the same way as before: its corners are in the other order
    expected = torch.tensor([[[10.0, 2, 0], [8, 0, 0], [10, 0, 0]], [[10, 0, 0], [10, 1, 0], [9, 0, 0]]])
    torch.testing.assert_close(mesh.corners(), expected, atol=1e-6, rtol=0)
    assert (mesh.area_vectors()[:, 2] > 0).all()
    torch.testing.assert_close(mesh.normals, torch.tensor([[0.0, 0, 1]]).expand(6, 3), atol=1e-6, rtol=0)


def test_polygons_and_negative_indices(tmp_path):
    # an L: concave, six corners; a fan from its first corner would cover what lies outside
    (tmp_path / "a.obj").write_text("v 0 0 0\nv 0 2 0\nv 1 2 0\nv 1 1 0\nv 2 1 0\nv 2 0 0\nf -6 -5 -4 -3 -2 -1\n")
    mesh = read_mesh(tmp_path / "a.obj")
    assert len(mesh.faces) == 4
    assert mesh.area() == pytest.approx(3) and (mesh.area_vectors()[:, 2] < 0).all()


def test_strips_fans_and_sparse(tmp_path):
    square = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0]], "<f4")
    strip = read_mesh(gltf(tmp_path / "s.gltf", [{"POSITION": square, "mode": 5}]))
    fan = read_mesh(gltf(tmp_path / "f.gltf", [{"POSITION": square[[0, 1, 3, 2]], "mode": 6}]))
    for mesh in (strip, fan):
        assert mesh.area() == pytest.approx(1) and (mesh.area_vectors()[:, 2] > 0).all()


def test_stl_round_trip(tmp_path):
    vertices = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    mesh = Mesh(vertices, torch.tensor([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]]))
    write_mesh(tmp_path / "a.stl", mesh)
    again = read_mesh(tmp_path / "a.stl")
    assert again.is_closed() and again.volume() == pytest.approx(1 / 6)


def test_faces_without_a_place_are_left_out(tmp_path):
    (tmp_path / "a.obj").write_text(f"{SQUARE}v nan 0 0\nf 1 2 3\nf 1 2 5\n")
    with pytest.warns(MeshWarning, match="1 of 2 faces"):
        assert read_mesh(tmp_path / "a.obj").faces.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("face, message", [
    ("f 0 1 2", "line 9: index 0, but indices count from 1"), ("f 1 2 9", "line 9: index 9 is out of range"),
    ("f 1 2", "line 9: a face has 2 corners"), ("f 1/ 2/x 3", "line 9: expected indices"),
    ("v 1 2 z", "line 9: expected numbers, at least three"), ("l 1 2", "only lines or points")])
def test_obj_mistakes_name_the_line(face, message, tmp_path):
    (tmp_path / "a.obj").write_text(f"{SQUARE}{face}\n")
    with pytest.raises(ValueError, match=message):
        read_mesh(tmp_path / "a.obj")
