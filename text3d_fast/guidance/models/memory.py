"""How much memory a model will need, before anything of it is loaded.

The step itself is run on the "meta" device: the configurations' networks, the encoder, guidance and the backward pass,
with shapes and dtypes but without numbers, while every tensor's storage is counted from its making to its end. What is
not counted: the libraries' own workspaces, fragmentation, the renderer, and on CUDA the context (about half a GiB).
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from text3d_fast.errors import ModelError
from text3d_fast.guidance.models.diffusion import DiffusionPrior, dtype_of
from text3d_fast.guidance.models.folder import ModelFolder
from text3d_fast.guidance.models.loading import empty_component, load_schedule
from text3d_fast.guidance.models.multiview import share_attention
from text3d_fast.guidance.models.options import ModelOptions
from text3d_fast.guidance.models.sources import brief
from text3d_fast.guidance.prior import Conditions
from text3d_fast.guidance.sds import ScoreDistillation

SHARE = 0.45  # of a warm convolution's speed that a whole step reaches on a CPU


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the device, and the work of one step.

    weights     of the U-Net and the VAE's encoder
    text        of the text encoder, which is there before them and not with them
    step        the most that a step holds beside the weights: encode, two rows of guidance, the encoder's backward
    forward     the same without the backward pass
    operations  floating-point operations of a step (a multiplication and an addition are two)
    """

    weights: int
    text: int
    step: int
    forward: int
    operations: int

    @property
    def peak(self) -> int:
        return max(self.text, self.weights + self.step)


def estimate(folder: ModelFolder, device: torch.device, options: ModelOptions | None = None,
             pictures: int | None = None, tiny_config: dict[str, Any] | None = None) -> MemoryEstimate:
    """For a model loaded on that device with these options, and steps of `pictures` at a time (None: one, or the views
    of a multi-view model).

    tiny_config   of the AutoencoderTiny that is used, if its files need not be asked
    """
    options = options or ModelOptions()
    pictures = folder.settings.views if pictures is None else pictures
    dtype = dtype_of(options.dtype, device)
    meta = torch.device("meta")
    unet = _cast(empty_component("unet", folder), dtype)
    if folder.settings.views > 1:
        share_attention(unet, folder.settings.views)
    text = empty_component("text_encoder", folder)
    width, vae = folder.unet.get("encoder_hid_dim") or folder.unet["cross_attention_dim"], None
    if folder.vae is not None:
        if options.tiny_autoencoder and tiny_config is None:
            tiny_config = _tiny_config(options.tiny_autoencoder)
        vae = empty_component("vae", folder) if tiny_config is None else _tiny(tiny_config)
        vae.decoder = None
        vae = _cast(vae, dtype)
    prior = DiffusionPrior(folder, lambda: unet, None if vae is None else lambda: vae, load_schedule(folder),
                           _Texts(width, dtype), meta, dtype, None if vae is None else dict(vae.config),
                           options.vae_slicing)
    conditions = Conditions(["a"] * pictures)
    images = torch.rand(pictures, prior.image_size, prior.image_size, 3, device=meta, requires_grad=True)

    def step() -> None:
        ScoreDistillation(prior, 7.5)(images, conditions).loss.backward()

    def sample() -> None:
        with torch.no_grad():
            ScoreDistillation(prior, 7.5)(images, conditions)

    offloaded = options.offload and device.type != "cpu"
    encoder = 0 if vae is None else _bytes(vae)
    text_bytes = 0 if offloaded else _count(text) * (4 if device.type == "cpu" else dtype.itemsize)
    copies = encoder if offloaded else 0  # of the VAE's weights, while it runs
    return MemoryEstimate(_bytes(unet) + encoder - copies, text_bytes, _peak(step) + copies, _peak(sample) + copies,
                          _operations(step))


def _cast(network: torch.nn.Module, dtype: torch.dtype) -> Any:
    return torch.nn.Module.to(network, dtype)  # without diffusers' remark on it


def _tiny_config(source: str) -> dict[str, Any]:
    import diffusers

    try:
        return diffusers.AutoencoderTiny.load_config(str(Path(source).expanduser()))
    except Exception as error:
        raise ModelError(f"tiny_autoencoder: {source} cannot be read ({brief(error)})") from error


def _tiny(config: dict[str, Any]) -> Any:
    import accelerate
    import diffusers

    with accelerate.init_empty_weights():
        return diffusers.AutoencoderTiny.from_config(config)


def seconds_on_cpu(operations: int) -> float:
    """About how long this machine takes for so many floating-point operations of a U-Net, from a convolution of one."""
    x, weight = (torch.ones(shape).to(memory_format=torch.channels_last)
                 for shape in ((2, 320, 32, 32), (320, 320, 3, 3)))
    best = math.inf
    with torch.no_grad():
        for _ in range(4):
            started = time.perf_counter()
            F.conv2d(x, weight, padding=1)
            best = min(best, time.perf_counter() - started)
    return operations / (2 * x.numel() * weight[0].numel() / best) / SHARE


def _count(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _bytes(network: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())


class _Texts:
    """Embeddings without numbers."""

    def __init__(self, width: int, dtype: torch.dtype):
        self.width, self.dtype = width, dtype

    def __call__(self, texts: list[str]) -> Tensor:
        return torch.empty(len(texts), 77, self.width, dtype=self.dtype, device="meta")


def _peak(run: Callable[[], None]) -> int:
    """The most bytes that the storages made by `run` hold at a time."""
    with _Storages() as storages, patch.object(F, "scaled_dot_product_attention", _attention):
        run()
    return storages.most


def _operations(run: Callable[[], None]) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


class _Storages(TorchDispatchMode):
    """Counts the storages of new tensors while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: tuple = (), options: dict | None = None) -> Any:
        outputs = function(*arguments, **(options or {}))
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((arguments, options)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(outputs):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                key = storage._cdata
                if key not in self._known and id(storage) not in given:
                    self._known.add(key)
                    size = storage.nbytes()
                    self.now += size
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self._gone, key, size)
        return outputs

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _attention(query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any) -> Tensor:
    """Attention as the kernels of CPUs and GPUs hold it, without the matrix of weights, which "meta" would make."""
    return _Attention.apply(query, key, value)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor):
        query, key, value, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
