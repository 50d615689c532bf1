"""Other residuals on the same step, and the table of all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

from text3d_fast.guidance.distillation import DistillationLoss, predict_noises
from text3d_fast.guidance.prior import Conditions, Prior
from text3d_fast.guidance.sds import ScoreDistillation
from text3d_fast.guidance.vsd import VariationalScoreDistillation

# what an image made by SDS looks like, in words (McAllister et al., 2024)
FLAWS = "oversaturated, smooth, pixelated, cartoon, foggy, hazy, blurry, bad structure, noisy, malformed"


class ClassifierScoreDistillation(DistillationLoss):
    """CSD (Yu et al., 2023): SDS without its eps_theta(y) - eps, the guidance alone.

        g = w(t) s (eps(x_t; y, t) - eps(x_t; empty, t))
    """

    def residual(self, x: Tensor, t: Tensor, noise: Tensor, conditions: Conditions, guidance: float) -> Tensor:
        x_t = self.prior.schedule.add_noise(x, noise, t)
        towards, away = predict_noises(self.prior, x_t, t, [conditions, self.unconditional(conditions)])
        return guidance * (towards - away)


class BridgeDistillation(DistillationLoss):
    """SDS-Bridge (McAllister et al., 2024): from the distribution where the image is to the one where it should be.

        g = w(t) s (eps(x_t; y, t) - eps(x_t; y and source, t))

    source    words, appended to each image's text, for how the images look before: `FLAWS` follows an SDS stage
    """

    def __init__(self, prior: Prior, guidance_weight: Any = 100.0, *args: Any, source: str = FLAWS, **options: Any):
        super().__init__(prior, guidance_weight, *args, **options)
        self.source = source

    def texts(self, texts: Sequence[str]) -> list[str]:
        return [*super().texts(texts), *(f"{text}, {self.source}" for text in texts)]

    def residual(self, x: Tensor, t: Tensor, noise: Tensor, conditions: Conditions, guidance: float) -> Tensor:
        x_t = self.prior.schedule.add_noise(x, noise, t)
        source = conditions.with_texts([f"{text}, {self.source}" for text in conditions.texts])
        towards, away = predict_noises(self.prior, x_t, t, [conditions, source])
        return guidance * (towards - away)


class IntervalScoreMatching(DistillationLoss):
    """ISM (Liang et al., LucidDreamer, 2023): x_t by DDIM inversion instead of a draw, so the target does not jump.

        g = w(t) (eps_hat(x_t; y, t) - eps(x_s; empty, s)),      x -> ... -> x_s -> x_t without a text

    interval    t - s
    stride      largest step of the inversion up to s; it takes ceil(largest s / stride) calls of the prior
    """

    def __init__(
        self,
        prior: Prior,
        guidance_weight: Any = 6.5,
        *args: Any,
        interval: float = 0.05,
        stride: float = 0.2,
        **options: Any,
    ):
        super().__init__(prior, guidance_weight, *args, **options)
        for name, value in (("interval", interval), ("stride", stride)):
            if not 0 < value <= 1:
                raise ValueError(f"{name}: expected a number in (0, 1], got {value}")
        self.interval = interval
        self.stride = stride

    def residual(self, x: Tensor, t: Tensor, noise: Tensor, conditions: Conditions, guidance: float) -> Tensor:
        schedule, empty = self.prior.schedule, self.unconditional(conditions)
        start = schedule.snap((t - self.interval).clamp(min=0.0))
        count = max(1, math.ceil(max(self.time_range.high, self.time_range.final_high or 0.0) / self.stride))
        times = [schedule.snap(start * (step / count)) for step in range(count)] + [start, t]
        x_s = x
        for now, then in pairwise(times):
            (predicted,) = predict_noises(self.prior, x_s, now, [empty])
            clean = schedule.to_sample(predicted, x_s, now, "epsilon")
            x_s = schedule.add_noise(clean, predicted, then)
        # the last prediction was made at x_s, and x_s is x_t by now
        return self.guided(x_s, t, conditions, guidance) - predicted


# name -> class; all are called alike. "vsd" takes its second score after the prior
DISTILLATIONS: dict[str, type[DistillationLoss]] = {
    "sds": ScoreDistillation,
    "vsd": VariationalScoreDistillation,
    "csd": ClassifierScoreDistillation,
    "bridge": BridgeDistillation,
    "ism": IntervalScoreMatching,
}
