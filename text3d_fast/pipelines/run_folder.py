"""The folder of a run: configuration, checkpoints, previews."""

from __future__ import annotations

import contextlib
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, TypeVar

from torch import Tensor

from text3d_fast.errors import CheckpointError, OutputError
from text3d_fast.files import write_text
from text3d_fast.guidance.models.options import HARMLESS
from text3d_fast.images import write_png
from text3d_fast.lines import LOG
from text3d_fast.pipelines import distributed
from text3d_fast.pipelines.checkpoint import load_about, load_state, save_state
from text3d_fast.pipelines.config import END, RunConfig
from text3d_fast.pipelines.settings import names_of, value_of
from text3d_fast.pipelines.stage import Stage

CONFIG, CHECKPOINT, PREVIEW = "config.yaml", "checkpoint.safetensors", "preview.png"
PRODUCTS = ("mesh.glb", "result.json", CHECKPOINT)
LOCK = ".lock"
# Settings that may change when a run goes on: they do not touch the optimization
CHANGEABLE = ("mesh_resolution", "faces", "texture", "checkpoint_every", "preview_every", "threads",
              *(f"prior.{name}" for name in HARMLESS))
# `files.atomic_path` names of files that were not finished
_LEFTOVER = re.compile(r"\.(mesh|turntable|views|preview|result|config|checkpoint)[\w-]*\.\w{8}\.\w+")
Config = TypeVar("Config", bound=RunConfig)


def _is_steps(name: str) -> bool:
    return name.rpartition(".")[2] == "steps"


def _may_change(name: str) -> bool:
    """Whether a setting may be another one when a run goes on."""
    return name in CHANGEABLE or _is_steps(name)


@dataclass
class Checkpoint:
    """Where a stage was: its name, steps done, seconds spent, and `Stage.tensors`."""

    stage: str
    step: int
    seconds: float
    tensors: dict[str, Tensor]


