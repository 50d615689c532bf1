"""The public functions of nvdiffrast's torch module, with their original signatures, on CPU and CUDA tensors.

Differences: every op also runs on a CPU; ids, and on a CPU all gradients, are identical in every run; coincident layers
survive depth peeling; there is no limit on the resolution; contexts hold nothing, so they may be shared and reused.
"""

import logging

import torch

from text3d_fast import ops

_log = logging.getLogger("text3d_fast.compat.nvdiffrast")
_LEVELS = (logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL)


class _Context:
    """Stands for the original's rasterizer contexts; holds no resources."""

    def __init__(self, device=None):
        self.device = device
        self.active_depth_peeler = None


class RasterizeCudaContext(_Context):
    """Holds no resources, and works on every device."""

    def __init__(self, device=None):
        super().__init__(device)


class RasterizeGLContext(_Context):
    """The same; no OpenGL is involved. output_db and mode are accepted and change nothing."""

    def __init__(self, output_db=True, mode="automatic", device=None):
        if mode not in ("automatic", "manual"):
            raise ValueError(f"mode: expected 'automatic' or 'manual', got {mode!r}")
        super().__init__(device)
        self.output_db = output_db
        self.mode = mode

    def set_context(self):
        """Nothing to do."""

    def release_context(self):
        """Nothing to do."""


def _check_context(glctx) -> None:
    if not isinstance(glctx, _Context):
        raise TypeError(f"glctx: expected RasterizeCudaContext or RasterizeGLContext, got {type(glctx).__name__}")


def _ranges(pos, ranges):
    """The original ignores ranges in instanced mode, where pos has a batch dimension."""
    return None if isinstance(pos, torch.Tensor) and pos.dim() == 3 else ranges


def rasterize(glctx, pos, tri, resolution, ranges=None, grad_db=True):
    """-> rast, rast_db; see ops.rasterize."""
    _check_context(glctx)
    if glctx.active_depth_peeler is not None:
        raise RuntimeError("glctx: rasterize cannot be called while a DepthPeeler of the same context is active")
    return ops.rasterize(pos, tri, resolution, _ranges(pos, ranges), grad_db)


class DepthPeeler:
    """with DepthPeeler(glctx, pos, tri, resolution) as peeler: peeler.rasterize_next_layer() -> rast, rast_db"""

    def __init__(self, glctx, pos, tri, resolution, ranges=None, grad_db=True):
        _check_context(glctx)
        self._context = glctx
        self._peeler = ops.DepthPeeler(pos, tri, resolution, _ranges(pos, ranges), grad_db)

    def __enter__(self):
        if self._context.active_depth_peeler is not None:
            raise RuntimeError("glctx: another DepthPeeler of this context is active")
        self._context.active_depth_peeler = self
        self._peeler.__enter__()
        return self

    def __exit__(self, *exception):
        self._context.active_depth_peeler = None
        return self._peeler.__exit__(*exception)

    def rasterize_next_layer(self):
        return self._peeler.rasterize_next_layer()


def interpolate(attr, rast, tri, rast_db=None, diff_attrs=None):
    """-> attributes, their image-space derivatives; see ops.interpolate."""
    return ops.interpolate(attr, rast, tri, rast_db, diff_attrs)


def texture(tex, uv, uv_da=None, mip_level_bias=None, mip=None, filter_mode="auto", boundary_mode="wrap",
            max_mip_level=None):
    """-> samples; mip is a list of levels 1, 2, ... or what texture_construct_mip returns; see ops.texture."""
    return ops.texture(tex, uv, uv_da, mip_level_bias, mip, filter_mode, boundary_mode, max_mip_level)


def texture_construct_mip(tex, max_mip_level=None, cube_mode=False):
    """Levels 1, 2, ... for `texture`'s mip; gradients flow through them to tex. Rebuild it when tex changes."""
    return ops.mip_stack(tex, max_mip_level, boundary_mode="cube" if cube_mode else "wrap")


def antialias(color, rast, pos, tri, topology_hash=None, pos_gradient_boost=1.0):
    """-> the image with blended silhouettes; see ops.antialias."""
    return ops.antialias(color, rast, pos, tri, topology_hash, pos_gradient_boost)


def antialias_construct_topology_hash(tri):
    """The mesh's topology, for `antialias`; reusable while tri does not change."""
    return ops.antialias_topology(tri)


def get_log_level():
    """0 info, 1 warning, 2 error, 3 fatal."""
    return _LEVELS.index(_log.level) if _log.level in _LEVELS else 1


def set_log_level(level):
    if level not in range(len(_LEVELS)):
        raise ValueError(f"level: expected 0 to {len(_LEVELS) - 1}, got {level!r}")
    _log.setLevel(_LEVELS[level])


__all__ = [
    "DepthPeeler",
    "RasterizeCudaContext",
    "RasterizeGLContext",
    "antialias",
    "antialias_construct_topology_hash",
    "get_log_level",
    "interpolate",
    "rasterize",
    "set_log_level",
    "texture",
    "texture_construct_mip",
]
