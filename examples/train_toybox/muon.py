"""Muon (Jordan et al. 2024): momentum whose steps are made orthogonal; fewer steps than Adam's for the same loss."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

# A quintic that takes singular values in (0, 1] close to 1 within five rounds (Jordan et al. 2024).
_QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalized(matrix: Tensor, rounds: int = 5) -> Tensor:
    """U V^T, roughly, of the matrix U S V^T [m, n], by a Newton-Schulz iteration."""
    a, b, c = _QUINTIC
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(rounds):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Muon(torch.optim.Optimizer):
    """Muon for tensors of at least two dimensions, seen as matrices [first, rest].

    torch.optim.Muon takes plain matrices only, and works in bf16, which many CPUs emulate. Steps are scaled as in Liu
    et al. 2025 (0.2 sqrt(max(m, n))), so that rates suit both this and AdamW.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step from the gradients that are there."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["momentum"] = torch.zeros_like(param)
                average = state["momentum"]
                average.lerp_(param.grad, 1 - group["momentum"])
                ahead = param.grad.lerp(average, group["momentum"]).flatten(1)  # Nesterov's
                scale = 0.2 * math.sqrt(max(ahead.shape))
                param.mul_(1 - group["lr"] * group["weight_decay"])
                param.add_(orthogonalized(ahead).view_as(param), alpha=-group["lr"] * scale)


def optimizers(
    parameters: Iterable[torch.nn.Parameter], ends: set[torch.nn.Parameter], rate: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Muon for the weights of layers; AdamW for biases, norms and `ends`: embeddings, layers next to the image."""
    parameters = list(parameters)
    layers = [p for p in parameters if p.dim() >= 2 and p not in ends]
    chosen = set(layers)
    others = [p for p in parameters if p not in chosen]
    return [
        Muon(layers, rate, weight_decay=weight_decay),
        torch.optim.AdamW(others, rate, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True),
    ]
