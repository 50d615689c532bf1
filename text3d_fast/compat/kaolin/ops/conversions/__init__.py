"""kaolin.ops.conversions"""

from text3d_fast.compat.kaolin.ops.conversions.flexicubes import FlexiCubes
from text3d_fast.compat.kaolin.ops.conversions.tetmesh import marching_tetrahedra

__all__ = ["FlexiCubes", "marching_tetrahedra"]