class RunFolder:
    """Where the files of a run go. Every file is written whole or not at all.

    Of several processes only the first one touches them: all call the methods together, and get what it got.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._made: list[Path] = []  # what `open` made, and may take back
        self._lock: IO[str] | None = None

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def open(
        self, config: Config, resume: bool, any_steps: bool = False, changes: Mapping[str, Any] = MappingProxyType({})
    ) -> Config:
        """Make the folder, or take the one to resume, and lock it; returns the configuration of the run.

        any_steps  the number of steps was not asked for, so the saved one holds
        changes    settings that were asked for by name; resuming takes those that do not touch the optimization

        Raises OutputError if the folder holds another run or somebody else's files, is in use by another run, is
        missing (resume), or cannot be written.
        """
        return distributed.from_first(lambda: self._open(config, resume, any_steps, changes))

    def _open(self, config: Config, resume: bool, any_steps: bool, changes: Mapping[str, Any]) -> Config:
        try:
            self.path.exists()
        except OSError as error:  # a name that is too long, for example
            raise OutputError(f"cannot use the folder {self.path}: {error.strerror or error}") from error
        if resume:
            config = self._continued(config, any_steps, changes)
            self._take_lock()
        else:
            self._refuse_others_files()
            made = [] if self.path.exists() else [self.path]
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OutputError(f"cannot make the folder {self.path}: {error.strerror or error}") from error
            self._take_lock()
            self._made = [*made, *(path for path in (self / CONFIG, self / LOG) if not path.exists()), self / PREVIEW]
        for left in self.path.glob(".*.*"):  # of a run that was killed while it wrote a file
            if _LEFTOVER.fullmatch(left.name):
                left.unlink(missing_ok=True)
        write_text(self / CONFIG, config.to_yaml())  # what cannot be written is said now, not after a hundred steps
        return config

    def _refuse_others_files(self) -> None:
        there = [name for name in PRODUCTS if (self / name).exists()]
        if there:
            raise OutputError(f"{self.path} already holds a run ({', '.join(there)}): continue it with --resume, "
                              f"or choose another folder with --out")
        if self.path.is_dir():
            others = sorted(entry.name for entry in self.path.iterdir() if entry.name != LOCK)
            if others and not self._is_ours():
                raise OutputError(f"{self.path} is not empty and holds no run of text3d-fast ({', '.join(others[:3])}"
                                  f"{' ...' if len(others) > 3 else ''}): choose another folder with --out")

    def _is_ours(self) -> bool:
        """Whether its config.yaml is that of a run."""
        import yaml

        try:
            content = yaml.safe_load((self / CONFIG).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            return False
        return isinstance(content, dict) and {"prompt", "model", "seed"} <= set(content)

    def _take_lock(self) -> None:
        """One run a folder. The lock ends with the process, however that ends."""
        try:
            import fcntl
        except ImportError:  # Windows
            return
        try:
            self._lock = open(self / LOCK, "a+")  # noqa: SIM115
        except OSError as error:
            raise OutputError(f"cannot write into {self.path}: {error.strerror or error}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "another process"
            self._lock.close()
            self._lock = None
            raise OutputError(f"{self.path} is in use by another run ({holder})") from None
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {platform.node() or 'this machine'}")
        self._lock.flush()

    def close(self) -> None:
        """Give the folder free."""
        if self._lock is not None:
            (self / LOCK).unlink(missing_ok=True)
            self._lock.close()
            self._lock = None

    def _continued(self, asked: Config, any_steps: bool, changes: Mapping[str, Any]) -> Config:
        if not (self / CHECKPOINT).is_file():
            raise CheckpointError(f"nothing to resume: there is no {self / CHECKPOINT}")
        saved = self.saved_config(type(asked))
        again = "resume it with its own settings, or choose another folder with --out"
        for name in ("pipeline", "prompt", "model", "fine_model", "seed"):
            there, wanted = getattr(saved, name, None), getattr(asked, name, None)
            if there != wanted:
                raise CheckpointError(f"{self.path} holds a run with {name} = {there!r}, not {wanted!r}; {again}")
        for name, there in asdict(saved.prior).items():
            if name not in HARMLESS and there != getattr(asked.prior, name):
                raise CheckpointError(f"{self.path} holds a run with prior.{name} = {there!r}, not "
                                      f"{getattr(asked.prior, name)!r}; give it again, or {again}")
        about = load_about(self / CHECKPOINT)
        self._check_settings(saved, about)
        any_steps = any_steps and not any(_is_steps(name) for name in changes)
        for name in changes:
            if not _may_change(name) and value_of(saved, name) != value_of(asked, name):
                raise CheckpointError(f"{self.path} holds a run with {name} = {value_of(saved, name)!r}; {again}")
        saved = saved.updated({name: value_of(asked, name) for name in changes if name in CHANGEABLE})
        if not any_steps and asked.total_steps() != saved.total_steps():
            if asked.total_steps() < saved.total_steps():
                raise CheckpointError(f"{self.path} holds a run with steps = {saved.total_steps()}, more than "
                                      f"{asked.total_steps()}; it can go on to more, not fewer")
            stages, begun = saved.stage_names(), about.get("stage")
            ahead = stages[stages.index(begun):] if begun in stages else stages  # those before have taken theirs
            more = asked.total_steps() - saved.total_steps()
            saved = saved.with_steps(saved.total_steps(ahead) + more, ahead)
        return saved

    def _check_settings(self, saved: Config, about: Mapping[str, Any]) -> None:
        """CheckpointError if config.yaml is not that of the checkpoint, but for what may change when a run goes on."""
        made_with = about.get("settings")
        for name in names_of(saved):
            if isinstance(made_with, dict) and name in made_with and not _may_change(name):
                there, value = made_with[name], value_of(saved, name)
                if there != (list(value) if isinstance(value, tuple) else value):
                    raise CheckpointError(f"{self / CONFIG} has {name} = {value!r}, but the checkpoint was made with "
                                          f"{there!r}; set it back, or choose another folder with --out")

    def saved_config(self, *kinds: type[Config]) -> Config:
        """The configuration of the run in this folder, which is to be one of the pipeline of one of these kinds."""
        if not (self / CONFIG).is_file():
            raise CheckpointError(f"{self.path} is no folder of a run: there is no {self / CONFIG}")
        try:
            text = (self / CONFIG).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"cannot read {self / CONFIG}: {getattr(error, 'strerror', '') or error}") from error
        if not text.endswith(END):
            raise CheckpointError(f"{self / CONFIG} is damaged: its end is missing")
        made_by = re.search(r"^pipeline: *(\w+) *$", text, re.MULTILINE)
        by_pipeline = {kind.pipeline: kind for kind in kinds}
        if made_by is not None and made_by[1] not in by_pipeline:
            raise CheckpointError(f"{self.path} holds a run of {made_by[1]}, not of {' or '.join(by_pipeline)}")
        kind = kinds[0] if made_by is None else by_pipeline[made_by[1]]
        return kind.from_yaml(text, str(self / CONFIG))

    def discard(self) -> None:
        """Remove what `open` made, if nothing came of it."""
        if distributed.is_first() and not any((self / name).exists() for name in PRODUCTS):
            self.close()
            with contextlib.suppress(OSError):
                for made in reversed(self._made):
                    made.rmdir() if made.is_dir() else made.unlink(missing_ok=True)

    def checkpoint(self, stages: Sequence[str]) -> Checkpoint:
        """The checkpoint of a run of these stages. CheckpointError if there is none, or it is of none of them."""
        found = distributed.from_first(lambda: self._read(self / CHECKPOINT))
        if found.stage not in stages:
            raise CheckpointError(f"{self / CHECKPOINT} is of the stage {found.stage}, expected "
                                  f"{' or '.join(stages)}")
        return found

    def restore_finished(self, stage: Stage) -> None:
        """Load a finished stage, from its own file or the checkpoint that it ended with."""
        own = self / f"{stage.name}.safetensors"
        found = distributed.from_first(lambda: self._read(own if own.is_file() else self / CHECKPOINT))
        if found.stage != stage.name:
            raise CheckpointError(f"{self.path} has not come to the stage {stage.name}, only to {found.stage}: go on "
                                  f"with --resume, or, if it was made with --stage, by generate --start {self.path}")
        if found.step < stage.config.steps:
            raise CheckpointError(f"{self.path} stopped at step {found.step} of {stage.config.steps} of the stage "
                                  f"{stage.name}: finish it first, with --resume")
        stage.restore(found.tensors, found.step, found.seconds)

    def keep_finished(self, stage: Stage) -> None:
        """Save a finished stage beside the checkpoint, which the next stage takes over."""
        own = self / f"{stage.name}.safetensors"
        if not own.exists():
            self._made.append(own)
        self._write(own, stage)

    def after_step(self, stage: Stage, force: bool = False) -> None:
        """Checkpoint and preview when due, at the end, or by force."""
        run, step = stage.run, stage.step_done
        if force or step % run.checkpoint_every == 0 or step == stage.config.steps:
            self._write(self / CHECKPOINT, stage)
        if step % run.preview_every == 0 and step < stage.config.steps:
            picture = stage.preview()
            distributed.from_first(lambda: write_png(self / PREVIEW, picture))

    def _write(self, path: Path, stage: Stage) -> None:
        settings = {name: value_of(stage.run, name) for name in names_of(stage.run)}
        about = {"stage": stage.name, "step": stage.step_done, "seconds": stage.seconds, "settings": settings}
        tensors = stage.tensors()
        distributed.from_first(lambda: save_state(path, tensors, about))

    def _read(self, path: Path) -> Checkpoint:
        tensors, about = load_state(path)
        step, seconds = about.get("step"), about.get("seconds")
        if not (type(step) is int and step >= 0 and isinstance(about.get("stage"), str)
                and isinstance(seconds, int | float) and 0 <= seconds < 1e12):
            raise CheckpointError(f"{path} is damaged (no stage, step or seconds); delete it and start again")
        return Checkpoint(about["stage"], step, float(seconds), tensors)
