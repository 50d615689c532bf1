"""Tetrahedral grids for marching tetrahedra: Kuhn's subdivision of a cube lattice, the A15 lattice, or any tets."""

import itertools

import numpy as np
import torch

from text3d_fast.ops.checks import require_same_device, require_tensor
from text3d_fast.ops.typed import typed

# The corners of a tet's six edges. Part of the public order: edge ids of a triangle refer to it.
TET_EDGES = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))

# One period of the A15 lattice, in quarters of the cell's side; neighbours are 2, sqrt(5) or sqrt(6) apart.
_A15_SITES = ((0, 0, 2), (2, 2, 0), (0, 1, 0), (0, 3, 0), (2, 0, 1), (2, 0, 3), (1, 2, 2), (3, 2, 2))
_A15_SQUARED_EDGES = (4, 5, 6)


class TetGrid:
    """A conforming tetrahedral mesh and the connectivity that `marching_tets` needs.

    Build one with `TetGrid.kuhn`, `.a15` or `.from_tets`. Connectivity is computed when first asked for; the Kuhn grid
    never needs it, as its tets are implied by the resolution.

    kind: "kuhn", "a15" or "tets"
    resolution: cells along (x, y, z) of a Kuhn grid, otherwise None
    positions: float32 [V, 3], vertices at rest; in [-1, 1]^3 for the built-in grids
    tets: int32 [T, 4]; the built-in grids order each tet's corners a, b, c, d so that
        ((b - a) x (c - a)) . (d - a) < 0, which makes extracted faces counter-clockwise seen from outside
    edges: int32 [E, 2], unique, each (smaller, larger), in lexicographic order
    tet_edges: int32 [T, 6], rows of `edges`, in the order 01, 02, 03, 12, 13, 23
    """

    def __init__(
        self,
        kind: str,
        positions: torch.Tensor,
        resolution: tuple[int, int, int] | None = None,
        tets: torch.Tensor | None = None,
    ):
        self.kind = kind
        self.positions = positions
        self.resolution = resolution
        self._known: dict[str, torch.Tensor] = {} if tets is None else {"tets": tets}

    @classmethod
    @typed
    def kuhn(cls, resolution: int | tuple[int, int, int], device: torch.device | str | None = None) -> "TetGrid":
        """Six tets a cube around its main diagonal (Freudenthal 1942, Kuhn 1960).

        resolution: cells along each axis, one number or three. Positions are (resolution + 1)^3 points of [-1, 1]^3 in
        C order of (x, y, z). Raises ValueError for a resolution below 1 or more than 2^31 - 1 triangles at worst.
        """
        cells = (resolution,) * 3 if isinstance(resolution, int) else tuple(resolution)
        if min(cells) < 1:
            raise ValueError(f"resolution: expected a positive int or three of them, got {resolution!r}")
        if 12 * cells[0] * cells[1] * cells[2] >= 2**31:
            raise ValueError(f"resolution: {cells} may give more triangles than int32 counts; at most 563^3 cells")
        axes = [torch.linspace(-1, 1, n + 1, dtype=torch.float32, device=device) for n in cells]
        positions = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
        return cls("kuhn", positions, cells)

    @classmethod
    @typed
    def a15(cls, resolution: int, device: torch.device | str | None = None) -> "TetGrid":
        """The A15 lattice, whose tets are nearly regular (the interior of the Quartet grids that nvdiffrec ships).

        resolution: a multiple of 4; the shortest edge is 2 * 2 / resolution, a cell of 46 tets has side 8 / resolution.
        At its faces the box [-1, 1]^3 cuts the lattice exactly at the middle of edges that cross it, so that the grid
        fills the box and every tet is whole or half. Vertices are in lexicographic order of (x, y, z).
        """
        if resolution < 4 or resolution % 4:
            raise ValueError(f"resolution: expected a positive multiple of 4, got {resolution!r}")
        positions, tets = _a15(resolution)
        device = torch.get_default_device() if device is None else device
        return cls("a15", torch.from_numpy(positions).to(device), None, torch.from_numpy(tets).to(device))

    @classmethod
    @typed
    def from_tets(cls, positions: torch.Tensor, tets: torch.Tensor) -> "TetGrid":
        """Any conforming tets.

        positions: float [V, 3]; tets: int32 or int64 [T, 4], rows of positions. The order of a tet's corners decides
        the winding: faces are counter-clockwise from outside where ((b - a) x (c - a)) . (d - a) < 0, as in kaolin.
        Raises ValueError for an index out of range.
        """
        require_tensor("positions", positions, ("vertices", 3))
        require_tensor("tets", tets, ("tets", 4), torch.int32, torch.int64)
        require_same_device(positions=positions, tets=tets)
        known = tets.numel() > 0 and tets.device.type != "meta"
        if known and (int(tets.min()) < 0 or int(tets.max()) >= positions.shape[0]):
            raise ValueError(f"tets: expected indices in [0, {positions.shape[0]}), got {int(tets.min())} to "
                             f"{int(tets.max())}")
        return cls("tets", positions.detach().float(), None, tets.int().contiguous())

    def to(self, device: torch.device | str) -> "TetGrid":
        """This grid on another device; connectivity known so far moves along."""
        moved = TetGrid(self.kind, self.positions.to(device), self.resolution)
        moved._known = {name: tensor.to(device) for name, tensor in self._known.items()}
        return moved

    @property
    def num_vertices(self) -> int:
        return self.positions.shape[0]

    @property
    def device(self) -> torch.device:
        return self.positions.device

    def __repr__(self) -> str:
        size = "" if self.resolution is None else f", resolution={self.resolution}"
        return f"TetGrid({self.kind!r}, vertices={self.num_vertices}{size})"

    def _get(self, *names: str) -> tuple[torch.Tensor, ...]:
        """Connectivity by name, made when first asked for. (cached_property takes locks that torch.compile refuses.)"""
        if any(name not in self._known for name in names):
            if self.device.type == "meta" and names != ("tets",):
                raise ValueError(f"tets: expected values to find the grid's {names[0]} from, got tensors on meta; ask "
                                 "for them on another device first, then .to('meta')")
            self._known.update(_MAKERS[names[0]](self))
        return tuple(self._known[name] for name in names)

    @property
    def tets(self) -> torch.Tensor:
        return self._get("tets")[0]

    @property
    def edges(self) -> torch.Tensor:
        return self._get("edges")[0]

    @property
    def tet_edges(self) -> torch.Tensor:
        return self._get("tet_edges")[0]

    @property
    def incidence(self) -> tuple[torch.Tensor, ...]:
        """The edges at each vertex v, all int32: low_offsets [V + 1], high_offsets [V + 1], high_edges [E].

        v is the smaller end of edges low_offsets[v] to low_offsets[v + 1], and the larger end of those listed in
        high_edges from high_offsets[v] to high_offsets[v + 1].
        """
        return self._get("low_offsets", "high_offsets", "high_edges")

    @typed
    def crossing_edges(self, sdf: torch.Tensor) -> torch.Tensor:
        """int32 [N, 2]: the edges (smaller, larger vertex) on which `marching_tets` puts its vertices, in its order."""
        inside = sdf > 0
        if self.kind == "kuhn":
            return _kuhn_crossing_edges(inside, self.resolution)
        low, high = self.edges.long().unbind(-1)
        return self.edges[inside[low] != inside[high]]


