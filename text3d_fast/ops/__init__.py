"""Differentiable ops. Each runs on a CPU and on CUDA, and has a plain torch twin in `text3d_fast.reference`."""

from text3d_fast.ops.composite import Composite, composite
from text3d_fast.ops.hash_grid import HashGridSpec, hash_grid, hash_grid_grad
from text3d_fast.ops.march_rays import march_rays
from text3d_fast.ops.samples import RaySamples

__all__ = [
    "Composite",
    "HashGridSpec",
    "RaySamples",
    "composite",
    "hash_grid",
    "hash_grid_grad",
    "march_rays",
]
