"""Running sums and products within segments of packed values."""

import torch

from text3d_fast import backends, native
from text3d_fast.ops.checks import float_dtypes, require_same_device, require_tensor
from text3d_fast.ops.registration import LastOrder, define
from text3d_fast.ops.typed import typed
from text3d_fast.reference.segmented_scan import segmented_scan as reference_segmented_scan

backends.declare("segmented_scan", triton=True)


@typed
def segmented_scan(
    values: torch.Tensor, offsets: torch.Tensor, op: str = "sum", exclusive: bool = False, reverse: bool = False
) -> torch.Tensor:
    """Running sums or products within segments, such as the rays of packed samples (segmented scan: Blelloch 1990).

    values: float32 [S]; offsets: int32 [N + 1], segment n is values[offsets[n] : offsets[n + 1]], as `ray_offsets` of
        `RaySamples`. op: "sum" or "product".
    Returns float32 [S]: of each value and those before it in its segment; exclusive: of those before it alone, 0 or 1
        for the first; reverse: of those behind it instead. What lies beyond the last offset is 0.
    Gradients to values: of a sum any number of times, of a product once, right also where factors are 0. No host
    synchronization. Kept for the backward pass: of a product its inputs.
    A segment's result depends on its own values alone, so NaN and infinity stay in it. A CPU adds and multiplies in
    double precision, a GPU in float32 as a tree.
    Raises ValueError or TypeError for wrong shapes, dtypes, devices or op; on a CPU also for offsets that do not rise.
    """
    if op not in ("sum", "product"):
        raise ValueError(f"op: expected 'sum' or 'product', got {op!r}")
    backend = backends.choose("segmented_scan", values.device)
    if backend == "reference":
        _check(values, offsets, op, exclusive, reverse, backend)
        return reference_segmented_scan(values, offsets, op, exclusive, reverse)
    return _scan(values, offsets, op, exclusive, reverse, backend)


def _check(values, offsets, op, exclusive, reverse, backend):
    require_tensor("values", values, ("values",), *float_dtypes(backend))
    require_tensor("offsets", offsets, ("segments + 1",), torch.int32)
    if offsets.shape[0] == 0:
        raise ValueError("offsets: expected shape [segments + 1], at least one entry, got [0]")
    require_same_device(values=values, offsets=offsets)


def _forward(values, offsets, op, exclusive, reverse, backend):
    values, offsets = native.aligned(values), native.aligned(offsets)
    out = torch.empty_like(values)
    backends.call(backend, "segmented_scan_forward", values, offsets, out, offsets.shape[0] - 1, values.shape[0],
                  op == "product", exclusive, reverse)
    return out


def _backward(grad, values, offsets, exclusive, reverse, backend):
    grad, values, offsets = native.aligned(grad), native.aligned(values), native.aligned(offsets)
    grad_values = torch.empty_like(values)
    backends.call(backend, "segmented_scan_backward", grad, values, offsets, grad_values, offsets.shape[0] - 1,
                  values.shape[0], exclusive, reverse)
    return grad_values


class _Derivative:
    @staticmethod
    def setup_context(ctx, inputs, output):
        values, offsets, *ctx.rest = inputs
        ctx.save_for_backward(values if ctx.rest[0] == "product" else None, offsets)

    @staticmethod
    def backward(ctx, grad):
        values, offsets = ctx.saved_tensors
        op, exclusive, reverse, backend = ctx.rest
        if op == "sum":
            gradient = _scan(grad, offsets, op, exclusive, not reverse, backend)
        else:
            gradient = _product_backward(grad, values, offsets, exclusive, reverse, backend)
        return gradient, None, None, None, None, None


_scan = define(
    "segmented_scan(Tensor values, Tensor offsets, str op, bool exclusive, bool reverse, str backend) -> Tensor",
    _forward,
    lambda values, *_: values.new_empty(values.shape),
    _Derivative,
    _check,
)
_product_backward = define(
    "segmented_scan_backward(Tensor grad, Tensor values, Tensor offsets, bool exclusive, bool reverse, str backend) "
    "-> Tensor",
    _backward,
    lambda grad, values, *_: values.new_empty(values.shape),
    LastOrder("segmented_scan_backward"),
)
