"""A small fully connected network that owns its parameters."""

import math

import torch

from text3d_fast import ops


class MLP(torch.nn.Module):
    """`ops.mlp` with its weights.

    spec: see ops.MLPSpec; further keyword arguments build one instead: MLP(inputs=32, outputs=4).
    Initial values are those of torch.nn.Linear (Kaiming uniform, so within 1 / sqrt(inputs of the layer), biases too),
    drawn from `generator` if given.
    """

    def __init__(
        self,
        spec: ops.MLPSpec | None = None,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        **spec_fields,
    ) -> None:
        super().__init__()
        if spec is not None and spec_fields:
            raise TypeError(f"spec: expected either a spec or its fields, got both ({', '.join(spec_fields)})")
        self.spec = ops.MLPSpec(**spec_fields) if spec is None else spec
        self.weights = torch.nn.Parameter(torch.empty(self.spec.num_params, dtype=torch.float32, device=device))
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        with torch.no_grad():
            for weight, bias in self.layers():
                bound = 1 / math.sqrt(weight.shape[1])
                weight.uniform_(-bound, bound, generator=generator)
                if bias is not None:
                    bias.uniform_(-bound, bound, generator=generator)

    def layers(self) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """(weight [out, in], bias [out] or None) of every layer, views of `weights`."""
        views, begin = [], 0
        for out, into in self.spec.layer_shapes:
            weight = self.weights[begin : begin + out * into].view(out, into)
            begin += out * into
            bias = self.weights[begin : begin + out] if self.spec.bias else None
            begin += out if self.spec.bias else 0
            views.append((weight, bias))
        return views

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., inputs] -> [..., outputs]"""
        return ops.mlp(x, self.weights, self.spec)

    def extra_repr(self) -> str:
        return f"{self.spec}, params={self.spec.num_params}"
