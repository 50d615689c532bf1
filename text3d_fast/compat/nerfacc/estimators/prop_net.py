"""Sampling where proposal networks expect something (mip-NeRF 360, Barron et al. 2022)."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from text3d_fast.compat.nerfacc.data_specs import RayIntervals
from text3d_fast.compat.nerfacc.estimators.base import AbstractEstimator
from text3d_fast.compat.nerfacc.pdf import importance_sampling, searchsorted
from text3d_fast.compat.nerfacc.volrend import render_transmittance_from_density


class PropNetEstimator(AbstractEstimator):
    """Rays are sampled anew from what each proposal network says of the samples before.

    optimizer, scheduler: of the proposal networks; stepped by update_every_n_steps.
    """

    def __init__(self, optimizer: torch.optim.Optimizer | None = None, scheduler=None) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.prop_cache: list = []

    @torch.no_grad()
    def sampling(
        self,
        prop_sigma_fns: list[Callable],
        prop_samples: list[int],
        num_samples: int,
        n_rays: int,
        near_plane: float,
        far_plane: float,
        sampling_type: Literal["uniform", "lindisp"] = "lindisp",
        stratified: bool = False,
        requires_grad: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """-> t_starts, t_ends [n_rays, num_samples].

        prop_sigma_fns: (t_starts, t_ends) -> densities, all [n_rays, prop_samples[i]], the coarsest first.
        sampling_type: spaced evenly in distance or in its inverse. requires_grad: keep what the networks said for
        compute_loss and update_every_n_steps.
        """
        if len(prop_sigma_fns) != len(prop_samples):
            raise ValueError(f"prop_samples: expected {len(prop_sigma_fns)} numbers, got {len(prop_samples)}")
        cdfs = torch.tensor([0.0, 1.0], device=self.device).expand(n_rays, 2).contiguous()
        intervals = RayIntervals(vals=cdfs)
        for sigma_fn, samples in zip(prop_sigma_fns, prop_samples):
            intervals, _ = importance_sampling(intervals, cdfs, samples, stratified)
            t_vals = _transform_stot(sampling_type, intervals.vals, near_plane, far_plane)
            t_starts, t_ends = t_vals[..., :-1], t_vals[..., 1:]
            with torch.set_grad_enabled(requires_grad):
                sigmas = sigma_fn(t_starts, t_ends)
                if sigmas.shape != t_starts.shape:
                    raise ValueError(f"prop_sigma_fns: expected a result of shape {list(t_starts.shape)}, got "
                                     f"{list(sigmas.shape)}")
                trans, _ = render_transmittance_from_density(t_starts, t_ends, sigmas)
                cdfs = _cdf(trans)
                if requires_grad:
                    self.prop_cache.append((intervals, cdfs))
        intervals, _ = importance_sampling(intervals, cdfs, num_samples, stratified)
        t_vals = _transform_stot(sampling_type, intervals.vals, near_plane, far_plane)
        if requires_grad:
            self.prop_cache.append((intervals, None))
        return t_vals[..., :-1], t_vals[..., 1:]

    @torch.enable_grad()
    def compute_loss(self, trans: Tensor, loss_scaler: float = 1.0) -> Tensor:
        """How far the proposals fall short of the final transmittance trans [n_rays, samples]; empties the cache."""
        if not self.prop_cache:
            return torch.zeros((), device=self.device)
        intervals, _ = self.prop_cache.pop()
        cdfs = _cdf(trans).detach()
        loss = torch.zeros((), device=self.device)
        while self.prop_cache:
            loss = loss + _pdf_loss(intervals, cdfs, *self.prop_cache.pop()).mean()
        return loss * loss_scaler

    @torch.enable_grad()
    def update_every_n_steps(self, trans: Tensor, requires_grad: bool = False, loss_scaler: float = 1.0) -> float:
        """With requires_grad a step of the optimizer, and the loss; a step of the scheduler in any case."""
        if requires_grad:
            return self._update(trans=trans, loss_scaler=loss_scaler)
        if self.scheduler is not None:
            self.scheduler.step()
        return 0.0

    @torch.enable_grad()
    def _update(self, trans: Tensor, loss_scaler: float = 1.0) -> float:
        if not self.prop_cache:
            raise RuntimeError("nothing to learn from: call sampling with requires_grad before")
        if self.optimizer is None:
            raise RuntimeError("optimizer: expected, to update the proposal networks; got None")
        loss = self.compute_loss(trans, loss_scaler)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        return loss.item()


def get_proposal_requires_grad_fn(target: float = 5.0, num_steps: int = 1000) -> Callable[[int], bool]:
    """step -> whether the proposals learn in it: in every one at first, after num_steps about every `target`-th."""
    since = 0

    def requires_grad(step: int) -> bool:
        nonlocal since
        learns = since > min(step / num_steps, 1.0) * target
        since = 1 if learns else since + 1
        return learns

    return requires_grad


def _cdf(trans: Tensor) -> Tensor:
    return 1.0 - torch.nn.functional.pad(trans, (0, 1))


def _transform_stot(kind: Literal["uniform", "lindisp"], s_vals: Tensor, t_min, t_max) -> Tensor:
    """From [0, 1] to [t_min, t_max], even in t or in 1 / t."""
    if kind == "uniform":
        return s_vals * t_max + (1 - s_vals) * t_min
    if kind == "lindisp":
        return 1 / (s_vals / t_max + (1 - s_vals) / t_min)
    raise ValueError(f"sampling_type: expected 'uniform' or 'lindisp', got {kind!r}")


def _pdf_loss(
    segments_query: RayIntervals, cdfs_query: Tensor, segments_key: RayIntervals, cdfs_key: Tensor, eps: float = 1e-7
) -> Tensor:
    """By how much a query interval's mass exceeds that of the key intervals that overlap it, squared, relative."""
    left, right = searchsorted(segments_key, segments_query)
    if segments_query.vals.dim() > 1:
        mass, left, right = cdfs_query.diff(dim=-1), left[..., :-1], right[..., 1:]
    else:
        is_left, is_right = segments_query.is_left, segments_query.is_right
        mass, left, right = cdfs_query[is_right] - cdfs_query[is_left], left[is_left], right[is_right]
    bound = cdfs_key.gather(-1, right) - cdfs_key.gather(-1, left)
    return (mass - bound).clip(min=0).square() / (mass + eps)


def _outer(t0_starts: Tensor, t0_ends: Tensor, t1_starts: Tensor, t1_ends: Tensor, y1: Tensor) -> Tensor:
    """The sum of y1 over the intervals 1 that overlap each interval 0."""
    below = torch.nn.functional.pad(y1.cumsum(-1), (1, 0))
    first = (torch.searchsorted(t1_starts.contiguous(), t0_starts.contiguous(), right=True) - 1).clamp(min=0)
    last = torch.searchsorted(t1_ends.contiguous(), t0_ends.contiguous(), right=True)
    first, last = (index.clamp(max=y1.shape[-1] - 1) for index in (first, last))
    return below[..., 1:].gather(-1, last) - below[..., :-1].gather(-1, first)


def _lossfun_outer(t: Tensor, w: Tensor, t_env: Tensor, w_env: Tensor) -> Tensor:
    """_pdf_loss from weights; by another road, to check it."""
    bound = _outer(t[..., :-1], t[..., 1:], t_env[..., :-1], t_env[..., 1:], w_env)
    return (w - bound).clip(min=0).square() / (w + torch.finfo(t.dtype).eps)
