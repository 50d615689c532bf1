"""One table of launch parameters: elements that a program takes, and its warps.

Chosen by register budget, at most 64 values a thread in a tile; what only a GPU can tell, which of several settings is
fastest, has not been told yet.
"""

from typing import NamedTuple

import triton


class Launch(NamedTuple):
    block: int  # elements (pixels, samples, vertices, ...) a program takes
    warps: int
    rays: int = 1  # rays a program takes, where it walks along several
    fuse: bool = True  # may multiplications and additions be fused? Not where several kernels must round alike


LAUNCH = {
    "antialias": Launch(128, 4),
    "composite": Launch(32, 1, 4),
    "fill": Launch(1024, 4),
    "interpolate": Launch(128, 4),
    "march_rays": Launch(32, 1, 4, fuse=False),
    "marching_tets": Launch(128, 4),
    "mlp": Launch(32, 4),
    "rasterize_pixels": Launch(128, 4, fuse=False),
    "rasterize_tiles": Launch(256, 4, fuse=False),
    "rasterize_triangles": Launch(32, 1, fuse=False),
    "segmented_scan": Launch(32, 1, 4),
    "texture": Launch(128, 4),
}
TILE_VALUES = 4096  # of a tile of elements by channels, four warps


def options(op: str) -> dict[str, int | bool]:
    """Keyword arguments of a kernel's launch."""
    return {"num_warps": LAUNCH[op].warps, "enable_fp_fusion": LAUNCH[op].fuse}


def padded(channels: int) -> int:
    """The smallest power of two that holds them; at least 1."""
    return triton.next_power_of_2(max(channels, 1))


def block_for(op: str, channels: int, rays: int = 1) -> int:
    """Elements a program takes if each has this many channels; at least 16."""
    launch = LAUNCH[op]
    return max(16, min(launch.block, TILE_VALUES * launch.warps // (4 * rays * padded(channels))))


def programs(count: int, block: int) -> int:
    return -(-count // block)
