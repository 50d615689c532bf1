"""Differentiable ops. Each runs on a CPU and on CUDA, and has a plain torch twin in `text3d_fast.reference`."""

from text3d_fast.ops.composite import Composite, composite
from text3d_fast.ops.march_rays import march_rays
from text3d_fast.ops.samples import RaySamples

__all__ = [
    "Composite",
    "RaySamples",
    "composite",
    "march_rays",
]
