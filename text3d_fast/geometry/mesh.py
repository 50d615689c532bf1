"""A triangle mesh with what an export needs: normals, vertex colours, a UV atlas and a texture."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from text3d_fast.geometry.normals import vertex_normals


@dataclass(eq=False)
class Mesh:
    """Right-handed, Y up, front towards +Z; faces counter-clockwise seen from outside.

    vertices: float [V, 3]
    faces: int [F, 3]
    normals: float [V, 3], unit length, or None
    colors: float [V, 3] in [0, 1], or None
    uv: float [U, 2] in [0, 1], v upwards, or None; corners of faces have their own rows, given by uv_faces, so that
        seams of the atlas do not cut the surface
    uv_faces: int [F, 3] rows of uv, or None
    texture: float [H, W, 3] in [0, 1], row 0 at the top (v = 1), or None
    normal_map: float [H, W, 3], normals in the frame of `tangents`, from -1..1 to [0, 1], or None
    Colours are those of the picture (sRGB), unlit.
    """

    vertices: torch.Tensor
    faces: torch.Tensor
    normals: torch.Tensor | None = None
    colors: torch.Tensor | None = None
    uv: torch.Tensor | None = None
    uv_faces: torch.Tensor | None = None
    texture: torch.Tensor | None = None
    normal_map: torch.Tensor | None = None

    def __post_init__(self) -> None:
        for name, columns in (("vertices", 3), ("faces", 3), ("normals", 3), ("colors", 3), ("uv", 2), ("uv_faces", 3)):
            value = getattr(self, name)
            if value is None:
                continue
            if value.dim() != 2 or value.shape[1] != columns:
                raise ValueError(f"{name}: expected shape [n, {columns}], got {list(value.shape)}")
        for name, like in (("normals", "vertices"), ("colors", "vertices"), ("uv_faces", "faces")):
            value, other = getattr(self, name), getattr(self, like)
            if value is not None and len(value) != len(other):
                raise ValueError(f"{name}: expected {len(other)} rows like {like}, got {len(value)}")
        if (self.uv is None) != (self.uv_faces is None):
            raise ValueError("uv, uv_faces: expected both or neither")

    def __repr__(self) -> str:
        names = ("normals", "colors", "uv", "texture", "normal_map")
        extras = [name for name in names if getattr(self, name) is not None]
        return f"Mesh(vertices={len(self.vertices)}, faces={len(self.faces)}{''.join(', ' + e for e in extras)})"

    def save(self, path: str | Path) -> None:
        """Write it as GLB, OBJ, PLY or STL, by the name's end; see `geometry.write_mesh`."""
        from text3d_fast.geometry.io import write_mesh

        write_mesh(path, self)

    def to(self, device: torch.device | str) -> "Mesh":
        moved = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Mesh(**{name: x if x is None else x.to(device) for name, x in moved.items()})

    def corners(self) -> torch.Tensor:
        """[F, 3, 3]: the positions of each face's three corners."""
        return self.vertices[self.faces.long()]

    def area_vectors(self) -> torch.Tensor:
        """[F, 3]: each face's normal times its area."""
        a, b, c = self.corners().unbind(1)
        return torch.linalg.cross(b - a, c - a) / 2

    def area(self) -> float:
        return float(self.area_vectors().norm(dim=-1).sum())

    def volume(self) -> float:
        """The enclosed volume of a closed mesh; negative where faces look inwards."""
        a, b, c = self.corners().double().unbind(1)
        return float((torch.linalg.cross(a, b) * c).sum() / 6)

    def with_normals(self) -> "Mesh":
        """The same with smooth normals, weighted by angles; see `vertex_normals`."""
        return dataclasses.replace(self, normals=vertex_normals(self.vertices, self.faces))

    def tangents(self) -> torch.Tensor:
        """[U, 4]: for each row of the atlas the unit direction of growing u, at right angles to the vertex normal, and
        the sign (1 or -1) for which sign * cross(normal, tangent) is that of growing v, as glTF's TANGENT.

        The mean of the faces around, weighted by area; some perpendicular where the atlas has none.
        """
        if self.uv is None or self.normals is None:
            raise ValueError("mesh: expected one with an atlas and normals (call unwrap and with_normals first)")
        rows = self.uv_faces.long()
        positions, places = self.corners().double(), self.uv[rows].double()
        edge, other = positions[:, 1] - positions[:, 0], positions[:, 2] - positions[:, 0]
        (u1, v1), (u2, v2) = (places[:, 1] - places[:, 0]).unbind(1), (places[:, 2] - places[:, 0]).unbind(1)
        turn = torch.sign(u1 * v2 - u2 * v1)
        along = (edge * v2[:, None] - other * v1[:, None]) * turn[:, None]
        area = self.area_vectors().double().norm(dim=1, keepdim=True)
        along = torch.nn.functional.normalize(along, dim=1, eps=1e-300) * area
        total = along.new_zeros(len(self.uv), 4)
        normal = along.new_zeros(len(self.uv), 3)
        for corner in range(3):
            total.index_add_(0, rows[:, corner], torch.cat([along, (turn * area[:, 0])[:, None]], 1))
            normal[rows[:, corner]] = self.normals[self.faces[:, corner].long()].double()
        tangent = _perpendicular(total[:, :3], normal)
        lost = tangent.norm(dim=1, keepdim=True) < 0.5
        axis = torch.nn.functional.one_hot(normal.abs().argmin(1), 3).to(normal)  # never parallel to the normal
        tangent = torch.where(lost, _perpendicular(axis, normal), tangent)
        return torch.cat([tangent, torch.where(total[:, 3:] < 0, -1.0, 1.0)], 1).to(self.vertices.dtype)

    def edges(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Unique edges [E, 2] (smaller, larger), and how many faces meet at each [E]."""
        pairs = torch.cat([self.faces[:, [0, 1]], self.faces[:, [1, 2]], self.faces[:, [2, 0]]]).long()
        stride = max(len(self.vertices), 1)
        keys, counts = torch.unique(pairs.amin(-1) * stride + pairs.amax(-1), return_counts=True)
        return torch.stack([keys // stride, keys % stride], -1), counts

    def euler_characteristic(self) -> int:
        """V - E + F over the vertices in use: 2 for each ball, 0 for each torus."""
        edges, _ = self.edges()
        return len(self.faces.unique()) - len(edges) + len(self.faces)

    def is_closed(self) -> bool:
        """Whether every edge belongs to exactly two faces."""
        return bool((self.edges()[1] == 2).all())

    def is_watertight(self) -> bool:
        """Whether each edge belongs to exactly two faces that run along it in opposite directions."""
        pairs = torch.cat([self.faces[:, [0, 1]], self.faces[:, [1, 2]], self.faces[:, [2, 0]]]).long()
        stride = max(len(self.vertices), 1)
        keys, counts = torch.unique(pairs[:, 0] * stride + pairs[:, 1], return_counts=True)
        opposite = torch.sort(keys % stride * stride + torch.div(keys, stride, rounding_mode="floor")).values
        return bool((counts == 1).all()) and torch.equal(keys, opposite)

    def components(self) -> torch.Tensor:
        """int64 [F]: the connected component of each face, numbered from 0 in the order of their first faces."""
        labels = torch.arange(len(self.vertices), device=self.vertices.device)
        faces = self.faces.long()
        while True:  # each vertex takes the least label around it, then follows it: O(log n) rounds in practice
            least = labels[faces].amin(1)
            spread = labels.clone()
            for corner in range(3):
                spread.scatter_reduce_(0, faces[:, corner], least, "amin")
            spread = spread[spread]
            if torch.equal(spread, labels):
                break
            labels = spread
        of_face = labels[faces[:, 0]]
        names, inverse = torch.unique(of_face, return_inverse=True)
        first = torch.full((len(names),), len(faces), device=faces.device)
        first.scatter_reduce_(0, inverse, torch.arange(len(faces), device=faces.device), "amin")
        rank = torch.empty_like(first)
        rank[first.argsort()] = torch.arange(len(names), device=faces.device)
        return rank[inverse]

    def select_faces(self, keep: torch.Tensor) -> "Mesh":
        """The faces where bool keep [F] holds, without the vertices that nothing uses any more."""

        def compact(faces, *tables):
            used, rows = torch.unique(faces.long(), return_inverse=True)
            return rows.to(faces.dtype), *(None if t is None else t[used] for t in tables)

        faces, vertices, normals, colors = compact(self.faces[keep], self.vertices, self.normals, self.colors)
        uv, uv_faces = self.uv, self.uv_faces
        if uv_faces is not None:
            uv_faces, uv = compact(uv_faces[keep], uv)
        return Mesh(vertices, faces, normals, colors, uv, uv_faces, self.texture, self.normal_map)


def _perpendicular(vector: torch.Tensor, normal: torch.Tensor) -> torch.Tensor:
    vector = torch.nn.functional.normalize(vector, dim=1, eps=1e-300)
    vector = vector - (vector * normal).sum(1, keepdim=True) * normal
    length = vector.norm(dim=1, keepdim=True)
    return torch.where(length > 1e-6, vector / length.clamp(min=1e-6), torch.zeros_like(vector))
