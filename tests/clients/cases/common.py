"""What the cases share: a soft ball as field, its picture in plain torch, comparisons."""

import torch
import torch.nn.functional as F
from nerfacc.grid import _query


class Ball(torch.nn.Module):
    """A ball of radius 0.7 with density falling off at its surface, coloured by position."""

    def __init__(self):
        super().__init__()
        self.density = torch.nn.Parameter(torch.tensor(30.0))

    def query_density(self, x):
        return self.density * torch.sigmoid(150 * (0.7 - x.norm(dim=-1, keepdim=True)))

    def forward(self, x, directions=None):
        return torch.sigmoid(4 * x), self.query_density(x)


def camera(size: int, distance: float = 3.0, spread: float = 0.35):
    """Rays [size * size, 3] from (0, 0, distance) towards the origin."""
    x = (torch.arange(size) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(x, x, indexing="ij")
    directions = F.normalize(torch.stack([spread * x, -spread * y, -torch.ones_like(x)], -1).view(-1, 3), dim=-1)
    return torch.tensor([0.0, 0.0, distance]).expand_as(directions).contiguous(), directions


def dense_picture(field, origins, directions, near: float, far: float, step: float, estimator=None,
                  thinnest: float | None = None):
    """Every interval of the ray in plain torch, before white: colours [rays, 3], opacities [rays, 1].

    estimator: an occupancy grid; what is in none of its occupied cells is left out. (It may miss cells that the ball
    only touches, as it looks at one random point of each.)
    thinnest: left out, too, are intervals of a smaller opacity, and those that less than 1e-4 of the light reaches.
    """
    edges = torch.arange(near, far, step)
    middles = edges + step / 2
    points = origins[:, None] + middles[:, None] * directions[:, None]
    rgb, sigma = field(points.view(-1, 3))
    if estimator is not None:
        sigma = sigma[:, 0] * _query(points.view(-1, 3), estimator.binaries, estimator.aabbs[0])[0]
    rgb, optical = rgb.view(*points.shape), sigma.view(points.shape[:-1]) * step
    transmittance = lambda optical: torch.exp(-(optical.cumsum(1) - optical))
    if thinnest is not None:
        optical = optical * ((transmittance(optical) >= 1e-4) & (1 - torch.exp(-optical) >= thinnest))
    weights = transmittance(optical) * (1 - torch.exp(-optical))
    opacity = weights.sum(1, keepdim=True)
    return (weights[..., None] * rgb).sum(1) + 1 - opacity, opacity


def largest(a, b) -> float:
    return float((a - b).abs().max())


def native_and_plain(render, parameters):
    """The picture and the gradients of its mean square, by the kernels and by the plain torch reference.

    render: () -> picture. Returns a line with the largest differences, after asserting that they are roundings.
    """
    import text3d_fast

    results = []
    for backend in (None, "reference"):
        with text3d_fast.use_backend(backend):
            picture = render()
            gradients = torch.autograd.grad(picture.square().mean(), parameters)
        results.append((picture.detach(), *gradients))
    (picture, *native), (plain, *wanted) = results
    scales = [float(g.abs().max()) for g in wanted]
    differences = [largest(a, b) / max(scale, 1e-12) for a, b, scale in zip(native, wanted, scales)]
    assert picture.std() > 0.01 and min(scales) > 0, "nothing to see"
    difference = largest(picture, plain) / max(1.0, float(plain.abs().max()))
    assert difference < 2e-4 and max(differences) < 2e-3, (difference, differences)
    return (f"picture {tuple(picture.shape)} differs from plain torch by at most {difference:.1e}, "
            f"gradients by {max(differences):.1e} of the largest")  # fmt: skip


def sphere(rows: int = 24, columns: int = 32):
    """Vertices [V, 3] and triangles int32 [T, 3], counter-clockwise from outside."""
    theta, phi = torch.meshgrid(torch.linspace(0, torch.pi, rows + 1), torch.arange(columns) / columns * 2 * torch.pi,
                                indexing="ij")  # fmt: skip
    v = torch.stack([theta.sin() * phi.cos(), theta.cos(), theta.sin() * phi.sin()], -1).view(-1, 3)
    i, j = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    k = (j + 1) % columns
    a, b, c, d = i * columns + j, i * columns + k, (i + 1) * columns + k, (i + 1) * columns + j
    t = torch.stack([torch.stack([a, b, c], -1), torch.stack([a, c, d], -1)], 2).view(-1, 3)
    return v, t.int()
