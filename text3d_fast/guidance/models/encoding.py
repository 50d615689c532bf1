"""Pictures to latents through a VAE, with gradients that survive half precision, and with little memory if need be."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from text3d_fast.errors import ModelWarning

_LOOKS, _EVERY = 4, 64  # an overflow is looked for in the first calls and then now and then: it waits for a GPU


class LatentEncoder(nn.Module):
    """Callable: pixels [B, 3, H, W] fp32 in -1..1 -> latents [B, C, h, w] fp32, scaled as the diffusion has them.

    vae           AutoencoderKL or AutoencoderTiny
    scale, shift  latents are (z - shift) * scale
    dtype         of its arithmetic; half precision becomes fp32 for good when latents are not finite
    slicing       one picture at a time, recomputed in the backward pass: a third more work for the VAE, and for
                  Stable Diffusion 0.95 instead of 1.6 GiB a step in half precision
    device        where to compute. With `offload` the weights stay where they are and are copied for each call
    """

    def __init__(self, vae: Any, scale: float, shift: float, dtype: torch.dtype, device: torch.device,
                 slicing: bool = False, offload: bool = False):
        super().__init__()
        self.vae, self.scale, self.shift = vae, scale, shift
        self.dtype, self.device, self.slicing, self.offload = dtype, device, slicing, offload
        self._calls = 0
        if slicing and not offload:
            vae.enable_gradient_checkpointing()  # block by block

    def forward(self, pixels: Tensor) -> Tensor:
        latents = self._encode(pixels)
        if self._looks(pixels) and bool(pixels.isfinite().all() & ~latents.isfinite().all()):
            warnings.warn("the VAE overflows in half precision and runs in fp32 from now on", ModelWarning,
                          stacklevel=2)
            self.dtype = torch.float32
            self.vae.float()
            latents = self._encode(pixels)
        self._calls += 1
        return latents

    def _looks(self, pixels: Tensor) -> bool:
        due = self._calls < _LOOKS or self._calls % _EVERY == 0
        return self.dtype != torch.float32 and pixels.device.type != "meta" and due

    def _encode(self, pixels: Tensor) -> Tensor:
        if not self.slicing:
            return self._scaled(pixels)
        parts = pixels.split(1)
        if self.offload and torch.is_grad_enabled():  # the weights' copies too are made again in the backward pass
            return torch.cat([checkpoint(self._scaled, part, use_reentrant=False) for part in parts])
        return torch.cat([self._scaled(part) for part in parts])

    def _scaled(self, pixels: Tensor) -> Tensor:
        if self.dtype == torch.float32:
            return self._latents(pixels)
        box: dict[str, Tensor] = {}
        return _Enlarge.apply(self._latents(_Restore.apply(pixels, box).to(self.dtype)).float(), box)

    def _latents(self, pixels: Tensor) -> Tensor:
        if self.offload:  # the copies belong to the graph and go with it
            copies = {f"network.{name}": value.to(self.device, non_blocking=True)
                      for name, value in self.vae.state_dict().items()}
            latents = torch.func.functional_call(_Mean(self.vae), copies, (pixels,))
        else:
            latents = _Mean(self.vae)(pixels)
        return (latents - self.shift) * self.scale


class _Mean(nn.Module):
    """The mean of the encoder's distribution: a sample differs from it by a few thousandths of the latents' spread."""

    def __init__(self, network: Any):
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        encoded = self.network.encode(pixels)
        return encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()


class _Enlarge(torch.autograd.Function):
    """Identity whose backward scales the gradient to a largest entry near 1, by a power of two kept in `box`.

    A mean-reduced loss has gradients near 1e-6, which half precision rounds to nothing inside the VAE.
    """

    @staticmethod
    def forward(ctx, x: Tensor, box: dict[str, Tensor]) -> Tensor:
        ctx.box = box
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        largest = gradient.abs().amax().clamp(1e-30, 1e30)
        ctx.box["scale"] = torch.exp2(-torch.log2(largest).round())
        return gradient * ctx.box["scale"], None


class _Restore(torch.autograd.Function):
    """Identity whose backward undoes `_Enlarge`; entries that overflowed on the way become zero."""

    @staticmethod
    def forward(ctx, x: Tensor, box: dict[str, Tensor]) -> Tensor:
        ctx.box = box
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        gradient = gradient.float() / ctx.box["scale"]
        return torch.where(gradient.isfinite(), gradient, 0.0), None
