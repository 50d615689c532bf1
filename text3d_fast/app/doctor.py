"""What `doctor` prints."""

from __future__ import annotations

import os
import platform
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from text3d_fast import backends, native
from text3d_fast.pipelines.results import versions

if TYPE_CHECKING:
    from text3d_fast.guidance import ModelOptions


def doctor(model: str | None, device: str = "auto", settings: dict[str, Any] | None = None) -> int:
    """Print versions, hardware and the table of ops; describe a model. Returns the exit status."""
    import text3d_fast.geometry
    import text3d_fast.nn
    import text3d_fast.ops  # noqa: F401  (registers every op)

    console = Console()
    found = "  ".join(f"{name} {version}" for name, version in versions().items())
    console.print(found, highlight=False)
    console.print(f"CPU {platform.machine()}, {os.cpu_count()} cores, native code for {native.cpu_isa() or 'none'}")
    console.print(f"GPU {gpu()}")
    reason = native.reason_against("cuda")
    console.print("native CUDA kernels: built" if reason is None else f"native CUDA kernels: none, as {reason}")
    table = Table("op", "device", "served by", "why not the others", title="which backend serves which op here")
    for row in backends.table():
        table.add_row(row["op"], row["device"], row["served by"], row["why not others"])
    console.print(table)
    return 0 if model is None else describe(model, console, device, settings or {})


def words() -> int:
    """Print the vocabulary of the built-in models, with what else they understand. Returns the exit status."""
    from text3d_fast.toybox import captions

    also: dict[str, list[str]] = {}
    for other, word in captions.SYNONYMS.items():
        also.setdefault(word, []).append(other)
    table = Table("", "word", "also understood as it", title="what the built-in models know", box=None)
    for kind, known in captions.vocabulary_table().items():
        for number, word in enumerate(known):
            table.add_row("" if number else kind, word, ", ".join(also.get(word, [])), end_section=word == known[-1])
    console = Console()
    console.print(table)
    console.print(captions.TWO_OBJECTS, highlight=False)
    return 0


def gpu() -> str:
    """The CUDA device's name, or why there is none."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cause = "this torch is built for CPUs" if torch.version.cuda is None else "torch sees no CUDA device"
    return f"none: {cause}; everything runs on the CPU"


def describe(model: str, console: Console, device: str = "auto", settings: dict[str, Any] | None = None) -> int:
    """Print what is known of a model without loading its weights."""
    from text3d_fast.guidance import load_prior, registered_priors
    from text3d_fast.pipelines.config import RunConfig

    try:
        options = RunConfig().updated(settings or {}).prior
        if model in registered_priors():
            content = load_prior(model, options=options).describe()
        else:
            content = _describe_model(model, device, options)
    except (ValueError, OSError) as error:
        Console(stderr=True).print(f"error: {error}", highlight=False, markup=False, soft_wrap=True)
        return 2
    table = Table("property", "value", title=str(model))
    for name, value in content.items():
        if name.startswith("memory"):
            value = f"{value / 2**30:.2f} GiB of weights" if isinstance(value, int) else value
        table.add_row(name.replace("_", " "), str(value))
    console.print(table, markup=False)
    return 0


def _describe_model(model: str, device: str, options: ModelOptions) -> dict[str, Any]:
    from text3d_fast.guidance import open_model
    from text3d_fast.guidance.models.diffusion import dtype_of
    from text3d_fast.guidance.models.loading import quiet
    from text3d_fast.guidance.models.memory import estimate

    kind = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    dtype = dtype_of(options.dtype, torch.device(kind))
    with quiet():
        folder = open_model(model, options.revision, dtype, options.config, options.prediction, weights=False)
        folder.check([name for name in folder.components if name != "vae" or options.tiny_autoencoder is None])
        needs = estimate(folder, torch.device(kind), options)
    gib = {name: getattr(needs, name) / 2**30 for name in ("peak", "weights", "step", "forward", "text")}
    about = folder.describe()
    pictures = "a picture" if folder.settings.views == 1 else f"{folder.settings.views} pictures"
    about[f"peak memory, {kind}"] = (
        f"{gib['peak']:.2f} GiB in {str(dtype).removeprefix('torch.')} with {pictures} a step: weights "
        f"{gib['weights']:.2f}, guidance and the encoder's backward {gib['step']:.2f} (without backward "
        f"{gib['forward']:.2f}); before them the text encoder {gib['text']:.2f}")
    about["work of a step"] = f"{needs.operations / 1e12:.2f} TFLOP"
    return about
