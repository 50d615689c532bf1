"""Triton twins of csrc/hash_grid: same results, same arguments as the Params there. Sums into params use atomics.

Sixteen-bit tables are widened on load; arithmetic is float32. Indices within a level are uint32, addresses int64.
"""

import torch

import triton
import triton.language as tl
from text3d_fast.ops.specs import HashGridSpec

BLOCK = 128


@triton.jit
def _axis(x, scale, offset, factor, keep, SMOOTH: tl.constexpr):
    """One axis of the cells: what the lower and upper vertex add to the index, the weight, its two derivatives."""
    position = tl.minimum(tl.maximum(x * scale + offset, -2147483648.0), 2147483520.0)
    whole = tl.floor(position)
    t = position - whole
    low = whole.to(tl.int32).to(tl.uint32, bitcast=True) * factor
    if SMOOTH:
        weight = t * t * (3.0 - 2.0 * t)
        slope = t * (1.0 - t) * (6.0 * scale)
        curvature = (1.0 - 2.0 * t) * (6.0 * scale * scale)
    else:
        weight = t
        slope = t * 0.0 + scale
        curvature = t * 0.0
    return low, low + factor, (1.0 - weight) * keep, weight * keep, slope * keep, curvature * keep


@triton.jit
def _cells(x_ptr, rows, mask, levels_ptr, l, offset, D: tl.constexpr, SMOOTH: tl.constexpr, CLIP: tl.constexpr):
    """Cells of a block of points at level l: its axes (the third is neutral in 2D) and the level's constants."""
    scale = tl.load(levels_ptr + l * 8).to(tl.float32, bitcast=True)
    first = tl.load(levels_ptr + l * 8 + 1).to(tl.int64)
    count = tl.load(levels_ptr + l * 8 + 2).to(tl.uint32, bitcast=True)
    hashed = tl.load(levels_ptr + l * 8 + 3)
    factor_x = tl.load(levels_ptr + l * 8 + 4).to(tl.uint32, bitcast=True)
    factor_y = tl.load(levels_ptr + l * 8 + 5).to(tl.uint32, bitcast=True)
    factor_z = tl.load(levels_ptr + l * 8 + 6).to(tl.uint32, bitcast=True)
    x = tl.load(x_ptr + rows * D, mask=mask, other=0.0)
    y = tl.load(x_ptr + rows * D + 1, mask=mask, other=0.0)
    z = tl.load(x_ptr + rows * D + 2, mask=mask, other=0.0) if D == 3 else x
    keep = x * 0.0 + 1.0
    if CLIP:
        inside = (x >= 0.0) & (x <= 1.0) & (y >= 0.0) & (y <= 1.0) & (z >= 0.0) & (z <= 1.0)
        keep = tl.where(inside, 1.0, 0.0)
    one = x * 0.0 + 1.0
    axis_x = _axis(x, scale, offset, factor_x, keep, SMOOTH)  # one factor of each product belongs to this axis
    axis_y = _axis(y, scale, offset, factor_y, one, SMOOTH)
    axis_z = _axis(z, scale, offset, factor_z, one, SMOOTH)
    return axis_x, axis_y, axis_z, first, count, hashed


@triton.jit
def _entry(c: tl.constexpr, axis_x, axis_y, axis_z, first, count, hashed, D: tl.constexpr):
    """Table entries of corner c."""
    x = axis_x[1] if c & 1 else axis_x[0]
    y = axis_y[1] if c & 2 else axis_y[0]
    xored, added = x ^ y, x + y
    if D == 3:
        z = axis_z[1] if c & 4 else axis_z[0]
        xored, added = xored ^ z, added + z
    return first + (tl.where(hashed != 0, xored, added) % count).to(tl.int64)


@triton.jit
def _factor(bit: tl.constexpr, axis, order: tl.constexpr):
    """The weight of one axis, or its derivative of the given order."""
    if order == 0:
        factor = axis[3] if bit else axis[2]
    elif order == 1:
        factor = axis[4] if bit else -axis[4]
    else:
        factor = axis[5] if bit else -axis[5]
    return factor


@triton.jit
def _weight(c: tl.constexpr, axis_x, axis_y, axis_z, D: tl.constexpr, OX: tl.constexpr, OY: tl.constexpr,
            OZ: tl.constexpr):
    """The weight of corner c, differentiated OX, OY, OZ times along the axes."""
    product = _factor(c & 1, axis_x, OX) * _factor((c >> 1) & 1, axis_y, OY)
    if D == 3:
        product = product * _factor((c >> 2) & 1, axis_z, OZ)
    return product


