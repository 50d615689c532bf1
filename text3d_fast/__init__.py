"""Text3D-Fast: text to 3D with 2D diffusion models, on hand-written CUDA, Triton and CPU kernels."""

import torch as _torch  # noqa: F401  first: the native kernels share the OpenMP runtime that torch maps

from text3d_fast.backends import use_backend

__version__ = "0.1.0"
__all__ = ["__version__", "use_backend"]
