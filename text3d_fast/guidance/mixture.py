"""Gaussian mixtures whose diffused densities, scores and score-distillation gradients are known exactly.

p(x) = sum_k pi_k N(mu_k, s_k^2 I) diffuses to p_t(x_t) = sum_k pi_k N(alpha mu_k, (alpha^2 s_k^2 + sigma^2) I).
As a `Prior` it proves guidance code on a case with nothing learned in it, and drives the 2D playground.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy
import torch
from torch import Tensor

from text3d_fast.guidance.prior import Conditions, Prior
from text3d_fast.guidance.schedule import NoiseSchedule


class GaussianMixture:
    """A mixture of K isotropic Gaussians in D dimensions, diffused by a schedule.

    means [K, D], stds [K], weights [K] (normalized here). Everything is computed in the dtype of the points given.
    """

    def __init__(
        self,
        means: Tensor,
        stds: Tensor | float,
        weights: Tensor | None = None,
        schedule: NoiseSchedule | None = None,
    ):
        means = torch.as_tensor(means, dtype=torch.float64)
        if means.ndim != 2:
            raise ValueError(f"means: expected shape [K, D], got {list(means.shape)}")
        self.means = means
        self.stds = torch.as_tensor(stds, dtype=torch.float64).expand(len(means))
        weights = torch.ones(len(means)) if weights is None else torch.as_tensor(weights)
        if tuple(weights.shape) != (len(means),) or bool((weights < 0).any()) or not bool(weights.sum() > 0):
            raise ValueError(f"weights: expected [{len(means)}] non-negative numbers with a positive sum")
        self.weights = weights.to(torch.float64) / weights.sum()
        self.schedule = schedule or NoiseSchedule.cosine()

    def log_density(self, x_t: Tensor, t: Tensor, log_weights: Tensor | None = None) -> Tensor:
        """log p_t(x_t). x_t [..., D], t [...]; log_weights [..., K] replaces the mixture's own. Returns [...]."""
        return torch.logsumexp(self._log_terms(x_t, t, log_weights)[0], -1)

    def score(self, x_t: Tensor, t: Tensor, log_weights: Tensor | None = None) -> Tensor:
        """The gradient of log p_t at x_t, [..., D]."""
        terms, difference, variance = self._log_terms(x_t, t, log_weights)
        share = torch.softmax(terms, -1)
        return -((share / variance)[..., None] * difference).sum(-2)

    def noise(self, x_t: Tensor, t: Tensor, log_weights: Tensor | None = None) -> Tensor:
        """The exact eps(x_t; t) = -sigma score, [..., D]."""
        return -self.schedule.sigma(t).to(x_t)[..., None] * self.score(x_t, t, log_weights)

    def _log_terms(self, x_t: Tensor, t: Tensor, log_weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        alpha, sigma = (value.to(x_t)[..., None] for value in self.schedule.alpha_sigma(t))
        difference = x_t[..., None, :] - alpha[..., None] * self.means.to(x_t)
        variance = alpha**2 * self.stds.to(x_t) ** 2 + sigma**2
        if log_weights is None:
            log_weights = self.weights.to(x_t).log()
        normalizer = self.means.shape[1] * torch.log(2 * math.pi * variance)
        terms = log_weights - 0.5 * (difference.square().sum(-1) / variance + normalizer)
        return terms, difference, variance

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """[count, D] draws from the undiffused mixture, fp64."""
        which = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.means.shape[1], dtype=torch.float64, generator=generator)
        return self.means[which] + self.stds[which, None] * noise


