"""The radiance field: density and albedo of every point, from a hash grid and a small network."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from text3d_fast import ops
from text3d_fast.nn import HashGrid

DENSITIES = ("softplus", "exp")
NORMALS = ("analytic", "finite")


class FieldSample(NamedTuple):
    """density [N] per unit length, albedo [N, 3] in 0..1, normals [N, 3] unit (zero where flat) or None"""

    density: Tensor
    albedo: Tensor
    normals: Tensor | None


@dataclass
class Blob:
    """What the raw density starts from: a soft ball at the origin, so that the first pictures are not empty.

    profile   "linear"    scale * (1 - |x| / width) (Magic3D: scale 10, width 0.5, before softplus)
              "gaussian"  scale * exp(-|x|^2 / (2 width^2)) (DreamFusion: scale 5, width 0.2, for its exp density)
    """

    scale: float = 10.0
    width: float = 0.5
    profile: str = "linear"

    def __post_init__(self) -> None:
        if self.profile not in ("linear", "gaussian"):
            raise ValueError(f"profile: expected linear or gaussian, got {self.profile!r}")

    def __call__(self, positions: Tensor) -> Tensor:
        if self.profile == "linear":
            return self.scale * (1 - positions.norm(dim=-1) / self.width)
        return self.scale * torch.exp(-positions.square().sum(-1) / (2 * self.width**2))

    def gradient(self, positions: Tensor) -> Tensor:
        """[N, 3], the derivative by position."""
        if self.profile == "linear":
            return -self.scale / self.width * torch.nn.functional.normalize(positions, dim=-1)
        return -self(positions)[:, None] * positions / self.width**2


class RadianceField(nn.Module):
    """raw density, albedo = MLP(hash grid(x)) + blob, in the box [-radius, radius]^3.

    spec       ops.HashGridSpec of dimension 3
    hidden     width of the one hidden layer (ReLU)
    density    "softplus" or "exp", applied to the raw density; raw values are kept below 15 for exp
    sharpness  multiplies the density: units of 1 / length, so that a surface can be opaque within one step
    generator  draws the initial parameters
    """

    def __init__(
        self,
        spec: ops.HashGridSpec,
        hidden: int = 32,
        radius: float = 1.0,
        density: str = "softplus",
        sharpness: float = 1.0,
        blob: Blob | None = None,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        if spec.dim != 3:
            raise ValueError(f"spec: expected a grid of dimension 3, got {spec.dim}")
        if density not in DENSITIES:
            raise ValueError(f"density: expected one of {', '.join(DENSITIES)}, got {density!r}")
        self.radius, self.density, self.sharpness, self.blob = radius, density, sharpness, blob or Blob()
        self.grid = HashGrid(spec)
        self.hidden = nn.Linear(spec.output_dim, hidden)
        self.output = nn.Linear(hidden, 4)
        with torch.no_grad():
            self.grid.params.uniform_(-1e-2, 1e-2, generator=generator)
            for layer in (self.hidden, self.output):
                layer.weight.normal_(0, math.sqrt(2 / layer.in_features), generator=generator)
                layer.bias.zero_()
            self.output.weight.mul_(0.5)

    @property
    def active_levels(self) -> int | None:
        """The grid's: only its first so many levels give output; None: all."""
        return self.grid.active_levels

    @active_levels.setter
    def active_levels(self, levels: int | None) -> None:
        self.grid.active_levels = levels

    @property
    def spec(self) -> ops.FieldSpec:
        """The field as `ops.render_field` takes it, with `grid.params` and `weights`."""
        network = ops.MLPSpec(self.hidden.in_features, 4, self.hidden.out_features)
        return ops.FieldSpec(self.grid.spec, network, self.radius, self.density, self.sharpness, self.blob.profile,
                             self.blob.scale, self.blob.width)

    @property
    def weights(self) -> Tensor:
        """The network's parameters as `ops.mlp` takes them, differentiable."""
        return torch.cat([t.flatten() for layer in (self.hidden, self.output) for t in (layer.weight, layer.bias)])

    def forward(self, positions: Tensor, normals: str | None = None) -> FieldSample:
        """Positions [N, 3] in the world; normals None, "analytic" or "finite" (central differences).

        Everything is differentiable by the parameters once, normals included; none of it by the positions.
        """
        if normals not in (None, *NORMALS):
            raise ValueError(f"normals: expected None or one of {', '.join(NORMALS)}, got {normals!r}")
        raw, albedo, gradient = self._evaluate(positions, normals == "analytic")
        if normals == "finite":
            gradient = self._finite_gradient(positions)
        unit = None if gradient is None else -torch.nn.functional.normalize(gradient, dim=-1, eps=1e-6)
        return FieldSample(self._activate(raw), torch.sigmoid(albedo), unit)

    def density_at(self, positions: Tensor) -> Tensor:
        """[N] density alone."""
        return self._activate(self._evaluate(positions, False)[0])

    def raw_density_gradient(self, positions: Tensor) -> Tensor:
        """[N, 3], d raw / d x: the direction of the density's gradient."""
        return self._evaluate(positions, True)[2]

    def _activate(self, raw: Tensor) -> Tensor:
        if self.density == "softplus":
            return self.sharpness * torch.nn.functional.softplus(raw)
        return self.sharpness * torch.exp(raw.clamp(max=15.0))

    def _evaluate(self, positions: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """raw density [N], raw albedo [N, 3], and d raw density / d x [N, 3] if asked for."""
        x = ((positions + self.radius) / (2 * self.radius)).clamp(0, 1)
        features = self.grid(x)
        if not with_gradient:
            out = ops.mlp(features, self.weights, self.spec.mlp)
            return out[:, 0] + self.blob(positions), out[:, 1:], None
        inner = self.hidden(features)
        out = self.output(torch.relu(inner))
        raw = out[:, 0] + self.blob(positions)
        # The network's twin: d raw / d features by hand, [N, K], then the chain rule through the grid.
        by_feature = ((inner > 0) * self.output.weight[0]) @ self.hidden.weight
        gradient = self.grid.vjp(x, by_feature) / (2 * self.radius)
        return raw, out[:, 1:], gradient + self.blob.gradient(positions)

    def _finite_gradient(self, positions: Tensor, step: float = 0.01) -> Tensor:
        """[N, 3], central differences of the raw density: six evaluations, no second derivative of the grid."""
        offsets = torch.eye(3, dtype=positions.dtype, device=positions.device) * step
        points = positions[:, None, None] + torch.stack([offsets, -offsets])  # [N, 2, 3, 3]
        raw = self._evaluate(points.reshape(-1, 3), False)[0].reshape(-1, 2, 3)
        return (raw[:, 0] - raw[:, 1]) / (2 * step)


def levels_at(progress: float, levels: int, start: int, end: float) -> int:
    """How many levels are on: `start` at progress 0, one more after equal spans, all from progress `end` on."""
    if end <= 0 or progress >= end or start >= levels:
        return levels
    return min(levels, start + math.floor(progress / end * (levels - start)))
