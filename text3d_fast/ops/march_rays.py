"""Sampling rays where an occupancy grid says there may be something."""

import math
from typing import Protocol

import torch

from text3d_fast import backends, native
from text3d_fast.ops.checks import check_values, float_dtypes, require_same_device, require_tensor
from text3d_fast.ops.registration import define
from text3d_fast.ops.samples import RaySamples
from text3d_fast.ops.typed import typed
from text3d_fast.reference.march_rays import march_rays as reference_march_rays

backends.declare("march_rays", triton=True)
MAX_LEVELS = 64
_RAYS_A_TILE = 1024  # kScanTile of csrc/common/scan.h
_RAY_BYTES, _RUNS_BYTES = 64, 200  # at least sizeof(MarchRay) and sizeof(MarchRuns), checked in the .cpp


class Occupancy(Protocol):
    """What `march_rays` needs of an occupancy grid; `nn.OccupancyGrid` is one.

    aabb: float [6] (x, y, z minima, then maxima); level i is the same box scaled by 2^i about its centre
    binaries: bool [levels, x, y, z], true where there may be something
    """

    aabb: torch.Tensor
    binaries: torch.Tensor


@typed
def march_rays(
    origins: torch.Tensor,
    directions: torch.Tensor,
    occupancy: Occupancy,
    near: float | torch.Tensor = 0.0,
    far: float | torch.Tensor = math.inf,
    step: float = 1e-2,
    jitter: torch.Tensor | None = None,
    cone_angle: float = 0.0,
    capacity: int | None = None,
) -> RaySamples:
    """Cut rays into intervals and keep those whose middle lies in an occupied cell.

    origins, directions: float32 [R, 3]; t counts in units of the direction's length, so normally unit vectors.
    near, far: a number or float32 [R]; the interval of t to sample. far may be infinite: the box ends the ray then.
    step: length of an interval in t. jitter: None or float32 [R] in [0, 1): intervals start at near + jitter * step
        instead of near. cone_angle: interval k has the length max(step, cone_angle * t_k).
    occupancy: `nn.OccupancyGrid`, or anything with `aabb` and `binaries`; a point is looked up in the innermost level
        that contains it, and is empty outside the outermost.
    Interval k is [t_k, min(t_{k+1}, far)], with t_k in closed form from k, so that far rays neither stall nor drift;
    none begins beyond far, and none that begins before far and has its middle in an occupied cell is missing.
    An axis-parallel ray is fine. Zero directions, near >= far and misses give no samples.

    capacity: None (exact): S is the number of samples; on a GPU one host synchronization to learn it.
        An int: S = capacity; no synchronization, can be captured in a CUDA graph. If more samples are found, the last
        are dropped and `overflow` (bool [], on the device) is true; read it when convenient, and allocate more.
    Returns RaySamples, sorted by ray and by t. Not differentiable: a sample's position is, through `.positions`.
    Raises ValueError or TypeError for wrong shapes, dtypes, devices, step <= 0 or cone_angle < 0, and for a grid of
    more than 64 levels, of 2^32 cells or more, or without any.
    NaN or infinite rays, rays that are in the box at times beyond 1e38 (a direction of 1e-38), or a box whose maxima
    are not above its minima: on a CPU ValueError; on a GPU no samples (TEXT3D_CHECK=1: ValueError).
    """
    if capacity is not None and not 0 <= capacity < 2**31:
        raise ValueError(f"capacity: expected None or a count below 2^31, got {capacity}")
    backend = backends.choose("march_rays", origins.device)
    near_number, near_tensor = (0.0, near) if isinstance(near, torch.Tensor) else (near, None)
    far_number, far_tensor = (0.0, far) if isinstance(far, torch.Tensor) else (far, None)
    binaries, aabb, room = occupancy.binaries, occupancy.aabb, -1 if capacity is None else capacity
    arguments = (origins, directions, binaries, aabb, near_tensor, far_tensor, jitter, near_number, far_number, step,
                 cone_angle, room, backend)
    if backend == "reference":
        _check(*arguments)
        *packed, overflow = reference_march_rays(origins, directions, binaries, aabb, near, far, jitter, step,
                                                 cone_angle, room)
    else:
        *packed, overflow = _march_rays(*arguments)
    return RaySamples(*packed, overflow=None if capacity is None else overflow)


