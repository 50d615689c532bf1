"""Running sums and products along the last dimension, or along the rays of packed samples: ops.segmented_scan.

float64 goes through its reference, everything else is computed in float32 or better. Sums are differentiable any number
of times; products once, also at 0.
"""

import contextlib

import torch
from torch import Tensor

from text3d_fast import ops, use_backend
from text3d_fast.compat.nerfacc.pack import pack_info


def inclusive_sum(inputs: Tensor, packed_info: Tensor | None = None, indices: Tensor | None = None) -> Tensor:
    """The sum of each sample of a ray and those before it; inputs: [..., samples], or packed [all samples]."""
    if _is_batched(inputs, packed_info, indices):
        return torch.cumsum(inputs, -1)
    return _packed(inputs, packed_info, indices, "sum", False)


def exclusive_sum(inputs: Tensor, packed_info: Tensor | None = None, indices: Tensor | None = None) -> Tensor:
    """The sum of the samples of a ray before each one; inputs: [..., samples], or packed [all samples]."""
    if _is_batched(inputs, packed_info, indices):
        return torch.cumsum(torch.nn.functional.pad(inputs[..., :-1], (1, 0)), -1)
    return _packed(inputs, packed_info, indices, "sum", True)


def inclusive_prod(inputs: Tensor, packed_info: Tensor | None = None, indices: Tensor | None = None) -> Tensor:
    """The product of each sample of a ray and those before it; inputs: [..., samples], or packed [all samples]."""
    if _is_batched(inputs, packed_info, indices):
        return torch.cumprod(inputs, -1)
    return _packed(inputs, packed_info, indices, "product", False)


def exclusive_prod(inputs: Tensor, packed_info: Tensor | None = None, indices: Tensor | None = None) -> Tensor:
    """The product of the samples of a ray before each one; inputs: [..., samples], or packed [all samples]."""
    if _is_batched(inputs, packed_info, indices):
        return torch.cumprod(torch.nn.functional.pad(inputs[..., :-1], (1, 0), value=1.0), -1)
    return _packed(inputs, packed_info, indices, "product", True)


def _is_batched(inputs: Tensor, packed_info: Tensor | None, indices: Tensor | None) -> bool:
    if packed_info is not None and indices is not None:
        raise ValueError("expected packed_info or indices, got both")
    if indices is not None and indices.shape != inputs.shape:
        raise ValueError(f"indices: expected the shape of inputs {list(inputs.shape)}, got {list(indices.shape)}")
    if packed_info is not None and (packed_info.dim() != 2 or packed_info.shape[1] != 2):
        raise ValueError(f"packed_info: expected shape [rays, 2], got {list(packed_info.shape)}")
    if (packed_info is not None or indices is not None) and inputs.dim() != 1:
        raise ValueError(f"inputs: expected packed [samples], got {list(inputs.shape)}")
    return packed_info is None and indices is None


def _packed(inputs: Tensor, packed_info: Tensor | None, indices: Tensor | None, op: str, exclusive: bool) -> Tensor:
    counts = (pack_info(indices) if packed_info is None else packed_info)[:, 1]
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    double = inputs.dtype == torch.float64
    with use_backend("reference") if double else contextlib.nullcontext():
        return ops.segmented_scan(inputs if double else inputs.float(), offsets, op, exclusive).to(inputs.dtype)
