"""Score distillation on a two-dimensional Gaussian mixture, where everything is known: run it and look at the picture.

    python examples/sds_playground.py [--out docs/images/sds_playground.png]

Left and middle: paths of points that descend the SDS gradient over the density they should find. All noise levels
average the modes; low ones find them. Right: the objective E[w sigma/alpha KL] along the way, falling for the
gradient w (eps_theta - eps) and rising for the opposite sign.
"""

import argparse
import math

import torch

from text3d_fast.guidance import WEIGHTINGS, Conditions, GaussianMixture, MixturePrior, ScoreDistillation
from text3d_fast.guidance.mixture import expected_divergence

STEPS, DRAWS = 150, 64


def ring_of_modes() -> GaussianMixture:
    angles = torch.arange(5) * (2 * math.pi / 5) + math.pi / 2
    return GaussianMixture(2.2 * torch.stack([angles.cos(), angles.sin()], 1), 0.35, torch.tensor([2.0, 1, 1, 1, 1]))


def descend(mixture: GaussianMixture, points: torch.Tensor, time_range: tuple, sign: float = 1.0) -> torch.Tensor:
    """Paths [STEPS + 1, N, D] of N points under Adam, each step averaging DRAWS samples of (t, eps)."""
    sds = ScoreDistillation(MixturePrior(mixture), 0.0, "sigma2", time_range)
    generator = torch.Generator().manual_seed(0)
    points = points.clone().requires_grad_()
    optimizer = torch.optim.Adam([points], 0.05)
    conditions = Conditions([""] * (DRAWS * len(points)))
    path = [points.detach().clone()]
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 0.06 * (1 - step / STEPS) + 0.002
        images = points.repeat(DRAWS, 1)[:, None, None]
        (slope,) = torch.autograd.grad(sds(images, conditions, generator=generator).loss, points)
        points.grad = sign * slope
        optimizer.step()
        path.append(points.detach().clone())
    return torch.stack(path)


def density(mixture: GaussianMixture, extent: float) -> torch.Tensor:
    axis = torch.linspace(-extent, extent, 161)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    return mixture.log_density(grid, torch.full(grid.shape[:2], 1e-3)).exp()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="sds_playground.png")
    out = parser.parse_args().out
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(13.5, 4.3), layout="constrained")
    mixture, extent = ring_of_modes(), 3.8
    angles = torch.arange(24) * (2 * math.pi / 24) + 0.1
    starts = torch.stack([angles.cos(), angles.sin()], 1) * torch.tensor([3.4, 0.7]).repeat(12)[:, None]
    for panel, time_range in zip(panels, ((0.02, 0.98), (0.02, 0.4))):
        panel.imshow(density(mixture, extent), extent=[-extent, extent] * 2, origin="lower", cmap="Blues")
        path = descend(mixture, starts, time_range)
        panel.plot(path[..., 0].numpy(), path[..., 1].numpy(), color="tab:orange", lw=0.8)
        panel.plot(*path[0].T.numpy(), "o", ms=3, color="0.45", label="start")
        panel.plot(*path[-1].T.numpy(), "o", ms=5, color="tab:red", mec="white", label="end")
        panel.set(title=f"t in [{time_range[0]}, {time_range[1]}], w = sigma$^2$", xticks=[], yticks=[],
                  xlim=(-extent, extent), ylim=(-extent, extent))
        panel.legend(loc="lower right", fontsize=8)
    line = GaussianMixture([[-2.0], [2.0]], 0.5)
    for sign, color, name in ((1.0, "tab:red", r"$\epsilon_\theta - \epsilon$"),
                              (-1.0, "0.4", r"$\epsilon - \epsilon_\theta$")):
        path = descend(line, torch.tensor([[0.4], [1.6], [3.0]]), (0.02, 0.98), sign)[..., 0]
        objective = expected_divergence(line, path.reshape(-1), WEIGHTINGS["sigma2"], nodes=(48, 64))
        objective = objective.reshape(path.shape)
        panels[2].plot(objective.numpy(), color=color, lw=1.4, label=[f"along $-w$ ({name})", None, None])
        if sign > 0:
            print(f"ends at {[round(x, 3) for x in path[-1].tolist()]}; the stationary point is 1.015")
    panels[2].set(title="two modes at $\\pm 2$, sd 0.5, one dimension", xlabel="step", ylim=(0.15, 0.8),
                  ylabel=r"$E_t[w\,\sigma/\alpha\,KL(q_t \Vert p_t)]$")
    panels[2].legend(fontsize=8)
    figure.savefig(out, dpi=110)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
