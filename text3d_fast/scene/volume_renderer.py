"""Volume rendering of a radiance field: march through occupied space, ask the field, composite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from text3d_fast import ops
from text3d_fast.nn import OccupancyGrid
from text3d_fast.scene.cameras import Cameras
from text3d_fast.scene.field import RadianceField
from text3d_fast.scene.lights import Lights
from text3d_fast.scene.regularizers import orientation_loss
from text3d_fast.scene.shading import shade


@dataclass
class Rendering:
    """Images [B, H, W, ...] of one batch.

    color           [.., 3] shaded, over the background
    opacity         [..]
    depth           [..] mean distance along the ray, 0 where nothing was met
    depth_variance  [..]
    normals         [.., 3] mean normal of the volume (not unit), None if the shading needed none
    orientation     scalar, `regularizers.orientation_loss`, None without normals
    samples         how many samples lie on the rays
    overflow        bool [], with a capacity: whether samples were dropped for want of room
    """

    color: Tensor
    opacity: Tensor
    depth: Tensor
    depth_variance: Tensor
    normals: Tensor | None
    orientation: Tensor | None
    samples: int
    overflow: Tensor | None = None


class VolumeRenderer:
    """Renders a field inside the ball of `radius` around the origin, which the occupancy grid thins out.

    step      length between samples; the grid's cells should not be much smaller
    capacity  None: as many samples as there are; an int: room for so many (`ops.march_rays`), so that shapes do not
              depend on data and a rendering can be captured in a CUDA graph
    """

    def __init__(self, occupancy: OccupancyGrid, step: float, radius: float = 1.0, early_stop: float = 1e-3,
                 capacity: int | None = None):
        self.occupancy, self.step, self.radius, self.early_stop = occupancy, step, radius, early_stop
        self.capacity = capacity

    def __call__(
        self,
        field: RadianceField,
        cameras: Cameras,
        background: Tensor,
        lights: Lights | None = None,
        mode: str = "albedo",
        normals: str | None = None,
        jitter: Tensor | None = None,
    ) -> Rendering:
        """background: [B, 3], or [B, H, W, 3]. lights: one for each camera, needed unless mode is "albedo".
        normals: "analytic" or "finite" to get them with "albedo" too; lit modes default to "analytic".
        jitter: [B, H, W] in 0..1, by how much of a step the samples of each ray are moved along it; None: 0.
        """
        if mode != "albedo":
            normals = normals or "analytic"
            if lights is None:
                raise ValueError(f"lights: expected one for each camera with mode {mode!r}, got None")
        shape = (len(cameras), cameras.height, cameras.width)
        origins, directions = (part.detach().reshape(-1, 3) for part in cameras.rays())
        samples = self.march(origins, directions, None if jitter is None else jitter.reshape(-1))
        fused = (type(field) is RadianceField and field.grid.compute_dtype in (None, torch.float32)
                 and normals != "finite" and ops.renders_fused(origins.device))
        render = self._render_fused if fused else self._render_by_parts
        values, opacity, depth, variance, orientation = render(field, origins, directions, samples, lights, mode,
                                                               normals)
        if background.ndim == 2:
            background = background[:, None, None, :].expand(*shape, 3)
        opacity = opacity.reshape(shape)
        images = values.reshape(*shape, -1)
        color = images[..., :3] + (1 - opacity[..., None]) * background
        return Rendering(color, opacity, depth.reshape(shape), variance.reshape(shape),
                         images[..., 3:] if normals is not None else None, orientation, samples.num_samples,
                         samples.overflow)

    def _render_fused(self, field, origins, directions, samples, lights, mode, normals) -> tuple:
        if mode != "albedo":
            lights = ops.PointLights(lights.position, lights.diffuse, lights.ambient)
        *images, orientation = ops.render_field(
            origins, directions, field.grid.params, field.weights, samples, field.spec, mode=mode,
            lights=lights if mode != "albedo" else None, normals=normals is not None,
            active_levels=field.active_levels, early_stop=self.early_stop)
        return *images, None if orientation is None else orientation.sum() / max(len(origins), 1)

    def _render_by_parts(self, field, origins, directions, samples, lights, mode, normals) -> tuple:
        positions, rows = samples.positions(origins, directions), samples.ray_ids.long()
        point = field(positions, normals)
        view = None
        if lights is not None and len(lights) > 1:
            view = samples.ray_ids // (len(origins) // len(lights))
        values = shade(point.albedo, point.normals, positions, lights, view, mode)
        if normals is not None:
            values = torch.cat([values, point.normals], -1)
        out = ops.composite(point.density, values, samples, early_stop=self.early_stop)
        orientation = None
        if normals is not None:
            orientation = orientation_loss(out.weights, point.normals, directions[rows], len(origins))
        return *out[:4], orientation

    @torch.no_grad()
    def march(self, origins: Tensor, directions: Tensor, jitter: Tensor | None) -> ops.RaySamples:
        """Samples inside the ball."""
        middle = -(origins * directions).sum(-1)
        half = (self.radius**2 - origins.square().sum(-1) + middle.square()).clamp_min(0).sqrt()
        near, far = (middle - half).clamp_min(0), (middle + half).clamp_min(0)
        return ops.march_rays(origins, directions, self.occupancy, near=near, far=far, step=self.step,
                              jitter=None if jitter is None else jitter.to(origins.device),
                              capacity=self.capacity)

    def visible_density(self, field: RadianceField) -> Callable[[Tensor], Tensor]:
        """The density as rays meet it, points [N, 3] -> [N]: none outside the ball or in cells that are skipped."""
        box, cells = self.occupancy.aabb, self.occupancy.binaries[0]
        size = torch.tensor(cells.shape, device=box.device)

        def density(points: Tensor) -> Tensor:
            where = ((points - box[:3]) / (box[3:] - box[:3]) * size).long().clamp_min(0)
            x, y, z = torch.minimum(where, size - 1).unbind(-1)
            seen = cells[x, y, z] & (points.norm(dim=-1) <= self.radius)
            return torch.where(seen, field.density_at(points), 0.0)

        return density

    def update(
        self, field: RadianceField, step: int, generator: torch.Generator | None = None, keep_all: bool = False,
        **options,
    ) -> bool:
        """Refresh the occupancy grid (see `nn.OccupancyGrid.update`); `keep_all`: nothing in the ball is pruned."""

        def opacity_of_a_sample(points: Tensor) -> Tensor:
            inside = points.norm(dim=-1) <= self.radius + 2 * self.step
            seen = torch.ones(len(points), device=points.device) if keep_all else field.density_at(points) * self.step
            return torch.where(inside, seen, 0.0)

        return self.occupancy.update(step, opacity_of_a_sample, generator, **options)
