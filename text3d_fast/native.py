"""The bridge to `text3d_fast._C`: raw pointers, sizes and a stream; no torch types cross it."""

import contextlib
import os
from collections.abc import Sequence
from types import ModuleType

import torch

_EMULATE = os.environ.get("TEXT3D_EMULATE") == "1"  # run the .cu sources on host memory; tests only
ALIGNMENT = 16  # bytes of the widest vector load
_module: ModuleType | None = None
_import_error = ""
try:
    if _EMULATE:
        from text3d_fast import _C_emulated as _module
    else:
        from text3d_fast import _C as _module
except ImportError as error:
    _import_error = str(error)


def reason_against(device_type: str) -> str | None:
    """Why the native kernels cannot run on this type of device, or None if they can."""
    if _module is None:
        return f"the compiled extension is missing ({_import_error}); run `pip install .` in the source tree"
    if device_type == "cpu":
        return None
    if device_type != "cuda":
        return f"there are no native kernels for {device_type}"
    if not _module.has_cuda or _module.emulated:
        return "text3d_fast was built without CUDA (nvcc was not found); see docs/install.md"
    return None


_NUMBERS = (int, float, bool)


def runs_cuda_source(device: torch.device) -> bool:
    """Do calls on this device run the .cu sources (on a GPU, or emulated)? They may need other scratch."""
    return device.type == "cuda" or _EMULATE


def cpu_isa() -> str:
    """The instruction set that run-time dispatch picked: baseline, avx2 or avx512."""
    return getattr(_module, "cpu_isa", "none")


def emulated() -> bool:
    """Whether CUDA sources run on host memory instead of the CPU kernels (TEXT3D_EMULATE=1, for tests)."""
    return _EMULATE


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in one piece, and for CUDA sources at an address that vector loads accept; a copy where it must be.

    Views may begin anywhere in their storage; what torch allocates is aligned.
    """
    tensor = tensor.contiguous()
    if runs_cuda_source(tensor.device) and tensor.data_ptr() % ALIGNMENT:
        return tensor.clone()
    return tensor


def call(name: str, *fields: torch.Tensor | Sequence[float] | float | bool | None) -> None:
    """Run entry point `name` with its Params' fields in order, on the device that the tensors are on.

    A sequence (of tensors or numbers) fills a fixed array; None is a null pointer.
    Tensors must be `aligned` and of the dtype that the Params declare; the ops see to both.
    """
    device: torch.device | None = None

    def flatten(field):
        nonlocal device
        if isinstance(field, torch.Tensor):
            if not field.is_contiguous():
                raise RuntimeError(f"{name}: a tensor of shape {tuple(field.shape)} is not contiguous")
            if device is not None and device != field.device:
                raise ValueError(f"{name}: all tensors must be on one device, got {device} and {field.device}")
            device = field.device
            if runs_cuda_source(device) and field.data_ptr() % ALIGNMENT:
                raise RuntimeError(f"{name}: a tensor of shape {tuple(field.shape)} is not {ALIGNMENT}-byte aligned")
            return field.data_ptr()
        if isinstance(field, (list, tuple)):
            return field if field and type(field[0]) in _NUMBERS else [flatten(f) for f in field]
        return 0 if field is None else field

    flat = [flatten(field) for field in fields]
    if device is None:
        raise RuntimeError(f"{name}: no tensor among its fields")
    reason = reason_against(device.type)
    if reason is not None:  # a program exported elsewhere, or the registered op called by itself
        raise RuntimeError(f"{name}: {reason}")
    if device.type == "cpu":
        getattr(_module, name)(0 if _EMULATE else None, *flat)
        return
    guard = torch.cuda.device(device) if device.index != torch.cuda.current_device() else contextlib.nullcontext()
    with guard:
        getattr(_module, name)(torch.cuda.current_stream(device).cuda_stream, *flat)
