"""Triton twin of csrc/mlp: a program takes a block of points through all layers, activations in registers.

float32 factors are multiplied in six products of bfloat16 parts, exact to 2^-22, which tensor cores of every maker
have; sums are float32. Programs that sum gradients of weights stay, each with a buffer of its own, added up in order at
the end. Layer 0 may have more inputs than registers hold: they come in chunks.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from text3d_fast._triton.launch import LAUNCH, options, padded, programs

CHUNK = 64  # inputs at a time
PRECISION = "ieee" if triton.knobs.runtime.interpret else "bf16x6"
NONE, RELU, SILU, SOFTPLUS, SIGMOID, EXP, TANH = (tl.constexpr(i) for i in range(7))  # as in csrc/mlp/mlp.h
FLOAT16, BFLOAT16 = tl.constexpr(1), tl.constexpr(2)


class Network(NamedTuple):
    """A network as the kernels take it; tuples have an item a layer."""

    inputs: int
    width: int
    layers: int
    outs: tuple[int, ...]
    padded_outs: tuple[int, ...]  # powers of two, at least 16: what tl.dot takes
    kinds: tuple[int, ...]  # activations
    weights: tuple[int, ...]  # where W begins among the parameters
    bias: bool  # it follows W
    dtype: int  # of factors
    precision: str  # of products of float32
    chunk: int  # inputs of layer 0 at a time


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _value(z, KIND: tl.constexpr):
    if KIND == RELU:
        out = tl.maximum(z, 0.0)
    elif KIND == SILU:
        out = z * _sigmoid(z)
    elif KIND == SOFTPLUS:
        u = tl.exp(-tl.abs(z))
        s = u / (2.0 + u)  # log(1 + u) as 2 artanh(s), accurate for small u
        t = s * s
        series = ((((t / 13 + 1 / 11) * t + 1 / 9) * t + 1 / 7) * t + 1 / 5) * t + 1 / 3
        out = tl.maximum(z, 0.0) + 2.0 * s * (series * t + 1.0)
    elif KIND == SIGMOID:
        out = _sigmoid(z)
    elif KIND == EXP:
        out = tl.exp(z)
    elif KIND == TANH:
        out = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * z))
    else:
        out = z
    return out


@triton.jit
def _slope(z, KIND: tl.constexpr):
    if KIND == RELU:
        out = tl.where(z > 0.0, 1.0, 0.0)
    elif KIND == SILU:
        s = _sigmoid(z)
        out = s * (1.0 + z * (1.0 - s))
    elif KIND == SOFTPLUS:
        out = _sigmoid(z)
    elif KIND == SIGMOID:
        s = _sigmoid(z)
        out = s * (1.0 - s)
    elif KIND == EXP:
        out = tl.exp(z)
    elif KIND == TANH:
        t = _value(z, KIND)
        out = 1.0 - t * t
    else:
        out = z * 0.0 + 1.0
    return out


@triton.jit
def _curvature(z, KIND: tl.constexpr):
    if KIND == SILU:
        s = _sigmoid(z)
        out = s * (1.0 - s) * (2.0 + z * (1.0 - 2.0 * s))
    elif KIND == SOFTPLUS:
        s = _sigmoid(z)
        out = s * (1.0 - s)
    elif KIND == SIGMOID:
        s = _sigmoid(z)
        out = s * (1.0 - s) * (1.0 - 2.0 * s)
    elif KIND == EXP:
        out = tl.exp(z)
    elif KIND == TANH:
        t = _value(z, KIND)
        out = -2.0 * t * (1.0 - t * t)
    else:
        out = z * 0.0
    return out


@triton.jit
def _dot(a, b, NET: tl.constexpr):
    """a b with the factors rounded as the network says, sums in float32."""
    if NET.dtype == FLOAT16:
        out = tl.dot(a.to(tl.float16), b.to(tl.float16))
    elif NET.dtype == BFLOAT16:
        out = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    else:
        out = tl.dot(a, b, input_precision=NET.precision)
    return out


@triton.jit
def _weight(weights, out, into, NET: tl.constexpr, l: tl.constexpr):
    """W_l at rows `out` and columns `into`; W_l or its transposed, as their shapes say."""
    IN: tl.constexpr = NET.width if l > 0 else NET.inputs
    return tl.load(weights + NET.weights[l] + out * IN + into, (out < NET.outs[l]) & (into < IN), 0.0)


@triton.jit
def _bias(weights, NET: tl.constexpr, l: tl.constexpr):
    """b_l [1, outs], 0 without a bias."""
    n = tl.arange(0, NET.padded_outs[l])[None, :]
    IN: tl.constexpr = NET.width if l > 0 else NET.inputs
    return tl.load(weights + NET.weights[l] + NET.outs[l] * IN + n, (n < NET.outs[l]) & NET.bias, 0.0)


@triton.jit
def _input(x, rows, there, k, NET: tl.constexpr):
    """The points' inputs k."""
    return tl.load(x + rows[:, None] * NET.inputs + k[None, :], there[:, None] & (k < NET.inputs)[None, :], 0.0)


