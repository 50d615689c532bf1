"""Running sums and products along the last dimension, or along the rays of packed samples.

Running values are kept in float64 over all packed samples at once; a ray's own part is a difference of two of them.
What is infinite or NaN in one ray stays in that ray. Sums are twice differentiable; products once, also at 0.
"""

import torch
from torch import Tensor

from text3d_fast.compat.nerfacc.pack import pack_info


def inclusive_sum(inputs: Tensor, packed_info: Tensor | None = None, indices: Tensor | None = None) -> Tensor:
    """The sum of each sample of a ray and those before it; inputs: [..., samples], or packed [all samples]."""
    if _is_batched(inputs, packed_info, indices):
        return torch.cumsum(inputs, -1)
    return _Sum.apply(inputs, *ray_bounds(inputs, packed_info, indices), False, False)


def exclusive_sum(inputs: Tensor, packed_info: Tensor | None = None, indices: Tensor | None = None) -> Tensor:
    """The sum of the samples of a ray before each one; inputs: [..., samples], or packed [all samples]."""
    if _is_batched(inputs, packed_info, indices):
        return torch.cumsum(torch.nn.functional.pad(inputs[..., :-1], (1, 0)), -1)
    return _Sum.apply(inputs, *ray_bounds(inputs, packed_info, indices), True, False)


def inclusive_prod(inputs: Tensor, packed_info: Tensor | None = None, indices: Tensor | None = None) -> Tensor:
    """The product of each sample of a ray and those before it; inputs: [..., samples], or packed [all samples]."""
    if _is_batched(inputs, packed_info, indices):
        return torch.cumprod(inputs, -1)
    return _Product.apply(inputs, *ray_bounds(inputs, packed_info, indices), False)


def exclusive_prod(inputs: Tensor, packed_info: Tensor | None = None, indices: Tensor | None = None) -> Tensor:
    """The product of the samples of a ray before each one; inputs: [..., samples], or packed [all samples]."""
    if _is_batched(inputs, packed_info, indices):
        return torch.cumprod(torch.nn.functional.pad(inputs[..., :-1], (1, 0), value=1.0), -1)
    return _Product.apply(inputs, *ray_bounds(inputs, packed_info, indices), True)


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


def ray_bounds(inputs: Tensor, packed_info: Tensor | None, indices: Tensor | None) -> tuple[Tensor, Tensor]:
    """For each packed sample the first and the last one of its ray, int64 [samples]."""
    if packed_info is None:
        packed_info = pack_info(indices)
    begin, count = packed_info.long().unbind(1)
    rays = torch.arange(len(begin), device=inputs.device).repeat_interleave(count, output_size=inputs.shape[0])
    return begin[rays], (begin + count - 1)[rays]


def _sum(inputs: Tensor, first: Tensor, last: Tensor, exclusive: bool, reverse: bool) -> Tensor:
    """In float64; reverse: of the samples behind instead of before."""
    if inputs.numel() == 0:
        return inputs.double()
    wrong = ~inputs.isfinite()
    clean = inputs.double().masked_fill(wrong, 0)
    total = _difference(clean, first, last, exclusive, reverse)
    if torch.compiler.is_compiling() or inputs.is_cuda or wrong.any():
        positive, negative = (inputs == torch.inf) | inputs.isnan(), (inputs == -torch.inf) | inputs.isnan()
        for infinite, value in ((positive, torch.inf), (negative, -torch.inf)):
            total = total + torch.where(_difference(infinite.long(), first, last, exclusive, reverse) > 0, value, 0.0)
    return total


def _difference(values: Tensor, first: Tensor, last: Tensor, exclusive: bool, reverse: bool) -> Tensor:
    running = torch.cumsum(values, 0)
    if reverse:
        return running[last] - (running if exclusive else running - values)
    return (running - values if exclusive else running) - (running - values)[first]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs, first, last, exclusive, reverse):
        ctx.save_for_backward(first, last)
        ctx.exclusive, ctx.reverse = exclusive, reverse
        return _sum(inputs, first, last, exclusive, reverse).to(inputs.dtype)

    @staticmethod
    def backward(ctx, grad):
        return _Sum.apply(grad, *ctx.saved_tensors, ctx.exclusive, not ctx.reverse), None, None, None, None


def _product(inputs: Tensor, first: Tensor, last: Tensor, exclusive: bool) -> Tensor:
    """In float64, by logarithms of what is neither 0 nor infinite nor NaN, and by counting the rest."""
    def count(which: Tensor) -> Tensor:
        return _difference(which.long(), first, last, exclusive, False)

    size = inputs.double().abs()
    zero, infinite, wrong = inputs == 0, inputs.isinf(), inputs.isnan()
    logs = torch.where(zero | infinite | wrong, 1.0, size).log()
    product = _difference(logs, first, last, exclusive, False).exp() * (1 - 2 * (count(inputs < 0) % 2))
    product = torch.where(count(infinite) > 0, product * torch.inf, product)
    product = torch.where(count(zero) > 0, product * 0, product)  # 0 * inf is NaN, as in a product
    return torch.where(count(wrong) > 0, torch.nan, product)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs, first, last, exclusive):
        product = _product(inputs, first, last, exclusive) if inputs.numel() else inputs.double()
        ctx.save_for_backward(inputs, first, last)
        ctx.exclusive = exclusive
        return product.to(inputs.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        inputs, first, last = ctx.saved_tensors
        if inputs.numel() == 0:
            return grad, None, None, None
        exclusive = ctx.exclusive
        # The first 0 of a ray gets the product of all others; behind it nothing has an influence.
        zero = inputs == 0
        first_zero = zero & (_difference(zero.long(), first, last, True, False) == 0)
        others = torch.where(first_zero, 1.0, inputs.double())
        behind = _sum(grad * _product(inputs, first, last, exclusive), first, last, exclusive, True)
        behind_others = _sum(grad * _product(others, first, last, exclusive), first, last, exclusive, True)
        gradient = torch.where(first_zero, behind_others, behind / torch.where(zero, torch.inf, inputs.double()))
        return gradient.to(inputs.dtype), None, None, None
