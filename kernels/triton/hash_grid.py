"""Triton twins of csrc/hash_grid: same results, same arguments as the Params there. Sums into params use atomics.

Sixteen-bit tables are widened on load; arithmetic is float32. Indices within a level are uint32, addresses int64.
"""

import torch

import triton
import triton.language as tl
from text3d_fast.ops.specs import HashGridSpec

BLOCK = 128


@triton.jit
def _axis(x, scale, offset, factor, keep, SMOOTH: tl.constexpr, NEAREST: tl.constexpr):
    """One axis of the cells: what the lower and upper vertex add to the index, the weights, their two derivatives."""
    position = tl.minimum(tl.maximum(x * scale + offset, -2147483648.0), 2147483520.0)
    whole = tl.floor(position)
    t = position - whole
    low = whole.to(tl.int32).to(tl.uint32, bitcast=True) * factor
    if SMOOTH:
        weight = t * t * (3.0 - 2.0 * t)
        slope = t * (1.0 - t) * (6.0 * scale)
        curvature = (1.0 - 2.0 * t) * (6.0 * scale * scale)
    else:
        weight = t * 0.0 if NEAREST else t
        slope = t * 0.0 if NEAREST else t * 0.0 + scale
        curvature = t * 0.0
    return low, low + factor, (1.0 - weight) * keep, weight * keep, slope * keep, curvature * keep


@triton.jit
def _cells(x_ptr, rows, mask, levels_ptr, l, offset, D: tl.constexpr, SMOOTH: tl.constexpr, NEAREST: tl.constexpr,
           CLIP: tl.constexpr):
    """Cells of a block of points at level l: its four axes (those beyond D repeat the first) and the level's first
    entry, entries, their reciprocal, and whether it is hashed."""
    level = levels_ptr + l * 16
    scale = tl.load(level).to(tl.float32, bitcast=True)
    first = tl.load(level + 1).to(tl.int64)
    count = tl.load(level + 2).to(tl.uint32, bitcast=True)
    hashed = tl.load(level + 3)
    reciprocal = tl.load(level + 4).to(tl.uint32, bitcast=True)
    factor_x = tl.load(level + 5).to(tl.uint32, bitcast=True)
    factor_y = tl.load(level + 6).to(tl.uint32, bitcast=True)
    factor_z = tl.load(level + 7).to(tl.uint32, bitcast=True)
    factor_w = tl.load(level + 8).to(tl.uint32, bitcast=True)
    x, y, z, w = _vectors(x_ptr, rows, mask, D)
    one = x * 0.0 + 1.0
    keep = one
    if CLIP:
        inside = (x >= 0.0) & (x <= 1.0) & (y >= 0.0) & (y <= 1.0) & (z >= 0.0) & (z <= 1.0) & (w >= 0.0) & (w <= 1.0)
        keep = tl.where(inside, 1.0, 0.0)
    axis_x = _axis(x, scale, offset, factor_x, keep, SMOOTH, NEAREST)  # one factor of each product belongs to this axis
    axis_y = _axis(y, scale, offset, factor_y, one, SMOOTH, NEAREST)
    axis_z = _axis(z, scale, offset, factor_z, one, SMOOTH, NEAREST)
    axis_w = _axis(w, scale, offset, factor_w, one, SMOOTH, NEAREST)
    return (axis_x, axis_y, axis_z, axis_w), first, (count, reciprocal, hashed)


@triton.jit
def _entry(c: tl.constexpr, axes, first, wrap, D: tl.constexpr):
    """Table entries of corner c. A hashed level has 2^k entries; the others' remainders come from a reciprocal,
    floor(2^32 / entries), whose quotient is right or one too small."""
    x = axes[0][1] if c & 1 else axes[0][0]
    y = axes[1][1] if c & 2 else axes[1][0]
    xored, added = x ^ y, x + y
    if D >= 3:
        z = axes[2][1] if c & 4 else axes[2][0]
        xored, added = xored ^ z, added + z
    if D == 4:
        w = axes[3][1] if c & 8 else axes[3][0]
        xored, added = xored ^ w, added + w
    count, reciprocal, hashed = wrap
    rest = added - tl.umulhi(added, added * 0 + reciprocal) * count
    rest = tl.minimum(rest, rest - count)
    return first + tl.where(hashed != 0, xored & (count - 1), rest).to(tl.int64)


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
def _weight(c: tl.constexpr, axes, D: tl.constexpr, A: tl.constexpr = -1, B: tl.constexpr = -1):
    """The weight of corner c, differentiated along the axes A and B where they are not -1."""
    product = _factor(c & 1, axes[0], (A == 0) + (B == 0)) * _factor((c >> 1) & 1, axes[1], (A == 1) + (B == 1))
    if D >= 3:
        product = product * _factor((c >> 2) & 1, axes[2], (A == 2) + (B == 2))
    if D == 4:
        product = product * _factor((c >> 3) & 1, axes[3], (A == 3) + (B == 3))
    return product


