"""Scenes: cameras, lights, shading, the radiance field, the background and the renderer."""

from text3d_fast.scene.background import BackgroundNetwork, random_background
from text3d_fast.scene.cameras import CameraDistribution, Cameras
from text3d_fast.scene.field import Blob, FieldSample, RadianceField
from text3d_fast.scene.lights import LightDistribution, Lights, headlights
from text3d_fast.scene.regularizers import (
    entropy_loss,
    laplacian_loss,
    normal_consistency,
    opacity_loss,
    orientation_loss,
    sdf_sign_loss,
    thickness_loss,
)
from text3d_fast.scene.shading import ShadingSchedule, shade
from text3d_fast.scene.tet_field import ColorField, TetField
from text3d_fast.scene.volume_renderer import Rendering, VolumeRenderer

__all__ = [
    "BackgroundNetwork",
    "Blob",
    "CameraDistribution",
    "Cameras",
    "ColorField",
    "FieldSample",
    "LightDistribution",
    "Lights",
    "RadianceField",
    "Rendering",
    "ShadingSchedule",
    "TetField",
    "VolumeRenderer",
    "entropy_loss",
    "headlights",
    "laplacian_loss",
    "normal_consistency",
    "opacity_loss",
    "orientation_loss",
    "random_background",
    "sdf_sign_loss",
    "shade",
    "thickness_loss",
]
