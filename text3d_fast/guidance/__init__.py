"""Guidance: image priors, noise schedules, prompts and the losses that turn a prior into a gradient."""

from .mixture import GaussianMixture, MixturePrior
from .prior import Conditions, Prior
from .schedule import NoiseSchedule
from .sds import WEIGHTINGS, Distillation, ScoreDistillation, TimeRange, distillation_loss, guided_noise

__all__ = [
    "WEIGHTINGS",
    "Conditions",
    "Distillation",
    "GaussianMixture",
    "MixturePrior",
    "NoiseSchedule",
    "Prior",
    "ScoreDistillation",
    "TimeRange",
    "distillation_loss",
    "guided_noise",
]
