"""Mesh files: .glb, .gltf, .obj, .ply and .stl read; all but .gltf written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from text3d_fast.files import write_bytes
from text3d_fast.geometry.gltf import glb_bytes, read_gltf, split_at_seams
from text3d_fast.geometry.mesh import Mesh
from text3d_fast.geometry.obj import read_obj, write_obj
from text3d_fast.geometry.parts import MOST_FACES, Part, assemble
from text3d_fast.images import to_bytes

SUFFIXES = (".glb", ".obj", ".ply", ".stl")
READABLE = (".glb", ".gltf", ".obj", ".ply", ".stl")
# What a reader needs is a multiple of the file, more of text than of binary; these stay under 2 GB.
_MOST_BYTES = {".glb": 128 << 20, ".gltf": 64 << 20, ".obj": 64 << 20, ".ply": 96 << 20, ".stl": 96 << 20}


def write_mesh(path: str | Path, mesh: Mesh) -> list[Path]:
    """Write a mesh as .glb, .obj, .ply or .stl; return the files written, the last of them `path`.

    GLB: Y up, front +Z, smooth normals, one PBR material (roughness 1, metallic 0, texture as base colour) or vertex
    colours. OBJ: the same with a .mtl and a .png beside it. PLY: binary, vertex colours, no texture. STL: binary, shape
    only. Each file is written atomically, the mesh itself last. Raises ValueError for another suffix, a mesh without
    faces or with coordinates that are not finite, OSError if it cannot be written.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"path: expected a name ending in {', '.join(SUFFIXES)}, got {path.name!r}")
    if len(mesh.faces) == 0:
        raise ValueError("mesh: expected at least one face, got none")
    if not bool(torch.isfinite(mesh.vertices).all()):
        raise ValueError("mesh: expected finite vertices, got NaN or infinity")
    if suffix == ".obj":
        return write_obj(path, mesh)
    write_bytes(path, {".glb": glb_bytes, ".ply": _ply_bytes, ".stl": _stl_bytes}[suffix](mesh))
    return [path]


