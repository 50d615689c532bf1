"""A hash grid that owns its parameters."""

import torch

from text3d_fast import ops
from text3d_fast.ops.typed import typed


class HashGrid(torch.nn.Module):
    """Multiresolution hash-grid encoding of points in [0, 1]^dim.

    spec: see ops.HashGridSpec; further keyword arguments build one instead: HashGrid(levels=8, features=4).
    compute_dtype: the precision that the table is read in (float32 if None); parameters stay float32 masters.
    active_levels: an attribute for coarse-to-fine training: only the first so many levels give output; None: all.
    Initial values are uniform in [-1e-4, 1e-4], drawn from `generator` if given.
    """

    @typed
    def __init__(
        self,
        spec: ops.HashGridSpec | None = None,
        *,
        compute_dtype: torch.dtype | None = None,
        active_levels: int | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        **spec_fields,
    ) -> None:
        super().__init__()
        if spec is not None and spec_fields:
            raise TypeError(f"spec: expected either a spec or its fields, got both ({', '.join(spec_fields)})")
        self.spec = ops.HashGridSpec(**spec_fields) if spec is None else spec
        self.compute_dtype = compute_dtype
        self.active_levels = active_levels
        self.params = torch.nn.Parameter(torch.empty(self.spec.num_params, dtype=torch.float32, device=device))
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        with torch.no_grad():
            self.params.uniform_(-1e-4, 1e-4, generator=generator)

    @property
    def output_dim(self) -> int:
        return self.spec.output_dim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., dim] in [0, 1] -> [..., levels * features]"""
        points = x.reshape(-1, x.shape[-1])
        y = ops.hash_grid(points, self.params, self.spec, self.active_levels, self.compute_dtype)
        return y.reshape(*x.shape[:-1], self.output_dim)

    def value_and_grad(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [..., dim] -> the value [..., levels * features] and its derivative by x [..., levels * features, dim]"""
        points = x.reshape(-1, x.shape[-1])
        y, grad = ops.hash_grid_grad(points, self.params, self.spec, self.active_levels, self.compute_dtype)
        return y.reshape(*x.shape[:-1], self.output_dim), grad.reshape(*x.shape[:-1], self.output_dim, self.spec.dim)

    def vjp(self, x: torch.Tensor, cotangent: torch.Tensor) -> torch.Tensor:
        """x [..., dim], cotangent [..., levels * features] -> cotangent times the derivative by x [..., dim]"""
        points, cotangents = x.reshape(-1, x.shape[-1]), cotangent.reshape(-1, cotangent.shape[-1])
        grad = ops.hash_grid_vjp(points, self.params, cotangents, self.spec, self.active_levels, self.compute_dtype)
        return grad.reshape(x.shape)

    def extra_repr(self) -> str:
        return f"{self.spec}, params={self.spec.num_params}"
