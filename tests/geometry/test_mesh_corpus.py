"""Small files of many kinds, half of them damaged: a mesh, or one sentence; in little memory and no traceback."""

import base64
import json
import random
import resource
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch

from text3d_fast.geometry import Mesh, MeshWarning, glb_bytes, read_mesh, write_mesh

SQUARE = "v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nvt 0 0\nvt 1 0\nvt 1 1\nvt 0 1\n"
PLY = ("ply\nformat ascii 1.0\nelement vertex {v}\nproperty float x\nproperty float y\nproperty float z\n"
       "element face {f}\nproperty list uchar int vertex_indices\nend_header\n{body}")
STL = ("solid a\nfacet normal 0 0 1\nouter loop\nvertex 0 0 0\nvertex {x} 0 0\nvertex 0 1 0\nendloop\nendfacet\n"
       "endsolid\n")
TRIANGLE = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]], "<f4").tobytes()


def bomb():
    """A PNG of a few bytes that says it is 60000 x 60000, and zeros enough to begin with."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1 << 20), 9))


def gltf(**changes):
    tree = {"asset": {"version": "2.0"}, "nodes": [{"mesh": 0}], "accessors": [
                {"bufferView": 0, "componentType": 5126, "count": 3, "type": "VEC3"}],
            "meshes": [{"primitives": [{"attributes": {"POSITION": 0}}]}],
            "bufferViews": [{"buffer": 0, "byteLength": 36}],
            "buffers": [{"byteLength": 36, "uri": "data:;base64," + base64.b64encode(TRIANGLE).decode()}]}
    return json.dumps(tree | changes)


def primitive(**entries):
    return [{"primitives": [{"attributes": {"POSITION": 0}, **entries}]}]


def colored():
    corners = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    faces = torch.tensor([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]])
    return Mesh(corners, faces, colors=torch.rand(4, 3, generator=torch.Generator().manual_seed(0)))


def nested(depth):
    return [{"children": [i + 1]} for i in range(depth)] + [{"mesh": 0}]


GOOD = {
    "plain.obj": SQUARE + "f 1 2 3\n", "quad.obj": SQUARE + "f 1 2 3 4\n", "negative.obj": SQUARE + "f -4 -3 -2\n",
    "slashes.obj": SQUARE + "vn 0 0 1\nf 1//1 2//1 3//1\nf 1/1/1 3/3/1 4/4/1\n", "uv.obj": SQUARE + "f 1/1 2/2 3/3\n",
    "crlf.obj": (SQUARE + "f 1 2 3\n").replace("\n", "\r\n"), "comment.obj": "# hi\n" + SQUARE + "f 1 2 3 # there\n",
    "continued.obj": SQUARE + "f 1 2 \\\n3\n", "groups.obj": SQUARE + "o a\ng b c\ns 1\nf 1 2 3\ns off\nf 1 3 4\n",
    "colors.obj": "v 0 0 0 1 0 0\nv 1 0 0 0 1 0\nv 0 1 0 0 0 1\nf 1 2 3\n",
    "latin.obj": SQUARE + "g \xe9\nf 1 2 3\n",
    "weights.obj": "v 0 0 0 1\nv 1 0 0 1\nv 0 1 0 1\nf 1 2 3\n",
    "nan_face.obj": SQUARE + "v nan 0 0\nf 1 2 3\nf 1 2 5\n",
    "no_mtl.obj": "mtllib gone.mtl\n" + SQUARE + "usemtl m\nf 1 2 3\n",
    "huge.obj": "v 0 0 0\nv 1e30 0 0\nv 0 1e30 0\nf 1 2 3",
    "tiny.obj": "v 0 0 0\nv 1e-30 0 0\nv 0 1e-30 0\nf 1 2 3", "ascii.stl": STL.format(x=1),
    "ascii.ply": PLY.format(v=3, f=1, body="0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n"),
    "quad.ply": PLY.format(v=4, f=1, body="0 0 0\n1 0 0\n1 1 0\n0 1 0\n4 0 1 2 3\n"),
    "plain.gltf": gltf(),
    "matrix.gltf": gltf(nodes=[{"mesh": 0, "matrix": [2, 0, 0, 0, 0, 2, 0, 0, 0, 0, -2, 0, 1, 2, 3, 1]}]),
    "twice.gltf": gltf(nodes=[{"mesh": 0}, {"mesh": 0, "scale": [-1, 1, 1], "translation": [1, 0, 0]}]),
    "deep.gltf": gltf(nodes=nested(3000)), "flat_scale.gltf": gltf(nodes=[{"mesh": 0, "scale": [1, 1, 0]}]),
    "strip.gltf": gltf(meshes=primitive(mode=5)), "points_too.gltf": gltf(meshes=[{"primitives": [
        {"attributes": {"POSITION": 0}}, {"attributes": {"POSITION": 0}, "mode": 0}]}]),
    "optional.gltf": gltf(extensionsUsed=["ACME_glow"], extras={"a": 1}),
    "no_picture.gltf": gltf(meshes=primitive(material=0), materials=[
        {"pbrMetallicRoughness": {"baseColorTexture": {"index": 0}}}]),
    "colored.glb": glb_bytes(colored()), "padded.glb": glb_bytes(colored()) + b"later bytes",
}  # fmt: skip
BAD = {
    "empty.obj": "", "points.obj": SQUARE, "zero.obj": SQUARE + "f 0 1 2\n", "beyond.obj": SQUARE + "f 1 2 99\n",
    "below.obj": SQUARE + "f -9 1 2\n", "words.obj": SQUARE + "f a b c\n",
    "short.obj": "v 0 0\nv 1 0\nv 0 1\nf 1 2 3\n",
    "all_nan.obj": "v nan 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n", "binary.obj": bytes(range(256)) * 8,
    "line.obj": SQUARE + "f 1 2\n", "cut.obj": SQUARE + "f 1 2 3/\nf 1/", "empty.glb": b"", "magic.glb": b"glTF",
    "cut.glb": glb_bytes(colored())[:200], "half.glb": glb_bytes(colored())[:-64], "zip.glb": b"PK\x03\x04" + bytes(60),
    "version1.glb": b"glTF" + struct.pack("<IIII", 1, 28, 8, 0) + b"{}      ", "text.gltf": "hello", "list.gltf": "[1]",
    "brackets.gltf": "[" * 100000, "old.gltf": gltf(asset={"version": "1.0"}), "none.gltf": gltf(meshes=[]),
    "draco.gltf": gltf(extensionsRequired=["KHR_draco_mesh_compression"]),
    "draco_part.gltf": gltf(meshes=primitive(extensions={"KHR_draco_mesh_compression": {"bufferView": 0}})),
    "meshopt.gltf": gltf(extensionsRequired=["EXT_meshopt_compression"]),
    "outside.gltf": gltf(buffers=[{"byteLength": 36, "uri": "../secret.bin"}]),
    "absolute.gltf": gltf(buffers=[{"byteLength": 36, "uri": "/etc/hostname"}]),
    "escaped.gltf": gltf(buffers=[{"byteLength": 36, "uri": "%2e%2e/secret.bin"}]),
    "web.gltf": gltf(buffers=[{"byteLength": 36, "uri": "http://127.0.0.1:9/a.bin"}]),
    "missing.gltf": gltf(buffers=[{"byteLength": 36, "uri": "gone.bin"}]),
    "count.gltf": gltf(accessors=[{"bufferView": 0, "componentType": 5126, "count": 10**12, "type": "VEC3"}]),
    "beyond.gltf": gltf(accessors=[{"bufferView": 0, "componentType": 5126, "count": 4, "type": "VEC3"}]),
    "zeros.gltf": gltf(accessors=[{"componentType": 5126, "count": 2 * 10**9, "type": "VEC3"}]),
    "view.gltf": gltf(bufferViews=[{"buffer": 0, "byteLength": 10**9}]),
    "kind.gltf": gltf(accessors=[{"bufferView": 0, "componentType": 1, "count": 3, "type": "VEC3"}]),
    "cycle.gltf": gltf(nodes=[{"children": [1]}, {"children": [0], "mesh": 0}], scenes=[{"nodes": [0]}]),
    "child.gltf": gltf(nodes=[{"children": [7], "mesh": 0}], scenes=[{"nodes": [0]}]),
    "types.gltf": gltf(nodes="nodes", meshes=3), "rotation.gltf": gltf(nodes=[{"mesh": 0, "rotation": [1]}]),
    "index.gltf": gltf(meshes=primitive(indices=0)), "nulls.gltf": gltf(accessors=None),
    "many.gltf": gltf(nodes=[{"mesh": 0} for _ in range(1000)], meshes=[{"primitives": [
        {"attributes": {"POSITION": 0}}] * 6000}]),
    "vertices.gltf": gltf(accessors=[{"componentType": 5126, "count": 8 * 10**6, "type": "VEC3"}], meshes=[
        {"primitives": [{"attributes": {"POSITION": 0}}] * 9}]),
    "empty.ply": "", "header.ply": "ply\nformat ascii 1.0\n", "cut.ply": PLY.format(v=3, f=1, body="0 0 0\n1 0"),
    "count.ply": PLY.format(v=10**12, f=10**12, body="0 0 0\n").replace("ascii", "binary_little_endian"),
    "index.ply": PLY.format(v=3, f=1, body="0 0 0\n1 0 0\n0 1 0\n3 0 1 7\n"),
    "nan.ply": PLY.format(v=3, f=1, body="nan 0 0\n1 0 0\n0 1 0\n3 0 1 2\n"), "empty.stl": "",
    "nan.stl": STL.format(x="nan"),
    "count.stl": bytes(80) + struct.pack("<I", 10**9) + bytes(50), "words.stl": "solid a\nfacet\n", "a.fbx": "x",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    (root / "secret.bin").write_bytes(TRIANGLE)
    (root / "in").mkdir()
    for name, content in (GOOD | BAD).items():
        (root / "in" / name).write_bytes(content if isinstance(content, bytes) else content.encode("latin-1"))
    return root / "in"


@pytest.fixture(autouse=True)
def little_memory():
    """2 GB of address space beyond what is there already."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def read(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MeshWarning)
        return read_mesh(path)


