"""From fields to files: surface extraction, cleaning, UV atlas, texture, GLB/OBJ/PLY, turntable, contact sheet."""

from text3d_fast.export.clean import CleaningReport, Dropped, clean_mesh
from text3d_fast.export.extract import automatic_threshold, averaged_density, extract_mesh, sample_colors
from text3d_fast.export.files import atomic_path, glb_bytes, read_mesh, write_bytes, write_mesh
from text3d_fast.export.mesh import Mesh
from text3d_fast.export.pictures import write_turntable, write_views
from text3d_fast.export.texture import bake_texture, unwrap

__all__ = [
    "CleaningReport",
    "Dropped",
    "Mesh",
    "atomic_path",
    "automatic_threshold",
    "averaged_density",
    "bake_texture",
    "clean_mesh",
    "extract_mesh",
    "glb_bytes",
    "read_mesh",
    "sample_colors",
    "unwrap",
    "write_bytes",
    "write_mesh",
    "write_turntable",
    "write_views",
]
