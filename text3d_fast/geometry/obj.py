"""Wavefront .obj with its .mtl: read into parts; written with one texture."""

from __future__ import annotations

import io
import re
from array import array
from pathlib import Path

import numpy as np
import torch

from text3d_fast.files import atomic_path, write_bytes
from text3d_fast.geometry.mesh import Mesh
from text3d_fast.geometry.parts import MOST_FACES, Material, Part, note
from text3d_fast.images import beside, read_image, to_bytes

# options of map_Kd and how many words follow; -o -s -t take one to three numbers
_WORDS = {"-blendu": 1, "-blendv": 1, "-cc": 1, "-clamp": 1, "-imfchan": 1, "-mm": 2, "-texres": 1, "-bm": 1,
          "-boost": 1, "-type": 1}
_MOST_MTL = 1 << 24


def read_obj(path: Path) -> list[Part]:
    """One part for each material. Polygons become triangles; indices may be negative. ValueError names the line."""
    tables = {"v": _Table(3), "vt": _Table(2), "vn": _Table(3)}
    library: dict[str, Material] = {}
    groups: dict[str | None, array] = {}
    current = groups.setdefault(None, array("q"))
    total = 0
    text = path.read_bytes().decode("utf-8", "replace").replace("\\\n", " ").replace("\\\r\n", " ")
    for number, line in enumerate(io.StringIO(text), 1):
        words = line.split("#", 1)[0].split()
        if not words:
            continue
        kind = words[0]
        if kind in tables:
            try:
                tables[kind].append([float(w) for w in words[1:]])
            except ValueError:
                raise ValueError(f"line {number}: expected numbers, at least {'one' if kind == 'vt' else 'three'}, "
                                 f"got {line.strip()[:60]!r}") from None
        elif kind == "f":
            corners = [_corner(word, tables, number) for word in words[1:]]
            if len(corners) < 3:
                raise ValueError(f"line {number}: a face has {len(corners)} corners")
            total += len(corners) - 2
            if total > MOST_FACES:
                raise ValueError(f"it has more than {MOST_FACES} triangles")
            order = (0, 1, 2) if len(corners) == 3 else _ears([tables["v"].point(c[0]) for c in corners])
            for k in order:
                current.extend(corners[k])
        elif kind == "usemtl":
            current = groups.setdefault(" ".join(words[1:]), array("q"))
        elif kind == "mtllib":
            _read_library(path.parent, line.split("#", 1)[0].strip()[6:].strip(), library)
    if not total:
        raise ValueError("it has no faces" + (", only lines or points" if tables["v"] else ""))
    vertices, uv, normals = (tables[kind].to_numpy() for kind in ("v", "vt", "vn"))
    colors = vertices[:, 3:] if vertices.shape[1] == 6 else None
    if colors is not None and colors.max() > 1.001:
        colors = colors / 255
    return [_part(np.frombuffer(corners, np.int64).reshape(-1, 3), vertices[:, :3], colors, uv, normals,
                  _named(name, library)) for name, corners in groups.items() if corners]


def _corner(word: str, tables: dict, number: int) -> tuple[int, int, int]:
    """Rows of vertex, texture coordinate and normal, -1 for none."""
    rows = []
    try:
        given = [int(part) if part else None for part in word.split("/")]
    except ValueError:
        raise ValueError(f"line {number}: expected indices like 1/2/3, got {word[:40]!r}") from None
    if given[0] is None or len(given) > 3:
        raise ValueError(f"line {number}: expected indices like 1/2/3, got {word[:40]!r}")
    for index, kind in zip([*given, None, None], ("v", "vt", "vn")):
        count = len(tables[kind])
        if index is None:
            rows.append(-1)
        elif index == 0:
            raise ValueError(f"line {number}: index 0, but indices count from 1")
        elif index > count or index < -count:
            raise ValueError(f"line {number}: index {index} is out of range, there are {count} {kind} lines above")
        else:
            rows.append(index - 1 if index > 0 else count + index)
    return tuple(rows)


