"""Meshes: extraction from fields, cleaning, UV atlas, texture baking, GLB, OBJ, PLY and STL files."""

from text3d_fast.geometry.atlas import unwrap
from text3d_fast.geometry.bake import bake_normals, bake_texture, nearest_normals
from text3d_fast.geometry.clean import CleaningReport, Dropped, clean_mesh
from text3d_fast.geometry.decimate import decimate
from text3d_fast.geometry.extract import automatic_threshold, averaged_density, extract_mesh, sample_colors
from text3d_fast.geometry.gltf import glb_bytes
from text3d_fast.geometry.io import read_mesh, write_mesh
from text3d_fast.geometry.mesh import Mesh
from text3d_fast.geometry.normals import vertex_normals
from text3d_fast.geometry.parts import MeshWarning

__all__ = [
    "CleaningReport",
    "Dropped",
    "Mesh",
    "MeshWarning",
    "automatic_threshold",
    "averaged_density",
    "bake_normals",
    "bake_texture",
    "clean_mesh",
    "decimate",
    "extract_mesh",
    "glb_bytes",
    "nearest_normals",
    "read_mesh",
    "sample_colors",
    "unwrap",
    "vertex_normals",
    "write_mesh",
]
