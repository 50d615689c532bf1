"""The forward diffusion x_t = alpha(t) x + sigma(t) eps, over a continuous t in [0, 1].

alpha^2 + sigma^2 = 1 throughout (variance preserving). The conversions between the three things a network may
predict (the noise eps, the velocity v = alpha eps - sigma x, the clean image x) are here too.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
_LARGEST_LOG_RATIO = 15.0  # |log(alpha / sigma)|: keeps a zero-terminal-SNR schedule finite


class NoiseSchedule:
    """alpha(t) and sigma(t) for t in [0, 1]; t = 0 is the clean image, t = 1 is (almost) pure noise.

    Build one with `NoiseSchedule.cosine()`, `.from_alphas_cumprod(abar)` or `.from_scheduler(diffusers_scheduler)`.
    A discrete schedule of N steps puts step k at t = k / (N - 1), is exact there, and interpolates linearly in
    log(alpha / sigma) in between.
    """

    def __init__(self, log_ratio: Tensor | None = None):
        """log_ratio [N]: log(alpha / sigma) at each step, non-increasing; None is the continuous cosine schedule."""
        if log_ratio is not None:
            if log_ratio.ndim != 1 or log_ratio.numel() < 2:
                raise ValueError(f"log_ratio: expected shape [N] with N >= 2, got {tuple(log_ratio.shape)}")
            if not bool(torch.isfinite(log_ratio).all()) or bool((log_ratio[1:] > log_ratio[:-1]).any()):
                raise ValueError("log_ratio: expected finite, non-increasing values (noise grows with the step)")
            log_ratio = log_ratio.detach().to("cpu", torch.float64)
        self._log_ratio = log_ratio
        self._on_device: dict[torch.device, Tensor] = {}

    @classmethod
    def cosine(cls) -> NoiseSchedule:
        """alpha = cos(pi t / 2), sigma = sin(pi t / 2), continuous."""
        return cls(None)

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Tensor) -> NoiseSchedule:
        """alphas_cumprod [N]: abar_k = alpha_k^2 of DDPM, decreasing, in [0, 1]."""
        abar = torch.as_tensor(alphas_cumprod).detach().to("cpu", torch.float64)
        if abar.ndim != 1 or bool((abar < 0).any()) or bool((abar > 1).any()):
            raise ValueError("alphas_cumprod: expected a vector of values in [0, 1]")
        log_ratio = 0.5 * (torch.log(abar) - torch.log1p(-abar))
        return cls(log_ratio.clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO))

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> NoiseSchedule:
        """The training schedule of a diffusers scheduler (anything that has `alphas_cumprod`)."""
        abar = getattr(scheduler, "alphas_cumprod", None)
        if abar is None:
            raise ValueError(
                f"scheduler: expected one with alphas_cumprod (a variance-preserving DDPM schedule), "
                f"got {type(scheduler).__name__}"
            )
        return cls.from_alphas_cumprod(abar)

    @property
    def num_steps(self) -> int | None:
        """Number of discrete steps, None if continuous."""
        return None if self._log_ratio is None else self._log_ratio.numel()

    def _table(self, device: torch.device) -> Tensor:
        table = self._on_device.get(device)
        if table is None:
            table = self._on_device[device] = self._log_ratio.to(device)
        return table

    def log_ratio(self, t: Tensor) -> Tensor:
        """log(alpha(t) / sigma(t)), half the log signal-to-noise ratio, in fp64."""
        t = t.to(torch.float64)
        if self._log_ratio is None:
            angle = t * (math.pi / 2)
            ratio = torch.log(torch.cos(angle)) - torch.log(torch.sin(angle))
            return ratio.nan_to_num(-_LARGEST_LOG_RATIO).clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)
        table = self._table(t.device)
        last = table.numel() - 1
        position = (t * last).clamp(0, last)
        low = position.floor().long().clamp(max=last - 1)
        # exact at the steps, which an fp32 t misses by a rounding
        fraction = position - low
        fraction = torch.where((fraction - fraction.round()).abs() < 1e-4, fraction.round(), fraction)
        return torch.lerp(table[low], table[low + 1], fraction)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha(t), sigma(t), of t's shape and dtype (fp32 if t is half precision)."""
        dtype = t.dtype if t.dtype in (torch.float32, torch.float64) else torch.float32
        if self._log_ratio is None:
            angle = t.to(torch.float64) * (math.pi / 2)
            return torch.cos(angle).clamp(min=0).to(dtype), torch.sin(angle).clamp(min=0).to(dtype)
        double = 2 * self.log_ratio(t)
        return torch.sigmoid(double).sqrt().to(dtype), torch.sigmoid(-double).sqrt().to(dtype)

    def alpha(self, t: Tensor) -> Tensor:
        return self.alpha_sigma(t)[0]

    def sigma(self, t: Tensor) -> Tensor:
        return self.alpha_sigma(t)[1]

    def timestep(self, t: Tensor) -> Tensor:
        """What the network is given: the nearest discrete step (int64), or 1000 t if the schedule is continuous."""
        if self._log_ratio is None:
            return t * 1000
        last = self._log_ratio.numel() - 1
        return (t.to(torch.float64) * last).round().clamp(0, last).long()

    def from_timestep(self, timestep: Tensor) -> Tensor:
        """The inverse of `timestep`: t in [0, 1], fp32."""
        last = 1000 if self._log_ratio is None else self._log_ratio.numel() - 1
        return timestep.to(torch.float32) / last

    def snap(self, t: Tensor) -> Tensor:
        """t moved to the nearest step the network was trained on (unchanged if the schedule is continuous)."""
        if self._log_ratio is None:
            return t
        last = self._log_ratio.numel() - 1
        return ((t.to(torch.float64) * last).round().clamp(0, last) / last).to(t.dtype)

    def add_noise(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha x + sigma eps. x, noise [B, ...], t [B]."""
        alpha, sigma = self._like(x, t)
        return alpha * x + sigma * noise

    def target(self, x: Tensor, noise: Tensor, t: Tensor, kind: str) -> Tensor:
        """What a network of `kind` is trained to predict from x_t = alpha x + sigma eps. x, noise [B, ...], t [B]."""
        if kind == "epsilon":
            return noise
        if kind == "sample":
            return x
        if kind == "v_prediction":
            alpha, sigma = self._like(x, t)
            return alpha * noise - sigma * x
        raise _unknown_kind(kind)

    def to_noise(self, prediction: Tensor, x_t: Tensor, t: Tensor, kind: str) -> Tensor:
        """eps from a prediction of `kind` ("epsilon", "v_prediction" or "sample"). prediction, x_t [B, ...], t [B]."""
        if kind == "epsilon":
            return prediction
        alpha, sigma = self._like(x_t, t)
        if kind == "v_prediction":
            return alpha * prediction + sigma * x_t
        if kind == "sample":
            return (x_t - alpha * prediction) / sigma.clamp(min=1e-6)
        raise _unknown_kind(kind)

    def to_sample(self, prediction: Tensor, x_t: Tensor, t: Tensor, kind: str) -> Tensor:
        """x (the clean image) from a prediction of `kind`."""
        if kind == "sample":
            return prediction
        alpha, sigma = self._like(x_t, t)
        if kind == "v_prediction":
            return alpha * x_t - sigma * prediction
        if kind == "epsilon":
            return (x_t - sigma * prediction) / alpha.clamp(min=1e-6)
        raise _unknown_kind(kind)

    def to_velocity(self, prediction: Tensor, x_t: Tensor, t: Tensor, kind: str) -> Tensor:
        """v = alpha eps - sigma x from a prediction of `kind`."""
        if kind == "v_prediction":
            return prediction
        alpha, sigma = self._like(x_t, t)
        return alpha * self.to_noise(prediction, x_t, t, kind) - sigma * self.to_sample(prediction, x_t, t, kind)

    def _like(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha, sigma shaped [B, 1, ...] for x, in x's dtype."""
        shape = (-1,) + (1,) * (x.ndim - 1)
        alpha, sigma = self.alpha_sigma(t)
        return alpha.reshape(shape).to(x), sigma.reshape(shape).to(x)


def _unknown_kind(kind: str) -> ValueError:
    return ValueError(f"kind: expected one of {', '.join(PREDICTION_TYPES)}, got {kind!r}")