def read_mesh(path: str | Path) -> Mesh:
    """Read a .glb, .gltf, .obj, .ply or .stl: vertices, faces, and normals, colours, atlas, texture if it has them.

    Scenes are put together with their transforms; several materials share one texture, in which each has its place
    (`parts.assemble`). Vertices that a format had to split at seams are joined again. What is left out of the mesh
    (points and lines, animation, vertex colours over a texture, textures that cannot be read) is said by a
    `MeshWarning`. Raises ValueError if the file is no mesh, too large or compressed, OSError if it cannot be opened.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in READABLE:
        raise ValueError(f"path: expected a name ending in {', '.join(READABLE)}, got {path.name!r}")
    size = path.stat().st_size
    if size > _MOST_BYTES[suffix]:
        raise ValueError(f"{path}: {size >> 20} MB are more than the {_MOST_BYTES[suffix] >> 20} MB that are read of "
                         f"a {suffix} file; reduce the mesh first")
    readers = {".glb": read_gltf, ".gltf": read_gltf, ".obj": read_obj, ".ply": _read_trimesh, ".stl": _read_trimesh}
    try:
        return assemble(readers[suffix](path))
    except OSError as error:
        if error.filename is not None and Path(error.filename) == path:
            raise
        reason, cause = str(error), error
    except json.JSONDecodeError as error:
        reason, cause = f"its JSON is damaged: {error}", error
    except ValueError as error:
        reason, cause = str(error), error
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError) as error:
        # values of a kind that no reader expects, where a file has been damaged
        reason, cause = f"damaged: {type(error).__name__} {error}", error
    raise ValueError(f"{path}: not a readable mesh ({' '.join(reason.split())[:200]})") from cause


def _read_trimesh(path: Path) -> list[Part]:
    import trimesh

    try:
        loaded = trimesh.load_mesh(path, process=False)
    except OSError:
        raise
    except Exception as error:  # its readers fail in many ways on a damaged file
        raise ValueError(str(error) or type(error).__name__) from error
    if not isinstance(loaded, trimesh.Trimesh) or len(loaded.faces) == 0:
        raise ValueError("it holds no triangles")
    if len(loaded.faces) > MOST_FACES:
        raise ValueError(f"it has more than {MOST_FACES} triangles")
    vertices, faces = np.array(loaded.vertices, np.float64), np.array(loaded.faces, np.int64)
    if path.suffix.lower() == ".stl":  # each triangle has its own corners: joined, so that shading is smooth
        vertices, rows = np.unique(vertices.astype(np.float32) + np.float32(0), axis=0, return_inverse=True)
        return [Part(vertices.astype(np.float64), rows.reshape(-1)[faces])]
    normals = np.array(loaded.vertex_normals) if "vertex_normals" in loaded._cache.cache else None
    colors, visual = None, loaded.visual
    if visual.kind == "vertex":
        colors = np.array(visual.vertex_colors, np.float64)[:, :3] / 255
    elif visual.kind == "face":
        vertices, colors = vertices[faces].reshape(-1, 3), np.repeat(visual.face_colors[:, :3] / 255, 3, 0)
        faces, normals = np.arange(len(vertices)).reshape(-1, 3), None
    elif visual.kind == "texture":
        found = getattr(visual, "vertex_attributes", {}).get("color")
        colors = None if found is None else np.array(found, np.float64)[:, :3] / 255
    return [Part(vertices, faces, normals, colors)]


def _ply_bytes(mesh: Mesh) -> bytes:
    """Binary, with normals and 8-bit colours (sRGB) if the mesh has them; a texture is sampled at the vertices."""
    mesh = mesh.to("cpu")
    columns = [("xyz", "<f4", mesh.vertices)]
    if mesh.normals is not None:
        columns.append((("nx", "ny", "nz"), "<f4", mesh.normals))
    colors = mesh.colors
    if colors is None and mesh.texture is not None and mesh.uv is not None:
        colors = _texture_at_vertices(mesh)
    if colors is not None:
        columns.append((("red", "green", "blue"), "u1", torch.from_numpy(to_bytes(colors))))
    rows = np.empty(len(mesh.vertices), [(name, kind) for names, kind, _ in columns for name in names])
    for names, _, values in columns:
        for k, name in enumerate(names):
            rows[name] = values[:, k].numpy()
    faces = np.empty(len(mesh.faces), [("count", "u1"), ("corners", "<i4", 3)])
    faces["count"], faces["corners"] = 3, mesh.faces.numpy()
    properties = [f"property {'uchar' if kind == 'u1' else 'float'} {name}" for names, kind, _ in columns
                  for name in names]
    header = ["ply", "format binary_little_endian 1.0", "comment text3d-fast", f"element vertex {len(rows)}",
              *properties, f"element face {len(faces)}", "property list uchar int vertex_indices", "end_header\n"]
    return "\n".join(header).encode() + rows.tobytes() + faces.tobytes()


def _texture_at_vertices(mesh: Mesh) -> torch.Tensor:
    vertex, row, _ = split_at_seams(mesh)
    height, width = mesh.texture.shape[:2]
    u, v = mesh.uv[row].unbind(1)
    column, line = (u * width).long().clamp(0, width - 1), ((1 - v) * height).long().clamp(0, height - 1)
    colors = torch.zeros(len(mesh.vertices), 3)
    colors[vertex] = mesh.texture[line, column]
    return colors


def _stl_bytes(mesh: Mesh) -> bytes:
    rows = np.zeros(len(mesh.faces), [("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])
    corners = mesh.corners().detach().cpu()
    rows["corners"] = corners.numpy()
    normal = torch.linalg.cross((corners[:, 1] - corners[:, 0]).double(), (corners[:, 2] - corners[:, 0]).double())
    rows["normal"] = torch.nn.functional.normalize(normal, dim=-1, eps=1e-300).numpy()
    return b"text3d-fast".ljust(80, b" ") + np.uint32(len(rows)).tobytes() + rows.tobytes()