def _ears(points: list[list[float]]) -> list[int]:
    """Corners of the triangles of a polygon, convex or not, by clipping ears in its own plane."""
    p = np.asarray(points, float)
    with np.errstate(all="ignore"):
        p = (p - p[0]) / max(np.abs(p - p[0]).max(), 1e-300)
        normal = np.cross(p, np.roll(p, -1, 0)).sum(0)
    count = len(p)
    if count > 1000 or not np.isfinite(normal).all():
        return [k for i in range(1, count - 1) for k in (0, i, i + 1)]
    axis = int(np.abs(normal).argmax())
    q = np.delete(p, axis, 1) * [1, -1 if (normal[axis] < 0) != (axis == 1) else 1]

    def turn(a, b, c) -> float:
        return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])

    left, order = list(range(count)), []
    while len(left) > 3:
        for i in range(len(left)):
            a, b, c = left[i - 1], left[i], left[(i + 1) % len(left)]
            if turn(q[a], q[b], q[c]) > 0 and not any(
                turn(q[a], q[b], q[k]) >= 0 and turn(q[b], q[c], q[k]) >= 0 and turn(q[c], q[a], q[k]) >= 0
                for k in left if k not in (a, b, c)
            ):
                break
        else:
            i, a, b, c = 1, left[0], left[1], left[2]  # crossed or flat: any triangle is as good
        order += [a, b, c]
        del left[i]
    return order + left


class _Table:
    """Rows of numbers, flat: lists would need five times the memory."""

    def __init__(self, width: int) -> None:
        self.width, self.values = width, array("d")

    def append(self, row: list[float]) -> None:
        if not self.values and self.width == 3 and len(row) >= 6:
            self.width = 6  # with colours
        if len(row) < (1 if self.width == 2 else 3):
            raise ValueError
        if len(row) < self.width:
            row = [*row[:3], 1.0, 1.0, 1.0] if self.width == 6 else [*row, 0.0]
        self.values.extend(row[: self.width])

    def __len__(self) -> int:
        return len(self.values) // self.width

    def __bool__(self) -> bool:
        return bool(self.values)

    def point(self, index: int) -> array:
        return self.values[index * self.width : index * self.width + 3]

    def to_numpy(self) -> np.ndarray:
        return np.array(self.values, np.float64).reshape(-1, self.width)


def _named(name: str | None, library: dict[str, Material]) -> Material | None:
    if name is not None and name not in library:
        note(f"material {name[:60]!r} is not defined; it is drawn plain")
    return library.get(name)


def _part(corners, vertices, colors, uv, normals, material) -> Part:
    """corners [3 F, 3]: rows of vertex, uv, normal; a vertex with several normals is repeated."""
    has_uv, has_normals = (corners[:, 1] >= 0).all(), (corners[:, 2] >= 0).all()
    rows, inverse = corners[:, 0], None
    if has_normals:
        values, of_row = np.unique(normals, axis=0, return_inverse=True)
        keys = corners[:, 0] * len(values) + of_row.reshape(-1)[corners[:, 2]]
        unique, inverse = np.unique(keys, return_inverse=True)
        rows, normals = unique // len(values), values[unique % len(values)]
        vertices, colors = vertices[rows], None if colors is None else colors[rows]
    faces = (corners[:, 0] if inverse is None else inverse.reshape(-1)).reshape(-1, 3)
    if not has_uv and material is not None and material.texture is not None:
        note("a texture without texture coordinates is left out")
        material = Material()
    return Part(vertices, faces, normals if has_normals else None, colors, uv if has_uv else None,
                corners[:, 1].reshape(-1, 3) if has_uv else None, material)


