"""Toybox: a small procedural world with known 3D truth, for trying, testing and judging text-to-3D offline."""

from text3d_fast.toybox.captions import PromptError, canonical, caption, parse, training_caption, view_word, vocabulary
from text3d_fast.toybox.scenes import Description, Scene, Thing, build_scene, random_description, sample_parameters

__all__ = [
    "Description",
    "PromptError",
    "Scene",
    "Thing",
    "build_scene",
    "canonical",
    "caption",
    "parse",
    "random_description",
    "sample_parameters",
    "training_caption",
    "view_word",
    "vocabulary",
]