@triton.jit
def _first(x, rows, there, weights, NET: tl.constexpr):
    """W_0 x, the inputs in chunks."""
    n = tl.arange(0, NET.padded_outs[0])
    z = tl.zeros((rows.shape[0], NET.padded_outs[0]), tl.float32)
    for start in range(0, NET.inputs, NET.chunk):
        k = start + tl.arange(0, NET.chunk)
        z += _dot(_input(x, rows, there, k, NET), _weight(weights, n[None, :], k[:, None], NET, 0), NET)
    return z


@triton.jit
def _next(a, weights, NET: tl.constexpr, l: tl.constexpr):
    """W_l a, l > 0"""
    k, n = tl.arange(0, NET.padded_outs[l - 1]), tl.arange(0, NET.padded_outs[l])
    return _dot(a, _weight(weights, n[None, :], k[:, None], NET, l), NET)


@triton.jit
def _back(delta, weights, k, NET: tl.constexpr, l: tl.constexpr):
    """W_l^T delta at the layer's inputs k."""
    n = tl.arange(0, NET.padded_outs[l])
    return _dot(delta, _weight(weights, n[:, None], k[None, :], NET, l), NET)


@triton.jit
def _values(first, weights, NET: tl.constexpr):
    """z of all layers, given W_0 x."""
    zs = (first + _bias(weights, NET, 0),)
    for l in tl.static_range(1, NET.layers):
        z = _next(_value(zs[l - 1], NET.kinds[l - 1]), weights, NET, l) + _bias(weights, NET, l)
        zs = zs + (z,)  # noqa: RUF005  all the unpacking that Triton knows
    return zs


@triton.jit
def _add_weights(gradient, delta, a, k, NET: tl.constexpr, l: tl.constexpr):
    """gradient of W_l at its columns k += delta^T a. Atomic, as a thread may hold other parts of it each time."""
    IN: tl.constexpr = NET.width if l > 0 else NET.inputs
    n = tl.arange(0, NET.padded_outs[l])[:, None]
    tl.atomic_add(gradient + NET.weights[l] + n * IN + k[None, :], _dot(tl.trans(delta), a, NET),
                  (n < NET.outs[l]) & (k < IN)[None, :], sem="relaxed")


@triton.jit
def _add_bias(gradient, delta, NET: tl.constexpr, l: tl.constexpr):
    IN: tl.constexpr = NET.width if l > 0 else NET.inputs
    n = tl.arange(0, NET.padded_outs[l])
    tl.atomic_add(gradient + NET.weights[l] + NET.outs[l] * IN + n, tl.sum(delta, 0), n < NET.outs[l], sem="relaxed")


@triton.jit
def _rows(tile, points, BLOCK: tl.constexpr):
    rows = tl.full((BLOCK,), BLOCK, tl.int64) * tile + tl.arange(0, BLOCK)
    return rows, rows < points


@triton.jit
def _output(y, rows, there, NET: tl.constexpr):
    """Pointers to the points' outputs, and which there are."""
    n = tl.arange(0, NET.padded_outs[NET.layers - 1])
    OUT: tl.constexpr = NET.outs[NET.layers - 1]
    return y + rows[:, None] * OUT + n[None, :], there[:, None] & (n < OUT)[None, :]


@triton.jit
def _reverse(grad_y, rows, there, zs, weights, gradient, NET: tl.constexpr, NEED_WEIGHTS: tl.constexpr):
    """delta of layer 0; adds the gradients of all parameters but W_0."""
    at, mask = _output(grad_y, rows, there, NET)
    delta = tl.load(at, mask, 0.0) * _slope(zs[NET.layers - 1], NET.kinds[NET.layers - 1])
    for l in tl.static_range(NET.layers - 1, 0, -1):
        k = tl.arange(0, NET.padded_outs[l - 1])
        if NEED_WEIGHTS:
            _add_weights(gradient, delta, _value(zs[l - 1], NET.kinds[l - 1]), k, NET, l)
            if NET.bias:
                _add_bias(gradient, delta, NET, l)
        delta = _back(delta, weights, k, NET, l) * _slope(zs[l - 1], NET.kinds[l - 1])
    if NEED_WEIGHTS and NET.bias:
        _add_bias(gradient, delta, NET, 0)
    return delta


