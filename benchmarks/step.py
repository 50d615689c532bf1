"""A DreamFusion step with nothing in it that a CUDA graph cannot capture: capacity mode, static buffers.

`Step.run()` is one step; `Step.refill()` puts the next cameras, colours and noise into the buffers, outside of the
graph.
"""

import math

import torch

from text3d_fast import nn, ops
from text3d_fast.scene.cameras import Cameras
from text3d_fast.scene.field import RadianceField
from text3d_fast.scene.volume_renderer import VolumeRenderer


class TinyPrior(torch.nn.Module):
    """Stands in for a diffusion model's network: predicts noise with two convolutions, conditioned on the time."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.first = torch.nn.Conv2d(4, width, 3, padding=1)
        self.last = torch.nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        level = t[:, None, None, None].expand(-1, 1, *x.shape[2:])
        return self.last(torch.nn.functional.silu(self.first(torch.cat([x, level], 1))))


class Step:
    """views, size: cameras and pixels a side; capacity: room for samples, the renderer tells if it did not suffice."""

    def __init__(self, device, views: int = 1, size: int = 64, capacity: int = 2**20, log2_table_size: int = 19,
                 levels: int = 16, normals: str | None = None):
        self.device, self.generator = torch.device(device), torch.Generator().manual_seed(0)
        spec = ops.HashGridSpec(levels=levels, log2_table_size=log2_table_size, per_level_scale=1.45)
        self.field = RadianceField(spec, generator=self.generator).to(device)
        self.prior = TinyPrior().to(device).requires_grad_(False)
        occupancy = nn.OccupancyGrid([-1.0] * 3 + [1.0] * 3, resolution=64).to(device)
        self.renderer = VolumeRenderer(occupancy, step=1.732 * 2 / 256, capacity=capacity)
        self.views, self.size, self.normals = views, size, normals
        self.cameras = self._cameras().to(device)
        self.background = torch.zeros(views, 3, device=device)
        self.time, self.noise = torch.zeros(views, device=device), torch.zeros(views, 3, size, size, device=device)
        self.overflow = torch.zeros((), dtype=torch.bool, device=device)
        self.optimizer = torch.optim.Adam(self.field.parameters(), 1e-2, capturable=self.device.type != "cpu")
        self.refill()

    def _cameras(self) -> Cameras:
        random = torch.rand(self.views, generator=self.generator)
        return Cameras.orbit(random * math.pi / 4, random * 2 * math.pi, torch.full((self.views,), 2.5),
                             torch.full((self.views,), 0.8), self.size)

    def refill(self) -> None:
        """Next cameras, background, noise level and noise, into the same memory."""
        fresh = self._cameras()
        for name, value in vars(self.cameras).items():
            if isinstance(value, torch.Tensor):
                value.copy_(getattr(fresh, name))
        self.background.copy_(torch.rand(self.views, 3, generator=self.generator))
        self.time.copy_(torch.rand(self.views, generator=self.generator) * 0.96 + 0.02)
        self.noise.copy_(torch.randn(self.noise.shape, generator=self.generator))

    def gradient(self) -> torch.Tensor:
        """Render, ask the prior, send the residual back (score distillation, Poole et al. 2022, eq. 3)."""
        picture = self.renderer(self.field, self.cameras, self.background, normals=self.normals)
        self.overflow.logical_or_(picture.overflow)
        x = picture.color.movedim(-1, 1)
        with torch.no_grad():
            alpha, sigma = (torch.cos(self.time * math.pi / 2), torch.sin(self.time * math.pi / 2))
            noisy = alpha[:, None, None, None] * x + sigma[:, None, None, None] * self.noise
            residual = sigma.square()[:, None, None, None] * (self.prior(noisy, self.time) - self.noise)
        loss = (x * residual).sum() / self.views
        if picture.orientation is not None:
            loss = loss + 0.01 * picture.orientation
        self.optimizer.zero_grad(set_to_none=False)
        loss.backward()
        return loss.detach()

    def run(self) -> torch.Tensor:
        loss = self.gradient()
        self.optimizer.step()
        return loss

    def capture(self) -> torch.cuda.CUDAGraph:
        """The step as one graph; replay it after each `refill()`."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.loss = self.run()
        return graph
