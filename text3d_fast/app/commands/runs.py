"""What `generate` and `edit` have in common: options of a run, its folder, and what is said when it ends."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg

from text3d_fast.app.commands.outcome import EMPTY_MESH, INTERRUPTED, fail


@dataclass(kw_only=True)
class RunOptions:
    """Where the result goes and how it is made."""

    steps: Annotated[int | None, arg(metavar="N")] = None
    """Steps of optimization; the default depends on the model, and of edit is 30 % of the result's."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one."""
    out: Annotated[Path | None, arg(metavar="DIR")] = None
    """The folder for the results; by default runs/PROMPT."""
    resume: bool = False
    """Go on from the checkpoint in OUT."""
    threads: Annotated[int | None, arg(metavar="N")] = None
    """CPU threads; by default what torch chooses."""
    set: Annotated[tuple[str, ...], arg(metavar="NAME=VALUE ...")] = ()
    """Other settings by their names in config.yaml, e.g. --set guidance.weight=7.5 field.levels=12."""
    quiet: bool = False
    """Print nothing but errors."""


def optimize(
    prompt: str, options: RunOptions, make: Callable[[dict], Any], run: Callable[[Any, Path, Callable], Any],
    command: list[str], own: list[str] | None = None,
) -> int:
    """make(settings) a pipeline, run(pipeline, out, callback) it, and say what came of it; returns the exit status.

    command: the words that start this command, own: those of its options that are not in `options`
    """
    if options.steps is not None and options.steps < 1:
        return fail(f"--steps: expected a positive number, got {options.steps}")
    try:
        settings = dict(parse_setting(text) for text in options.set)
    except ValueError as error:
        return fail(str(error))
    import torch

    from text3d_fast.app.progress import Progress
    from text3d_fast.errors import EmptyMesh, Interrupted, OutputError

    out = options.out or default_folder(prompt, options.resume)
    if options.threads is not None:
        cores = os.cpu_count() or 1
        if not 1 <= options.threads <= 4096:
            return fail(f"--threads: expected 1 to {cores}, the cores of this machine, got {options.threads}")
        if options.threads > cores and not options.quiet:
            print(f"--threads {options.threads}: this machine has {cores} cores, so {cores} are used", file=sys.stderr)
        torch.set_num_threads(min(options.threads, cores))
    try:
        pipeline = make(settings)
        with Progress(pipeline, prompt, options.steps, quiet=options.quiet) as progress:
            result = run(pipeline, out, progress.step)
    except Interrupted as stop:
        print(f"\nStopped after step {stop.step}; everything is saved in {out}. To go on:\n"
              f"  {resume_command(command, own or [], options, out)}", file=sys.stderr)
        return INTERRUPTED
    except KeyboardInterrupt:  # before the first step, or while the mesh is made
        if not (out / "checkpoint.safetensors").is_file():
            raise
        print(f"\nStopped; the last checkpoint is in {out}. To go on:\n"
              f"  {resume_command(command, own or [], options, out)}", file=sys.stderr)
        return INTERRUPTED
    except EmptyMesh as error:
        print(f"error: {error}", file=sys.stderr)
        return EMPTY_MESH
    except (OutputError, ValueError) as error:
        return fail(str(error))
    except RuntimeError as error:
        if type(error) is RuntimeError and "backend" not in str(error) and "out of memory" not in str(error):
            raise
        return fail(str(error))
    if not options.quiet:
        progress.summary(result)
    return 0


def parse_setting(text: str) -> tuple[str, object]:
    """"guidance.weight=7.5" to a name and a value, read as YAML."""
    import yaml

    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ValueError(f"--set: expected NAME=VALUE, got {text!r}")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError:
        raise ValueError(f"--set {name}: cannot read the value {value!r}") from None


def default_folder(prompt: str, resume: bool, root: Path = Path("runs")) -> Path:
    """runs/a-red-mug, or the next free runs/a-red-mug-2; to resume, the newest of them."""
    import re

    stem = "-".join(re.findall(r"[a-z0-9]+", prompt.lower()))[:60] or "run"
    number, folder = 1, root / stem
    while folder.exists():
        number, newest = number + 1, folder
        folder = root / f"{stem}-{number}"
    return newest if resume and number > 1 else folder


def option_words(options: Any, leave_out: tuple[str, ...] = ()) -> list[str]:
    """The words of a command line for the options of a dataclass that differ from their defaults."""
    words = []
    for entry in dataclasses.fields(options):
        value = getattr(options, entry.name)
        if entry.name in leave_out or value in (entry.default, None):
            continue
        words.append("--" + entry.name.replace("_", "-"))
        if value is not True:
            words += [str(part) for part in value] if isinstance(value, tuple) else [str(value)]
    return words


def resume_command(command: list[str], own: list[str], options: RunOptions, out: Path) -> str:
    """The command line that continues this run."""
    shared = option_words(options, ("resume", "out"))
    return shlex.join(["text3d-fast", *command, "--resume", "--out", str(out), *own, *shared])
