"""What files hold, pieces with a material each, made into one `Mesh` with one texture."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field

import numpy as np
import torch

from text3d_fast.geometry.mesh import Mesh

MOST_FACES = 5_000_000
_TEXTURE_SIDE = 4096  # of the one texture that all materials share
_PAD = 4  # texels around each material's own, so that filtering finds no neighbour
_ONE_SRGB = 255


class MeshWarning(UserWarning):
    """Something in a file that is left out of the mesh."""


def note(message: str) -> None:
    warnings.warn(message, MeshWarning, stacklevel=3)


@dataclass(eq=False)
class Material:
    """color: sRGB in [0, 1]; texture, normal_map: uint8 [H, W, 3], row 0 at the top, or None; wrap: of u and v."""

    color: tuple[float, float, float] = (1.0, 1.0, 1.0)
    texture: np.ndarray | None = None
    wrap: tuple[str, str] = ("repeat", "repeat")
    normal_map: np.ndarray | None = None


@dataclass(eq=False)
class Part:
    """Arrays as in `Mesh`, of one material (None: the file names none)."""

    vertices: np.ndarray
    faces: np.ndarray
    normals: np.ndarray | None = None
    colors: np.ndarray | None = None
    uv: np.ndarray | None = None
    uv_faces: np.ndarray | None = None
    material: Material | None = field(default=None)


def to_linear(color):
    """sRGB to linear light: glTF's factors and vertex colours are linear, its textures and our colours sRGB."""
    color = np.asarray(color, np.float64)
    return np.where(color <= 0.04045, color / 12.92, ((np.maximum(color, 0) + 0.055) / 1.055) ** 2.4)


def to_srgb(color):
    color = np.asarray(color, np.float64)
    return np.where(color <= 0.0031308, color * 12.92, 1.055 * np.maximum(color, 1e-8) ** (1 / 2.4) - 0.055)


def placed(part: Part, matrix: np.ndarray) -> Part:
    """The part moved by an affine matrix [4, 4]; a reflection turns its faces, so that they still look outwards."""
    linear = matrix[:3, :3]
    vertices = part.vertices @ linear.T + matrix[:3, 3]
    mirrored = np.linalg.det(linear) < 0
    turn = (lambda f: None if f is None else f[:, ::-1]) if mirrored else (lambda f: f)
    normals = part.normals
    if normals is not None:
        a, b, c = linear.T  # cofactors instead of the inverse: a flat matrix has none
        cofactors = np.stack([np.cross(b, c), np.cross(c, a), np.cross(a, b)], 1) * (-1 if mirrored else 1)
        normals = normals @ cofactors.T
    return Part(vertices, turn(part.faces), normals, part.colors, part.uv, turn(part.uv_faces), part.material)


def assemble(parts: list[Part]) -> Mesh:
    """One mesh of all parts. ValueError if nothing is left to draw.

    Colours: a texture if a part has one or materials differ (each has a place of its own in it), else vertex colours
    if there are any, or if the material has a colour. Faces with coordinates that are no numbers are left out.
    """
    parts = [_sound(part) for part in parts if len(part.faces)]
    if not sum(len(part.faces) for part in parts):
        raise ValueError("it holds no triangles")
    starts = np.cumsum([0] + [len(part.vertices) for part in parts])
    vertices = np.concatenate([part.vertices for part in parts])
    faces = np.concatenate([part.faces + start for part, start in zip(parts, starts)])
    normals = None
    if any(part.normals is not None for part in parts):
        normals = np.concatenate([_unit_normals(part) for part in parts])
    colors = uv = uv_faces = texture = None
    materials = list({id(part.material): part.material or Material() for part in parts}.values())
    if any(part.uv is not None and part.material and part.material.texture is not None for part in parts):
        uv, uv_faces, texture = _textured(parts)
    elif any(part.colors is not None for part in parts):
        colors = np.concatenate([_vertex_colors(part) for part in parts])
    elif len({material.color for material in materials}) > 1:
        uv, uv_faces, texture = _textured(parts)
    elif parts[0].material is not None:
        colors = np.broadcast_to(np.asarray(materials[0].color), vertices.shape)
    elif len(parts) == 1 and parts[0].uv is not None:
        uv, uv_faces = parts[0].uv, parts[0].uv_faces
    if uv is not None:  # colours are the texture's: vertices need not be repeated
        vertices, faces, normals = _joined(vertices, faces, normals)

    def tensor(array, dtype):
        return None if array is None else torch.from_numpy(np.array(array, dtype, order="C"))

    return Mesh(tensor(vertices, np.float32), tensor(faces, np.int32), tensor(normals, np.float32),
                tensor(colors, np.float32), tensor(uv, np.float32), tensor(uv_faces, np.int32),
                tensor(texture, np.float32), tensor(_normal_map(parts), np.float32))