def _read_library(folder: Path, name: str, library: dict[str, Material]) -> None:
    try:
        text = beside(folder, name, _MOST_MTL).read_bytes().decode("utf-8", "replace")
    except (OSError, ValueError) as error:
        note(f"material file {name[:60]!r} is left out: {error}")
        return
    material = Material()
    for line in text.splitlines():
        words = line.split("#", 1)[0].split()
        kind = words[0].lower() if words else ""
        if kind == "newmtl":
            material = library.setdefault(" ".join(words[1:]), Material((0.8, 0.8, 0.8)))
        elif kind == "kd":
            try:
                color = tuple(min(max(float(w), 0.0), 1.0) for w in words[1:4])
            except ValueError:
                color = ()
            if len(color) == 3 and material.texture is None and not any(c != c for c in color):
                material.color = color
            elif len(color) != 3:
                note(f"a Kd line cannot be read: {line.strip()[:60]!r}")
        elif kind == "map_kd":
            file, options = _map(line)
            if "-clamp on" in options:
                material.wrap = ("clamp", "clamp")
            try:
                found = beside(folder, file.replace("\\", "/"), 1 << 28)
                material.texture = np.asarray(read_image(found, f"texture {file!r}"))
                material.color = (1.0, 1.0, 1.0)  # Kd beside a texture is what the exporter happened to have
            except (OSError, ValueError) as error:
                note(f"texture {file[:60]!r} is left out: {error}")


def _map(line: str) -> tuple[str, str]:
    """File name, which may have blanks, and the options before it."""
    words = line.split()[1:]
    start = 0
    while start < len(words) - 1 and words[start].startswith("-"):
        option, start = words[start], start + 1
        if option in ("-o", "-s", "-t"):
            for _ in range(3):
                if start < len(words) - 1 and re.fullmatch(r"[-+.\deE]+", words[start]):
                    start += 1
        else:
            start += _WORDS.get(option, 0)
    file = " ".join(words[start:])
    return file, " ".join(words[:start])


def write_obj(path: Path, mesh: Mesh) -> list[Path]:
    """The mesh, and its .mtl and .png whose names have no blanks: many readers stop at one."""
    mesh = mesh.to("cpu")
    textured = mesh.texture is not None and mesh.uv is not None
    written = []
    lines = io.StringIO()
    if textured:
        from PIL import Image

        stem = re.sub(r"\s+", "_", path.stem)
        maps = {"map_Kd": (mesh.texture, path.with_name(f"{stem}.png"))}
        if mesh.normal_map is not None:
            maps["norm"] = mesh.normal_map, path.with_name(f"{stem}_normal.png")
        text = "newmtl albedo\nKa 0 0 0\nKd 1 1 1\nKs 0 0 0\n"
        for name, (picture, image) in maps.items():
            with atomic_path(image) as temporary:
                Image.fromarray(to_bytes(picture)).save(temporary)
            text += f"{name} {image.name}\n"
            written.append(image)
        material = path.with_name(f"{stem}.mtl")
        write_bytes(material, text.encode())
        written.append(material)
        lines.write(f"mtllib {material.name}\n")
    points = mesh.vertices if mesh.colors is None or textured else torch.cat([mesh.vertices, mesh.colors], 1)
    np.savetxt(lines, points.numpy(), "v" + " %.9g" * points.shape[1])
    columns = [mesh.faces + 1]
    if textured:
        np.savetxt(lines, mesh.uv.numpy(), "vt %.7g %.7g")
        columns.append(mesh.uv_faces + 1)
        lines.write("usemtl albedo\n")
    if mesh.normals is not None:
        np.savetxt(lines, mesh.normals.numpy(), "vn %.5g %.5g %.5g")
        columns.append(mesh.faces + 1)
    corner = "%d" + ("/%d" if textured else "/" if mesh.normals is not None else "")
    corner += "/%d" if mesh.normals is not None else ""
    np.savetxt(lines, torch.stack(columns, -1).flatten(1).numpy(), f"f {corner} {corner} {corner}")
    write_bytes(path, lines.getvalue().encode())
    return [*written, path]
