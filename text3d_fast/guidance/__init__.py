"""Guidance: image priors, noise schedules, prompts and the losses that turn a prior into a gradient."""

from .diffusion import DiffusionPrior
from .mixture import GaussianMixture, MixturePrior
from .model_folder import ModelError, open_model
from .prior import Conditions, Prior
from .prompts import ViewPrompts
from .schedule import NoiseSchedule
from .sds import WEIGHTINGS, Distillation, ScoreDistillation, TimeRange, distillation_loss, guided_noise

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
