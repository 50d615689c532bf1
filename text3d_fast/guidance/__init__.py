"""Guidance: image priors, noise schedules, prompts and the losses that turn a prior into a gradient."""

from text3d_fast.errors import ModelError
from text3d_fast.guidance.mixture import GaussianMixture, MixturePrior
from text3d_fast.guidance.models.diffusion import DiffusionPrior
from text3d_fast.guidance.models.folder import open_model
from text3d_fast.guidance.prior import Conditions, Prior
from text3d_fast.guidance.prompts import ViewPrompts
from text3d_fast.guidance.schedule import NoiseSchedule
from text3d_fast.guidance.sds import (
    WEIGHTINGS,
    Distillation,
    ScoreDistillation,
    TimeRange,
    distillation_loss,
    guided_noise,
)

__all__ = [
    "WEIGHTINGS",
    "Conditions",
    "DiffusionPrior",
    "Distillation",
    "GaussianMixture",
    "MixturePrior",
    "ModelError",
    "NoiseSchedule",
    "Prior",
    "ScoreDistillation",
    "TimeRange",
    "ViewPrompts",
    "distillation_loss",
    "guided_noise",
    "open_model",
]
