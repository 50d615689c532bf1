"""The folder of a run: configuration, checkpoints, previews."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from text3d_fast.errors import CheckpointError, OutputError
from text3d_fast.files import atomic_path, write_text
from text3d_fast.images import write_png
from text3d_fast.pipelines.checkpoint import load_state, save_state
from text3d_fast.pipelines.config import RunConfig
from text3d_fast.pipelines.stage import Stage

CONFIG, CHECKPOINT, PREVIEW = "config.yaml", "checkpoint.safetensors", "preview.png"
PRODUCTS = ("mesh.glb", "result.json", CHECKPOINT)
Config = TypeVar("Config", bound=RunConfig)


@dataclass
class Checkpoint:
    """Where a stage was: its name, steps done, seconds spent, and `Stage.tensors`."""

    stage: str
    step: int
    seconds: float
    tensors: dict[str, Tensor]


class RunFolder:
    """Where the files of a run go. Every file is written whole or not at all."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def open(self, config: Config, resume: bool, any_steps: bool = False) -> Config:
        """Make the folder, or check the one to resume; returns the configuration of the run.

        any_steps: the number of steps was not asked for, so the saved one holds.

        Raises OutputError if the folder holds another run, is missing (resume), or cannot be written.
        """
        if resume:
            config = self._continued(config, any_steps)
        else:
            there = [name for name in PRODUCTS if (self / name).exists()]
            if there:
                raise OutputError(f"{self.path} already holds a run ({', '.join(there)}): continue it with --resume, "
                                  f"or choose another folder with --out")
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OutputError(f"cannot make the folder {self.path}: {error.strerror or error}") from error
            write_text(self / CONFIG, config.to_yaml())
        with atomic_path(self / ".probe") as part:  # says now, not after the first hundred steps
            part.write_bytes(b"x")
        (self / ".probe").unlink()
        return config

    def _continued(self, asked: Config, any_steps: bool) -> Config:
        if not (self / CHECKPOINT).is_file():
            raise CheckpointError(f"nothing to resume: there is no {self / CHECKPOINT}")
        saved = self.saved_config(type(asked))
        pairs = {name: (getattr(saved, name), getattr(asked, name)) for name in ("pipeline", "prompt", "model", "seed")}
        if not any_steps:
            pairs["steps"] = saved.total_steps(), asked.total_steps()
        for name, (there, wanted) in pairs.items():
            if there != wanted:
                raise CheckpointError(
                    f"{self.path} holds a run with {name} = {there!r}, not {wanted!r}; "
                    f"resume it with its own settings, or choose another folder with --out"
                )
        return saved

    def saved_config(self, kind: type[Config]) -> Config:
        """The configuration of the run in this folder."""
        try:
            return kind.load(self / CONFIG)
        except OSError as error:
            raise CheckpointError(f"cannot read {self / CONFIG}: {error.strerror or error}") from error

    def discard(self) -> None:
        """Remove what `open` made, if nothing came of it."""
        if not any((self / name).exists() for name in PRODUCTS):
            with contextlib.suppress(OSError):
                (self / CONFIG).unlink()
                (self / PREVIEW).unlink(missing_ok=True)
                self.path.rmdir()

    def checkpoint(self, stages: Sequence[str]) -> Checkpoint:
        """The checkpoint of a run of these stages. CheckpointError if there is none, or it is of none of them."""
        return self._read(self / CHECKPOINT, stages)

    def restore_finished(self, stage: Stage) -> None:
        """Load a finished stage, from its own file or the checkpoint that it ended with."""
        own = self / f"{stage.name}.safetensors"
        found = self._read(own if own.is_file() else self / CHECKPOINT, [stage.name])
        stage.restore(found.tensors, found.step, found.seconds)

    def keep_finished(self, stage: Stage) -> None:
        """Save a finished stage beside the checkpoint, which the next stage takes over."""
        self._write(self / f"{stage.name}.safetensors", stage)

    def after_step(self, stage: Stage, force: bool = False) -> None:
        """Checkpoint and preview when due, at the end, or by force."""
        run, step = stage.run, stage.step_done
        if force or step % run.checkpoint_every == 0 or step == stage.config.steps:
            self._write(self / CHECKPOINT, stage)
        if step % run.preview_every == 0 and step < stage.config.steps:
            write_png(self / PREVIEW, stage.preview())

    def _write(self, path: Path, stage: Stage) -> None:
        about = {"stage": stage.name, "step": stage.step_done, "seconds": stage.seconds, "prompt": stage.run.prompt}
        save_state(path, stage.tensors(), about)

    def _read(self, path: Path, stages: Sequence[str]) -> Checkpoint:
        tensors, about = load_state(path)
        if not isinstance(about.get("step"), int) or not isinstance(about.get("stage"), str):
            raise CheckpointError(f"{path} is damaged (no stage or step); delete it and start again")
        if about["stage"] not in stages:
            raise CheckpointError(f"{path} is of the stage {about['stage']}, expected {' or '.join(stages)}")
        return Checkpoint(about["stage"], about["step"], float(about.get("seconds", 0.0)), tensors)