class MixturePrior(Prior):
    """A Gaussian mixture behind the `Prior` interface: "images" [B, H, W, C] with H W C = D, taken as they are.

    labels: text -> the components it stands for (weights renormalized); "" stands for all of them.
    """

    name, kind = "mixture", "exact"

    def __init__(
        self,
        mixture: GaussianMixture,
        shape: tuple[int, int, int] | None = None,
        labels: Mapping[str, Sequence[int]] | None = None,
    ):
        """shape (C, h, w); (D, 1, 1) by default."""
        self.mixture = mixture
        self.schedule = mixture.schedule
        dimension = mixture.means.shape[1]
        self.shape = tuple(shape) if shape is not None else (dimension, 1, 1)
        if len(self.shape) != 3 or math.prod(self.shape) != dimension:
            raise ValueError(f"shape: expected (C, h, w) with a product of {dimension}, got {self.shape}")
        self.image_size = self.shape[1]
        self._log_weights = {"": mixture.weights.log()}
        for text, components in (labels or {}).items():
            chosen = torch.zeros_like(mixture.weights)
            chosen[list(components)] = mixture.weights[list(components)]
            self._log_weights[text] = (chosen / chosen.sum()).log()

    def encode(self, images: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, C, H, W], no change of range."""
        return images.permute(0, 3, 1, 2)

    def predict_noise(self, x_t: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        unknown = sorted(set(conditions.texts) - set(self._log_weights))
        if unknown:
            raise ValueError(f"texts: expected one of {sorted(self._log_weights)}, got {unknown}")
        names = list(self._log_weights)
        rows = torch.tensor([names.index(text) for text in conditions.texts], device=x_t.device)
        log_weights = torch.stack(list(self._log_weights.values())).to(x_t)[rows]
        return self.mixture.noise(x_t.flatten(1), t, log_weights).reshape(x_t.shape)


def expected_gradient(
    mixture: GaussianMixture,
    x: Tensor,
    weighting: Callable[[Tensor, Tensor], Tensor],
    time_range: tuple[float, float] = (0.02, 0.98),
    nodes: tuple[int, int] = (96, 128),
) -> Tensor:
    """E over t ~ U(time_range) and eps of w(t) (eps(x_t; t) - eps), for one-dimensional x [N], by quadrature in fp64.

    nodes: Gauss-Legendre points in t, Gauss-Hermite points in eps. Returns [N].
    """
    t, t_weight, noise, noise_weight = _nodes(time_range, nodes)
    alpha, sigma = mixture.schedule.alpha_sigma(t)
    x_t = alpha[:, None] * x.double()[:, None, None] + sigma[:, None] * noise
    predicted = mixture.noise(x_t[..., None], t[:, None].expand(x_t.shape))[..., 0]
    inner = (predicted * noise_weight).sum(-1)  # E[eps] = 0
    return (inner * weighting(alpha, sigma) * t_weight).sum(-1)


def expected_divergence(
    mixture: GaussianMixture,
    x: Tensor,
    weighting: Callable[[Tensor, Tensor], Tensor],
    time_range: tuple[float, float] = (0.02, 0.98),
    nodes: tuple[int, int] = (96, 128),
) -> Tensor:
    """E over t of w(t) sigma / alpha KL(N(alpha x, sigma^2) || p_t), one-dimensional x [N], by quadrature in fp64.

    This is the objective that score distillation with weight w(t) descends: its derivative is `expected_gradient`.
    """
    t, t_weight, noise, noise_weight = _nodes(time_range, nodes)
    alpha, sigma = mixture.schedule.alpha_sigma(t)
    x_t = alpha[:, None] * x.double()[:, None, None] + sigma[:, None] * noise
    log_p = mixture.log_density(x_t[..., None], t[:, None].expand(x_t.shape))
    log_q = -0.5 * noise.square() - torch.log(sigma[:, None] * math.sqrt(2 * math.pi))
    divergence = ((log_q - log_p) * noise_weight).sum(-1)
    return (divergence * weighting(alpha, sigma) * sigma / alpha * t_weight).sum(-1)


def _nodes(time_range: tuple[float, float], nodes: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """t, its weights (summing to 1), eps, its weights (summing to 1)."""
    low, high = time_range
    points, weights = (torch.from_numpy(part) for part in numpy.polynomial.legendre.leggauss(nodes[0]))
    noise, noise_weights = (torch.from_numpy(part) for part in numpy.polynomial.hermite_e.hermegauss(nodes[1]))
    return low + (high - low) * (points + 1) / 2, weights / 2, noise, noise_weights / noise_weights.sum()
