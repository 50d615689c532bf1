"""The folder of a run: configuration, checkpoints, previews; and what Ctrl-C does."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from text3d_fast.errors import CheckpointError, OutputError
from text3d_fast.files import atomic_path, write_text
from text3d_fast.pipelines.checkpoint import load_state, save_state
from text3d_fast.pipelines.config import DreamFusionConfig
from text3d_fast.pipelines.training import Training

CONFIG, CHECKPOINT, PREVIEW = "config.yaml", "checkpoint.safetensors", "preview.png"
PRODUCTS = ("mesh.glb", "result.json", CHECKPOINT)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C came; `step` steps are done, and saved in `folder` if there is one."""

    def __init__(self, step: int, folder: RunFolder | None):
        super().__init__(f"interrupted after step {step}")
        self.step, self.folder = step, folder


class RunFolder:
    """Where the files of a run go. Every file is written whole or not at all."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def open(self, config: DreamFusionConfig, resume: bool, any_steps: bool = False) -> DreamFusionConfig:
        """Make the folder, or check the one to resume; returns the configuration of the run.

        any_steps: the number of steps was not asked for, so the saved one holds.

        Raises OutputError if the folder holds another run, is missing (resume), or cannot be written.
        """
        if resume:
            config = self._saved_config(config, any_steps)
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

    def _saved_config(self, asked: DreamFusionConfig, any_steps: bool) -> DreamFusionConfig:
        if not (self / CHECKPOINT).is_file():
            raise CheckpointError(f"nothing to resume: there is no {self / CHECKPOINT}")
        try:
            saved = DreamFusionConfig.load(self / CONFIG)
        except OSError as error:
            raise CheckpointError(f"cannot read {self / CONFIG}: {error.strerror or error}") from error
        for name in ("prompt", "model", "seed", *(() if any_steps else ("steps",))):
            if getattr(saved, name) != getattr(asked, name):
                raise CheckpointError(
                    f"{self.path} holds a run with {name} = {getattr(saved, name)!r}, not {getattr(asked, name)!r}; "
                    f"resume it with its own settings, or choose another folder with --out"
                )
        return saved

    def discard(self) -> None:
        """Remove what `open` made, if nothing came of it."""
        if not any((self / name).exists() for name in PRODUCTS):
            with contextlib.suppress(OSError):
                (self / CONFIG).unlink()
                (self / PREVIEW).unlink(missing_ok=True)
                self.path.rmdir()

    def restore(self, training: Training) -> None:
        tensors, about = load_state(self / CHECKPOINT)
        if not isinstance(about.get("step"), int):
            raise CheckpointError(f"{self / CHECKPOINT} is damaged (no step); delete it and start again")
        training.restore(tensors, about["step"], float(about.get("seconds", 0.0)))

    def save(self, training: Training) -> None:
        about = {"step": training.step, "seconds": training.seconds, "prompt": training.config.prompt}
        save_state(self / CHECKPOINT, training.tensors(), about)

    def after_step(self, training: Training, force: bool = False) -> None:
        """Checkpoint and preview when due, at the end, or by force."""
        config, step = training.config, training.step
        if force or step % config.checkpoint_every == 0 or step == config.steps:
            self.save(training)
        if step % config.preview_every == 0 and step < config.steps:
            from text3d_fast.images import write_png
            from text3d_fast.pipelines.pictures import preview

            write_png(self / PREVIEW, preview(training))


@dataclass
class _Interrupt:
    requested: bool = False


@contextlib.contextmanager
def catch_interrupt() -> Iterator[_Interrupt]:
    """Turns the first Ctrl-C into a request, so that a step is never cut in half; the second one acts at once."""
    interrupt = _Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return

    def request(number, frame) -> None:
        if interrupt.requested:
            raise KeyboardInterrupt
        interrupt.requested = True

    previous = signal.signal(signal.SIGINT, request)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, previous)


