"""The part of kaolin's interface that text-to-3D code uses: `ops.conversions.marching_tetrahedra`."""

from text3d_fast.compat.kaolin import ops

__all__ = ["ops"]
