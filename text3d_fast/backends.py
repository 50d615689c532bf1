"""Which implementation serves an op: native (C++ or CUDA), Triton, or the plain torch reference.

Order on a GPU: native CUDA, then Triton, then the reference (which warns once); on a CPU: native, then the reference.
`use_backend("triton")` or the environment variable TEXT3D_BACKEND asks for one; if it cannot serve an op, the call
raises with the reason.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator

import torch

from text3d_fast import native

BACKENDS = ("native", "triton", "reference")
_requested: str | None = os.environ.get("TEXT3D_BACKEND") or None
_has_triton_twin: dict[str, bool] = {}
_warned: set[str] = set()


class BackendWarning(UserWarning):
    """An op on a GPU is served by its slow reference."""


def _check(name: str | None) -> None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")


_check(_requested)


@contextlib.contextmanager
def _restore(previous: str | None) -> Iterator[None]:
    global _requested
    try:
        yield
    finally:
        _requested = previous


def use_backend(name: str | None) -> contextlib.AbstractContextManager[None]:
    """Ask for one backend from now on, or within a `with` block; None returns to the default order.

    Raises ValueError for an unknown name. An op that the backend cannot serve raises when it is called.
    """
    global _requested
    _check(name)
    previous, _requested = _requested, name
    return _restore(previous)


def declare(op: str, *, triton: bool = False) -> None:
    """Called by each op once: its name, and whether a Triton twin exists."""
    _has_triton_twin[op] = triton


def reason_against(backend: str, op: str, device_type: str) -> str | None:
    """Why `backend` cannot serve `op` on this type of device, or None if it can."""
    if backend == "reference":
        return None
    if backend == "native":
        return native.reason_against(device_type)
    if not _has_triton_twin[op]:
        return f"{op} has no Triton kernel"
    if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton kernels run on CUDA devices (or anywhere under TRITON_INTERPRET=1)"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed"
    return None


def choose(op: str, device: torch.device) -> str:
    """The backend that serves `op` on `device` now.

    Raises RuntimeError if one was asked for that cannot; warns once per op when a GPU falls back to the reference.
    """
    device_type = device.type
    if _requested is not None:
        reason = reason_against(_requested, op, device_type)
        if reason is not None:
            raise RuntimeError(f"backend {_requested!r} cannot serve {op} on {device_type}: {reason}")
        return _requested
    if native.reason_against(device_type) is None:
        return "native"
    if device_type == "cuda" and reason_against("triton", op, device_type) is None:
        return "triton"
    if device_type == "cuda" and op not in _warned:
        _warned.add(op)
        warnings.warn(f"{op} runs as its slow torch reference: {native.reason_against('cuda')}", BackendWarning, 3)
    return "reference"


def table() -> list[dict[str, str]]:
    """For each op and type of device that is here: which backend serves it, and why the others do not."""
    rows = []
    for op in sorted(_has_triton_twin):
        for device_type in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            reasons = {name: reason_against(name, op, device_type) for name in BACKENDS}
            served = next(name for name in BACKENDS if reasons[name] is None)
            rows.append({"op": op, "device": device_type, "served by": served,
                         "why not others": "; ".join(f"{k}: {v}" for k, v in reasons.items() if v)})
    return rows
