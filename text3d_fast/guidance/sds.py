"""Score distillation sampling (Poole et al., DreamFusion, 2022): a diffusion prior as a gradient on images.

One step draws t and eps, forms x_t = alpha x + sigma eps, and descends along

    g = w(t) (eps_hat(x_t; y, t) - eps),      eps_hat = (1 + s) eps(x_t; y, t) - s eps(x_t; empty, t)

with s the guidance weight (s = 0: the plain conditional model, s = -1: unconditional; other projects' "scale" is s + 1
where they write empty + scale (text - empty)). The sign is the one that lowers the KL divergence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from text3d_fast.guidance.distillation import DistillationLoss, full_precision
from text3d_fast.guidance.prior import Conditions, Prior


class ScoreDistillation(DistillationLoss):
    """The SDS loss of a batch of rendered images. See the module's docstring for the formula.

    jacobian    False: the gradient above. True: the true gradient of w(t) |eps_hat - eps|^2 with respect to x,
                2 w alpha (eps_hat - eps) d eps_hat / d x_t, by backpropagation through the network
    options     of `DistillationLoss`
    """

    def __init__(self, prior: Prior, guidance_weight: Any = 100.0, *args: Any, jacobian: bool = False, **options: Any):
        super().__init__(prior, guidance_weight, *args, **options)
        self.jacobian = jacobian

    def residual(self, x: Tensor, t: Tensor, noise: Tensor, conditions: Conditions, guidance: float) -> Tensor:
        x_t = self.prior.schedule.add_noise(x, noise, t)
        return self.guided(x_t, t, conditions, guidance) - noise

    def gradient(
        self, x: Tensor, t: Tensor, noise: Tensor, conditions: Conditions, progress: float = 0.0
    ) -> tuple[Tensor, Tensor | None]:
        """See DistillationLoss. With `jacobian` the loss reports w |eps_hat - eps|^2 averaged over each image."""
        if not self.jacobian:
            return super().gradient(x, t, noise, conditions, progress)
        with torch.enable_grad():
            # a leaf of its own: the network's graph ends here and is freed before the encoder's runs backward
            leaf = full_precision(x).detach().requires_grad_()
            residual = self.residual(leaf, t, noise.to(leaf), conditions, self.guidance_at(progress))
            value = self.weight_at(t, leaf) * residual.square()
            if not residual.requires_grad:
                raise ValueError(f"jacobian: {type(self.prior).__name__}.predict_noise is not differentiable in x_t")
            (gradient,) = torch.autograd.grad(value.sum(), leaf)
        return gradient, value.detach().flatten(1).mean(1)