def _make_kuhn_tets(grid: TetGrid) -> dict[str, torch.Tensor]:
    _, ny, nz = grid.resolution
    strides = torch.tensor([(ny + 1) * (nz + 1), nz + 1, 1], dtype=torch.int32, device=grid.device)
    x, y, z = (torch.arange(n, dtype=torch.int32, device=grid.device) for n in grid.resolution)
    base = (x[:, None, None] * strides[0] + y[:, None] * strides[1] + z).reshape(-1, 1, 1)
    corners = torch.tensor(KUHN_TETS, device=grid.device)  # bits 4, 2, 1: a step along x, y, z
    steps = torch.stack([corners >> 2 & 1, corners >> 1 & 1, corners & 1], -1)
    steps = (steps * strides).sum(-1, dtype=torch.int32)
    return {"tets": (base + steps).reshape(-1, 4)}


def _make_edges(grid: TetGrid) -> dict[str, torch.Tensor]:
    return _make_kuhn_edges(grid) if grid.kind == "kuhn" else _make_tet_edges(grid)


def _make_kuhn_edges(grid: TetGrid) -> dict[str, torch.Tensor]:
    """Each vertex has an edge to the corner at every other corner of the cube above it, where there is one."""
    size = [n + 1 for n in grid.resolution]
    strides = (size[1] * size[2], size[2], 1)
    corners = list(itertools.product((0, 1), repeat=3))[1:]  # ascending steps: lexicographic
    exists = torch.ones(*size, 7, dtype=torch.bool, device=grid.device)
    for i, corner in enumerate(corners):
        for axis, step in enumerate(corner):
            if step:
                exists.select(axis, size[axis] - 1)[..., i] = False
    low, corner = exists.view(-1, 7).nonzero().int().unbind(-1)
    steps = torch.tensor([sum(c * s for c, s in zip(corner, strides)) for corner in corners], dtype=torch.int32,
                         device=grid.device)
    return {"edges": torch.stack([low, low + steps[corner.long()]], -1)}