@triton.jit
def _along(c: tl.constexpr, axes, vector, D: tl.constexpr, A: tl.constexpr = -1):
    """The gradient of corner c's weight (differentiated along axis A where it is not -1), times a vector."""
    total = _weight(c, axes, D, 0, A) * vector[0] + _weight(c, axes, D, 1, A) * vector[1]
    if D >= 3:
        total += _weight(c, axes, D, 2, A) * vector[2]
    if D == 4:
        total += _weight(c, axes, D, 3, A) * vector[3]
    return total


@triton.jit
def _vectors(ptr, rows, mask, D: tl.constexpr):
    """Four coordinates; those beyond D repeat the first."""
    x = tl.load(ptr + rows * D, mask=mask, other=0.0)
    y = tl.load(ptr + rows * D + 1, mask=mask, other=0.0)
    z = tl.load(ptr + rows * D + 2, mask=mask, other=0.0) if D >= 3 else x
    w = tl.load(ptr + rows * D + 3, mask=mask, other=0.0) if D == 4 else x
    return x, y, z, w


@triton.jit
def _store_vectors(ptr, rows, mask, x, y, z, w, D: tl.constexpr):
    tl.store(ptr + rows * D, x, mask=mask)
    tl.store(ptr + rows * D + 1, y, mask=mask)
    if D >= 3:
        tl.store(ptr + rows * D + 2, z, mask=mask)
    if D == 4:
        tl.store(ptr + rows * D + 3, w, mask=mask)


@triton.jit
def _load(table_ptr, entries, mask, F: tl.constexpr):
    features = tl.arange(0, F)
    return tl.load(table_ptr + entries[:, None] * F + features[None, :], mask=mask[:, None], other=0.0).to(tl.float32)