@triton.jit
def _load(table_ptr, entries, mask, F: tl.constexpr):
    features = tl.arange(0, F)
    return tl.load(table_ptr + entries[:, None] * F + features[None, :], mask=mask[:, None], other=0.0).to(tl.float32)


@triton.jit
def forward_kernel(x_ptr, table_ptr, y_ptr, jacobian_ptr, levels_ptr, points, levels, active, offset,
                   D: tl.constexpr, F: tl.constexpr, SMOOTH: tl.constexpr, CLIP: tl.constexpr, JACOBIAN: tl.constexpr,
                   BLOCK: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < points
    l = tl.program_id(1)
    ax, ay, az, first, count, hashed = _cells(x_ptr, rows, mask, levels_ptr, l, offset, D, SMOOTH, CLIP)
    features = tl.arange(0, F)
    out = (rows[:, None] * levels + l) * F + features[None, :]
    present = rows < tl.where(l < active, points, 0)
    value = tl.zeros((BLOCK, F), tl.float32)
    slope_x = tl.zeros((BLOCK, F), tl.float32)
    slope_y = tl.zeros((BLOCK, F), tl.float32)
    slope_z = tl.zeros((BLOCK, F), tl.float32)
    for c in tl.static_range(1 << D):
        theta = _load(table_ptr, _entry(c, ax, ay, az, first, count, hashed, D), present, F)
        value += _weight(c, ax, ay, az, D, 0, 0, 0)[:, None] * theta
        if JACOBIAN:
            slope_x += _weight(c, ax, ay, az, D, 1, 0, 0)[:, None] * theta
            slope_y += _weight(c, ax, ay, az, D, 0, 1, 0)[:, None] * theta
            if D == 3:
                slope_z += _weight(c, ax, ay, az, D, 0, 0, 1)[:, None] * theta
    tl.store(y_ptr + out, value, mask=mask[:, None])
    if JACOBIAN:
        tl.store(jacobian_ptr + out * D, slope_x, mask=mask[:, None])
        tl.store(jacobian_ptr + out * D + 1, slope_y, mask=mask[:, None])
        if D == 3:
            tl.store(jacobian_ptr + out * D + 2, slope_z, mask=mask[:, None])


@triton.jit
def backward_x_kernel(x_ptr, table_ptr, grad_y_ptr, grad_jacobian_ptr, grad_x_ptr, levels_ptr, points, levels, active,
                      offset, D: tl.constexpr, F: tl.constexpr, SMOOTH: tl.constexpr, CLIP: tl.constexpr,
                      JACOBIAN: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < points
    features = tl.arange(0, F)
    sum_x = tl.zeros((BLOCK,), tl.float32)
    sum_y = tl.zeros((BLOCK,), tl.float32)
    sum_z = tl.zeros((BLOCK,), tl.float32)
    for l in range(active):
        ax, ay, az, first, count, hashed = _cells(x_ptr, rows, mask, levels_ptr, l, offset, D, SMOOTH, CLIP)
        row = (rows[:, None] * levels + l) * F + features[None, :]
        grad_y = tl.load(grad_y_ptr + row, mask=mask[:, None], other=0.0)
        for c in tl.static_range(1 << D):
            theta = _load(table_ptr, _entry(c, ax, ay, az, first, count, hashed, D), mask, F)
            dot = tl.sum(theta * grad_y, 1)
            sum_x += _weight(c, ax, ay, az, D, 1, 0, 0) * dot
            sum_y += _weight(c, ax, ay, az, D, 0, 1, 0) * dot
            if D == 3:
                sum_z += _weight(c, ax, ay, az, D, 0, 0, 1) * dot
            if JACOBIAN:
                dot_x = tl.sum(theta * tl.load(grad_jacobian_ptr + row * D, mask=mask[:, None], other=0.0), 1)
                dot_y = tl.sum(theta * tl.load(grad_jacobian_ptr + row * D + 1, mask=mask[:, None], other=0.0), 1)
                dot_z = dot_x * 0.0
                if D == 3:
                    dot_z = tl.sum(theta * tl.load(grad_jacobian_ptr + row * D + 2, mask=mask[:, None], other=0.0), 1)
                more_x, more_y, more_z = _second_weights(c, ax, ay, az, D, dot_x, dot_y, dot_z)
                sum_x += more_x
                sum_y += more_y
                sum_z += more_z
    tl.store(grad_x_ptr + rows * D, sum_x, mask=mask)
    tl.store(grad_x_ptr + rows * D + 1, sum_y, mask=mask)
    if D == 3:
        tl.store(grad_x_ptr + rows * D + 2, sum_z, mask=mask)


@triton.jit
def _second_weights(c: tl.constexpr, ax, ay, az, D: tl.constexpr, along_x, along_y, along_z):
    """The matrix of second derivatives of corner c's weight, times a vector."""
    xy = _weight(c, ax, ay, az, D, 1, 1, 0)
    out_x = _weight(c, ax, ay, az, D, 2, 0, 0) * along_x + xy * along_y
    out_y = _weight(c, ax, ay, az, D, 0, 2, 0) * along_y + xy * along_x
    out_z = along_z * 0.0
    if D == 3:
        xz = _weight(c, ax, ay, az, D, 1, 0, 1)
        yz = _weight(c, ax, ay, az, D, 0, 1, 1)
        out_x += xz * along_z
        out_y += yz * along_z
        out_z = _weight(c, ax, ay, az, D, 0, 0, 2) * along_z + xz * along_x + yz * along_y
    return out_x, out_y, out_z


@triton.jit
def _first_weight(c: tl.constexpr, ax, ay, az, D: tl.constexpr, along_x, along_y, along_z):
    """The gradient of corner c's weight, times a vector."""
    weight = _weight(c, ax, ay, az, D, 1, 0, 0) * along_x + _weight(c, ax, ay, az, D, 0, 1, 0) * along_y
    if D == 3:
        weight += _weight(c, ax, ay, az, D, 0, 0, 1) * along_z
    return weight


@triton.jit
def _vectors(ptr, rows, mask, D: tl.constexpr):
    x = tl.load(ptr + rows * D, mask=mask, other=0.0)
    y = tl.load(ptr + rows * D + 1, mask=mask, other=0.0)
    z = tl.load(ptr + rows * D + 2, mask=mask, other=0.0) if D == 3 else x * 0.0
    return x, y, z


@triton.jit
def second_points_kernel(x_ptr, table_ptr, grad_y_ptr, toward_ptr, cotangent_params_ptr, grad_grad_y_ptr, grad_x_ptr,
                         levels_ptr, points, levels, active, offset, D: tl.constexpr, F: tl.constexpr,
                         SMOOTH: tl.constexpr, CLIP: tl.constexpr, TOWARD: tl.constexpr, PARAMS: tl.constexpr,
                         GRAD_X: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < points
    features = tl.arange(0, F)
    sum_x = tl.zeros((BLOCK,), tl.float32)
    sum_y = tl.zeros((BLOCK,), tl.float32)
    sum_z = tl.zeros((BLOCK,), tl.float32)
    for l in range(levels):
        ax, ay, az, first, count, hashed = _cells(x_ptr, rows, mask, levels_ptr, l, offset, D, SMOOTH, CLIP)
        row = (rows[:, None] * levels + l) * F + features[None, :]
        present = rows < tl.where(l < active, points, 0)
        grad_y = tl.load(grad_y_ptr + row, mask=present[:, None], other=0.0)
        grad_grad_y = tl.zeros((BLOCK, F), tl.float32)
        for c in tl.static_range(1 << D):
            entries = _entry(c, ax, ay, az, first, count, hashed, D)
            if TOWARD:
                to_x, to_y, to_z = _vectors(toward_ptr, rows, present, D)
                theta = _load(table_ptr, entries, present, F)
                grad_grad_y += _first_weight(c, ax, ay, az, D, to_x, to_y, to_z)[:, None] * theta
                dot = tl.sum(theta * grad_y, 1)
                more_x, more_y, more_z = _second_weights(c, ax, ay, az, D, to_x * dot, to_y * dot, to_z * dot)
                sum_x += more_x
                sum_y += more_y
                sum_z += more_z
            if PARAMS:
                theta = _load(cotangent_params_ptr, entries, present, F)
                grad_grad_y += _weight(c, ax, ay, az, D, 0, 0, 0)[:, None] * theta
                dot = tl.sum(theta * grad_y, 1)
                sum_x += _weight(c, ax, ay, az, D, 1, 0, 0) * dot
                sum_y += _weight(c, ax, ay, az, D, 0, 1, 0) * dot
                if D == 3:
                    sum_z += _weight(c, ax, ay, az, D, 0, 0, 1) * dot
        tl.store(grad_grad_y_ptr + row, grad_grad_y, mask=mask[:, None])
    if GRAD_X:
        tl.store(grad_x_ptr + rows * D, sum_x, mask=mask)
        tl.store(grad_x_ptr + rows * D + 1, sum_y, mask=mask)
        if D == 3:
            tl.store(grad_x_ptr + rows * D + 2, sum_z, mask=mask)


@triton.jit
def scatter_kernel(x_ptr, grad_y_ptr, grad_jacobian_ptr, toward_ptr, grad_params_ptr, levels_ptr, points, levels,
                   offset, D: tl.constexpr, F: tl.constexpr, SMOOTH: tl.constexpr, CLIP: tl.constexpr,
                   JACOBIAN: tl.constexpr, TOWARD: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < points
    l = tl.program_id(1)
    features = tl.arange(0, F)
    ax, ay, az, first, count, hashed = _cells(x_ptr, rows, mask, levels_ptr, l, offset, D, SMOOTH, CLIP)
    row = (rows[:, None] * levels + l) * F + features[None, :]
    grad_y = tl.load(grad_y_ptr + row, mask=mask[:, None], other=0.0)
    for c in tl.static_range(1 << D):
        if TOWARD:
            to_x, to_y, to_z = _vectors(toward_ptr, rows, mask, D)
            values = _first_weight(c, ax, ay, az, D, to_x, to_y, to_z)[:, None] * grad_y
        else:
            values = _weight(c, ax, ay, az, D, 0, 0, 0)[:, None] * grad_y
        if JACOBIAN:
            outer = tl.load(grad_jacobian_ptr + row * D, mask=mask[:, None], other=0.0)
            values += _weight(c, ax, ay, az, D, 1, 0, 0)[:, None] * outer
            outer = tl.load(grad_jacobian_ptr + row * D + 1, mask=mask[:, None], other=0.0)
            values += _weight(c, ax, ay, az, D, 0, 1, 0)[:, None] * outer
            if D == 3:
                outer = tl.load(grad_jacobian_ptr + row * D + 2, mask=mask[:, None], other=0.0)
                values += _weight(c, ax, ay, az, D, 0, 0, 1)[:, None] * outer
        entries = _entry(c, ax, ay, az, first, count, hashed, D)
        tl.atomic_add(grad_params_ptr + entries[:, None] * F + features[None, :], values, mask=mask[:, None],
                      sem="relaxed")


_levels: dict[tuple[str, torch.device], torch.Tensor] = {}


def _level_table(spec: HashGridSpec, device: torch.device) -> torch.Tensor:
    """int32 [levels, 8]: bits of the scale, first entry, entries, hashed, the factor of each axis."""
    if (spec.key, device) not in _levels:
        rows = torch.zeros(spec.levels, 8, dtype=torch.int64)
        rows[:, 0] = torch.tensor(spec.level_scales, dtype=torch.float32).view(torch.int32)
        offsets = torch.tensor(spec.level_offsets)
        rows[:, 1], rows[:, 2] = offsets[:-1], offsets.diff()
        rows[:, 3] = torch.tensor(spec.level_hashed)
        for l in range(spec.levels):
            rows[l, 4 : 4 + spec.dim] = torch.tensor(spec.level_factors(l))
        wrapped = torch.where(rows >= 2**31, rows - 2**32, rows)
        _levels[spec.key, device] = wrapped.int().to(device)
    return _levels[spec.key, device]


def _constants(spec: HashGridSpec) -> dict:
    return {"D": spec.dim, "F": spec.features, "SMOOTH": spec.interpolation == "smoothstep",
            "CLIP": spec.dialect == "ngp", "BLOCK": BLOCK}


def forward(x, table, y, jacobian, spec: HashGridSpec, active_levels: int) -> None:
    if not x.shape[0]:
        return
    grid = (triton.cdiv(x.shape[0], BLOCK), spec.levels)
    forward_kernel[grid](x, table, y, y if jacobian is None else jacobian, _level_table(spec, x.device), x.shape[0],
                         spec.levels, active_levels, spec.offset, JACOBIAN=jacobian is not None, **_constants(spec))


def _scatter(x, grad_y, grad_jacobian, toward, grad_params, spec, active_levels):
    grad_params.zero_()
    if not x.shape[0] or not active_levels:
        return
    grid = (triton.cdiv(x.shape[0], BLOCK), active_levels)
    scatter_kernel[grid](x, grad_y, x if grad_jacobian is None else grad_jacobian, x if toward is None else toward,
                         grad_params, _level_table(spec, x.device), x.shape[0], spec.levels, spec.offset,
                         JACOBIAN=grad_jacobian is not None, TOWARD=toward is not None, **_constants(spec))


def backward(x, table, grad_y, grad_jacobian, grad_x, grad_params, spec: HashGridSpec, active_levels: int) -> None:
    if grad_x is not None and x.shape[0]:
        backward_x_kernel[(triton.cdiv(x.shape[0], BLOCK),)](
            x, table, grad_y, x if grad_jacobian is None else grad_jacobian, grad_x, _level_table(spec, x.device),
            x.shape[0], spec.levels, active_levels, spec.offset, JACOBIAN=grad_jacobian is not None, **_constants(spec))
    if grad_params is not None:
        _scatter(x, grad_y, grad_jacobian, None, grad_params, spec, active_levels)


def second(x, table, grad_y, cotangent_x, cotangent_params, grad_grad_y, grad_x, grad_params, spec: HashGridSpec,
           active_levels: int) -> None:
    if x.shape[0]:
        second_points_kernel[(triton.cdiv(x.shape[0], BLOCK),)](
            x, table, grad_y, x if cotangent_x is None else cotangent_x,
            x if cotangent_params is None else cotangent_params, grad_grad_y, x if grad_x is None else grad_x,
            _level_table(spec, x.device), x.shape[0], spec.levels, active_levels, spec.offset,
            TOWARD=cotangent_x is not None, PARAMS=cotangent_params is not None, GRAD_X=grad_x is not None,
            **_constants(spec))
    if grad_params is not None:
        _scatter(x, grad_y, None, cotangent_x, grad_params, spec, active_levels)


def compile_cases() -> list[tuple]:
    """(kernel, signature, constants) to compile ahead of time."""
    flags = {"D": "constexpr", "F": "constexpr", "SMOOTH": "constexpr", "CLIP": "constexpr", "BLOCK": "constexpr"}
    sizes = {"points": "i32", "levels": "i32"}

    def case(kernel, pointers, scalars, dim, features, smooth, more):
        signature = {**pointers, "levels_ptr": "*i32", **scalars, **flags, **dict.fromkeys(more, "constexpr")}
        ordered = {name: signature[name] for name in kernel.arg_names}
        return kernel, ordered, {"D": dim, "F": features, "SMOOTH": smooth, "CLIP": smooth, "BLOCK": BLOCK, **more}

    cases = []
    for dim, features, table, on in ((3, 2, "*fp16", True), (3, 2, "*fp32", False), (2, 8, "*bf16", True)):
        float32 = "*fp32"
        cases += [
            case(forward_kernel, {"x_ptr": float32, "table_ptr": table, "y_ptr": float32, "jacobian_ptr": float32},
                 {**sizes, "active": "i32", "offset": "fp32"}, dim, features, on, {"JACOBIAN": on}),
            case(backward_x_kernel, {"x_ptr": float32, "table_ptr": table, "grad_y_ptr": float32,
                                     "grad_jacobian_ptr": float32, "grad_x_ptr": float32},
                 {**sizes, "active": "i32", "offset": "fp32"}, dim, features, on, {"JACOBIAN": on}),
            case(second_points_kernel, {"x_ptr": float32, "table_ptr": table, "grad_y_ptr": float32,
                                        "toward_ptr": float32, "cotangent_params_ptr": float32,
                                        "grad_grad_y_ptr": float32, "grad_x_ptr": float32},
                 {**sizes, "active": "i32", "offset": "fp32"}, dim, features, on,
                 {"TOWARD": True, "PARAMS": on, "GRAD_X": True}),
            case(scatter_kernel, {"x_ptr": float32, "grad_y_ptr": float32, "grad_jacobian_ptr": float32,
                                  "toward_ptr": float32, "grad_params_ptr": float32},
                 {**sizes, "offset": "fp32"}, dim, features, on, {"JACOBIAN": False, "TOWARD": on}),
        ]
    return cases
