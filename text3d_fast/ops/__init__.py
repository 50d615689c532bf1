"""Differentiable ops. Each runs on a CPU and on CUDA, and has a plain torch twin in `text3d_fast.reference`."""

from text3d_fast.ops.composite import Composite, composite
from text3d_fast.ops.hash_grid import HashGridSpec, hash_grid, hash_grid_grad
from text3d_fast.ops.interpolate import interpolate
from text3d_fast.ops.march_rays import march_rays
from text3d_fast.ops.rasterize import DepthPeeler, rasterize
from text3d_fast.ops.samples import RaySamples

__all__ = [
    "Composite",
    "DepthPeeler",
    "HashGridSpec",
    "RaySamples",
    "composite",
    "hash_grid",
    "hash_grid_grad",
    "interpolate",
    "march_rays",
    "rasterize",
]
