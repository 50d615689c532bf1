"""Which implementation serves an op: native (C++ or CUDA), Triton, or the plain torch reference.

Order on a GPU: native CUDA, then Triton, then the reference (which warns once); on a CPU: native, then the reference.
`use_backend("triton")` or the environment variable TEXT3D_BACKEND asks for one; if it cannot serve an op, the call
raises with the reason. The choice is made once a call and holds for its backward pass, wherever that runs.
"""

import contextlib
import importlib
import os
import warnings
from collections.abc import Iterator, Sequence
from contextvars import ContextVar

import torch

from text3d_fast import native

BACKENDS = ("native", "triton", "reference")
_has_triton_twin: dict[str, bool] = {}
_has_cuda: dict[str, bool] = {}
_warned: set[str] = set()


class BackendWarning(UserWarning):
    """An op on a GPU is served by its slow reference."""


def _check(name: str | None) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)} or None, got {name!r}")
    return name


_default = _check(os.environ.get("TEXT3D_BACKEND") or None)
_requested: ContextVar[str | None] = ContextVar("text3d_backend", default=_default)
_last_requested = _default  # by any thread: what torch.compile, which cannot read a ContextVar, guards on


def _request(name: str | None) -> None:
    global _last_requested
    _requested.set(name)
    _last_requested = name


@contextlib.contextmanager
def _restore(previous: str | None) -> Iterator[None]:
    try:
        yield
    finally:
        _request(previous)


def use_backend(name: str | None) -> contextlib.AbstractContextManager[None]:
    """Ask for one backend from now on, or within a `with` block; None returns to the default order.

    Holds for this thread (this contextvars.Context), and for the backward passes of what is called under it. A function
    under torch.compile is compiled anew when the request has changed.
    Raises ValueError for an unknown name. An op that the backend cannot serve raises when it is called.
    """
    _check(name)
    previous = _requested.get()
    _request(name)
    return _restore(previous)


def _requested_in_compilation(_: str | None) -> str | None:
    return _requested.get()


# What torch.compiler.assume_constant_result sets, but that imports all of the compiler first (seconds).
_requested_in_compilation._dynamo_marked_constant = True


def requested() -> str | None:
    """The backend that was asked for here, or None."""
    return _requested_in_compilation(_last_requested) if torch.compiler.is_compiling() else _requested.get()


def declare(op: str, *, triton: bool = False, cuda: bool = True) -> None:
    """Called by each op once: its name, and whether a Triton twin and CUDA kernels exist."""
    _has_triton_twin[op] = triton
    _has_cuda[op] = cuda


def reason_against(backend: str, op: str, device_type: str) -> str | None:
    """Why `backend` cannot serve `op` on this type of device, or None if it can."""
    if backend == "reference":
        return None
    if backend == "native":
        if not _has_cuda[op] and (device_type == "cuda" or native.emulated()):
            return f"{op} has no CUDA kernel"
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
    wanted = requested()
    if wanted is not None:
        reason = reason_against(wanted, op, device_type)
        if reason is not None:
            raise RuntimeError(f"backend {wanted!r} cannot serve {op} on {device_type}: {reason}")
        return wanted
    if device_type == "meta" or reason_against("native", op, device_type) is None:
        return "native"  # on meta: the fake kernel, which knows shapes
    if device_type == "cuda" and reason_against("triton", op, device_type) is None:
        return "triton"
    if device_type == "cuda" and op not in _warned:
        _warned.add(op)
        reason = reason_against("native", op, device_type)
        warnings.warn(f"{op} runs as its slow torch reference: {reason}", BackendWarning, 4)
    return "reference"


def call(backend: str, entry: str, *fields: torch.Tensor | Sequence[float] | float | bool | None) -> None:
    """Run kernel `entry`, which is an op's name and which of its kernels, with its Params' fields in order: the native
    one, or on backend "triton" its twin of the same name and arguments."""
    if backend != "triton":
        return native.call(entry, *fields)
    op = max((op for op in _has_triton_twin if entry.startswith(f"{op}_")), key=len)
    twin = getattr(importlib.import_module(f"text3d_fast._triton.{op}"), entry)
    device = next(field.device for field in fields if isinstance(field, torch.Tensor))
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
        twin(*fields)


def runs_gpu_source(backend: str, device: torch.device) -> bool:
    """Do calls run kernels written for GPUs: CUDA (emulated, too) or Triton? They may need other scratch."""
    return backend == "triton" or native.runs_cuda_source(device)


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
