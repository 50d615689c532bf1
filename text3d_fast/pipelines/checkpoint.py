"""A training state in one safetensors file."""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from text3d_fast.errors import CheckpointError
from text3d_fast.files import atomic_path

FORMAT = "2"


def save_state(path: str | Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Write tensors and a JSON-able description, atomically."""
    import safetensors
    from safetensors.torch import save_file

    whole = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    description = json.dumps(about)
    metadata = {"format": FORMAT, "about": description, "crc32": str(_checksum(whole, description))}
    with atomic_path(path) as part:
        try:
            save_file(whole, part, metadata=metadata)
        except safetensors.SafetensorError as error:  # what a full disk becomes there
            raise OSError(f"{error}") from error


def load_state(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_state` wrote. Raises CheckpointError if there is nothing, or it is not that."""
    with _opened(path) as (file, about):
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if str(_checksum(tensors, file.metadata()["about"])) != file.metadata()["crc32"]:
            raise ValueError("its checksum is another one")
        return tensors, about


def _checksum(tensors: dict[str, Tensor], description: str) -> int:
    """CRC-32 of the description and of every tensor with its name, dtype and shape."""
    value = zlib.crc32(description.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        value = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), value)
    return value


def load_about(path: str | Path) -> dict[str, Any]:
    """The description alone, without the tensors; raises as `load_state`."""
    with _opened(path) as (_, about):
        return about


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise CheckpointError(f"{path} is not a checkpoint of this version (format {metadata.get('format')})")
            about = json.loads(metadata["about"])
            if not isinstance(about, dict):
                raise ValueError("no description")
            yield file, about
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is damaged ({error}); delete it and start again") from error


def optimizer_tensors(optimizer: torch.optim.Optimizer, name: str = "optimizer") -> dict[str, Tensor]:
    """The optimizer's moments and counters by "NAME/parameter index/entry"."""
    state = optimizer.state_dict()["state"]
    return {f"{name}/{index}/{key}": torch.as_tensor(value)
            for index, entry in state.items() for key, value in entry.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], name: str = "optimizer") -> None:
    """The inverse of `optimizer_tensors` (learning rates are set anew each step)."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith(name + "/"):
            _, index, entry = key.rsplit("/", 2)
            state.setdefault(int(index), {})[entry] = value.clone()
    content = optimizer.state_dict()
    content["state"] = state
    optimizer.load_state_dict(content)
