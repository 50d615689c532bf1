"""A tetrahedral grid whose signed distances and vertices are learned."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from text3d_fast import ops
from text3d_fast.ops.typed import typed

LATTICES = ("a15", "kuhn")


class DeformableTetGrid(torch.nn.Module):
    """A surface as signed distances and offsets on a tetrahedral grid (DMTet, Shen et al. 2021, section 3.1).

    resolution: of ops.TetGrid.a15 (a multiple of 4) or ops.TetGrid.kuhn, 64 to 256 in practice; lattice: "a15" has
        rounder tets, "kuhn" needs no stored connectivity.
    centre, half_side: of the cube that the grid fills, in the world.
    Parameters, zero at first:
        sdf          float32 [V], in world units, positive inside; what touches the cube is outside whatever it says
        deformation  float32 [V, 3]; a vertex is moved by tanh of it times half of the shortest edge along each axis
    Buffers: centre [3], half_side scalar; boundary bool [V], the vertices on the cube's faces (not saved).
    """

    @typed
    def __init__(
        self,
        resolution: int = 128,
        lattice: str = "a15",
        centre: Sequence[float] | torch.Tensor = (0.0, 0.0, 0.0),
        half_side: float = 1.0,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        if lattice not in LATTICES:
            raise ValueError(f"lattice: expected one of {', '.join(LATTICES)}, got {lattice!r}")
        self.lattice, self.resolution = lattice, resolution
        self.grid = getattr(ops.TetGrid, lattice)(resolution, device)
        self.register_buffer("centre", torch.zeros(3, dtype=torch.float32, device=device))
        self.register_buffer("half_side", torch.ones((), dtype=torch.float32, device=device))
        self.register_buffer("boundary", (self.grid.positions.abs() == 1).any(-1), persistent=False)
        self.sdf = torch.nn.Parameter(self.grid.positions.new_zeros(self.grid.num_vertices))
        self.deformation = torch.nn.Parameter(self.grid.positions.new_zeros(self.grid.num_vertices, 3))
        self.place(centre, half_side)

    @torch.no_grad()
    def place(self, centre: Sequence[float] | torch.Tensor, half_side: float) -> None:
        """Fill another cube; distances and offsets stay as they are. ValueError unless half_side is positive."""
        if not half_side > 0:
            raise ValueError(f"half_side: expected a positive length, got {half_side}")
        self.centre.copy_(torch.as_tensor(centre, dtype=torch.float32, device=self.centre.device))
        self.half_side.fill_(half_side)

    @property
    def spacing(self) -> torch.Tensor:
        """The shortest edge at rest, in the world; a scalar tensor."""
        return self.half_side * ((4.0 if self.lattice == "a15" else 2.0) / self.resolution)

    def rest_positions(self) -> torch.Tensor:
        """[V, 3] in the world, without the offsets."""
        return torch.addcmul(self.centre, self.half_side, self.grid.positions)

    def positions(self) -> torch.Tensor:
        """[V, 3] in the world, where the vertices are."""
        return torch.addcmul(self.rest_positions(), 0.5 * self.spacing, torch.tanh(self.deformation))

    def distances(self) -> torch.Tensor:
        """[V]: sdf, below zero on the cube's faces, so that the surface is closed."""
        return torch.where(self.boundary, torch.minimum(self.sdf, -1e-3 * self.spacing), self.sdf)

    def mesh(self) -> tuple[torch.Tensor, torch.Tensor]:
        """vertices [N, 3] in the world and faces int32 [M, 3], closed and counter-clockwise from outside.

        Differentiable in both parameters. No faces at all where every distance has one sign: nothing is raised, the
        caller decides what a vanished surface means.
        """
        return ops.marching_tets(self.positions(), self.distances(), self.grid)

    def crossing_edges(self) -> torch.Tensor:
        """int32 [N, 2]: the grid's edges that the surface crosses, in the order of the mesh's vertices."""
        with torch.no_grad():
            return self.grid.crossing_edges(self.distances())

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], *args: Any, **kwargs: Any) -> "DeformableTetGrid":
        module = super()._apply(fn, *args, **kwargs)
        if self.grid.device != self.sdf.device:
            self.grid = self.grid.to(self.sdf.device)
        return module

    def extra_repr(self) -> str:
        return f"{self.lattice}, resolution={self.resolution}, vertices={self.grid.num_vertices}"
