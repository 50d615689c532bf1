"""GLB, OBJ and PLY files through trimesh."""

import io
from pathlib import Path

import numpy as np
import torch

from text3d_fast.files import atomic_path, write_bytes
from text3d_fast.geometry.mesh import Mesh
from text3d_fast.images import to_bytes

SUFFIXES = (".glb", ".obj", ".ply")


def write_mesh(path: str | Path, mesh: Mesh) -> list[Path]:
    """Write a mesh as .glb, .obj or .ply; return the files written, the last of them `path`.

    GLB: Y up, front +Z, one PBR material (roughness 1, metallic 0, texture as base colour) or vertex colours. OBJ: the
    same with a .mtl and a .png beside it. PLY: binary, vertex colours, no texture. Each file is written atomically, the
    mesh itself last. Raises ValueError for another suffix or a mesh without faces, OSError if it cannot be written.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"path: expected a name ending in {', '.join(SUFFIXES)}, got {path.name!r}")
    if len(mesh.faces) == 0:
        raise ValueError("mesh: expected at least one face, got none")
    if suffix == ".obj":
        return _write_obj(path, mesh)
    if suffix == ".ply":
        exported = _to_trimesh(mesh, linear_colors=False)
        write_bytes(path, exported.export(file_type="ply", vertex_normal=mesh.normals is not None))
    else:
        write_bytes(path, glb_bytes(mesh))
    return [path]


def glb_bytes(mesh: Mesh) -> bytes:
    """The content of a .glb file, as `write_mesh` writes it."""
    from trimesh.exchange.gltf import export_glb

    exported = _to_trimesh(mesh, linear_colors=True)
    return export_glb(exported, include_normals=mesh.normals is not None, tree_postprocessor=_matte)


def read_mesh(path: str | Path) -> Mesh:
    """Read a .glb, .obj or .ply: vertices, faces, and normals, vertex colours, atlas and texture if there are any.

    Vertices that a format had to split at seams are joined again by position. Raises ValueError if the file is no mesh.
    """
    import trimesh

    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"path: expected a name ending in {', '.join(SUFFIXES)}, got {path.name!r}")
    try:
        scene = trimesh.load_scene(path, process=False)
        only = next(iter(scene.geometry.values())) if len(scene.geometry) == 1 else None
        placed = only is None or not np.allclose(scene.graph[scene.graph.nodes_geometry[0]][0], np.eye(4))
        loaded = scene.to_mesh() if placed else only  # joining a scene would lose its normals
        if not isinstance(loaded, trimesh.Trimesh) or len(loaded.faces) == 0:
            raise ValueError("it holds no triangles")
    except OSError:
        raise
    except Exception as error:  # trimesh's readers fail in many ways on a damaged file
        raise ValueError(f"{path}: not a readable mesh ({error})") from error
    vertices = torch.from_numpy(np.array(loaded.vertices, np.float32))
    faces = torch.from_numpy(np.array(loaded.faces, np.int32))
    normals = None
    if "vertex_normals" in loaded._cache.cache:
        normals = torch.from_numpy(np.array(loaded.vertex_normals, np.float32))
    colors = uv = uv_faces = texture = None
    visual = loaded.visual
    vertex_colors = visual.vertex_colors if visual.kind == "vertex" else visual.vertex_attributes.get("color")
    if vertex_colors is not None:
        colors = torch.from_numpy(np.array(vertex_colors[:, :3], np.float32)) / 255
        if path.suffix.lower() == ".glb":
            colors = _to_srgb(colors)
    if visual.kind == "texture" and visual.uv is not None:
        uv, uv_faces = torch.from_numpy(np.array(visual.uv, np.float32)), faces.clone()
        image = getattr(visual.material, "baseColorTexture", None) or getattr(visual.material, "image", None)
        if image is not None:
            texture = torch.from_numpy(np.array(image.convert("RGB"), np.float32)) / 255
    if uv is not None:
        joined, rows = np.unique(vertices.numpy(), axis=0, return_inverse=True)
        rows = rows.reshape(-1)
        first = np.full(len(joined), len(rows))
        np.minimum.at(first, rows, np.arange(len(rows)))
        vertices, faces = torch.from_numpy(joined), torch.from_numpy(rows.astype(np.int32))[faces.long()]
        normals = None if normals is None else normals[torch.from_numpy(first)]
    return Mesh(vertices, faces, normals, colors, uv, uv_faces, texture)


def _split_at_seams(mesh: Mesh) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Vertex and atlas row of each exported vertex, and the faces: a vertex is repeated for each atlas row it has."""
    if mesh.uv is None:
        rows = torch.arange(len(mesh.vertices))
        return rows, rows, mesh.faces.cpu().long()
    keys = mesh.faces.cpu().long() * len(mesh.uv) + mesh.uv_faces.cpu().long()
    unique, faces = torch.unique(keys, return_inverse=True)
    return unique // len(mesh.uv), unique % len(mesh.uv), faces


