"""Sampling where a grid of cells remembers that there is something."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from text3d_fast.compat.nerfacc.estimators.base import AbstractEstimator
from text3d_fast.compat.nerfacc.grid import _enlarge_aabb, march, traverse_grids
from text3d_fast.compat.nerfacc.volrend import render_visibility_from_alpha, render_visibility_from_density


class OccGridEstimator(AbstractEstimator):
    """Nested grids of cells with a decaying maximum of the density (Mueller et al. 2022, appendix E).

    roi_aabb: 6 numbers, minima then maxima: the box of level 0; level i is 2^i times as large about its centre.
    resolution: cells along each axis, one number or three. levels: number of grids.
    Buffers: resolution int32 [3], aabbs [levels, 6], occs [levels * cells], binaries bool [levels, x, y, z]; not in the
    state dict: grid_coords int64 [cells, 3], grid_indices int64 [cells].
    """

    DIM = 3

    def __init__(
        self,
        roi_aabb: Sequence[float] | Tensor,
        resolution: int | Sequence[int] | Tensor = 128,
        levels: int = 1,
        **kwargs,
    ) -> None:
        super().__init__()
        if kwargs:
            raise ValueError(f"unknown arguments {', '.join(kwargs)}; nerfacc 0.4 dropped contraction_type")
        if isinstance(resolution, int):
            resolution = [resolution] * self.DIM
        resolution = torch.as_tensor(resolution, dtype=torch.int32)
        roi_aabb = torch.as_tensor(roi_aabb, dtype=torch.float32)
        if resolution.shape != (self.DIM,):
            raise ValueError(f"resolution: expected one or {self.DIM} ints, got {resolution.tolist()}")
        if roi_aabb.shape != (2 * self.DIM,):
            raise ValueError(f"roi_aabb: expected {2 * self.DIM} numbers, got {roi_aabb.tolist()}")
        size = resolution.tolist()
        self.cells_per_lvl = size[0] * size[1] * size[2]
        self.levels = levels
        self.register_buffer("resolution", resolution)
        self.register_buffer("aabbs", torch.stack([_enlarge_aabb(roi_aabb, 2.0**i) for i in range(levels)]))
        self.register_buffer("occs", torch.zeros(levels * self.cells_per_lvl))
        self.register_buffer("binaries", torch.zeros([levels, *size], dtype=torch.bool))
        coords = torch.stack(torch.meshgrid([torch.arange(n) for n in size], indexing="ij"), -1)
        self.register_buffer("grid_coords", coords.reshape(-1, self.DIM), persistent=False)
        self.register_buffer("grid_indices", torch.arange(self.cells_per_lvl), persistent=False)

    @torch.no_grad()
    def sampling(
        self,
        rays_o: Tensor,
        rays_d: Tensor,
        sigma_fn: Callable | None = None,
        alpha_fn: Callable | None = None,
        near_plane: float = 0.0,
        far_plane: float = 1e10,
        t_min: Tensor | None = None,
        t_max: Tensor | None = None,
        render_step_size: float = 1e-3,
        early_stop_eps: float = 1e-4,
        alpha_thre: float = 0.0,
        stratified: bool = False,
        cone_angle: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """-> ray_indices int64, t_starts, t_ends, packed [samples] and sorted by ray. Not differentiable.

        rays_o, rays_d: [rays, 3]. near_plane, far_plane, and t_min, t_max [rays], bound the middles of the samples.
        sigma_fn, alpha_fn: (t_starts, t_ends, ray_indices) -> densities or opacities [samples]: if given, samples that
            light does not reach (early_stop_eps) or that are thinner than min(alpha_thre, mean of occs) are dropped.
        stratified: the first sample of each ray begins up to a step later, at random. cone_angle: the step grows as
            max(render_step_size, cone_angle * t).
        """
        near = torch.full_like(rays_o[:, 0], near_plane)
        far = torch.full_like(near, far_plane)
        near = near if t_min is None else torch.maximum(near, t_min)
        far = far if t_max is None else torch.minimum(far, t_max)
        if stratified:
            near = near + torch.rand_like(near) * render_step_size
        if render_step_size > 0:
            ray_indices, t_starts, t_ends = march(
                rays_o, rays_d, self.binaries, self.aabbs[0], near, far, render_step_size, cone_angle
            )
        else:
            intervals, samples, _ = traverse_grids(
                rays_o, rays_d, self.binaries, self.aabbs, near, far, render_step_size, cone_angle
            )
            ray_indices = samples.ray_indices
            t_starts, t_ends = intervals.vals[intervals.is_left], intervals.vals[intervals.is_right]

        if (sigma_fn is None and alpha_fn is None) or (alpha_thre <= 0 and early_stop_eps <= 0):
            return ray_indices, t_starts, t_ends
        alpha_thre = min(alpha_thre, self.occs.mean().item()) if alpha_thre > 0 else 0.0
        field, name = (sigma_fn, "sigma_fn") if sigma_fn is not None else (alpha_fn, "alpha_fn")
        seen = field(t_starts, t_ends, ray_indices) if len(t_starts) else t_starts
        if seen.shape != t_starts.shape:
            raise ValueError(f"{name}: expected a result of shape {list(t_starts.shape)}, got {list(seen.shape)}")
        options = {"ray_indices": ray_indices, "n_rays": len(rays_o), "early_stop_eps": early_stop_eps,
                   "alpha_thre": alpha_thre}
        if sigma_fn is not None:
            kept = render_visibility_from_density(t_starts, t_ends, seen, **options)
        else:
            kept = render_visibility_from_alpha(seen, **options)
        return ray_indices[kept], t_starts[kept], t_ends[kept]

    @torch.no_grad()
    def update_every_n_steps(
        self,
        step: int,
        occ_eval_fn: Callable,
        occ_thre: float = 1e-2,
        ema_decay: float = 0.95,
        warmup_steps: int = 256,
        n: int = 16,
    ) -> None:
        """Every n-th step, look at the field again: occs = max(ema_decay * occs, seen) in cells that were looked at.

        occ_eval_fn: positions [points, 3] -> [points, 1] or [points], usually density times step length.
        step < warmup_steps: every cell that is not marked invisible; later a quarter of them at random and as many
        occupied ones. binaries = occs > min(occ_thre, mean of occs). Raises RuntimeError in eval mode.
        """
        if not self.training:
            raise RuntimeError("update_every_n_steps is for training; in eval mode call _update")
        if step % n == 0:
            self._update(step, occ_eval_fn, occ_thre, ema_decay, warmup_steps)

    @torch.no_grad()
    def mark_invisible_cells(
        self, K: Tensor, c2w: Tensor, width: int, height: int, near_plane: float = 0.0, chunk: int = 32**3
    ) -> None:
        """Set occs to -1 in cells that no camera sees, or that lie closer to one than near_plane, and to 0 elsewhere.

        K: [cameras or 1, 3, 3]; c2w: [cameras, 3 or 4, 4], OpenCV axes. chunk: cells looked at together.
        """
        if K.dim() != 3 or K.shape[1:] != (3, 3) or c2w.dim() != 3 or c2w.shape[1:] not in ((3, 4), (4, 4)):
            raise ValueError(f"K, c2w: expected [cameras, 3, 3] and [cameras, 3 or 4, 4], got {list(K.shape)} and "
                             f"{list(c2w.shape)}")
        if K.shape[0] not in (1, c2w.shape[0]):
            raise ValueError(f"K: expected 1 or {c2w.shape[0]} cameras, got {K.shape[0]}")
        w2c = c2w[:, :3, :3].transpose(1, 2)
        origin = w2c @ c2w[:, :3, 3:]
        for level, cells in enumerate(self._get_all_cells()):
            low, high = self.aabbs[level].split(3)
            for part in cells.split(chunk):
                corner = self.grid_coords[part] / (self.resolution - 1)
                points = K @ (w2c @ (low + corner * (high - low)).T - origin)  # [cameras, 3, cells]
                depth = points[:, 2]
                u, v = points[:, 0] / depth, points[:, 1] / depth
                in_image = (depth >= 0) & (u >= 0) & (u < width) & (v >= 0) & (v < height)
                near = (in_image & (depth < near_plane)).any(0)
                seen = (in_image & (depth >= near_plane)).any(0) & ~near
                self.occs[level * self.cells_per_lvl + part] = seen.float() - 1

    @torch.no_grad()
    def _get_all_cells(self) -> list[Tensor]:
        """Of each level, the cells that are not marked invisible."""
        return [self.grid_indices[occs >= 0] for occs in self.occs.view(self.levels, -1)]

    @torch.no_grad()
    def _sample_uniform_and_occupied_cells(self, n: int) -> list[Tensor]:
        """Of each level, n random cells without the invisible ones, and up to n occupied ones."""
        chosen = []
        for occs, binaries in zip(self.occs.view(self.levels, -1), self.binaries):
            uniform = torch.randint(self.cells_per_lvl, (n,), device=self.device)
            occupied = binaries.flatten().nonzero()[:, 0]
            if n < len(occupied):
                occupied = occupied[torch.randint(len(occupied), (n,), device=self.device)]
            chosen.append(torch.cat([uniform[occs[uniform] >= 0], occupied]))
        return chosen

    @torch.no_grad()
    def _update(
        self,
        step: int,
        occ_eval_fn: Callable,
        occ_thre: float = 0.01,
        ema_decay: float = 0.95,
        warmup_steps: int = 256,
    ) -> None:
        if step < warmup_steps:
            chosen = self._get_all_cells()
        else:
            chosen = self._sample_uniform_and_occupied_cells(self.cells_per_lvl // 4)
        for level, cells in enumerate(chosen):
            coords = self.grid_coords[cells]
            inside = (coords + torch.rand_like(coords, dtype=torch.float32)) / self.resolution
            low, high = self.aabbs[level].split(3)
            seen = occ_eval_fn(low + inside * (high - low)).reshape(-1).to(self.occs.dtype)
            # A cell drawn twice keeps the larger value, so the result does not depend on the order.
            largest = torch.full((self.cells_per_lvl,), -torch.inf, device=self.device, dtype=self.occs.dtype)
            largest.scatter_reduce_(0, cells, seen, "amax")
            occs = self.occs.view(self.levels, -1)[level]
            occs.copy_(torch.where(largest > -torch.inf, torch.maximum(occs * ema_decay, largest), occs))
        visible = self.occs >= 0
        mean = torch.where(visible, self.occs, 0).sum() / visible.sum()
        self.binaries = (self.occs > mean.clamp(max=occ_thre)).view(self.binaries.shape)
