"""Text3D-Fast: text to 3D with 2D diffusion models, on hand-written CUDA, Triton and CPU kernels."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from text3d_fast.backends import use_backend

__version__ = "0.1.0"
__all__ = ["__version__", "use_backend"]


def __getattr__(name: str) -> Any:
    if name == "use_backend":  # torch is imported when it is needed, so that `text3d-fast --help` answers at once
        from text3d_fast.backends import use_backend

        return use_backend
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
