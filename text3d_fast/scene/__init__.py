"""Scenes: cameras, lights, shading, the radiance field, the background and the renderers."""

from .cameras import CameraDistribution, Cameras

__all__ = ["CameraDistribution", "Cameras"]
