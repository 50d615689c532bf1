"""kaolin.utils"""

from text3d_fast.compat.kaolin.utils import testing

__all__ = ["testing"]
