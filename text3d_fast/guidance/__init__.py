"""Guidance: image priors, noise schedules, prompts and the losses that turn a prior into a gradient."""

from text3d_fast.errors import ModelError
from text3d_fast.guidance.distillation import (
    WEIGHTINGS,
    Distillation,
    DistillationLoss,
    Rows,
    TimeRange,
    distillation_loss,
    guided_noise,
)
from text3d_fast.guidance.lora import LoraPrior
from text3d_fast.guidance.mixture import GaussianMixture, MixturePrior
from text3d_fast.guidance.models.diffusion import DiffusionPrior
from text3d_fast.guidance.models.folder import open_model
from text3d_fast.guidance.models.options import ModelOptions
from text3d_fast.guidance.prior import Conditions, Prior
from text3d_fast.guidance.prompts import ViewPrompts
from text3d_fast.guidance.registry import load_prior, register_prior, registered_priors
from text3d_fast.guidance.schedule import NoiseSchedule
from text3d_fast.guidance.sds import ScoreDistillation
from text3d_fast.guidance.variants import DISTILLATIONS
from text3d_fast.guidance.vsd import ParticleScore, VariationalScoreDistillation

__all__ = [
    "DISTILLATIONS",
    "WEIGHTINGS",
    "Conditions",
    "DiffusionPrior",
    "Distillation",
    "DistillationLoss",
    "GaussianMixture",
    "LoraPrior",
    "MixturePrior",
    "ModelError",
    "ModelOptions",
    "NoiseSchedule",
    "ParticleScore",
    "Prior",
    "Rows",
    "ScoreDistillation",
    "TimeRange",
    "VariationalScoreDistillation",
    "ViewPrompts",
    "distillation_loss",
    "guided_noise",
    "load_prior",
    "open_model",
    "register_prior",
    "registered_priors",
]
