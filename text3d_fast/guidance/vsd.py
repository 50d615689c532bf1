"""Variational score distillation (Wang et al., ProlificDreamer, 2023): particles as samples of the prior.

SDS moves one image towards a mode; VSD moves n of them so that together they are distributed as the prior's images:

    g = w(t) (eps_hat(x_t; y, t) - eps_phi(x_t; y, c, t))

with eps_hat the prior, guided, and eps_phi = -sigma grad log q_t the score of the particles' own noisy images,
unguided. `LoraPrior` learns it, by denoising the rendered images; `ParticleScore` is exact. For a single particle
q_t = N(alpha x, sigma^2) and eps_phi is the drawn eps itself: SDS.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from text3d_fast.guidance.distillation import (
    DistillationLoss,
    Source,
    TimeRange,
    draw,
    draw_rows,
    full_precision,
    guide,
    predict_noises,
)
from text3d_fast.guidance.mixture import GaussianMixture
from text3d_fast.guidance.prior import Conditions, Prior
from text3d_fast.guidance.schedule import NoiseSchedule

CALLS = ("separate", "together", "reused")


class LearnedScore(Protocol):
    """A network that learns the score of the rendered images: `LoraPrior`, or an own one with these."""

    schedule: NoiseSchedule
    prediction_type: str
    module: nn.Module  # exactly the parameters to train and to save

    def predict(self, x_t: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """eps, v or x, by `prediction_type`, [B, ...]; differentiable in the parameters."""
        ...

    def predict_noise(self, x_t: Tensor, t: Tensor, conditions: Conditions) -> Tensor: ...


class ParticleScore:
    """The exact score of n particles' noisy images, whatever their conditions: q_t = 1/n sum_i N(alpha x_i, sigma^2).

    Costs B n times the size of an image in memory; meant for small spaces.
    """

    prediction_type = "epsilon"
    module = None

    def __init__(self, schedule: NoiseSchedule):
        self.schedule = schedule
        self._mixture: GaussianMixture | None = None

    def observe(self, x: Tensor) -> None:
        """Where the particles are now, [n, C, h, w]."""
        self._mixture = GaussianMixture(x.detach().flatten(1), 0.0, schedule=self.schedule)

    def predict_noise(self, x_t: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """See Prior."""
        if self._mixture is None:
            raise RuntimeError("ParticleScore has seen no particles yet: call train_score (or observe) first")
        return self._mixture.noise(x_t.flatten(1), t).reshape(x_t.shape)


class VariationalScoreDistillation(DistillationLoss):
    """The VSD loss of a batch of rendered images, and the training of its second score.

    A step is `vsd(images, conditions, ...)` for the particles, then `vsd.train_score(images.detach(), conditions, ...)`
    for the second score (before the first one with a ParticleScore, which has to know its particles).

    score             LoraPrior, another LearnedScore, or ParticleScore; its x and its noise schedule are the prior's
    guidance_weight   of the prior, in the (1 + s) / s form; the paper's scale 7.5 is 6.5
    time_range        the paper's: up to 0.98, from a fifth of the run on up to 0.5
    score_prompt      what the score is given instead of each image's text: the prompt without view words
    score_rate        learning rate of its AdamW
    score_time_range  of t in its training
    pose_dropout      share of the training images whose pose is dropped
    calls             "separate"  prior, score and its training run on their own
                      "together"  prior and score in one call of the network (a LoraPrior on the prior itself)
                      "reused"    the score's call is its training too, at the t and eps of the loss, and nothing is
                                  dropped; train_score is then not needed
    options           of `DistillationLoss`

    `modules` and `optimizers` hold by name what a checkpoint has to keep. Gradients of several processes can be
    averaged in a `register_step_pre_hook` of the optimizer.
    """

    def __init__(
        self,
        prior: Prior,
        score: LearnedScore | ParticleScore,
        guidance_weight: Any = 6.5,
        weighting: Any = "sigma2",
        time_range: TimeRange | tuple[float, float] | None = None,
        score_prompt: str | None = None,
        score_rate: float = 1e-4,
        score_time_range: tuple[float, float] = (0.0, 1.0),
        pose_dropout: float = 0.1,
        calls: str = "separate",
        **options: Any,
    ):
        if time_range is None:
            time_range = TimeRange(0.02, 0.98, final_high=0.5, kind="step", end=0.2)
        super().__init__(prior, guidance_weight, weighting, time_range, **options)
        if calls not in CALLS:
            raise ValueError(f"calls: expected one of {', '.join(CALLS)}, got {calls!r}")
        if calls == "together" and getattr(score, "base", None) is not prior:
            raise ValueError("calls: together needs a LoraPrior of the prior itself as score")
        if calls == "reused" and score.module is None:
            raise ValueError(f"calls: reused needs a score that learns, got {type(score).__name__}")
        if not 0 <= pose_dropout <= 1:
            raise ValueError(f"pose_dropout: expected a share in [0, 1], got {pose_dropout}")
        grid = torch.linspace(0, 1, 101)
        if float((prior.schedule.alpha(grid) - score.schedule.alpha(grid)).abs().max()) > 1e-3:
            raise ValueError("score: its noise schedule differs from the prior's, so their x_t are not the same")
        self.score = score
        self.score_prompt = score_prompt
        self.score_time_range = TimeRange(*score_time_range)
        self.pose_dropout = pose_dropout
        self.calls = calls
        self.modules: dict[str, nn.Module] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        if score.module is not None:
            self.modules["score"] = score.module
            self.optimizers["score"] = torch.optim.AdamW(score.module.parameters(), score_rate)

    def residual(self, x: Tensor, t: Tensor, noise: Tensor, conditions: Conditions, guidance: float) -> Tensor:
        """See DistillationLoss."""
        x_t = self.prior.schedule.add_noise(x, noise, t)
        own = self._score_conditions(conditions)
        if self.calls == "together":
            sides, amounts = self.sides(conditions, guidance)
            *predicted, second = self._together(x_t, t, [*sides, own])
            return guide(predicted, guidance, amounts) - second
        guided = self.guided(x_t, t, conditions, guidance)
        if self.calls == "reused":
            with torch.enable_grad():
                prediction = self.score.predict(x_t, t, own)
                self._descend(prediction, self.score.schedule.target(x.detach(), noise, t, self.score.prediction_type))
            second = self.score.schedule.to_noise(prediction.detach(), x_t, t, self.score.prediction_type)
        else:
            (second,) = predict_noises(self.score, x_t, t, [own])
        return guided - full_precision(second)

    def train_score(
        self, images: Tensor, conditions: Conditions, generator: Source = None
    ) -> Tensor | None:
        """One step of denoising the rendered images [B, H, W, 3] at a t and eps of its own; the loss, detached.

        A ParticleScore takes the images as all the particles there are, and gives None.
        """
        with torch.no_grad():
            x = self.prior.encode(images)
        return self.train_score_encoded(x, conditions, generator)

    def train_score_encoded(
        self, x: Tensor, conditions: Conditions, generator: Source = None
    ) -> Tensor | None:
        """The same for x [B, C, h, w] that is already in the prior's space."""
        x = full_precision(x).detach()
        if self.score.module is None:
            self.score.observe(x)
            return None
        schedule, kind = self.score.schedule, self.score.prediction_type
        t, noise = draw(x, schedule, self.score_time_range, 0.0, generator, getattr(self.score, "views", 1))
        noise = noise.to(x)
        own = self._score_conditions(conditions)
        if own.pose is not None and self.pose_dropout > 0:
            dropped = draw_rows(torch.rand, (len(x),), generator, own.pose.device) < self.pose_dropout
            own.pose = torch.where(dropped[:, None, None], torch.nan, own.pose)
        with torch.enable_grad():
            prediction = self.score.predict(schedule.add_noise(x, noise, t), t, own)
            return self._descend(prediction, schedule.target(x, noise, t, kind))

    def _descend(self, prediction: Tensor, target: Tensor) -> Tensor:
        """One optimizer step on the mean square error; returns it, detached."""
        loss = (prediction - target).square().mean()
        optimizer = self.optimizers["score"]
        optimizer.zero_grad(set_to_none=True)
        # about the sum over one image, by a power of two: a mean's gradients vanish in half precision on their way
        scale = 2.0 ** round(math.log2(prediction[0].numel()))
        (loss * scale).backward()
        for parameter in self.score.module.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(scale).nan_to_num_(0.0, 0.0, 0.0)
        optimizer.step()
        return loss.detach()

    def _score_conditions(self, conditions: Conditions) -> Conditions:
        texts = conditions.texts if self.score_prompt is None else [self.score_prompt] * len(conditions)
        return conditions.with_texts(texts)

    def _together(self, x_t: Tensor, t: Tensor, sides: list[Conditions]) -> list[Tensor]:
        """eps for all sides in one call, the last one by the score."""
        count = len(sides)
        rows = torch.arange(count * len(t), device=x_t.device) >= (count - 1) * len(t)
        every = self.score.predict_noise(
            torch.cat([x_t] * count), torch.cat([t] * count), Conditions.concatenate(sides), rows
        )
        return list(every.chunk(count))
