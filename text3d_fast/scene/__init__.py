"""Scenes: cameras, lights, shading, the radiance field, the background and the renderer."""

from .background import BackgroundNetwork, random_background
from .cameras import CameraDistribution, Cameras
from .field import Blob, FieldSample, RadianceField
from .lights import LightDistribution, Lights, headlights
from .regularizers import entropy_loss, opacity_loss, orientation_loss, thickness_loss
from .shading import ShadingSchedule, shade
from .volume_renderer import Rendering, VolumeRenderer

__all__ = [
    "BackgroundNetwork",
    "Blob",
    "CameraDistribution",
    "Cameras",
    "FieldSample",
    "LightDistribution",
    "Lights",
    "RadianceField",
    "Rendering",
    "ShadingSchedule",
    "VolumeRenderer",
    "entropy_loss",
    "headlights",
    "opacity_loss",
    "orientation_loss",
    "random_background",
    "shade",
    "thickness_loss",
]
