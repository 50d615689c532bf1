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
    Rows,
    VariationalScoreDistillation,
)
from text3d_fast.guidance.prompts import ViewPrompts
from text3d_fast.pipelines import distributed
from text3d_fast.pipelines.config import ProlificDreamerConfig
from text3d_fast.pipelines.mesh_stage import MeshStage
from text3d_fast.pipelines.stage import Extraction, Stage, StepState
from text3d_fast.pipelines.volume_stage import (
    VolumeStage,
    guidance_options,
    sample_cameras,
    time_range,
    view_conditions,
)
from text3d_fast.scene.background import random_background
from text3d_fast.scene.cameras import Cameras


class ParticleStage(Stage):
    """`particles`, each a stage of the class `particle` with its own scene, optimizer and random numbers; one clock and
    one distillation loss for all.

    Each begins with a particle of the stage before. One that has no surface there is lost, and the result says so.
    Several processes deal the particles out (`distributed.dealt`); `particles` are then those that are here, by number.
    """

    run: ProlificDreamerConfig
    particle: ClassVar[type[VolumeStage] | type[MeshStage]]

    def build(self, previous: Stage | None) -> None:
        if previous is not None and not isinstance(previous, ParticleStage):
            raise ValueError(f"previous: expected a finished stage of particles, got {previous!r}")
        front, back = self.config.view_sectors
        self.views = ViewPrompts(self.config.view_words, front=front, back=back)
        numbers, self.share = distributed.dealt(self.run.particles)
        befores = dict.fromkeys(numbers) if previous is None else previous.particles
        self.particles: dict[int, VolumeStage | MeshStage] = {}
        lost: dict[int, EmptyMesh] = {}
        for number, before in befores.items():
            try:  # an index of its own: other initial parameters and random numbers than other particles and stages
                self.particles[number] = self.particle(self.config, self.run, self.prior, self.device, before,
                                                       self.index + 10 * number, self.share)
            except EmptyMesh as error:
                lost[number] = error
        lost = {number: error for part in distributed.gather(lost) for number, error in part.items()}
        self.alive = len({number for part in distributed.gather(list(self.particles)) for number in part})
        if not self.alive:
            raise next(iter(lost.values()))
        self.warnings = ([] if previous is None else list(previous.warnings)) + [
            f"particle {number} of {self.run.particles} is lost: the stage before {self.name} left it without a surface"
            for number in sorted(lost)
        ]
        self.distill = self.distillation()

    @abstractmethod
    def distillation(self) -> DistillationLoss:
        """What moves the particles."""

    def modules(self) -> dict[str, nn.Module]:
        return {f"particle{number}/{name}": module for number, particle in self.particles.items()
                for name, module in particle.modules().items()}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {f"particle{number}/{name}": optimizer for number, particle in self.particles.items()
                for name, optimizer in particle.optimizers().items()}

    def generators(self) -> dict[str, torch.Generator]:
        return super().generators() | {f"particle{number}/generator": particle.generator
                                       for number, particle in self.particles.items()}

    def tensors(self) -> dict[str, Tensor]:
        """As `Stage.tensors`; of several processes the first one gets those of all."""
        own = super().tensors()
        if distributed.size() == 1:
            return own
        mine = {name: value.cpu() for name, value in own.items() if name.startswith("particle")}
        for part in distributed.gather(mine if self.share.index == 0 else {}, first_only=True):
            own |= part
        return own

    def step(self) -> StepState:
        """A picture of each particle, one call of the loss for all of them, a step of Adam for each."""
        chosen, views = self.chosen(), self.same_views()
        if not chosen:  # all that this process had are lost
            self.without_particles()
            nothing = torch.zeros((), device=self.device)
            return StepState(self, None, nothing, nothing)
        looks = []
        for particle in chosen:
            particle.step_done = self.step_done
            looks.append(particle.look(*views))
        images = torch.cat([look.images for look in looks])
        conditions = Conditions.concatenate([
            replace(view_conditions(particle, look), pose=look.cameras.camera_to_world)
            for particle, look in zip(chosen, looks, strict=True)
        ])
        rows = [particle.rows for particle in chosen]
        self.before(images, conditions)
        distilled = self.distill(images, conditions, self.progress, rows)
        # the loss is a mean over all pictures: each particle gets what it would alone
        loss = len(chosen) * distilled.loss + sum(look.penalties for look in looks)
        for particle in chosen:
            particle.optimizer.zero_grad(set_to_none=True)
        if loss.requires_grad:  # pictures that show nothing of a surface that stays as it is move nothing
            loss.backward()
        for particle in chosen:
            self.share.average(particle.optimizer)
            particle.optimizer.step()
        self.after(images, conditions, rows)
        return StepState(self, looks[0].rendering, loss.detach() / len(chosen), distilled.gradient_norm)

    def chosen(self) -> list[VolumeStage | MeshStage]:
        """The particles of this step, of those that are here."""
        return list(self.particles.values())

    def same_views(self) -> tuple[Cameras, Tensor] | tuple[()]:
        """Cameras and background colours that all particles are seen with in this step; nothing: each has its own."""
        return ()

    def before(self, images: Tensor, conditions: Conditions) -> None:
        """What the loss has to know of the step's pictures first."""

    def after(self, images: Tensor, conditions: Conditions, rows: list[Rows]) -> None:
        """What is learned from the step's pictures."""

    def without_particles(self) -> None:
        """The part in a step of a process that has no particle left."""

    @property
    def parts(self) -> list[Stage]:
        return list(self.particles.values())

    def picture(self, cameras: Cameras) -> Tensor:
        """Of the first particle."""
        return self.parts[0].picture(cameras)

    def preview(self) -> Tensor:
        """A row for each particle."""
        rows = {number: particle.preview().cpu() for number, particle in self.particles.items()}
        every = {number: row for part in distributed.gather(rows) for number, row in part.items()}
        return torch.cat([every[number] for number in sorted(every)])

    def extract(self) -> list[Extraction]:
        own = {number: particle.extract() for number, particle in self.particles.items()}
        if distributed.size() > 1:
            own = {number: [replace(asset, mesh=asset.mesh.to("cpu")) for asset in assets]
                   for number, assets in own.items()}
        every = {number: assets for part in distributed.gather(own) for number, assets in part.items()}
        assets = [asset for number in sorted(every) for asset in every[number]]
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
        distill = VariationalScoreDistillation(
            self.prior, second, chosen.weight, chosen.weighting, time_range(chosen), score_prompt=self.prompt,
            score_rate=score.rate, pose_dropout=score.pose_dropout, calls=score.calls,
            **guidance_options(chosen, self.views, self.prompt),
        )
        if distributed.size() > 1:
            self._share_score(distill)
        return distill

    def _share_score(self, distill: VariationalScoreDistillation) -> None:
        """Every process trains the score on its own pictures; its gradient is made that of the mean over all."""
        if distill.score.module is not None:
            parameters = list(distill.score.module.parameters())
            part = len(self.particles) / (self.alive * self.share.count)
            distill.optimizers["score"].register_step_pre_hook(
                lambda *_: distributed.sum_gradients(parameters, part))

    def modules(self) -> dict[str, nn.Module]:
        return super().modules() | self.distill.modules

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        # under other names than the modules: both go into one file
        return super().optimizers() | {f"{name}_optimizer": part for name, part in self.distill.optimizers.items()}

    def chosen(self) -> list[VolumeStage | MeshStage]:
        every = super().chosen()
        if self.config.each_step == "all" or len(every) < 2:
            return every
        return [every[int(torch.randint(len(every), (1,), generator=self.generator))]]

    def same_views(self) -> tuple[Cameras, Tensor] | tuple[()]:
        if self.config.score.kind == "lora":
            return ()
        # the mixture is that of pictures from one camera
        return sample_cameras(self), random_background(self.config.batch, self.generator, self.device)

    def before(self, images: Tensor, conditions: Conditions) -> None:
        if self.config.score.kind == "particles":
            self._observe(dict(zip(self.particles, images.detach(), strict=True)), conditions)

    def _observe(self, own: dict[int, Tensor], conditions: Conditions) -> None:
        """The pictures of the particles that are here, and of all others."""
        if distributed.size() > 1:
            parts = distributed.gather({number: image.cpu().clone() for number, image in own.items()})
            own = {number: image.to(self.device) for part in parts for number, image in part.items()}
        self.distill.train_score(torch.stack([own[number] for number in sorted(own)]), conditions)

    def after(self, images: Tensor, conditions: Conditions, rows: list[Rows]) -> None:
        if self.config.score.kind == "lora" and self.config.score.calls != "reused":
            self.distill.train_score(images.detach(), conditions, rows)

    def without_particles(self) -> None:
        if self.config.score.kind == "particles":
            self._observe({}, Conditions([]))
        else:
            optimizer = self.distill.optimizers["score"]
            optimizer.zero_grad(set_to_none=True)
            optimizer.step()  # of the gradients of the others
