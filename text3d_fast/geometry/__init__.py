"""Meshes: extraction from fields, cleaning, UV atlas, texture baking, GLB/OBJ/PLY files."""

from text3d_fast.geometry.atlas import bake_texture, unwrap
from text3d_fast.geometry.clean import CleaningReport, Dropped, clean_mesh
from text3d_fast.geometry.extract import automatic_threshold, averaged_density, extract_mesh, sample_colors
from text3d_fast.geometry.io import glb_bytes, read_mesh, write_mesh
from text3d_fast.geometry.mesh import Mesh

__all__ = [
    "CleaningReport",
    "Dropped",
    "Mesh",
    "automatic_threshold",
    "averaged_density",
    "bake_texture",
    "clean_mesh",
    "extract_mesh",
    "glb_bytes",
    "read_mesh",
    "sample_colors",
    "unwrap",
    "write_mesh",
]