@triton.jit
def forward_kernel(x, weights, y, points, NET: tl.constexpr, BLOCK: tl.constexpr):
    rows, there = _rows(tl.program_id(0), points, BLOCK)
    z = _values(_first(x, rows, there, weights, NET), weights, NET)[NET.layers - 1]
    at, mask = _output(y, rows, there, NET)
    tl.store(at, _value(z, NET.kinds[NET.layers - 1]), mask)


@triton.jit
def backward_kernel(grad_y, x, weights, grad_x, partial, points, size, NET: tl.constexpr, NEED_X: tl.constexpr,
                    NEED_WEIGHTS: tl.constexpr, BLOCK: tl.constexpr):
    gradient = partial + tl.program_id(0).to(tl.int64) * size
    for tile in range(tl.program_id(0), tl.cdiv(points, BLOCK), tl.num_programs(0)):
        rows, there = _rows(tile, points, BLOCK)
        zs = _values(_first(x, rows, there, weights, NET), weights, NET)
        delta = _reverse(grad_y, rows, there, zs, weights, gradient, NET, NEED_WEIGHTS)
        for start in range(0, NET.inputs, NET.chunk):
            inputs = start + tl.arange(0, NET.chunk)
            if NEED_WEIGHTS:
                _add_weights(gradient, delta, _input(x, rows, there, inputs, NET), inputs, NET, 0)
            if NEED_X:
                tl.store(grad_x + rows[:, None] * NET.inputs + inputs[None, :], _back(delta, weights, inputs, NET, 0),
                         there[:, None] & (inputs < NET.inputs)[None, :])


@triton.jit
def second_kernel(cotangent_x, cotangent_weights, grad_y, x, weights, grad_grad_y, grad_x, partial, points, size,
                  NET: tl.constexpr, TOWARD_X: tl.constexpr, TOWARD_WEIGHTS: tl.constexpr, NEED_GRAD_Y: tl.constexpr,
                  NEED_X: tl.constexpr, NEED_WEIGHTS: tl.constexpr, BLOCK: tl.constexpr):
    """Tangents z' of all layers, then v and delta backward: see csrc/mlp/mlp.h."""
    gradient = partial + tl.program_id(0).to(tl.int64) * size
    for tile in range(tl.program_id(0), tl.cdiv(points, BLOCK), tl.num_programs(0)):
        rows, there = _rows(tile, points, BLOCK)
        zs = _values(_first(x, rows, there, weights, NET), weights, NET)
        moved = zs[0] * 0.0
        if TOWARD_X:
            moved += _first(cotangent_x, rows, there, weights, NET)
        if TOWARD_WEIGHTS:
            moved += _first(x, rows, there, cotangent_weights, NET) + _bias(cotangent_weights, NET, 0)
        tangents = (moved,)
        for l in tl.static_range(1, NET.layers):
            z = zs[l - 1]
            moved = _next(_slope(z, NET.kinds[l - 1]) * tangents[l - 1], weights, NET, l)
            if TOWARD_WEIGHTS:
                moved += _next(_value(z, NET.kinds[l - 1]), cotangent_weights, NET, l)
                moved += _bias(cotangent_weights, NET, l)
            tangents = tangents + (moved,)  # noqa: RUF005
        LAST: tl.constexpr = NET.layers - 1
        slope = _slope(zs[LAST], NET.kinds[LAST])
        if NEED_GRAD_Y:
            at, mask = _output(grad_grad_y, rows, there, NET)
            tl.store(at, slope * tangents[LAST], mask)
        at, mask = _output(grad_y, rows, there, NET)
        delta = tl.load(at, mask, 0.0)
        v = delta * tangents[LAST] * _curvature(zs[LAST], NET.kinds[LAST])
        delta *= slope
        for l in tl.static_range(NET.layers - 1, 0, -1):
            k, z = tl.arange(0, NET.padded_outs[l - 1]), zs[l - 1]
            inner = _slope(z, NET.kinds[l - 1])
            if NEED_WEIGHTS:
                _add_weights(gradient, v, _value(z, NET.kinds[l - 1]), k, NET, l)
                _add_weights(gradient, delta, inner * tangents[l - 1], k, NET, l)
                if NET.bias:
                    _add_bias(gradient, v, NET, l)
            f = _back(v, weights, k, NET, l)
            if TOWARD_WEIGHTS:
                f += _back(delta, cotangent_weights, k, NET, l)
            e = _back(delta, weights, k, NET, l)
            v = f * inner + e * tangents[l - 1] * _curvature(z, NET.kinds[l - 1])
            delta = e * inner
        if NEED_WEIGHTS and NET.bias:
            _add_bias(gradient, v, NET, 0)
        for start in range(0, NET.inputs, NET.chunk):
            inputs = start + tl.arange(0, NET.chunk)
            if NEED_WEIGHTS:
                _add_weights(gradient, v, _input(x, rows, there, inputs, NET), inputs, NET, 0)
                if TOWARD_X:
                    _add_weights(gradient, delta, _input(cotangent_x, rows, there, inputs, NET), inputs, NET, 0)
            if NEED_X:
                result = _back(v, weights, inputs, NET, 0)
                if TOWARD_WEIGHTS:
                    result += _back(delta, cotangent_weights, inputs, NET, 0)
                tl.store(grad_x + rows[:, None] * NET.inputs + inputs[None, :], result,
                         there[:, None] & (inputs < NET.inputs)[None, :])


