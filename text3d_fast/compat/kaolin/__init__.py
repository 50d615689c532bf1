"""The part of kaolin's interface that text-to-3D code uses: marching tetrahedra and FlexiCubes in `ops.conversions`."""

from text3d_fast.compat.kaolin import ops, utils

__all__ = ["ops", "utils"]
