"""From a density field to a mesh."""

import math
from collections.abc import Callable

import torch

from text3d_fast import ops
from text3d_fast.geometry.mesh import Mesh

# "auto": a layer of a sixteenth of the box's half side is half opaque there. Fields that never get that dense are cut
# at half of what their densest points reach.
_HALF_OPAQUE_LAYER = 1 / 16
_DENSEST_SHARE = 1e-3


@torch.no_grad()
def sample_density(
    density_fn: Callable[[torch.Tensor], torch.Tensor], points: torch.Tensor, chunk: int = 1 << 18
) -> torch.Tensor:
    """density_fn at points [N, 3], `chunk` at a time -> float32 [N]. Raises ValueError for wrong shapes or values."""
    values = []
    for part in points.split(chunk):
        density = density_fn(part)
        if density.shape not in ((len(part),), (len(part), 1)):
            raise ValueError(f"density_fn: expected a tensor of shape [{len(part)}], got {list(density.shape)}")
        values.append(density.reshape(-1).float())
    density = torch.cat(values) if values else points.new_zeros(0)
    if not bool(torch.isfinite(density).all()):
        raise ValueError("density_fn: expected finite densities, got NaN or infinity")
    return density


@torch.no_grad()
def averaged_density(
    density_fn: Callable[[torch.Tensor], torch.Tensor], layer: float, width: float = 0.01, resolution: int = 128,
    device: torch.device | str | None = None,
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A smooth density in [-1, 1]^3: points [N, 3] -> [N], without the pits that rays do not see.

    The field is sampled at resolution^3 cell centres. Averaged, with a Gaussian of standard deviation `width`, is the
    opacity of a layer `layer` thick (the length between samples along a ray): a few very dense points then weigh no
    more than opaque ones. Between cells it is linear. Raises ValueError as `extract_mesh` does.
    """
    axis = (torch.arange(resolution, device=device) + 0.5) * 2 / resolution - 1
    # z slowest: the order in which grid_sample reads a volume at (x, y, z)
    points = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij")[::-1], -1)
    opacity = 1 - torch.exp(-layer * sample_density(density_fn, points.view(-1, 3)))
    opacity = opacity.view(1, 1, resolution, resolution, resolution)
    deviation = width * resolution / 2  # in cells
    reach = max(1, math.ceil(2.5 * deviation))
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=device) / deviation).square())
    kernel /= kernel.sum()
    for shape in ((-1, 1, 1), (1, -1, 1), (1, 1, -1)):
        size = kernel.view(shape).shape
        opacity = torch.nn.functional.conv3d(opacity, kernel.view(1, 1, *size), padding=[n // 2 for n in size])
    density = -torch.log1p(-opacity.clamp(0, 1 - 1e-4)) / layer

    def averaged(points: torch.Tensor) -> torch.Tensor:
        where = points.view(1, 1, 1, -1, 3)
        return torch.nn.functional.grid_sample(density, where, padding_mode="border", align_corners=False).view(-1)

    return averaged


def automatic_threshold(density: torch.Tensor) -> float:
    """A density to cut at, for values [N] on a grid over [-1, 1]^3, in 1 / unit of length."""
    densest = max(1, round(_DENSEST_SHARE * density.numel()))
    reached = float(density.topk(densest).values.mean()) if density.numel() else 0.0
    return min(math.log(2) / _HALF_OPAQUE_LAYER, reached / 2)


@torch.no_grad()
def extract_mesh(
    density_fn: Callable[[torch.Tensor], torch.Tensor],
    resolution: int = 128,
    threshold: float | str = "auto",
    device: torch.device | str | None = None,
    lattice: str = "a15",
    refine: int = 5,
) -> tuple[Mesh, float]:
    """The surface density = threshold in the box [-1, 1]^3 by marching tetrahedra; and the threshold.

    density_fn: points [N, 3] -> density [N] or [N, 1], per unit length, not negative.
    resolution: of the grid. With lattice "a15" (a multiple of 4) neighbours are 4 / resolution apart, with "kuhn"
    2 / resolution; the first has far fewer and rounder triangles at the same detail.
    threshold: a density, or "auto": where a layer 1/16 thick is half opaque (11.1), or half of the field's densest
    0.1 %, whichever is less.
    refine: each vertex lies on an edge of the grid; so many times the part of it that holds the surface is halved by
    evaluating the field there, before interpolating. Fields may rise within a small part of an edge.
    Interpolates the logarithm of density, as fields are the exponential of something smooth. What touches the box is
    closed there. An empty field gives a mesh without faces.
    Raises ValueError for a bad argument, or densities of wrong shape or not finite.
    """
    if lattice not in ("a15", "kuhn"):
        raise ValueError(f"lattice: expected 'a15' or 'kuhn', got {lattice!r}")
    if not (threshold == "auto" or (isinstance(threshold, int | float) and 0 < threshold < math.inf)):
        raise ValueError(f"threshold: expected 'auto' or a positive number, got {threshold!r}")
    grid = ops.TetGrid.a15(resolution, device) if lattice == "a15" else ops.TetGrid.kuhn(resolution, device)
    density = sample_density(density_fn, grid.positions)
    level = automatic_threshold(density) if threshold == "auto" else float(threshold)
    if level <= 0:
        empty = torch.zeros(0, 3, device=grid.device)
        return Mesh(empty, empty.int()), level
    sdf = _log_ratio(density, level)
    boundary = (grid.positions.abs() == 1).any(-1)
    sdf = torch.where(boundary, sdf.clamp(max=-1e-3), sdf)
    vertices, faces = ops.marching_tets(grid.positions, sdf, grid)
    if refine and len(vertices):
        edges = grid.crossing_edges(sdf).long()
        edges = torch.where((sdf[edges[:, 1]] > 0)[:, None], edges, edges.flip(1))
        outside, inside = ((grid.positions[ends], sdf[ends]) for ends in edges.unbind(1))
        vertices = _refine(density_fn, level, outside, inside, refine)
    return Mesh(vertices, faces), level


def _log_ratio(density: torch.Tensor, level: float) -> torch.Tensor:
    """log(density / level), positive inside; beyond 4 the value says nothing about where the surface is."""
    return torch.log((density / level).clamp(math.exp(-4), math.exp(4)))


def _refine(density_fn, level, outside, inside, rounds: int) -> torch.Tensor:
    """Bisect the segments between (points [N, 3], values [N]) outside and inside, then interpolate."""
    for _ in range(rounds):
        middle = (outside[0] + inside[0]) / 2
        value = _log_ratio(sample_density(density_fn, middle), level)
        within = value > 0
        rows = within[:, None]
        inside = torch.where(rows, middle, inside[0]), torch.where(within, value, inside[1])
        outside = torch.where(rows, outside[0], middle), torch.where(within, outside[1], value)
    share = inside[1] / (inside[1] - outside[1])
    return inside[0] + share[:, None] * (outside[0] - inside[0])


@torch.no_grad()
def sample_colors(
    color_fn: Callable[[torch.Tensor], torch.Tensor], points: torch.Tensor, chunk: int = 1 << 18
) -> torch.Tensor:
    """color_fn at points [N, 3] -> [N, 3], clamped to [0, 1]. Raises ValueError for wrong shapes or values."""
    values = []
    for part in points.split(chunk):
        color = color_fn(part)
        if color.shape != (len(part), 3):
            raise ValueError(f"color_fn: expected a tensor of shape [{len(part)}, 3], got {list(color.shape)}")
        values.append(color.float())
    colors = torch.cat(values) if values else points.new_zeros(0, 3)
    if not bool(torch.isfinite(colors).all()):
        raise ValueError("color_fn: expected finite colours, got NaN or infinity")
    return colors.clamp(0, 1)
