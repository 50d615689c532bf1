"""A coarse memory of where the radiance field is not empty."""

import math
from collections.abc import Callable, Sequence

import torch

from text3d_fast.ops.typed import typed


class OccupancyGrid(torch.nn.Module):
    """Nested grids of cells that remember the field's recent largest values (Mueller et al. 2022, appendix E).

    aabb: 6 numbers, the minima of x, y, z, then the maxima: the box of level 0; level i is scaled by 2^i about its
        centre. resolution: cells along each axis, one int or three; the same for every level.
    Buffers, all in the state dict:
        aabb      float32 [6]
        occs      float32 [levels, x, y, z], a decaying maximum of what `update` saw; negative: never occupied
        binaries  bool [levels, x, y, z], what `march_rays` looks at; all true until the first update
    """

    @typed
    def __init__(self, aabb: torch.Tensor | Sequence[float], resolution: int | Sequence[int] = 128, levels: int = 1):
        super().__init__()
        known = not isinstance(aabb, torch.Tensor) or aabb.device.type != "meta"
        numbers = aabb.flatten().tolist() if known and isinstance(aabb, torch.Tensor) else aabb if known else None
        if known and not (len(numbers) == 6 and all(low < high for low, high in zip(numbers[:3], numbers[3:]))):
            raise ValueError(f"aabb: expected 6 numbers, minima then larger maxima, got {numbers}")
        device = aabb.device if isinstance(aabb, torch.Tensor) else None
        box = torch.as_tensor(aabb, dtype=torch.float32, device=device).reshape(6)
        size = (resolution,) * 3 if isinstance(resolution, int) else tuple(resolution)
        if len(size) != 3 or min(size) < 1 or max(size) > 1024:
            raise ValueError(f"resolution: expected one or three ints between 1 and 1024, got {resolution}")
        if not 1 <= levels <= 16:
            raise ValueError(f"levels: expected 1 to 16, got {levels}")
        if levels * math.prod(size) >= 2**32:
            raise ValueError(f"resolution: expected fewer than 2^32 cells, got {levels} levels of {size}")
        self.levels, self.resolution = levels, size
        self.register_buffer("aabb", box.clone())
        self.register_buffer("occs", torch.zeros(levels, *size, dtype=torch.float32, device=device))
        self.register_buffer("binaries", torch.ones(levels, *size, dtype=torch.bool, device=device))

    @property
    def cells_per_level(self) -> int:
        x, y, z = self.resolution
        return x * y * z

    def cell_points(self, level: int, cells: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
        """World positions [N, 3] in the cells with flat indices [N] of a level, at `inside` [N, 3] in [0, 1)."""
        x, y, z = self.resolution
        corner = torch.stack([cells // (y * z), cells // z % y, cells % z], -1) + inside
        unit = torch.stack([corner[:, 0] / x, corner[:, 1] / y, corner[:, 2] / z], -1)
        centre, extent = 0.5 * (self.aabb[:3] + self.aabb[3:]), self.aabb[3:] - self.aabb[:3]
        return centre + (unit - 0.5) * extent * 2.0**level

    @torch.no_grad()
    def update(
        self,
        step: int,
        density_fn: Callable[[torch.Tensor], torch.Tensor],
        generator: torch.Generator | None = None,
        *,
        every: int = 16,
        warmup: int = 256,
        threshold: float = 0.01,
        decay: float = 0.95,
        chunk: int = 2**20,
    ) -> bool:
        """Every `every`-th step, look at the field again. Returns whether this step was one.

        density_fn: positions [N, 3] -> [N] or [N, 1], compared with `threshold`: usually sigma * step length (about
            the opacity of one sample). N is the same on every call after the warm-up, at most `chunk`.
        step < warmup: every cell; later, per level, a quarter of the cells drawn uniformly and a quarter from the
            occupied ones. The field is seen at one random point of each cell (`generator`, on the grid's device).
        occs = max(decay * occs, seen) in the cells that were looked at; binaries = occs > min(threshold, mean(occs)).
        Without host synchronization, and deterministic: a cell drawn twice keeps the larger value. NaN counts as not
        looked at, infinity as the largest finite value seen, at least 1.
        """
        if step % every != 0:
            return False
        for level in range(self.levels):
            cells = self._draw_cells(level, step < warmup, generator)
            inside = torch.rand(len(cells), 3, generator=generator, dtype=self.occs.dtype, device=self.occs.device)
            points = self.cell_points(level, cells, inside)
            seen = torch.cat([density_fn(part).reshape(-1).to(self.occs.dtype) for part in points.split(chunk)])
            if seen.shape != cells.shape:
                raise ValueError(f"density_fn: expected one value for each of {len(cells)} points, got {len(seen)}")
            # Infinity would never decay: it counts as the densest that was seen, at least 1.
            finite = torch.where(seen.isfinite(), seen, 0)
            seen = torch.where(seen == torch.inf, finite.amax().clamp(min=1) if len(seen) else 1.0, seen)
            largest = seen.new_full((self.cells_per_level,), -1.0)
            largest.scatter_reduce_(0, cells, seen.clamp(min=0), "amax")
            old = self.occs[level].view(-1)
            looked_at = (largest >= 0) & (old >= 0)
            old.copy_(torch.where(looked_at, torch.maximum(old * decay, largest), old))
        self.refresh(threshold)
        return True

    @torch.no_grad()
    def refresh(self, threshold: float = 0.01) -> None:
        """Recompute `binaries` from `occs`."""
        known = self.occs >= 0
        mean = torch.where(known, self.occs, 0).sum() / known.sum()
        torch.gt(self.occs, mean.clamp(max=threshold), out=self.binaries)

    def _draw_cells(self, level: int, all_cells: bool, generator: torch.Generator | None) -> torch.Tensor:
        device, count = self.occs.device, self.cells_per_level
        if all_cells:
            return torch.arange(count, device=device)
        quarter = max(count // 4, 1)
        uniform = torch.randint(count, (quarter,), generator=generator, device=device)
        # Occupied cells by rank, without asking the device how many there are: all of them if they fit (the rest
        # of the quarter repeats them), otherwise random ones; if there are none, uniform ones.
        ranks = self.binaries[level].view(-1).cumsum(0, dtype=torch.int32)
        total = ranks[-1]
        fit = torch.arange(quarter, dtype=torch.int32, device=device) % total.clamp(min=1)
        random = (torch.rand(quarter, generator=generator, device=device, dtype=torch.float64) * total).int()
        chosen = torch.searchsorted(ranks, torch.where(total <= quarter, fit, random) + 1)
        fallback = torch.randint(count, (quarter,), generator=generator, device=device)
        return torch.cat([uniform, torch.where(total > 0, chosen, fallback)])
