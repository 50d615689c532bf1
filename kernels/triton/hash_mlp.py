"""Triton twin of csrc/hash_mlp: encoding and network of a block of points in registers.

A feature is a column of layer 0: as soon as a level is looked up, its features go into that layer's sums, so that the
encoding is never in one piece. Sums into params use atomics, those into weights buffers of programs that stay.
"""

import triton
import triton.language as tl
from text3d_fast._triton.hash_grid import _cells, _constants, _entry, _level_table, _store_vectors, _weight
from text3d_fast._triton.launch import LAUNCH, programs
from text3d_fast._triton.mlp import _output, _reverse, _rows, _value, _values, launch_of, network_of
from text3d_fast.ops.specs import HashGridSpec


@triton.jit
def _feature(table, f, axes, first, wrap, there, D: tl.constexpr, F: tl.constexpr, NEAREST: tl.constexpr):
    """Feature f of a level at the points."""
    value = tl.zeros(there.shape, tl.float32)
    for c in tl.static_range(1 if NEAREST else 1 << D):
        theta = tl.load(table + _entry(c, axes, first, wrap, D) * F + f, mask=there, other=0.0)
        value += _weight(c, axes, D) * theta
    return value


@triton.jit
def _column(weights, column, NET: tl.constexpr):
    """A column of W_0 [1, outs]."""
    n = tl.arange(0, NET.padded_outs[0])[None, :]
    return tl.load(weights + n * NET.inputs + column, n < NET.outs[0], 0.0)


@triton.jit
def _first(x, table, weights, levels_ptr, rows, there, active, offset, NET: tl.constexpr, D: tl.constexpr,
           F: tl.constexpr, SMOOTH: tl.constexpr, NEAREST: tl.constexpr, CLIP: tl.constexpr):
    """W_0 of the encoding."""
    z = tl.zeros((rows.shape[0], NET.padded_outs[0]), tl.float32)
    for l in range(active):
        axes, first, wrap = _cells(x, rows, there, levels_ptr, l, offset, D, SMOOTH, NEAREST, CLIP)
        for f in tl.static_range(F):
            value = _feature(table, f, axes, first, wrap, there, D, F, NEAREST)
            z += value[:, None] * _column(weights, l * F + f, NET)
    return z


@triton.jit
def forward_kernel(x, table, weights, y, levels_ptr, points, active, offset, NET: tl.constexpr, D: tl.constexpr,
                   F: tl.constexpr, SMOOTH: tl.constexpr, NEAREST: tl.constexpr, CLIP: tl.constexpr,
                   BLOCK: tl.constexpr):
    rows, there = _rows(tl.program_id(0), points, BLOCK)
    first = _first(x, table, weights, levels_ptr, rows, there, active, offset, NET, D, F, SMOOTH, NEAREST, CLIP)
    z = _values(first, weights, NET)[NET.layers - 1]
    at, mask = _output(y, rows, there, NET)
    tl.store(at, _value(z, NET.kinds[NET.layers - 1]), mask)


