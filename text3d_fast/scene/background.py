"""What is seen where the scene is not: a network of the ray direction, or one colour for each image."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class BackgroundNetwork(nn.Module):
    """A small MLP of the sinusoidally encoded ray direction (DreamFusion's environment map).

    frequencies  octaves of the encoding; low ones keep detail out of the background
    """

    def __init__(self, hidden: int = 16, frequencies: int = 2, generator: torch.Generator | None = None):
        super().__init__()
        self.frequencies = frequencies
        inputs = 3 + 6 * frequencies
        self.layers = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, 3))
        with torch.no_grad():
            for layer in (self.layers[0], self.layers[2]):
                layer.weight.normal_(0, layer.in_features**-0.5, generator=generator)
                layer.bias.zero_()

    def forward(self, directions: Tensor) -> Tensor:
        """Unit directions [..., 3] -> rgb in 0..1, [..., 3]."""
        waves = directions[..., None] * (torch.pi * 2.0 ** torch.arange(self.frequencies, device=directions.device))
        waves = waves.flatten(-2)
        return torch.sigmoid(self.layers(torch.cat([directions, waves.sin(), waves.cos()], -1)))


def random_background(count: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
    """[count, 3] colours, uniform in the cube."""
    return torch.rand(count, 3, generator=generator, device=generator.device).to(device)