@triton.jit
def forward_kernel(x_ptr, table_ptr, y_ptr, jacobian_ptr, levels_ptr, points, levels, active, offset,
                   D: tl.constexpr, F: tl.constexpr, SMOOTH: tl.constexpr, NEAREST: tl.constexpr, CLIP: tl.constexpr,
                   JACOBIAN: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < points
    l = tl.program_id(1)
    axes, first, wrap = _cells(x_ptr, rows, mask, levels_ptr, l, offset, D, SMOOTH, NEAREST, CLIP)
    features = tl.arange(0, F)
    out = (rows[:, None] * levels + l) * F + features[None, :]
    present = rows < tl.where(l < active, points, 0)
    value = tl.zeros((BLOCK, F), tl.float32)
    slope_x = tl.zeros((BLOCK, F), tl.float32)
    slope_y = tl.zeros((BLOCK, F), tl.float32)
    slope_z = tl.zeros((BLOCK, F), tl.float32)
    slope_w = tl.zeros((BLOCK, F), tl.float32)
    for c in tl.static_range(1 if NEAREST else 1 << D):
        theta = _load(table_ptr, _entry(c, axes, first, wrap, D), present, F)
        value += _weight(c, axes, D)[:, None] * theta
        if JACOBIAN:
            slope_x += _weight(c, axes, D, 0)[:, None] * theta
            slope_y += _weight(c, axes, D, 1)[:, None] * theta
            if D >= 3:
                slope_z += _weight(c, axes, D, 2)[:, None] * theta
            if D == 4:
                slope_w += _weight(c, axes, D, 3)[:, None] * theta
    tl.store(y_ptr + out, value, mask=mask[:, None])
    if JACOBIAN:
        _store_vectors(jacobian_ptr, out, mask[:, None], slope_x, slope_y, slope_z, slope_w, D)


@triton.jit
def backward_x_kernel(x_ptr, table_ptr, grad_y_ptr, grad_jacobian_ptr, grad_x_ptr, levels_ptr, points, levels, active,
                      offset, D: tl.constexpr, F: tl.constexpr, SMOOTH: tl.constexpr, NEAREST: tl.constexpr,
                      CLIP: tl.constexpr, JACOBIAN: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < points
    features = tl.arange(0, F)
    sum_x = tl.zeros((BLOCK,), tl.float32)
    sum_y = tl.zeros((BLOCK,), tl.float32)
    sum_z = tl.zeros((BLOCK,), tl.float32)
    sum_w = tl.zeros((BLOCK,), tl.float32)
    for l in range(0 if NEAREST else active):
        axes, first, wrap = _cells(x_ptr, rows, mask, levels_ptr, l, offset, D, SMOOTH, NEAREST, CLIP)
        row = (rows[:, None] * levels + l) * F + features[None, :]
        grad_y = tl.load(grad_y_ptr + row, mask=mask[:, None], other=0.0)
        for c in tl.static_range(1 << D):
            theta = _load(table_ptr, _entry(c, axes, first, wrap, D), mask, F)
            dot = tl.sum(theta * grad_y, 1)
            sum_x += _weight(c, axes, D, 0) * dot
            sum_y += _weight(c, axes, D, 1) * dot
            if D >= 3:
                sum_z += _weight(c, axes, D, 2) * dot
            if D == 4:
                sum_w += _weight(c, axes, D, 3) * dot
            if JACOBIAN:
                outer_x, outer_y, outer_z, outer_w = _vectors(grad_jacobian_ptr, row, mask[:, None], D)
                dots = (tl.sum(theta * outer_x, 1), tl.sum(theta * outer_y, 1), tl.sum(theta * outer_z, 1),
                        tl.sum(theta * outer_w, 1))
                sum_x += _along(c, axes, dots, D, 0)
                sum_y += _along(c, axes, dots, D, 1)
                if D >= 3:
                    sum_z += _along(c, axes, dots, D, 2)
                if D == 4:
                    sum_w += _along(c, axes, dots, D, 3)
    _store_vectors(grad_x_ptr, rows, mask, sum_x, sum_y, sum_z, sum_w, D)


@triton.jit
def second_points_kernel(x_ptr, table_ptr, grad_y_ptr, toward_ptr, cotangent_params_ptr, grad_grad_y_ptr, grad_x_ptr,
                         levels_ptr, points, levels, active, offset, D: tl.constexpr, F: tl.constexpr,
                         SMOOTH: tl.constexpr, NEAREST: tl.constexpr, CLIP: tl.constexpr, TOWARD: tl.constexpr,
                         PARAMS: tl.constexpr, GRAD_X: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < points
    features = tl.arange(0, F)
    sum_x = tl.zeros((BLOCK,), tl.float32)
    sum_y = tl.zeros((BLOCK,), tl.float32)
    sum_z = tl.zeros((BLOCK,), tl.float32)
    sum_w = tl.zeros((BLOCK,), tl.float32)
    for l in range(levels):
        axes, first, wrap = _cells(x_ptr, rows, mask, levels_ptr, l, offset, D, SMOOTH, NEAREST, CLIP)
        row = (rows[:, None] * levels + l) * F + features[None, :]
        present = rows < tl.where(l < active, points, 0)
        grad_y = tl.load(grad_y_ptr + row, mask=present[:, None], other=0.0)
        grad_grad_y = tl.zeros((BLOCK, F), tl.float32)
        for c in tl.static_range(1 if NEAREST else 1 << D):
            entries = _entry(c, axes, first, wrap, D)
            if TOWARD and not NEAREST:
                toward = _vectors(toward_ptr, rows, present, D)
                theta = _load(table_ptr, entries, present, F)
                grad_grad_y += _along(c, axes, toward, D)[:, None] * theta
                dot = tl.sum(theta * grad_y, 1)
                sum_x += _along(c, axes, toward, D, 0) * dot
                sum_y += _along(c, axes, toward, D, 1) * dot
                if D >= 3:
                    sum_z += _along(c, axes, toward, D, 2) * dot
                if D == 4:
                    sum_w += _along(c, axes, toward, D, 3) * dot
            if PARAMS:
                theta = _load(cotangent_params_ptr, entries, present, F)
                grad_grad_y += _weight(c, axes, D)[:, None] * theta
                dot = tl.sum(theta * grad_y, 1)
                sum_x += _weight(c, axes, D, 0) * dot
                sum_y += _weight(c, axes, D, 1) * dot
                if D >= 3:
                    sum_z += _weight(c, axes, D, 2) * dot
                if D == 4:
                    sum_w += _weight(c, axes, D, 3) * dot
        tl.store(grad_grad_y_ptr + row, grad_grad_y, mask=mask[:, None])
    if GRAD_X:
        _store_vectors(grad_x_ptr, rows, mask, sum_x, sum_y, sum_z, sum_w, D)


@triton.jit
def scatter_kernel(x_ptr, grad_y_ptr, grad_jacobian_ptr, toward_ptr, grad_params_ptr, levels_ptr, points, levels,
                   offset, D: tl.constexpr, F: tl.constexpr, SMOOTH: tl.constexpr, NEAREST: tl.constexpr,
                   CLIP: tl.constexpr, JACOBIAN: tl.constexpr, TOWARD: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < points
    l = tl.program_id(1)
    features = tl.arange(0, F)
    axes, first, wrap = _cells(x_ptr, rows, mask, levels_ptr, l, offset, D, SMOOTH, NEAREST, CLIP)
    row = (rows[:, None] * levels + l) * F + features[None, :]
    grad_y = tl.load(grad_y_ptr + row, mask=mask[:, None], other=0.0)
    for c in tl.static_range(1 if NEAREST else 1 << D):
        if TOWARD:
            values = _along(c, axes, _vectors(toward_ptr, rows, mask, D), D)[:, None] * grad_y
        else:
            values = _weight(c, axes, D)[:, None] * grad_y
        if JACOBIAN and not NEAREST:
            outer_x, outer_y, outer_z, outer_w = _vectors(grad_jacobian_ptr, row, mask[:, None], D)
            values += _weight(c, axes, D, 0)[:, None] * outer_x
            values += _weight(c, axes, D, 1)[:, None] * outer_y
            if D >= 3:
                values += _weight(c, axes, D, 2)[:, None] * outer_z
            if D == 4:
                values += _weight(c, axes, D, 3)[:, None] * outer_w
        entries = _entry(c, axes, first, wrap, D)
        tl.atomic_add(grad_params_ptr + entries[:, None] * F + features[None, :], values, mask=mask[:, None],
                      sem="relaxed")


_levels: dict[tuple[str, torch.device], torch.Tensor] = {}


def _level_table(spec: HashGridSpec, device: torch.device) -> torch.Tensor:
    """int32 [levels, 16]: bits of the scale, first entry, entries, hashed, 2^32 / entries, the factor of each axis."""
    if (spec.key, device) not in _levels:
        rows = torch.zeros(spec.levels, 16, dtype=torch.int64)
        rows[:, 0] = torch.tensor(spec.level_scales, dtype=torch.float32).view(torch.int32)
        offsets = torch.tensor(spec.level_offsets)
        rows[:, 1], rows[:, 2] = offsets[:-1], offsets.diff()
        rows[:, 3] = torch.tensor(spec.level_hashed)
        rows[:, 4] = (2**32 // rows[:, 2]).clamp(max=2**32 - 1)
        for l in range(spec.levels):
            rows[l, 5 : 5 + spec.dim] = torch.tensor(spec.level_factors(l))
        wrapped = torch.where(rows >= 2**31, rows - 2**32, rows)
        _levels[spec.key, device] = wrapped.int().to(device)
    return _levels[spec.key, device]


def _constants(spec: HashGridSpec) -> dict:
    return {"D": spec.dim, "F": spec.features, "SMOOTH": spec.interpolation == "smoothstep",
            "NEAREST": spec.interpolation == "nearest", "CLIP": spec.dialect == "ngp", "BLOCK": BLOCK}


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
    flags = dict.fromkeys(("D", "F", "SMOOTH", "NEAREST", "CLIP", "BLOCK"), "constexpr")
    sizes = {"points": "i32", "levels": "i32"}

    def case(kernel, pointers, scalars, dim, features, interpolation, more):
        signature = {**pointers, "levels_ptr": "*i32", **scalars, **flags, **dict.fromkeys(more, "constexpr")}
        ordered = {name: signature[name] for name in kernel.arg_names}
        smooth, nearest = interpolation == "smoothstep", interpolation == "nearest"
        constants = {"D": dim, "F": features, "SMOOTH": smooth, "NEAREST": nearest, "CLIP": smooth, "BLOCK": BLOCK}
        return kernel, ordered, {**constants, **more}

    cases = []
    for dim, features, table, kind in ((3, 2, "*fp16", "smoothstep"), (4, 2, "*fp32", "linear"),
                                       (2, 8, "*bf16", "smoothstep"), (3, 4, "*fp16", "nearest")):
        float32, on = "*fp32", kind == "smoothstep"
        cases += [
            case(forward_kernel, {"x_ptr": float32, "table_ptr": table, "y_ptr": float32, "jacobian_ptr": float32},
                 {**sizes, "active": "i32", "offset": "fp32"}, dim, features, kind, {"JACOBIAN": on}),
            case(backward_x_kernel, {"x_ptr": float32, "table_ptr": table, "grad_y_ptr": float32,
                                     "grad_jacobian_ptr": float32, "grad_x_ptr": float32},
                 {**sizes, "active": "i32", "offset": "fp32"}, dim, features, kind, {"JACOBIAN": on}),
            case(second_points_kernel, {"x_ptr": float32, "table_ptr": table, "grad_y_ptr": float32,
                                        "toward_ptr": float32, "cotangent_params_ptr": float32,
                                        "grad_grad_y_ptr": float32, "grad_x_ptr": float32},
                 {**sizes, "active": "i32", "offset": "fp32"}, dim, features, kind,
                 {"TOWARD": True, "PARAMS": on, "GRAD_X": True}),
            case(scatter_kernel, {"x_ptr": float32, "grad_y_ptr": float32, "grad_jacobian_ptr": float32,
                                  "toward_ptr": float32, "grad_params_ptr": float32},
                 {**sizes, "offset": "fp32"}, dim, features, kind, {"JACOBIAN": False, "TOWARD": on}),
        ]
    return cases