def _check(origins, directions, binaries, aabb, near, far, jitter, near_number, far_number, step, cone_angle, capacity,
           backend):
    dtypes = float_dtypes(backend)
    require_tensor("origins", origins, ("rays", 3), *dtypes)
    rays = origins.shape[0]
    require_tensor("directions", directions, (rays, 3), *dtypes)
    require_tensor("occupancy.binaries", binaries, ("levels", "x", "y", "z"), torch.bool)
    if 0 in binaries.shape or binaries.shape[0] > MAX_LEVELS or binaries.numel() >= 2**32:
        raise ValueError(f"occupancy.binaries: expected 1 to {MAX_LEVELS} levels, sides of at least 1 and fewer than "
                         f"2^32 cells, got shape {list(binaries.shape)}")
    require_tensor("occupancy.aabb", aabb, (6,), *dtypes)
    for name, value in (("near", near), ("far", far), ("jitter", jitter)):
        if value is not None:
            require_tensor(name, value, (rays,), *dtypes)
    require_same_device(origins=origins, directions=directions, near=near, far=far, jitter=jitter,
                        **{"occupancy.binaries": binaries, "occupancy.aabb": aabb})
    if not 0 < step < math.inf:
        raise ValueError(f"step: expected a positive number, got {step}")
    if not 0 <= cone_angle < math.inf:
        raise ValueError(f"cone_angle: expected 0 or a positive number, got {cone_angle}")


def _march(origins, directions, binaries, aabb, near, far, jitter, near_number, far_number, step, cone_angle, capacity,
           backend):
    device, rays = origins.device, origins.shape[0]
    levels, x, y, z = binaries.shape
    inputs = (origins, directions, binaries, aabb, near, far, jitter)
    inputs = [None if t is None else native.aligned(t) for t in inputs]

    def scratch(size: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    on_cpu = device.type == "cpu"
    bits = scratch((levels * x * y * z + 31) // 32, torch.int32)
    blocks = scratch(levels * -(-x // 8) * -(-y // 8) * -(-z // 8)) if on_cpu else None
    states, runs = scratch(rays * _RAY_BYTES), scratch(rays * _RUNS_BYTES) if on_cpu else None
    offsets, info = scratch(rays + 1, torch.int32), scratch(4 + -(-rays // _RAYS_A_TILE), torch.int64)
    overflow = torch.empty((), dtype=torch.bool, device=device)

    def call(entry: str, room: int, ids=None, starts=None, ends=None) -> None:
        backends.call(backend, entry, *inputs, bits, blocks, states, runs, offsets, info, overflow, ids, starts, ends,
                      rays, room, levels, x, y, z, near_number, far_number, step, cone_angle)

    call("march_rays_count", capacity)
    exact = capacity < 0
    if exact or on_cpu or check_values():
        found, not_finite, too_many_steps, too_many_samples = info[:4].tolist()
        if not_finite and (on_cpu or check_values()):
            raise ValueError("march_rays: expected finite origins, directions and near, far not NaN, jitter in [0, 1), "
                             "times inside the box below 1e38, and occupancy.aabb with minima below its maxima; some "
                             "ray or the box has other values")
        if too_many_steps:
            raise ValueError(f"step: {step} cuts the part of some ray inside the box into more than 2^24 intervals")
        if too_many_samples:
            raise ValueError(f"march_rays: {found} samples, but at most 2^31 - 1 fit; increase step or split the rays")
    else:
        found = 0
    size = found if exact else capacity
    ids, starts, ends = scratch(size, torch.int32), origins.new_empty(size), origins.new_empty(size)
    call("march_rays_emit", size, ids, starts, ends)
    return ids, starts, ends, offsets, overflow


def _fake(origins, directions, binaries, aabb, near, far, jitter, near_number, far_number, step, cone_angle, capacity,
          backend):
    size = torch.library.get_ctx().new_dynamic_size() if capacity < 0 else capacity
    times = [origins.new_empty(size) for _ in range(2)]
    ids = origins.new_empty(size, dtype=torch.int32)
    offsets = origins.new_empty(origins.shape[0] + 1, dtype=torch.int32)
    return ids, *times, offsets, origins.new_empty((), dtype=torch.bool)


_march_rays = define(
    "march_rays(Tensor origins, Tensor directions, Tensor binaries, Tensor aabb, Tensor? near, Tensor? far, "
    "Tensor? jitter, float near_number, float far_number, float step, float cone_angle, int capacity, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _march,
    _fake,
    check=_check,
)
