"""Stages of several particles: scenes for one prompt that are optimized side by side."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from text3d_fast.errors import EmptyMesh
from text3d_fast.guidance import (
    Conditions,
    DistillationLoss,
    LoraPrior,
    ParticleScore,
    VariationalScoreDistillation,
)
from text3d_fast.guidance.prompts import ViewPrompts
from text3d_fast.pipelines.config import ProlificDreamerConfig
from text3d_fast.pipelines.mesh_stage import MeshStage
from text3d_fast.pipelines.stage import Extraction, Stage, StepState
from text3d_fast.pipelines.volume_stage import VolumeStage, guidance_options, time_range, view_conditions
from text3d_fast.scene.cameras import Cameras


class ParticleStage(Stage):
    """`particles`, each a stage of the class `particle` with its own scene and optimizer; one clock, one source of
    random numbers and one distillation loss for all.

    Each begins with a particle of the stage before. One that has no surface there is lost, and the result says so.
    """

    run: ProlificDreamerConfig
    particle: ClassVar[type[VolumeStage] | type[MeshStage]]

    def build(self, previous: Stage | None) -> None:
        if previous is not None and not isinstance(previous, ParticleStage):
            raise ValueError(f"previous: expected a finished stage of particles, got {previous!r}")
        befores = [None] * self.run.particles if previous is None else previous.particles
        self.warnings = [] if previous is None else list(previous.warnings)
        self.particles: list[VolumeStage | MeshStage] = []
        empty = None
        for number, before in enumerate(befores, 1):
            try:  # an index of its own: other initial parameters than the other particles and stages
                made = self.particle(self.config, self.run, self.prior, self.device, before, self.index + 10 * number)
            except EmptyMesh as error:
                empty = error
                self.warnings.append(f"particle {number} of {len(befores)} is lost: the stage before {self.name} left "
                                     f"it without a surface")
                continue
            made.generator = self.generator
            self.particles.append(made)
        if not self.particles:
            raise empty
        self.distill = self.distillation()

    @abstractmethod
    def distillation(self) -> DistillationLoss:
        """What moves the particles."""

    def modules(self) -> dict[str, nn.Module]:
        return {f"particle{number}/{name}": module for number, particle in enumerate(self.particles, 1)
                for name, module in particle.modules().items()}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {f"particle{number}/{name}": optimizer for number, particle in enumerate(self.particles, 1)
                for name, optimizer in particle.optimizers().items()}

    def step(self) -> StepState:
        """A picture of each particle, one call of the loss for all of them, a step of Adam for each."""
        looks, chosen = [], self.chosen()
        for particle in chosen:
            particle.step_done = self.step_done
            same = looks[0] if looks and self.same_views() else None
            looks.append(particle.look() if same is None else particle.look(same.cameras, same.background))
        images = torch.cat([look.images for look in looks])
        conditions = Conditions.concatenate([
            replace(view_conditions(particle, look), pose=look.cameras.camera_to_world)
            for particle, look in zip(chosen, looks, strict=True)
        ])
        self.before(images, conditions)
        distilled = self.distill(images, conditions, self.progress, self.generator)
        # the loss is a mean over all pictures: each particle gets what it would alone
        loss = len(chosen) * distilled.loss + sum(look.penalties for look in looks)
        for particle in chosen:
            particle.optimizer.zero_grad(set_to_none=True)
        if loss.requires_grad:  # pictures that show nothing of a surface that stays as it is move nothing
            loss.backward()
        for particle in chosen:
            particle.optimizer.step()
        self.after(images, conditions)
        return StepState(self, looks[0].rendering, loss.detach() / len(chosen), distilled.gradient_norm)

    @property
    def views(self) -> ViewPrompts:
        return self.particles[0].views

    def chosen(self) -> list[VolumeStage | MeshStage]:
        """The particles of this step."""
        return self.particles

    def same_views(self) -> bool:
        """Whether all particles are seen from the same cameras in a step."""
        return False

    def before(self, images: Tensor, conditions: Conditions) -> None:
        """What the loss has to know of the step's pictures first."""

    def after(self, images: Tensor, conditions: Conditions) -> None:
        """What is learned from the step's pictures."""

    @property
    def parts(self) -> list[Stage]:
        return list(self.particles)

    def picture(self, cameras: Cameras) -> Tensor:
        """Of the first particle."""
        return self.particles[0].picture(cameras)

    def preview(self) -> Tensor:
        """A row for each particle."""
        return torch.cat([particle.preview() for particle in self.particles])

    def extract(self) -> list[Extraction]:
        assets = [asset for particle in self.particles for asset in particle.extract()]
        assets[0].warnings[:0] = self.warnings
        return assets


class VariationalStage(ParticleStage):
    """Particles that VSD moves, and the score of their pictures, which is part of the stage's state."""

    distill: VariationalScoreDistillation

    def distillation(self) -> VariationalScoreDistillation:
        chosen, score = self.config.guidance, self.config.score
        if score.kind == "particles":
            if self.config.batch != 1:
                raise ValueError(f"batch: expected 1 with the exact score of the particles, got {self.config.batch}")
            second = ParticleScore(self.prior.schedule)
        elif getattr(self.prior, "unet", None) is None:
            raise ValueError(f"score.kind: lora needs a prior with a network, and {self.prior.name} has none; choose "
                             f"score.kind particles")
        else:
            second = LoraPrior(self.prior, score.rank, self.run.seed)
        return VariationalScoreDistillation(
            self.prior, second, chosen.weight, chosen.weighting, time_range(chosen), score_prompt=self.prompt,
            score_rate=score.rate, pose_dropout=score.pose_dropout, calls=score.calls,
            **guidance_options(chosen, self.views, self.prompt),
        )

    def modules(self) -> dict[str, nn.Module]:
        return super().modules() | self.distill.modules

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        # under other names than the modules: both go into one file
        return super().optimizers() | {f"{name}_optimizer": part for name, part in self.distill.optimizers.items()}

    def chosen(self) -> list[VolumeStage | MeshStage]:
        if self.config.each_step == "all" or len(self.particles) == 1:
            return self.particles
        return [self.particles[int(torch.randint(len(self.particles), (1,), generator=self.generator))]]

    def same_views(self) -> bool:
        return self.config.score.kind == "particles"  # the mixture is that of pictures from one camera

    def before(self, images: Tensor, conditions: Conditions) -> None:
        if self.config.score.kind == "particles":
            self.distill.train_score(images.detach(), conditions, self.generator)

    def after(self, images: Tensor, conditions: Conditions) -> None:
        if self.config.score.kind == "lora" and self.config.score.calls != "reused":
            self.distill.train_score(images.detach(), conditions, self.generator)