def _normal_map(parts: list[Part]) -> np.ndarray | None:
    """That of a single part whose atlas does not repeat; others are left out."""
    if all(part.material is None or part.material.normal_map is None for part in parts):
        return None
    (part, *others), slack = parts, 1e-6
    if others or part.uv is None or part.normals is None or part.uv.min() < -slack or part.uv.max() > 1 + slack:
        note("normal maps of several parts, of repeated ones, or without normals and texture coordinates are left out")
        return None
    return part.material.normal_map.astype(np.float32) / _ONE_SRGB


def _sound(part: Part) -> Part:
    """Without faces that have a corner at no finite place, and what is wrong in normals, colours and uv mended."""
    for name, faces, rows in (("face", part.faces, len(part.vertices)),
                              ("texture coordinate", part.uv_faces, 0 if part.uv is None else len(part.uv))):
        if faces is not None and (faces.min() < 0 or faces.max() >= rows):
            raise ValueError(f"a {name} index is out of range: {faces.min()} to {faces.max()} of {rows}")
    with np.errstate(over="ignore", invalid="ignore"):
        finite = np.isfinite(part.vertices.astype(np.float32)).all(1)
    keep = finite[part.faces].all(1)
    if not keep.all():
        note(f"{(~keep).sum()} of {len(keep)} faces have a corner whose coordinates are not finite; they are left out")
    normals, colors, uv, uv_faces = part.normals, part.colors, part.uv, part.uv_faces
    if normals is not None and not np.isfinite(normals).all():
        normals = None
    if colors is not None:
        colors = np.clip(np.nan_to_num(colors), 0, 1)
    if uv is not None and not np.isfinite(uv).all():
        note("some texture coordinates are not finite; they are taken as 0")
        uv = np.nan_to_num(uv, nan=0.0, posinf=0.0, neginf=0.0)
    vertices = np.where(finite[:, None], part.vertices, 0)
    return Part(vertices, part.faces[keep], normals, colors, uv, None if uv_faces is None else uv_faces[keep],
                part.material)


def _unit_normals(part: Part) -> np.ndarray:
    if part.normals is None:
        vertices = part.vertices.astype(np.float64)
        vertices = vertices / max(np.abs(vertices).max(), 1e-300)
        mesh = Mesh(torch.from_numpy(vertices), torch.from_numpy(np.ascontiguousarray(part.faces)))
        return mesh.with_normals().normals.numpy()
    normals = part.normals.astype(np.float64)
    normals = normals / np.maximum(np.abs(normals).max(1, keepdims=True), 1e-300)
    return normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-20)


def _vertex_colors(part: Part) -> np.ndarray:
    color = np.asarray((part.material or Material()).color)
    if part.colors is None:
        return np.broadcast_to(color, part.vertices.shape)
    return part.colors if (color == 1).all() else to_srgb(to_linear(part.colors) * to_linear(color))


def _joined(vertices: np.ndarray, faces: np.ndarray, normals: np.ndarray | None):
    """Vertices that a format had to repeat at seams, once: those of equal position and normal."""
    keys = (vertices if normals is None else np.concatenate([vertices, normals], 1)).astype(np.float32) + 0.0
    joined, rows = np.unique(keys, axis=0, return_inverse=True)
    return joined[:, :3], rows.reshape(-1)[faces], None if normals is None else joined[:, 3:]