@pytest.mark.parametrize("name", GOOD)
def test_good_files_are_read(name, folder):
    mesh = read(folder / name)
    assert len(mesh.faces) and torch.isfinite(mesh.vertices).all() and mesh.area_vectors().shape[1] == 3
    assert int(mesh.faces.max()) < len(mesh.vertices)


@pytest.mark.parametrize("name", BAD)
def test_damaged_files_are_one_sentence(name, folder):
    with pytest.raises(ValueError) as error:
        read(folder / name)
    text = str(error.value)
    assert name in text and len(text) < 400 and "\n" not in text.strip(), text


@pytest.mark.parametrize("suffix", [".glb", ".obj", ".ply", ".stl"])
def test_random_damage(suffix, tmp_path):
    """Bytes changed, cut out or doubled: a mesh or a ValueError, never another error."""
    write_mesh(tmp_path / f"a{suffix}", colored())
    data = (tmp_path / f"a{suffix}").read_bytes()
    chance = random.Random(5)
    outcomes = set()
    for _ in range(60):
        damaged = bytearray(data)
        for _ in range(chance.choice([1, 3, 10])):
            at = chance.randrange(len(damaged))
            action = chance.choice(["change", "cut", "double"])
            if action == "change":
                damaged[at] = chance.randrange(256)
            elif action == "cut":
                del damaged[at : at + chance.randrange(1, 40)]
            else:
                damaged[at:at] = damaged[at : at + 20]
            if not damaged:
                break
        (tmp_path / f"b{suffix}").write_bytes(damaged)
        try:
            outcomes.add(len(read(tmp_path / f"b{suffix}").faces) > 0)
        except ValueError as error:
            outcomes.add("refused")
            assert "b" + suffix in str(error)
    assert outcomes == {True, "refused"}


def test_a_bomb_for_a_texture_is_left_out(tmp_path):
    (tmp_path / "t.png").write_bytes(bomb())
    (tmp_path / "a.mtl").write_text("newmtl m\nmap_Kd t.png\n")
    (tmp_path / "a.obj").write_text("mtllib a.mtl\n" + SQUARE + "usemtl m\nf 1/1 2/2 3/3\n")
    with pytest.warns(MeshWarning, match="more than 64 million"):
        assert read_mesh(tmp_path / "a.obj").texture is None


def test_large_files_are_refused_before_they_are_read(tmp_path):
    with open(tmp_path / "a.obj", "wb") as file:
        file.truncate(1 << 34)  # a hole: it takes no place on the disk
    with pytest.raises(ValueError, match="16384 MB are more than the 64 MB"):
        read_mesh(tmp_path / "a.obj")
