"""Differentiable ops. Each runs on a CPU and on CUDA, and has a plain torch twin in `text3d_fast.reference`."""

from text3d_fast.ops.antialias import antialias, antialias_topology
from text3d_fast.ops.composite import Composite, composite
from text3d_fast.ops.hash_grid import HashGridSpec, hash_grid, hash_grid_grad, hash_grid_vjp
from text3d_fast.ops.hash_mlp import hash_mlp
from text3d_fast.ops.interpolate import interpolate
from text3d_fast.ops.march_rays import march_rays
from text3d_fast.ops.marching_tets import marching_tets
from text3d_fast.ops.mlp import MLPSpec, mlp
from text3d_fast.ops.prune_samples import prune_samples
from text3d_fast.ops.rasterize import DepthPeeler, rasterize
from text3d_fast.ops.render_field import FieldRendering, FieldSpec, PointLights, render_field, renders_fused
from text3d_fast.ops.samples import RaySamples
from text3d_fast.ops.segmented_scan import segmented_scan
from text3d_fast.ops.tet_grid import TetGrid
from text3d_fast.ops.texture import mip_stack, texture

__all__ = [
    "Composite",
    "DepthPeeler",
    "FieldRendering",
    "FieldSpec",
    "HashGridSpec",
    "MLPSpec",
    "PointLights",
    "RaySamples",
    "TetGrid",
    "antialias",
    "antialias_topology",
    "composite",
    "hash_grid",
    "hash_grid_grad",
    "hash_grid_vjp",
    "hash_mlp",
    "interpolate",
    "march_rays",
    "marching_tets",
    "mip_stack",
    "mlp",
    "prune_samples",
    "rasterize",
    "render_field",
    "renders_fused",
    "segmented_scan",
    "texture",
]