def network_of(dtype, inputs, outputs, width, hidden_layers, activation, output_activation, bias) -> Network:
    outs = (width,) * hidden_layers + (outputs,)
    weights = [0]
    for into, out in zip((inputs, *outs), outs):
        weights.append(weights[-1] + out * (into + bias))
    kinds = (activation,) * hidden_layers + (output_activation,)
    return Network(inputs, width, len(outs), outs, tuple(max(16, padded(out)) for out in outs), kinds,
                   tuple(weights[:-1]), bool(bias), dtype, PRECISION, min(CHUNK, max(16, padded(inputs))))


def launch_of(network: Network) -> dict[str, int | bool]:
    """Wide matrices take twice the warps. One stage: pipelined loads take up to ten times the shared memory."""
    warps = LAUNCH["mlp"].warps * (2 if max(network.padded_outs) > CHUNK else 1)
    return options("mlp") | {"num_warps": warps, "num_stages": 1}


def mlp_forward(x, weights, y, points, *layout):
    network, block = network_of(*layout), LAUNCH["mlp"].block
    if points:
        forward_kernel[(programs(points, block),)](x, weights, y, points, network, block, **launch_of(network))


def mlp_backward(grad_y, x, weights, grad_x, grad_weights, partial, blocks, points, *layout):
    network, block, need = network_of(*layout), LAUNCH["mlp"].block, grad_weights is not None
    if need:
        partial.zero_()
    if points:
        backward_kernel[(min(programs(points, block), blocks),)](
            grad_y, x, weights, x if grad_x is None else grad_x, partial if need else x, points, weights.shape[0],
            network, grad_x is not None, need, block, **launch_of(network))
    if need:
        grad_weights.copy_(partial.sum(0))


def mlp_second(cotangent_x, cotangent_weights, grad_y, x, weights, grad_grad_y, grad_x, grad_weights, partial, blocks,
               points, *layout):
    network, block, need = network_of(*layout), LAUNCH["mlp"].block // 2, grad_weights is not None
    if need:
        partial.zero_()
    if points:
        second_kernel[(min(programs(points, block), blocks),)](
            x if cotangent_x is None else cotangent_x, weights if cotangent_weights is None else cotangent_weights,
            grad_y, x, weights, x if grad_grad_y is None else grad_grad_y,
            x if grad_x is None else grad_x, partial if need else x, points, weights.shape[0],
            network, cotangent_x is not None, cotangent_weights is not None, grad_grad_y is not None,
            grad_x is not None, need, block, **launch_of(network))
    if need:
        grad_weights.copy_(partial.sum(0))


def compile_cases():
    """(kernel, signature, constants, launch) for the ahead-of-time check."""
    block = LAUNCH["mlp"].block
    needs = "TOWARD_X", "TOWARD_WEIGHTS", "NEED_GRAD_Y", "NEED_X", "NEED_WEIGHTS"
    flags = {forward_kernel: {}, backward_kernel: dict.fromkeys(needs[3:], True),
             second_kernel: dict.fromkeys(needs, True)}
    for layout in ((2, 64, 3, 128, 3, 2, 4, True), (1, 130, 5, 33, 1, 3, 0, False), (0, 32, 4, 64, 1, 1, 0, True)):
        network = network_of(*layout)
        for kernel, needs in flags.items():
            fixed = {"NET": network, "BLOCK": block // 2 if kernel is second_kernel else block, **needs}
            types = {"points": "i32", "size": "i32"}
            signature = {n: "constexpr" if n in fixed else types.get(n, "*fp32") for n in kernel.arg_names}
            yield kernel, signature, fixed, launch_of(network)
