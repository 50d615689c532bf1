"""kaolin.ops.conversions"""

from text3d_fast.compat.kaolin.ops.conversions.tetmesh import marching_tetrahedra

__all__ = ["marching_tetrahedra"]
