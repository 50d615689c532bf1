"""Argument checks shared by the ops: each error names the argument, what was expected and what came."""

import os

import torch


def require_tensor(name: str, value: torch.Tensor, shape: tuple[int | str, ...], *dtypes: torch.dtype) -> None:
    """Raise TypeError or ValueError unless `value` is a tensor of this shape and one of these dtypes.

    In `shape` an int is an exact size, a string a free one that is named in the message; no dtypes: any floating one.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    fits = value.dim() == len(shape) and all(isinstance(s, str) or s == n for s, n in zip(shape, value.shape))
    if not fits:
        expected = "[" + ", ".join(map(str, shape)) + "]"
        raise ValueError(f"{name}: expected shape {expected}, got {list(value.shape)}")
    if dtypes and value.dtype not in dtypes:
        raise TypeError(f"{name}: expected {' or '.join(map(str, dtypes))}, got {value.dtype}")
    if not dtypes and not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {value.dtype}")


def require_same_device(**tensors: torch.Tensor | None) -> torch.device:
    """Raise ValueError unless all tensors are on one device; return it."""
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    (first, reference), *others = present.items()
    for name, tensor in others:
        if tensor.device != reference.device:
            raise ValueError(f"{name}: expected device {reference.device} like {first}, got {tensor.device}")
    return reference.device


def check_values() -> bool:
    """Does the environment ask for checks of values on a GPU, at the price of a synchronization (TEXT3D_CHECK=1)?"""
    return os.environ.get("TEXT3D_CHECK") == "1"


def require_indices(name: str, indices: torch.Tensor, count: int, lowest: int = 0) -> None:
    """Raise ValueError unless all indices are from `lowest` to count - 1. Synchronizes with the device."""
    if indices.numel() and (int(indices.min()) < lowest or int(indices.max()) >= count):
        raise ValueError(f"{name}: expected indices from {lowest} to {count - 1}, "
                         f"got {int(indices.min())} to {int(indices.max())}")


def require_finite(name: str, value: torch.Tensor) -> None:
    """Raise ValueError if a number is NaN or infinite. Synchronizes with the device."""
    if not bool(value.isfinite().all()):
        raise ValueError(f"{name}: expected finite coordinates, got NaN or infinity")
