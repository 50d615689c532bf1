"""kaolin.ops"""

from text3d_fast.compat.kaolin.ops import conversions

__all__ = ["conversions"]
