"""A surface on a deformable tetrahedral grid with a volumetric texture, and how both come out of a radiance field."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from text3d_fast import ops
from text3d_fast.nn import DeformableTetGrid, HashGrid
from text3d_fast.scene.field import RadianceField

# Beyond so many edges of the grid a distance says no more than on which side a vertex is.
BAND = 4.0
# The cube of the second extraction, beside the object's own: as much room on each side as threestudio gives it.
MARGIN = 1.1


class ColorField(nn.Module):
    """albedo = sigmoid(MLP(hash grid(x))) in the cube [-radius, radius]^3: texture without an atlas.

    spec of dimension 3; hidden: width of the one hidden layer (ReLU).
    """

    def __init__(self, spec: ops.HashGridSpec, hidden: int = 32, radius: float = 1.0):
        super().__init__()
        if spec.dim != 3:
            raise ValueError(f"spec: expected a grid of dimension 3, got {spec.dim}")
        self.radius = radius
        self.grid = HashGrid(spec)
        self.hidden = nn.Linear(spec.output_dim, hidden)
        self.output = nn.Linear(hidden, 3)

    def forward(self, positions: Tensor) -> Tensor:
        """Positions [N, 3] in the world -> albedo [N, 3] in 0..1. Gradients to the parameters and the positions."""
        x = ((positions + self.radius) / (2 * self.radius)).clamp(0, 1)
        return torch.sigmoid(self.output(torch.relu(self.hidden(self.grid(x)))))

    @classmethod
    @torch.no_grad()
    def from_radiance_field(
        cls, field: RadianceField, further_levels: int = 0, generator: torch.Generator | None = None
    ) -> ColorField:
        """The field's albedo, exactly; `further_levels` of the hash grid beyond it start at zero and add detail."""
        spec = field.grid.spec
        finer = ops.HashGridSpec(
            levels=spec.levels + further_levels, features=spec.features, log2_table_size=spec.log2_table_size,
            base_resolution=spec.base_resolution, per_level_scale=spec.per_level_scale, kind=spec.kind,
            interpolation=spec.interpolation, dialect=spec.dialect, align_corners=spec.align_corners,
        )
        color = cls(finer, field.hidden.out_features, field.radius).to(field.grid.params.device)
        color.grid.params.zero_()
        color.grid.params[: spec.num_params] = field.grid.params
        if field.active_levels is not None:  # levels that were never on hold noise
            start = spec.level_offsets[min(field.active_levels, spec.levels)] * spec.features
            color.grid.params[start: spec.num_params] = 0
        inputs = field.hidden.in_features
        drawn = torch.randn(field.hidden.out_features, finer.output_dim - inputs, generator=generator)
        color.hidden.weight.copy_(torch.cat([field.hidden.weight.cpu(), drawn * inputs**-0.5], 1))
        color.hidden.bias.copy_(field.hidden.bias)
        color.output.weight.copy_(field.output.weight[1:])  # row 0 is the density
        color.output.bias.copy_(field.output.bias[1:])
        return color


class TetField(nn.Module):
    """The scene of the fine stages: `tets`, the surface, and `color`, its volumetric texture."""

    def __init__(self, tets: DeformableTetGrid, color: ColorField):
        super().__init__()
        self.tets, self.color = tets, color


@torch.no_grad()
def fit_to_density(
    tets: DeformableTetGrid, density: Callable[[Tensor], Tensor], level: float, chunk: int = 1 << 18
) -> bool:
    """Set the grid's distances to those from the surface density = level, twice: in the cube it fills, then in one
    around what it found there, larger by a tenth (Magic3D converts density minus a constant; threestudio extracts
    again in the object's box). False, and a grid that is outside everywhere, if nothing reaches the level.

    density: points [N, 3] -> [N], not negative. The distance is that of log(density / level) to first order,
    f / |grad f|, cut at a few edges of the grid: right near the surface, and a bounded step away from it elsewhere.
    """
    tets.deformation.zero_()
    _set_distances(tets, density, level, chunk)
    vertices, faces = tets.mesh()
    if not len(faces):
        return False
    low, high = vertices.amin(0), vertices.amax(0)
    tets.place((low + high) / 2, MARGIN * float((high - low).max()) / 2)
    _set_distances(tets, density, level, chunk)
    return bool(len(tets.mesh()[1]))


def _set_distances(tets: DeformableTetGrid, density: Callable[[Tensor], Tensor], level: float, chunk: int) -> None:
    band = BAND * tets.spacing
    step = 0.5 * tets.spacing
    offsets = torch.eye(3, device=tets.sdf.device) * step

    def value(points: Tensor) -> Tensor:
        return torch.log((density(points).reshape(-1) / level).clamp(1e-3, 1e3))

    for rows in torch.arange(len(tets.sdf), device=tets.sdf.device).split(chunk):
        points = tets.rest_positions()[rows]
        f = value(points)
        slope = torch.stack([value(points + o) - value(points - o) for o in offsets], -1).norm(dim=-1) / (2 * step)
        distance = f / slope.clamp(min=1e-6)
        tets.sdf[rows] = torch.where(f == 0, 0.0, torch.minimum(torch.maximum(distance, -band), band))