@triton.jit
def backward_kernel(grad_y, x, table, weights, grad_x, grad_params, partial, levels_ptr, points, active, offset, size,
                    NET: tl.constexpr, NEED_X: tl.constexpr, NEED_PARAMS: tl.constexpr, NEED_WEIGHTS: tl.constexpr,
                    D: tl.constexpr, F: tl.constexpr, SMOOTH: tl.constexpr, NEAREST: tl.constexpr, CLIP: tl.constexpr,
                    BLOCK: tl.constexpr):
    gradient = partial + tl.program_id(0).to(tl.int64) * size
    n = tl.arange(0, NET.padded_outs[0])
    for tile in range(tl.program_id(0), tl.cdiv(points, BLOCK), tl.num_programs(0)):
        rows, there = _rows(tile, points, BLOCK)
        values = _first(x, table, weights, levels_ptr, rows, there, active, offset, NET, D, F, SMOOTH, NEAREST, CLIP)
        delta = _reverse(grad_y, rows, there, _values(values, weights, NET), weights, gradient, NET, NEED_WEIGHTS)
        sum_x = tl.zeros((BLOCK,), tl.float32)
        sum_y = tl.zeros((BLOCK,), tl.float32)
        sum_z = tl.zeros((BLOCK,), tl.float32)
        sum_w = tl.zeros((BLOCK,), tl.float32)
        for l in range(active):
            axes, first, wrap = _cells(x, rows, there, levels_ptr, l, offset, D, SMOOTH, NEAREST, CLIP)
            for f in tl.static_range(F):
                if NEED_WEIGHTS:
                    value = _feature(table, f, axes, first, wrap, there, D, F, NEAREST)
                    tl.atomic_add(gradient + n * NET.inputs + l * F + f, tl.sum(delta * value[:, None], 0),
                                  n < NET.outs[0], sem="relaxed")
                if NEED_PARAMS or NEED_X:
                    cotangent = tl.sum(delta * _column(weights, l * F + f, NET), 1)
                    for c in tl.static_range(1 if NEAREST else 1 << D):
                        entry = _entry(c, axes, first, wrap, D) * F + f
                        if NEED_PARAMS:
                            tl.atomic_add(grad_params + entry, _weight(c, axes, D) * cotangent, there, sem="relaxed")
                        if NEED_X and not NEAREST:
                            dot = tl.load(table + entry, there, 0.0) * cotangent
                            sum_x += _weight(c, axes, D, 0) * dot
                            sum_y += _weight(c, axes, D, 1) * dot
                            if D >= 3:
                                sum_z += _weight(c, axes, D, 2) * dot
                            if D == 4:
                                sum_w += _weight(c, axes, D, 3) * dot
        if NEED_X:
            _store_vectors(grad_x, rows, there, sum_x, sum_y, sum_z, sum_w, D)


def _grid_constants(grid: HashGridSpec) -> dict:
    return _constants(grid) | {"BLOCK": LAUNCH["mlp"].block}


def forward(x, table, weights, y, grid: HashGridSpec, active_levels: int, layout: tuple) -> None:
    network, points = network_of(0, *layout), x.shape[0]
    if points:
        forward_kernel[(programs(points, LAUNCH["mlp"].block),)](
            x, table, weights, y, _level_table(grid, x.device), points, active_levels, grid.offset, NET=network,
            **_grid_constants(grid), **launch_of(network))


def backward(grad_y, x, table, weights, grad_x, grad_params, grad_weights, partial, blocks, grid: HashGridSpec,
             active_levels: int, layout: tuple) -> None:
    network, points = network_of(0, *layout), x.shape[0]
    for sums in (partial, grad_params):
        if sums is not None:
            sums.zero_()
    if points:
        backward_kernel[(min(programs(points, LAUNCH["mlp"].block), blocks),)](
            grad_y, x, table, weights, x if grad_x is None else grad_x, x if grad_params is None else grad_params,
            x if partial is None else partial, _level_table(grid, x.device), points, active_levels, grid.offset,
            weights.shape[0], NET=network, NEED_X=grad_x is not None, NEED_PARAMS=grad_params is not None,
            NEED_WEIGHTS=grad_weights is not None, **_grid_constants(grid), **launch_of(network))
    if grad_weights is not None:
        grad_weights.copy_(partial.sum(0))


def compile_cases():
    """(kernel, signature, constants, launch) for the ahead-of-time check."""
    needs = dict.fromkeys(("NEED_X", "NEED_PARAMS", "NEED_WEIGHTS"), True)
    for grid, layout in ((HashGridSpec(dim=4, levels=3, features=4, kind="tiled", dialect="ngp",
                                       interpolation="smoothstep"), (12, 5, 33, 2, 2, 4, False)),
                         (HashGridSpec(), (32, 4, 64, 1, 1, 0, True))):
        for kernel, more in ((forward_kernel, {}), (backward_kernel, needs)):
            fixed = {"NET": network_of(0, *layout), **_grid_constants(grid), **more}
            types = {"points": "i32", "active": "i32", "size": "i32", "offset": "fp32", "levels_ptr": "*i32"}
            signature = {n: "constexpr" if n in fixed else types.get(n, "*fp32") for n in kernel.arg_names}
            yield kernel, signature, fixed, launch_of(fixed["NET"])