def _textured(parts: list[Part]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """uv, uv_faces of all faces in a row, and the texture that holds all materials."""
    tiles, owner, places = {}, [], []
    columns = math.ceil(math.sqrt(len({id(part.material) for part in parts})))
    room, left = _TEXTURE_SIDE // columns, 2 * _TEXTURE_SIDE**2
    for part in parts:
        material = part.material or Material()
        if material.texture is None or part.uv is None:
            color = np.asarray(material.color)
            if part.colors is not None:
                note("vertex colours of a part beside textured ones are replaced by their mean")
                color = _vertex_colors(part)[part.faces].mean((0, 1))
            key, tile = tuple(color), np.broadcast_to(color, (1, 1, 3))
            places.append((np.full((1, 2), 0.5), np.zeros(part.faces.shape, np.int64)))
        else:
            if part.colors is not None and np.ptp(part.colors) + abs(1 - part.colors.max()) > 1e-3:
                note("vertex colours over a texture are left out")
            tile, uv, uv_faces = _unwrapped(material, part.uv, part.uv_faces)
            key = id(part.material), tile.shape  # as often repeated
            if key not in tiles:
                tile = _reduced(tile, room)
                left -= tile.shape[0] * tile.shape[1]
                if left < 0:
                    raise ValueError("its textures together are larger than can be drawn; reduce them first")
            places.append((uv, uv_faces))
        owner.append(key)
        tiles.setdefault(key, tile)
    if len(parts) == 1:
        return *places[0], tiles[owner[0]]
    names = {key: number for number, key in enumerate(tiles)}
    return _packed(list(tiles.values()), [names[key] for key in owner], places)


def _tinted(material: Material) -> np.ndarray:
    texture = material.texture.astype(np.float32) / _ONE_SRGB
    if material.color == (1.0, 1.0, 1.0):
        return texture
    levels = np.arange(256) / 255
    table = np.stack([to_srgb(to_linear(levels) * to_linear(c)) for c in material.color], 1).astype(np.float32)
    return np.stack([table[material.texture[..., k], k] for k in range(3)], -1)


def _unwrapped(material: Material, uv: np.ndarray, uv_faces: np.ndarray):
    """Texture and uv in [0, 1] that show what repeated or mirrored ones would: the texture is laid out as often as
    the widest face needs it."""
    texture = _tinted(material)
    corners = uv[uv_faces].astype(np.float64)
    if corners.min() >= -1e-6 and corners.max() <= 1 + 1e-6:
        return texture, np.clip(uv, 0, 1), uv_faces
    for axis, mode in enumerate(material.wrap):
        along = 1 - axis  # of the picture: u goes with columns
        if mode == "clamp":
            corners[..., axis] = corners[..., axis].clip(0, 1)
            continue
        if mode == "mirror":
            texture = np.concatenate([texture, np.flip(texture, along)], along)
            if along == 0:
                texture = np.flip(texture, 0)  # v goes upwards: the mirrored one lies above
            corners[..., axis] /= 2
        corners[..., axis] -= np.floor(corners[..., axis].min(1, keepdims=True) + 1e-6)
        count = max(1, math.ceil(corners[..., axis].max() - 1e-6))
        if count > _TEXTURE_SIDE // 2:
            note("a texture is repeated thousands of times across a face; its mean colour is drawn")
            texture, count = texture.mean(along, keepdims=True), 1
            corners[..., axis] = 0.5
        elif count * texture.shape[along] > _TEXTURE_SIDE:
            size = list(texture.shape[1::-1])
            size[axis] = max(1, _TEXTURE_SIDE // count)
            texture = _resized(texture, size)
        corners[..., axis] /= count
        texture = np.concatenate([texture] * count, along)
    return texture, corners.reshape(-1, 2), np.arange(corners.shape[0] * 3).reshape(-1, 3)


def _resized(texture: np.ndarray, size: list[int]) -> np.ndarray:
    from PIL import Image

    image = Image.fromarray((np.clip(texture, 0, 1) * 255).round().astype(np.uint8))
    return np.asarray(image.resize(tuple(size), Image.Resampling.BOX), np.float32) / 255


def _reduced(texture: np.ndarray, room: int) -> np.ndarray:
    """The texture, no side of it longer than `room`."""
    if max(texture.shape[:2]) <= room:
        return texture
    return _resized(texture, [min(texture.shape[1], room), min(texture.shape[0], room)])


def _packed(tiles: list[np.ndarray], owner: list[int], places: list[tuple]):
    """Each tile in a cell of a square of cells; owner: the tile of each part."""
    columns = math.ceil(math.sqrt(len(tiles)))
    cell = min(max(max(tile.shape[:2]) for tile in tiles) + 2 * _PAD, _TEXTURE_SIDE // columns)
    if cell <= 2 * _PAD:
        raise ValueError(f"it has {len(tiles)} materials, more than can be drawn")
    texture = np.zeros((cell * columns, cell * columns, 3), np.float32)
    boxes = []
    for i, tile in enumerate(tiles):
        tile = _reduced(tile, cell - 2 * _PAD)
        height, width = tile.shape[:2]
        top, left = i // columns * cell, i % columns * cell
        padded = np.pad(tile, ((_PAD, cell - height - _PAD), (_PAD, cell - width - _PAD), (0, 0)), "edge")
        texture[top : top + cell, left : left + cell] = padded
        boxes.append((left + _PAD, top + _PAD, width, height))
    rows, corners, start = [], [], 0
    for which, (uv, uv_faces) in zip(owner, places):
        left, top, width, height = boxes[which]
        u = (left + uv[:, 0] * width) / texture.shape[1]
        v = 1 - (top + (1 - uv[:, 1]) * height) / texture.shape[0]
        rows.append(np.stack([u, v], 1))
        corners.append(uv_faces + start)
        start += len(uv)
    return np.concatenate(rows), np.concatenate(corners), texture
