"""A second prior on a diffusion model's own weights: low-rank adapters in its attention, and the camera in its time.

ProlificDreamer's model of the rendered images (Wang et al., 2023): W x + B A x for the query, key, value and output
projections, and a small network of the camera-to-world matrix added to the time embedding.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

from text3d_fast.guidance.models.diffusion import DiffusionPrior
from text3d_fast.guidance.prior import Conditions, Prior

_PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0"]
_ADAPTER = "score"


class LoraPrior(Prior):
    """Beside `base`, sharing its weights; starts as its equal, for B and the camera network's last layer are zero.

    base    the model to adapt; it is left as it is, and none of its weights ever gets a gradient
    rank    of the adapters
    seed    of A and of the camera network

    `module` holds what there is to train and to save (fp32, whatever the base's dtype). The camera is
    `Conditions.pose`; a row without one adds nothing to the time embedding. Needs the package peft.

    With another model than the guiding one (a v prediction beside an eps prediction), the base is that other model.
    """

    def __init__(self, base: DiffusionPrior, rank: int = 4, seed: int = 0):
        if rank < 1:
            raise ValueError(f"rank: expected a positive integer, got {rank}")
        self.base = base
        self.schedule = base.schedule
        self.image_size = base.image_size
        self.views = base.views
        self.prediction_type = base.prediction_type
        # a copy of the structure alone: the tensors are the base's own
        shared = {id(tensor): tensor for tensor in chain(base.unet.parameters(), base.unet.buffers())}
        self._adapted = copy.copy(base)
        self._adapted.unet = copy.deepcopy(base.unet, shared)
        layers = _add_adapters(self._adapted.unet, rank)
        time = _time_embedding(self._adapted.unet)
        width = time.linear_2.out_features
        camera = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width))
        self.module = nn.ModuleDict({"layers": layers, "camera": camera.to(base.device)}).float().requires_grad_(True)
        _initialize(layers, camera, seed)
        self._rows: Tensor | None = None  # [B] bool while the network runs: which rows are adapted; None: all
        self._added: Tensor | None = None  # [B, width] while the network runs
        for layer in layers.values():
            layer["B"].register_forward_hook(self._only_rows)
        time.register_forward_hook(self._add_camera)

    def encode(self, images: Tensor) -> Tensor:
        """See Prior."""
        return self.base.encode(images)

    def predict(self, x_t: Tensor, t: Tensor, conditions: Conditions, rows: Tensor | None = None) -> Tensor:
        """What the adapted network returns, by `prediction_type`; fp32. Differentiable in `module`'s parameters.

        rows    [B] bool: the rows that adapters and camera act on; the others get the base's own prediction
        """
        with self._during(conditions, rows):
            return self._adapted.predict(x_t, t, conditions)

    def predict_noise(self, x_t: Tensor, t: Tensor, conditions: Conditions, rows: Tensor | None = None) -> Tensor:
        """See Prior; `rows` as in `predict`."""
        prediction = self.predict(x_t, t, conditions, rows)
        return self.schedule.to_noise(prediction, x_t.float(), t, self.prediction_type)

    @contextmanager
    def _during(self, conditions: Conditions, rows: Tensor | None) -> Iterator[None]:
        known = None
        if conditions.pose is not None:
            pose = conditions.pose.to(self.base.device, torch.float32).flatten(1)
            known = pose.isfinite().all(1)
            if rows is not None:
                known = known & rows
            added = self.module["camera"](pose.nan_to_num(0.0, 0.0, 0.0))
            self._added = torch.where(known[:, None], added, 0.0)
        self._rows = rows
        try:
            yield
        finally:
            self._rows = self._added = None

    def _only_rows(self, module: nn.Module, given: tuple, output: Tensor) -> Tensor | None:
        if self._rows is None:
            return None
        return output * self._rows.to(output).reshape((-1,) + (1,) * (output.ndim - 1))

    def _add_camera(self, module: nn.Module, given: tuple, output: Tensor) -> Tensor | None:
        return None if self._added is None else output + self._added.to(output.dtype)


def _add_adapters(unet: nn.Module, rank: int) -> nn.ModuleDict:
    """Put adapters into the attention projections; {layer: {"A", "B"}}, with "/" for the dots of the layer's name."""
    try:
        import peft
    except ImportError as error:
        raise ImportError("LoRA needs peft: pip install 'text3d-fast[generate]'") from error
    configuration = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=_PROJECTIONS, init_lora_weights=False)
    try:
        peft.inject_adapter_in_model(configuration, unet, _ADAPTER)
    except ValueError as error:
        raise ValueError(f"base: its U-Net has no attention projections {', '.join(_PROJECTIONS)}") from error
    adapted = [(name, layer) for name, layer in unet.named_modules() if isinstance(layer, peft.tuners.lora.LoraLayer)]
    return nn.ModuleDict({
        name.replace(".", "/"): nn.ModuleDict({"A": layer.lora_A[_ADAPTER], "B": layer.lora_B[_ADAPTER]})
        for name, layer in adapted
    })


def _time_embedding(unet: nn.Module) -> nn.Module:
    for name, module in unet.named_modules():
        if name.split(".")[-1] == "time_embedding":
            return module
    raise ValueError("base: its U-Net has no time_embedding to add the camera to")


@torch.no_grad()
def _initialize(layers: nn.ModuleDict, camera: nn.Sequential, seed: int) -> None:
    """A and the camera's first layer U(-n^-0.5, n^-0.5) for n inputs, B and the camera's last layer 0."""
    generator = torch.Generator().manual_seed(seed)
    for linear in (*(layer["A"] for layer in layers.values()), camera[0]):
        bound = linear.in_features**-0.5
        linear.weight.copy_(torch.empty(linear.weight.shape).uniform_(-bound, bound, generator=generator))
    for linear in (*(layer["B"] for layer in layers.values()), camera[2]):
        linear.weight.zero_()
    camera[0].bias.zero_()
    camera[2].bias.zero_()