def _kuhn_crossing_edges(inside: torch.Tensor, resolution: tuple[int, int, int]) -> torch.Tensor:
    """As `TetGrid.crossing_edges`, by comparing the lattice with itself one step on: no list of all edges."""
    size = [n + 1 for n in resolution]
    found = []
    for rank, corner in enumerate(list(itertools.product((0, 1), repeat=3))[1:]):
        step = (corner[0] * size[1] + corner[1]) * size[2] + corner[2]
        low = (inside[:-step] != inside[step:]).nonzero()[:, 0]
        place = (low // (size[1] * size[2]), low // size[2] % size[1], low % size[2])
        # neighbours that wrap round into the next row are none
        exists = torch.stack([at + along < n for at, along, n in zip(place, corner, size)]).all(0)
        low = low[exists]
        found.append(torch.stack([low, low + step, low * 7 + rank], -1))
    edges = torch.cat(found)
    return edges[edges[:, 2].argsort(), :2].int()


def _make_tet_edges(grid: TetGrid) -> dict[str, torch.Tensor]:
    pairs = grid.tets[:, TET_EDGES].long()
    stride = max(grid.num_vertices, 1)
    unique, rows = torch.unique(pairs.amin(-1) * stride + pairs.amax(-1), return_inverse=True)
    return {"edges": torch.stack([unique // stride, unique % stride], -1).int(), "tet_edges": rows.int()}


def _make_incidence(grid: TetGrid) -> dict[str, torch.Tensor]:
    def offsets(ends: torch.Tensor) -> torch.Tensor:
        counts = torch.bincount(ends, minlength=grid.num_vertices)
        return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()

    low, high = grid.edges.unbind(-1)
    high_edges = torch.argsort(high, stable=True).int()
    return {"low_offsets": offsets(low), "high_offsets": offsets(high), "high_edges": high_edges}


_MAKERS = {
    "tets": _make_kuhn_tets,
    "edges": _make_edges,
    "tet_edges": _make_tet_edges,
    "low_offsets": _make_incidence,
}


def _kuhn_tets() -> tuple[tuple[int, int, int, int], ...]:
    """The six tets of a cube as corner numbers 4x + 2y + z: one for each order of stepping along the axes."""
    tets = []
    for order in itertools.permutations((4, 2, 1)):
        path = [0, order[0], order[0] + order[1], 7]
        even = order in ((4, 2, 1), (2, 1, 4), (1, 4, 2))  # even permutations give ((b-a) x (c-a)) . (d-a) > 0
        tets.append((path[0], path[2], path[1], path[3]) if even else tuple(path))
    return tuple(tets)


KUHN_TETS = _kuhn_tets()


def _a15_cell() -> np.ndarray:
    """int [46, 4, 3]: the tets of one period, each in the cell of its least coordinates, negatively oriented.

    They are the sets of four sites that are pairwise neighbours.
    """
    shifts = np.array(list(itertools.product((-1, 0, 1), repeat=3))) * 4
    points = (shifts[:, None] + np.array(_A15_SITES)).reshape(-1, 3)
    near = np.isin(((points[:, None] - points) ** 2).sum(-1), _A15_SQUARED_EDGES)
    centre = range(13 * len(_A15_SITES), 14 * len(_A15_SITES))
    found = set()
    for a in centre:
        for b, c, d in itertools.combinations(np.flatnonzero(near[a]), 3):
            if near[b, c] and near[b, d] and near[c, d]:
                tet = points[[a, b, c, d]]
                found.add(tuple(sorted(map(tuple, (tet - tet.min(0) // 4 * 4).tolist()))))
    tets = np.array(sorted(found))
    positive = np.linalg.det(tets[:, 1:] - tets[:, :1]) > 0
    tets[positive] = tets[positive][:, [0, 2, 1, 3]]
    return tets


def _a15(resolution: int) -> tuple[np.ndarray, np.ndarray]:
    """positions float32 [V, 3] and tets int32 [T, 4] of the A15 lattice in [-1, 1]^3.

    Only edges between the two sites of a pair, parallel to an axis, cross a plane at a multiple of 2, and they do so at
    their middle: moving what lies beyond the box onto its face therefore cuts the tets exactly.
    """
    cell = _a15_cell()
    cells = range(-1, resolution // 4 + 1)
    yz = np.stack(np.meshgrid(cells, cells, indexing="ij"), -1).reshape(-1, 2) * 4
    kept = []
    stride = resolution + 1
    for x in cells:
        origins = np.concatenate([np.full((len(yz), 1), 4 * x), yz], 1)
        points = np.clip((origins[:, None, None] + cell).reshape(-1, 4, 3), 0, resolution).astype(np.int32)
        a, b, c = (points[:, i] - points[:, 0] for i in (1, 2, 3))
        points = points[(np.cross(a, b) * c).sum(-1) != 0]
        kept.append((points[..., 0] * stride + points[..., 1]) * stride + points[..., 2])
    keys = np.concatenate(kept)
    used = np.zeros(stride**3, bool)
    used[keys] = True
    ids = np.cumsum(used, dtype=np.int32) - 1
    sites = np.stack(np.unravel_index(np.flatnonzero(used), (stride,) * 3), -1)
    return (sites * (2 / resolution) - 1).astype(np.float32), ids[keys]
