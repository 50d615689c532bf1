"""Scenes: cameras, lights, shading, the radiance field, the background and the renderer."""

from text3d_fast.scene.background import BackgroundNetwork, random_background
from text3d_fast.scene.cameras import CameraDistribution, Cameras
from text3d_fast.scene.field import Blob, FieldSample, RadianceField
from text3d_fast.scene.lights import LightDistribution, Lights, headlights
from text3d_fast.scene.regularizers import entropy_loss, opacity_loss, orientation_loss, thickness_loss
from text3d_fast.scene.shading import ShadingSchedule, shade
from text3d_fast.scene.volume_renderer import Rendering, VolumeRenderer

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
