"""glTF 2.0: read .glb and .gltf into parts; write .glb."""

from __future__ import annotations

import base64
import io
import json
import math
import struct
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes

import numpy as np
import torch

from text3d_fast.geometry.mesh import Mesh
from text3d_fast.geometry.parts import MOST_FACES, Material, Part, note, placed, to_linear, to_srgb
from text3d_fast.images import beside, read_image, to_bytes

_TYPES = {5120: "i1", 5121: "u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
_WIDTHS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT4": 16}
_UNDERSTOOD = ("KHR_materials_", "KHR_mesh_quantization", "KHR_texture_transform", "KHR_lights_", "EXT_texture_webp",
               "KHR_xmp")
_WRAPS = {33071: "clamp", 33648: "mirror", 10497: "repeat"}
_MOST_BYTES = 1 << 27  # of all files beside it
_MOST_PIXELS = 96 << 20  # of all textures
_MOST_PARTS = 20_000


def read_gltf(path: Path) -> list[Part]:
    """The triangles of the scene, each primitive of each node placed by its transforms. ValueError if damaged."""
    return _Reader(path).parts()


class _Reader:
    def __init__(self, path: Path) -> None:
        self.folder = path.parent
        data = path.read_bytes()
        self.binary = None
        if data[:4] == b"glTF":
            data = self._chunks(data)
        elif path.suffix.lower() == ".glb":
            raise ValueError("it does not begin as a .glb does")
        self.tree = json.loads(data)
        if not isinstance(self.tree, dict) or not isinstance(self.tree.get("asset"), dict):
            raise ValueError("its JSON is not that of a glTF file")
        if str(self.tree["asset"].get("version", "")).split(".")[0] != "2":
            raise ValueError(f"glTF version {self.tree['asset'].get('version')!r}; only 2.0 is read")
        for name in self.tree.get("extensionsRequired", []):
            if not str(name).startswith(_UNDERSTOOD):
                raise ValueError(f"it needs the extension {name}, which is not read; export it without compression")
        self.buffers, self.materials = {}, {}
        self.bytes, self.pixels, self.vertices = _MOST_BYTES, _MOST_PIXELS, 3 * MOST_FACES  # left of each

    def _chunks(self, data: bytes) -> bytes:
        if len(data) < 20:
            raise ValueError("the file is cut off")
        _, version, length = struct.unpack_from("<4sII", data)
        if version != 2:
            raise ValueError(f"glTF version {version}; only 2 is read")
        if length > len(data):
            raise ValueError(f"the file is cut off: {len(data)} of {length} bytes")
        start, tree = 12, None
        while start + 8 <= length:
            size, kind = struct.unpack_from("<I4s", data, start)
            chunk = data[start + 8 : start + 8 + size]
            if len(chunk) < size:
                raise ValueError("a chunk is cut off")
            if kind == b"JSON" and tree is None:
                tree = chunk
            elif kind == b"BIN\0" and self.binary is None:
                self.binary = chunk
            start += 8 + size
        if tree is None:
            raise ValueError("it has no JSON chunk")
        return tree

    def item(self, kind: str, index) -> dict:
        items = self.tree.get(kind, [])
        if not isinstance(index, int) or not 0 <= index < len(items):
            raise ValueError(f"{kind}: index {index} of {len(items)}")
        return items[index]

    def resource(self, uri: str) -> bytes:
        if uri.startswith("data:"):
            head, _, body = uri.partition(",")
            return base64.b64decode(body) if head.endswith(";base64") else unquote_to_bytes(body)
        data = beside(self.folder, unquote(uri), self.bytes).read_bytes()
        self.bytes -= len(data)
        return data

    def view(self, index) -> tuple[memoryview, int | None]:
        view = self.item("bufferViews", index)
        number = view.get("buffer")
        if number not in self.buffers:
            uri = self.item("buffers", number).get("uri")
            if uri is None and self.binary is None:
                raise ValueError("its binary chunk is missing")
            self.buffers[number] = self.binary if uri is None else self.resource(uri)
        start, size = view.get("byteOffset", 0), view.get("byteLength", 0)
        if start < 0 or size < 0 or start + size > len(self.buffers[number]):
            raise ValueError(f"buffer view {index} reaches beyond its buffer")
        return memoryview(self.buffers[number])[start : start + size], view.get("byteStride")

    def accessor(self, index, kind: str | None = None) -> np.ndarray:
        """[count, width]; normalized integers as floats."""
        entry = self.item("accessors", index)
        if kind is not None and entry.get("type") not in kind.split():
            raise ValueError(f"accessor {index} is {entry.get('type')}, expected {kind}")
        count = entry.get("count")
        values = self._table(index, entry, entry, count, _WIDTHS.get(entry.get("type"), 0))
        sparse = entry.get("sparse")
        if sparse is not None:
            values = values.copy()
            where = self._table(index, {**sparse["indices"], "componentType": sparse["indices"]["componentType"]},
                                sparse["indices"], sparse["count"], 1)[:, 0]
            if len(where) and where.max() >= count:
                raise ValueError(f"accessor {index}: a sparse index is out of range")
            values[where] = self._table(index, entry, sparse["values"], sparse["count"], values.shape[1])
        if entry.get("normalized") and values.dtype.kind in "iu":
            return np.maximum(values.astype(np.float32) / np.iinfo(values.dtype).max, -1)
        return values

    def _table(self, index, entry: dict, where: dict, count, width: int) -> np.ndarray:
        kind = _TYPES.get(entry.get("componentType"))
        if kind is None or not width or not isinstance(count, int) or not 0 <= count <= 3 * MOST_FACES:
            raise ValueError(f"accessor {index} is damaged, or larger than {3 * MOST_FACES} elements")
        dtype = np.dtype(kind)
        if where.get("bufferView") is None:
            return np.zeros((count, width), dtype)
        data, stride = self.view(where["bufferView"])
        stride = stride or width * dtype.itemsize
        start = where.get("byteOffset", 0)
        if count and (start < 0 or stride < 1 or start + (count - 1) * stride + width * dtype.itemsize > len(data)):
            raise ValueError(f"accessor {index} reaches beyond its buffer view")
        return np.ndarray((count, width), dtype, data, start, (stride, dtype.itemsize)).copy() if count else np.zeros(
            (0, width), dtype)

    def parts(self) -> list[Part]:
        meshes, result, total = {}, [], 0
        for matrix, node in self._nodes():
            number = node["mesh"]
            if number not in meshes:
                mesh = self.item("meshes", number)
                if len(mesh.get("primitives", [])) > _MOST_PARTS:
                    raise ValueError(f"it has more than {_MOST_PARTS} parts")
                meshes[number] = [part for p in mesh.get("primitives", []) if (part := self._primitive(p)) is not None]
            else:
                self.spend(sum(len(part.vertices) for part in meshes[number]))
            total += sum(len(part.faces) for part in meshes[number])
            if total > MOST_FACES or len(result) + len(meshes[number]) > _MOST_PARTS:
                raise ValueError(f"it has more than {MOST_FACES} triangles or {_MOST_PARTS} parts")
            if "skin" in node:
                note("skeletons are not applied: the mesh stands as it was modelled")
                matrix = np.eye(4)
            result += [placed(part, matrix) for part in meshes[number]]
        return result

    def spend(self, vertices: int) -> None:
        self.vertices -= vertices
        if self.vertices < 0:
            raise ValueError(f"it has more than {3 * MOST_FACES} vertices")

    def _nodes(self):
        """World matrix and node, for each that shows a mesh."""
        nodes = self.tree.get("nodes", [])
        scenes = self.tree.get("scenes", [])
        if scenes:
            roots = self.item("scenes", self.tree.get("scene", 0)).get("nodes", [])
        else:
            roots = sorted(set(range(len(nodes))) - {c for node in nodes for c in node.get("children", [])})
        stack, seen = [(root, np.eye(4)) for root in reversed(roots)], set()
        while stack:
            index, above = stack.pop()
            if index in seen:
                raise ValueError(f"node {index} has two parents")
            seen.add(index)
            node = self.item("nodes", index)
            matrix = above @ _local(node)
            if node.get("mesh") is not None:
                yield matrix, node
            stack += [(child, matrix) for child in reversed(node.get("children", []))]

    def _primitive(self, primitive: dict) -> Part | None:
        mode = primitive.get("mode", 4)
        if mode not in (4, 5, 6):
            note("points and lines are left out")
            return None
        attributes = primitive.get("attributes", {})
        for name in primitive.get("extensions", {}):
            if "compression" in name:
                raise ValueError(f"it is compressed by {name}, which is not read; export it without compression")
        if "POSITION" not in attributes:
            note("a part without positions is left out")
            return None
        if primitive.get("targets"):
            note("morph targets are not applied: the mesh stands as it was modelled")
        vertices = self.accessor(attributes["POSITION"], "VEC3")
        self.spend(len(vertices))
        vertices = vertices.astype(np.float64)
        indices = primitive.get("indices")
        corners = np.arange(len(vertices)) if indices is None else self.accessor(indices, "SCALAR")[:, 0]
        faces = _triangles(corners.astype(np.int64), mode)

        def attribute(name: str, kind: str, columns: int):
            if name not in attributes:
                return None
            values = self.accessor(attributes[name], kind).astype(np.float64)[:, :columns]
            if len(values) != len(vertices):
                raise ValueError(f"{name} has {len(values)} rows for {len(vertices)} positions")
            return values

        material, channel, transform = self._material(primitive.get("material"))
        uv = attribute(f"TEXCOORD_{channel}", "VEC2", 2)
        if uv is None and material is not None and material.texture is not None:
            note("a texture without texture coordinates is left out")
            material = Material(material.color)
        if uv is not None:
            uv = uv @ transform[:2, :2].T + transform[:2, 2]
            uv[:, 1] = 1 - uv[:, 1]
        colors = attribute("COLOR_0", "VEC3 VEC4", 3)
        return Part(vertices, faces, attribute("NORMAL", "VEC3", 3), None if colors is None else to_srgb(colors), uv,
                    None if uv is None else faces, material)

    def _material(self, index) -> tuple[Material | None, int, np.ndarray]:
        if index is None:
            return None, 0, np.eye(3)
        if index not in self.materials:
            entry = self.item("materials", index)
            surface = entry.get("pbrMetallicRoughness", {})
            factor, place = surface.get("baseColorFactor"), surface.get("baseColorTexture")
            glossy = entry.get("extensions", {}).get("KHR_materials_pbrSpecularGlossiness")
            if glossy is not None:
                factor, place = glossy.get("diffuseFactor", factor), glossy.get("diffuseTexture", place)
            color = np.clip(np.nan_to_num(np.asarray(factor or [1, 1, 1, 1], float)[:3]), 0, 1)
            if entry.get("alphaMode") == "BLEND":
                note("transparency is drawn opaque")
            material = Material(tuple(1.0 if c == 1 else float(to_srgb(c)) for c in color))
            channel, transform = 0, np.eye(3)
            if place is not None:
                moved = place.get("extensions", {}).get("KHR_texture_transform", {})
                channel = moved.get("texCoord", place.get("texCoord", 0))
                transform = _texture_transform(moved)
                material.texture = self._texture(material, place.get("index"))
            bumps = entry.get("normalTexture")
            if bumps is not None and bumps.get("texCoord", 0) == channel and (transform == np.eye(3)).all():
                material.normal_map = self._texture(material, bumps.get("index"))
            self.materials[index] = material, channel, transform
        return self.materials[index]

    def _texture(self, material: Material, index) -> np.ndarray | None:
        """The picture, and its way of repeating for the material; None if it cannot be read."""
        try:
            texture = self.item("textures", index)
            webp = texture.get("extensions", {}).get("EXT_texture_webp", {})
            image = self.item("images", texture.get("source", webp.get("source")))
            data = self.view(image["bufferView"])[0] if "bufferView" in image else self.resource(image["uri"])
            picture = read_image(bytes(data), f"texture {index}")
            if picture.width * picture.height > self.pixels:
                raise ValueError("all textures together are too large")
            self.pixels -= picture.width * picture.height
        except (ValueError, OSError, KeyError) as error:
            note(f"texture {index} is left out: {error}")
            return None
        if "sampler" in texture:
            sampler = self.item("samplers", texture["sampler"])
            material.wrap = tuple(_WRAPS.get(sampler.get(name), "repeat") for name in ("wrapS", "wrapT"))
        return np.asarray(picture)


def _local(node: dict) -> np.ndarray:
    if "matrix" in node:
        return np.asarray(node["matrix"], np.float64).reshape(4, 4).T
    matrix = np.eye(4)
    x, y, z, w = np.asarray(node.get("rotation", [0, 0, 0, 1]), float) / max(math.hypot(*node.get("rotation", [1])),
                                                                              1e-12)
    rotation = [[1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
                [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
                [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)]]
    matrix[:3, :3] = np.array(rotation) * np.asarray(node.get("scale", [1, 1, 1]), float)
    matrix[:3, 3] = node.get("translation", [0, 0, 0])
    return matrix


def _texture_transform(moved: dict) -> np.ndarray:
    turn = moved.get("rotation", 0.0)
    (x, y), (su, sv) = moved.get("offset", (0, 0)), moved.get("scale", (1, 1))
    cos, sin = math.cos(turn), math.sin(turn)
    return np.array([[cos * su, sin * sv, x], [-sin * su, cos * sv, y], [0, 0, 1]])


def _triangles(corners: np.ndarray, mode: int) -> np.ndarray:
    if mode == 4:
        return corners[: len(corners) // 3 * 3].reshape(-1, 3)
    if len(corners) < 3:
        return np.zeros((0, 3), np.int64)
    if mode == 5:
        faces = np.stack([corners[:-2], corners[1:-1], corners[2:]], 1)
        faces[1::2] = faces[1::2, [1, 0, 2]]
        return faces
    return np.stack([np.broadcast_to(corners[:1], len(corners) - 2), corners[1:-1], corners[2:]], 1)


def glb_bytes(mesh: Mesh) -> bytes:
    """The content of a .glb file, as `write_mesh` writes it: smooth normals if the mesh has none, vertex colours in 16
    bits (linear, of which 8 are too coarse in the dark), one matte material with texture and normal map."""
    mesh = (mesh if mesh.normals is not None else mesh.with_normals()).to("cpu")
    vertex, row, faces = split_at_seams(mesh)
    writer = _Writer()
    positions = mesh.vertices[vertex].float().numpy()
    attributes = {"POSITION": writer.accessor(positions, "VEC3", 34962, bounds=True)}
    attributes["NORMAL"] = writer.accessor(unit_normals(mesh.normals[vertex]).numpy(), "VEC3", 34962)
    material = {"name": "matte", "pbrMetallicRoughness": {"metallicFactor": 0.0, "roughnessFactor": 1.0}}
    textured = mesh.texture is not None and mesh.uv is not None
    if textured:
        uv = mesh.uv[row].float()
        attributes["TEXCOORD_0"] = writer.accessor(torch.stack([uv[:, 0], 1 - uv[:, 1]], 1).numpy(), "VEC2", 34962)
        material["name"] = "albedo"
        material["pbrMetallicRoughness"]["baseColorTexture"] = {"index": writer.texture(mesh.texture)}
        if mesh.normal_map is not None:
            frame = mesh.tangents()[row]
            frame = torch.cat([unit_normals(frame[:, :3]), frame[:, 3:].float()], 1)
            attributes["TANGENT"] = writer.accessor(frame.numpy(), "VEC4", 34962)
            material["normalTexture"] = {"index": writer.texture(mesh.normal_map)}
    elif mesh.colors is not None:
        colors = np.full((len(vertex), 4), 65535, "<u2")  # rows of 8 bytes: glTF wants multiples of 4
        colors[:, :3] = np.round(np.clip(to_linear(mesh.colors[vertex].numpy()), 0, 1) * 65535)
        attributes["COLOR_0"] = writer.accessor(colors, "VEC4", 34962, normalized=True)
    indices = writer.accessor(faces.numpy().astype("<u4").reshape(-1, 1), "SCALAR", 34963)
    return writer.file(attributes, indices, material)


def split_at_seams(mesh: Mesh) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Vertex and atlas row of each exported vertex, and the faces: a vertex is repeated for each atlas row it has.
    Vertices without a face are left out."""
    rows = max(1, 0 if mesh.uv is None else len(mesh.uv))
    keys = mesh.faces.cpu().long() * rows
    if mesh.uv is not None:
        keys = keys + mesh.uv_faces.cpu().long()
    unique, faces = torch.unique(keys, return_inverse=True)
    return unique // rows, unique % rows, faces


def unit_normals(normals: torch.Tensor) -> torch.Tensor:
    """Of unit length in any case: up where there is no direction, as files must not hold others."""
    normals = torch.nn.functional.normalize(normals.double(), dim=-1, eps=1e-30)
    lost = normals.norm(dim=-1, keepdim=True) < 0.5
    return torch.where(lost, normals.new_tensor([0.0, 1.0, 0.0]), normals).float()


class _Writer:
    def __init__(self) -> None:
        self.data = bytearray()
        self.tree = {"asset": {"version": "2.0", "generator": "text3d-fast"}, "scene": 0,
                     "scenes": [{"nodes": [0]}], "nodes": [{"mesh": 0}], "accessors": [], "bufferViews": []}

    def view(self, data: bytes, **more) -> int:
        self.data += bytes(-len(self.data) % 4)
        self.tree["bufferViews"].append({"buffer": 0, "byteOffset": len(self.data), "byteLength": len(data), **more})
        self.data += data
        return len(self.tree["bufferViews"]) - 1

    def accessor(self, values: np.ndarray, kind: str, target: int, bounds: bool = False, **more) -> int:
        codes = {"<f4": 5126, "<u2": 5123, "<u4": 5125}
        entry = {"bufferView": self.view(np.ascontiguousarray(values).tobytes(), target=target),
                 "componentType": codes[values.dtype.str], "count": len(values), "type": kind, **more}
        if bounds:
            entry |= {"min": values.min(0).tolist(), "max": values.max(0).tolist()}
        self.tree["accessors"].append(entry)
        return len(self.tree["accessors"]) - 1

    def texture(self, picture: torch.Tensor) -> int:
        from PIL import Image

        file = io.BytesIO()
        Image.fromarray(to_bytes(picture)).save(file, format="PNG")
        images = self.tree.setdefault("images", [])
        images.append({"bufferView": self.view(file.getvalue()), "mimeType": "image/png"})
        self.tree["samplers"] = [{"magFilter": 9729, "minFilter": 9987, "wrapS": 33071, "wrapT": 33071}]
        self.tree.setdefault("textures", []).append({"sampler": 0, "source": len(images) - 1})
        return len(images) - 1

    def file(self, attributes: dict, indices: int, material: dict) -> bytes:
        self.tree["materials"] = [material]
        self.tree["meshes"] = [{"primitives": [{"attributes": attributes, "indices": indices, "material": 0}]}]
        self.data += bytes(-len(self.data) % 4)
        self.tree["buffers"] = [{"byteLength": len(self.data)}]
        text = json.dumps(self.tree, separators=(",", ":"), allow_nan=False).encode()
        text += b" " * (-len(text) % 4)
        chunks = struct.pack("<I4s", len(text), b"JSON") + text
        chunks += struct.pack("<I4s", len(self.data), b"BIN\0") + bytes(self.data)
        return struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks
