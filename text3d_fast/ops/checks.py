"""Checks of tensors shared by the ops: each error names the argument, what was expected and what came.

Public functions and registered ops share them, so that they hold in eager, compiled and exported code.
"""

import os
import warnings

import torch

from text3d_fast.ops.typed import said


def require_tensor(name: str, value: torch.Tensor, shape: tuple[int | str, ...], *dtypes: torch.dtype) -> None:
    """Raise TypeError or ValueError unless `value` is a tensor of this shape and one of these dtypes.

    In `shape` an int is an exact size, a string a free one that is named in the message; no dtypes: any floating one.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {said(value)}")
    sizes = value.shape
    fits = len(sizes) == len(shape)
    if fits:
        for wanted, size in zip(shape, sizes):
            if type(wanted) is not str and wanted != size:
                fits = False
                break
    if not fits:
        expected = "[" + ", ".join(map(str, shape)) + "]"
        raise ValueError(f"{name}: expected shape {expected}, got {list(value.shape)}")
    if dtypes and value.dtype not in dtypes:
        raise TypeError(f"{name}: expected {' or '.join(map(str, dtypes))}, got {value.dtype}")
    if not dtypes and not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {value.dtype}")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got {value.layout}")


def float_dtypes(backend: str) -> tuple[torch.dtype, ...]:
    """What floating-point tensors may be, for `require_tensor`: references take any."""
    return () if backend == "reference" else (torch.float32,)


def require_same_device(**tensors: torch.Tensor | None) -> torch.device:
    """Raise ValueError unless all tensors are on one device; return it."""
    reference = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if reference is None:
            first, reference = name, tensor.device
        elif tensor.device != reference:
            raise ValueError(f"{name}: expected device {reference} like {first}, got {tensor.device}")
    return reference


def check_values() -> bool:
    """Does the environment ask for checks of values on a GPU, at the price of a synchronization (TEXT3D_CHECK=1)?"""
    return os.environ.get("TEXT3D_CHECK") == "1"


def alert_not_deterministic(what: str) -> None:
    """What torch does for its own ops without a deterministic implementation: raise, or warn if only that is asked."""
    if not torch.are_deterministic_algorithms_enabled():
        return
    message = (f"{what} does not have a deterministic implementation, but you set "
               "'torch.use_deterministic_algorithms(True)'; warn_only=True lets it run")
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        raise RuntimeError(message)
    warnings.warn(message, stacklevel=2)


def require_indices(name: str, indices: torch.Tensor, count: int, lowest: int = 0) -> None:
    """Raise ValueError unless all indices are from `lowest` to count - 1. Synchronizes with the device."""
    if indices.numel() and (int(indices.min()) < lowest or int(indices.max()) >= count):
        raise ValueError(f"{name}: expected indices from {lowest} to {count - 1}, "
                         f"got {int(indices.min())} to {int(indices.max())}")


def require_finite(name: str, value: torch.Tensor) -> None:
    """Raise ValueError if a number is NaN or infinite. Synchronizes with the device."""
    if not bool(value.isfinite().all()):
        raise ValueError(f"{name}: expected finite coordinates, got NaN or infinity")
