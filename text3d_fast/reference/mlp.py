"""Small fully connected networks in plain torch: the oracle for `ops.mlp`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from text3d_fast.ops.specs import MLPSpec

ACTIVATIONS = {"none": lambda x: x, "relu": torch.relu, "silu": functional.silu, "softplus": functional.softplus,
               "sigmoid": torch.sigmoid, "exp": torch.exp, "tanh": torch.tanh}


def mlp(x: torch.Tensor, weights: torch.Tensor, spec: MLPSpec) -> torch.Tensor:
    """Shapes and meaning as `ops.mlp`; any floating dtype, differentiable any number of times."""
    layers = spec.layer_shapes
    begin = 0
    for layer, (out, into) in enumerate(layers):
        weight = weights[begin : begin + out * into].reshape(out, into)
        begin += out * into
        bias = weights[begin : begin + out] if spec.bias else None
        begin += out if spec.bias else 0
        last = layer == len(layers) - 1
        x = ACTIVATIONS[spec.output_activation if last else spec.activation](functional.linear(x, weight, bias))
    return x
