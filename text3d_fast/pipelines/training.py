"""The state of one optimization: the scene, its optimizer, its random numbers; saved and restored exactly."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from text3d_fast import ops
from text3d_fast.errors import CheckpointError
from text3d_fast.nn import OccupancyGrid
from text3d_fast.pipelines.checkpoint import optimizer_tensors, restore_optimizer
from text3d_fast.pipelines.config import DreamFusionConfig
from text3d_fast.scene.background import BackgroundNetwork
from text3d_fast.scene.field import Blob, RadianceField, levels_at
from text3d_fast.scene.volume_renderer import VolumeRenderer


class Training:
    """Everything that changes from step to step of a DreamFusion run.

    step        steps done
    seconds     spent on them
    field, background (None with solid colours), renderer, optimizer
    generator   the one source of random numbers, on the CPU, so that a GPU run draws the same cameras
    """

    def __init__(self, config: DreamFusionConfig, device: torch.device | str = "cpu"):
        self.config, self.device, self.step = config, torch.device(device), 0
        self.seconds = 0.0
        self.generator = torch.Generator().manual_seed(config.seed)
        chosen, sampling, rates = config.field, config.sampling, config.optimizer
        spec = ops.HashGridSpec.with_max_resolution(
            chosen.max_resolution, levels=chosen.levels, features=chosen.features,
            log2_table_size=chosen.log2_table_size, base_resolution=chosen.base_resolution,
            interpolation="smoothstep" if chosen.smooth else "linear",
        )
        self.field = RadianceField(
            spec, chosen.hidden, radius=1.0, density=chosen.density, sharpness=chosen.sharpness,
            blob=Blob(chosen.blob_scale, chosen.blob_width, chosen.blob_profile), generator=self.generator,
        ).to(self.device)
        self.background: BackgroundNetwork | None = None
        if config.background == "network":
            self.background = BackgroundNetwork(generator=self.generator).to(self.device)
        occupancy = OccupancyGrid([-1, -1, -1, 1, 1, 1], sampling.occupancy).to(self.device)
        self.renderer = VolumeRenderer(occupancy, sampling.step, sampling.radius)
        groups: list[tuple[nn.Module, float]] = [
            (self.field.grid, rates.grid), (self.field.hidden, rates.network), (self.field.output, rates.network)
        ]
        if self.background is not None:
            groups.append((self.background, rates.background))
        self._rates = [rate for _, rate in groups]
        self.optimizer = torch.optim.Adam([{"params": list(module.parameters())} for module, _ in groups],
                                          lr=0.0, betas=(0.9, 0.99), eps=1e-15, fused=True)

    @property
    def progress(self) -> float:
        """Of the optimization, in [0, 1]."""
        return self.step / self.config.steps

    def prepare_step(self) -> None:
        """What depends on the step alone: learning rates, hash-grid levels, the occupancy grid."""
        config, progress = self.config, self.progress
        warm = min(1.0, (self.step + 1) / max(1.0, config.optimizer.warmup * config.steps))
        final = config.optimizer.final
        fall = final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * warm * fall
        chosen, sampling = config.field, config.sampling
        self.field.active_levels = levels_at(progress, chosen.levels, chosen.start_levels, chosen.levels_end)
        self.renderer.update(self.field, self.step, self._occupancy_generator(), progress < sampling.prune_from,
                             every=sampling.update_every, warmup=0, threshold=sampling.threshold)

    def _occupancy_generator(self) -> torch.Generator:
        """On the occupancy grid's device; a function of seed and step, so it need not be saved."""
        return torch.Generator(self.device).manual_seed(hash((self.config.seed, self.step)) & (2**63 - 1))

    def penalty(self, name: str) -> float:
        """The weight of a penalty now."""
        start, end = getattr(self.config.penalties, name)
        return start + (end - start) * self.progress

    def modules(self) -> dict[str, nn.Module]:
        named = {"field": self.field, "occupancy": self.renderer.occupancy}
        return named if self.background is None else named | {"background": self.background}

    def tensors(self) -> dict[str, Tensor]:
        """The whole state, to be restored exactly."""
        state = {f"{name}/{key}": value for name, module in self.modules().items()
                 for key, value in module.state_dict().items()}
        return state | optimizer_tensors(self.optimizer) | {"generator": self.generator.get_state()}

    def restore(self, tensors: dict[str, Tensor], step: int, seconds: float = 0.0) -> None:
        """The inverse of `tensors`. Raises CheckpointError if they are of another configuration."""
        try:
            for name, module in self.modules().items():
                prefix = name + "/"
                part = {key[len(prefix):]: value for key, value in tensors.items() if key.startswith(prefix)}
                module.load_state_dict(part)
            restore_optimizer(self.optimizer, tensors)
            self.generator.set_state(tensors["generator"])
        except (RuntimeError, KeyError, ValueError) as error:
            raise CheckpointError(f"the checkpoint does not fit its configuration: {error}") from error
        self.step, self.seconds = step, seconds
