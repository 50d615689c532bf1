"""Guidance: image priors, noise schedules, prompts and the losses that turn a prior into a gradient."""

from .prior import Conditions, Prior
from .schedule import NoiseSchedule

__all__ = ["Conditions", "NoiseSchedule", "Prior"]