def _to_trimesh(mesh: Mesh, linear_colors: bool):
    import trimesh
    from PIL import Image

    mesh = mesh.to("cpu")
    vertex, row, faces = _split_at_seams(mesh)
    visual = None
    if mesh.texture is not None and mesh.uv is not None:
        image = Image.fromarray(to_bytes(mesh.texture))
        material = trimesh.visual.material.PBRMaterial(name="albedo", baseColorTexture=image, roughnessFactor=1.0,
                                                       metallicFactor=0.0)
        visual = trimesh.visual.TextureVisuals(uv=mesh.uv[row].numpy(), material=material)
    elif mesh.colors is not None:
        colors = _to_linear(mesh.colors) if linear_colors else mesh.colors
        visual = trimesh.visual.ColorVisuals(vertex_colors=to_bytes(colors[vertex]))
    return trimesh.Trimesh(
        vertices=mesh.vertices[vertex].numpy(), faces=faces.numpy(), visual=visual, process=False,
        vertex_normals=None if mesh.normals is None else mesh.normals[vertex].numpy(),
    )  # fmt: skip


def _matte(tree: dict) -> None:
    """Give primitives without a material a matte one: glTF's default is metal. Name the maker."""
    tree["asset"]["generator"] = "text3d-fast"
    bare = [p for m in tree.get("meshes", []) for p in m["primitives"] if "material" not in p]
    if bare:
        materials = tree.setdefault("materials", [])
        materials.append({"name": "matte", "pbrMetallicRoughness": {"metallicFactor": 0.0, "roughnessFactor": 1.0}})
        for primitive in bare:
            primitive["material"] = len(materials) - 1


def _write_obj(path: Path, mesh: Mesh) -> list[Path]:
    mesh = mesh.to("cpu")
    textured = mesh.texture is not None and mesh.uv is not None
    written = []
    lines = io.StringIO()
    if textured:
        from PIL import Image

        image, material = path.with_suffix(".png"), path.with_suffix(".mtl")
        with atomic_path(image) as temporary:
            Image.fromarray(to_bytes(mesh.texture)).save(temporary)
        write_bytes(material, f"newmtl albedo\nKa 0 0 0\nKd 1 1 1\nKs 0 0 0\nmap_Kd {image.name}\n".encode())
        written += [image, material]
        lines.write(f"mtllib {material.name}\n")
    points = mesh.vertices if mesh.colors is None or textured else torch.cat([mesh.vertices, mesh.colors], 1)
    np.savetxt(lines, points.numpy(), "v" + " %.7g" * points.shape[1])
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


def _to_linear(color: torch.Tensor) -> torch.Tensor:
    """glTF's vertex colours are linear, its textures sRGB."""
    return torch.where(color <= 0.04045, color / 12.92, ((color + 0.055) / 1.055) ** 2.4)


def _to_srgb(color: torch.Tensor) -> torch.Tensor:
    return torch.where(color <= 0.0031308, color * 12.92, 1.055 * color.clamp(min=1e-8) ** (1 / 2.4) - 0.055)
