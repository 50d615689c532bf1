"""What the pipelines have in common: from a prompt and a prior to a result."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch

from text3d_fast.errors import ModelWarning
from text3d_fast.guidance import Prior, load_prior
from text3d_fast.guidance.models.options import HARMLESS
from text3d_fast.pipelines import distributed
from text3d_fast.pipelines.config import RunConfig
from text3d_fast.pipelines.recipes import Recipe, recipe, volume_recipe
from text3d_fast.pipelines.results import Report, Result, finish
from text3d_fast.pipelines.run_folder import RunFolder
from text3d_fast.pipelines.settings import names_of, value_of
from text3d_fast.pipelines.stage import Stage
from text3d_fast.pipelines.trainer import Callback, Trainer

MACHINES_OWN = ("threads", *(f"prior.{name}" for name in HARMLESS))  # settings that may differ between processes


class Pipeline:
    """Text to meshes by one stage or several. A pipeline says which settings it has and which stages.

    model     None or "toybox": the learned prior of the Toybox world; "analytic": its exact one; or a folder,
              a .safetensors file or a hub id of a Stable-Diffusion-class model
    device    "auto", "cpu" or "cuda"
    prior     an own `guidance.Prior` instead of a model
    config    all settings; by default those that suit the prior. `settings` replaces some of them, by dotted path:
              DreamFusion("analytic", settings={"guidance.weight": 7.5, "field.levels": 12})
    """

    config_type: ClassVar[type[RunConfig]]
    stages: ClassVar[Sequence[type[Stage]]]

    def __init__(
        self,
        model: str | None = None,
        device: str = "auto",
        config: RunConfig | None = None,
        prior: Prior | None = None,
        settings: dict[str, Any] | None = None,
    ):
        self.device = choose_device(device)
        self.changes = dict(settings or {})
        # how the prior is loaded has to be known before it says which other settings suit it
        options = {name: value for name, value in self.changes.items() if name.startswith("prior.")}
        if options and prior is not None:
            raise ValueError(f"{next(iter(options))}: the prior is an own one and is loaded already")
        self.options = (config or self.config_type()).updated(options).prior
        self.prior = load_prior(model, self.device, self.options) if prior is None else prior
        self.model = model or self.prior.name
        config = config or self.default_config()
        self.config = config.updated(self.changes)

    def default_config(self) -> RunConfig:
        """The settings that suit the prior; see recipes."""
        return self.config_type(model=self.model).updated(recipe(self.prior, self.config_type).settings())

    def recipes(self) -> dict[str, Recipe]:
        """What suits the priors, by stage."""
        return {kind.name: volume_recipe(self.stage_prior(kind)) for kind in self.stages}

    def source(self, name: str) -> str:
        """Where the value of a setting (dotted, as in config.yaml) comes from when nobody asks for another."""
        recipes = self.recipes()
        stage, _, own = name.partition(".")
        return recipes[stage].source(own) if stage in recipes else next(iter(recipes.values())).source(name)

    def stage_prior(self, stage: type[Stage]) -> Prior:
        """The prior that guides a stage."""
        return self.prior

    def run(
        self,
        prompt: str,
        steps: int | None = None,
        seed: int = 0,
        out: str | Path | None = None,
        callback: Callback | None = None,
        resume: bool = False,
        stage: str | None = None,
        start: str | Path | None = None,
        report: Report | None = None,
    ) -> Result:
        """Optimize a scene for the prompt and extract its mesh. In a job of several processes (`distributed.join`) all
        call it together, and the first one writes.

        steps     of the stages that run, together; divided among them as the defaults are
        out       a folder for mesh.glb, pictures, result.json, config.yaml and checkpoint.safetensors; None: no files
        callback  called after each step with its number (from 1) and a StepState
        resume    continue from out's checkpoint, with its configuration; the result is that of an unbroken run
        stage     only this one of the stages
        start     the folder of a run that finished the stage before, to begin after it
        report    called while the result is made with what is done and the share of it that is, 0 to 1

        Raises ValueError for prompts the prior has no words for, OutputError for files that cannot be written or
        read, Interrupted after Ctrl-C (everything is saved by then).
        """
        config = self.config.updated({
            "prompt": self.prior.canonical(prompt), "model": self.model, "seed": seed,
            "threads": torch.get_num_threads(),
        })
        before, chosen = self._chosen(stage, start)
        if steps is not None:
            config = config.with_steps(steps, [kind.name for kind in chosen if kind.name in config.stage_names()])
        self.check_processes(config, chosen)
        distributed.check_alike({
            **{name: value_of(config, name) for name in names_of(config) if name not in MACHINES_OWN},
            "stage": stage, "resume": resume, "start, whether there is one,": start is not None,
            "out, whether there is one,": out is not None,
        })
        self._foretell(config, chosen)
        folder = None if out is None else RunFolder(out)
        if folder is not None:
            config = folder.open(config, resume, any_steps=steps is None, changes=self.changes)
        try:
            finished = self._finished(config.prompt, before, start, folder) if before else None
            makers = [(kind.name, partial(self._make, config, kind)) for kind in chosen]
            last = Trainer(makers, folder, callback).run(resume, finished)
            return finish(last, folder, self.about(), report)
        except BaseException:
            if folder is not None:
                folder.discard()  # nothing half-written: unless a checkpoint was made, the folder is as before
            raise
        finally:
            if folder is not None:
                folder.close()

    def check_processes(self, config: RunConfig, stages: Sequence[type[Stage]]) -> None:
        """ValueError, before anything is done, if several processes can't do these stages together."""
        distributed.check_batches(getattr(config, "particles", 1), [
            ("batch" if config.stage(kind.name) is config else f"{kind.name}.batch", config.stage(kind.name).batch)
            for kind in stages], [self.stage_prior(kind).views for kind in stages])

    def _foretell(self, config: RunConfig, stages: Sequence[type[Stage]]) -> None:
        """Warn of a run that will take hours, before it begins."""
        seconds, step = 0.0, 0.0
        for kind in stages:
            picture = self.stage_prior(kind).seconds_a_picture() or 0.0
            own = config.stage(kind.name)
            step = max(step, picture * own.batch)
            seconds += picture * own.batch * own.steps
        if seconds > 3600:
            long = f"{seconds / 3600:.0f} hours" if seconds < 48 * 3600 else f"{seconds / 86400:.0f} days"
            warnings.warn(
                f"guidance by {self.model} takes about {step:.0f} s a step on this CPU, and all steps about {long}. "
                f"Quicker: a GPU; prior.tiny_autoencoder (a tenth of the VAE's work); fewer steps; or the built-in "
                f"models (toybox, analytic)", ModelWarning, stacklevel=3)

    def about(self) -> dict[str, Any]:
        """What result.json says beyond what every run has."""
        return {}

    def _finished(
        self, prompt: str, stages: Sequence[type[Stage]], start: str | Path, out: RunFolder | None = None
    ) -> Stage:
        """The last of these stages as the run in `start` left it; each needs the one before it to be built. The folder
        `out` gets them too, so that it holds a whole run."""
        folder = RunFolder(start)
        config, stage = distributed.from_first(lambda: self.start_config(folder, prompt)), None
        for kind in stages:
            stage = self._make(config, kind, stage)
            folder.restore_finished(stage)
            if out is not None:
                out.keep_finished(stage)
        return stage

    def start_config(self, folder: RunFolder, prompt: str) -> RunConfig:
        """The configuration of a folder to begin after, for this prompt."""
        saved = folder.saved_config(self.config_type)
        if saved.prompt != prompt:
            warnings.warn(f"{folder.path} was made for {saved.prompt!r}; the stages after it are asked for {prompt!r}",
                          ModelWarning, stacklevel=2)
        return saved

    def _make(self, config: RunConfig, kind: type[Stage], previous: Stage | None) -> Stage:
        index = list(self.stages).index(kind)
        return kind(config.stage(kind.name), config, self.stage_prior(kind), self.device, previous, index)

    def _chosen(
        self, stage: str | None, start: str | Path | None
    ) -> tuple[Sequence[type[Stage]], Sequence[type[Stage]]]:
        """The stages that `start` has finished, and those to run."""
        names = [kind.name for kind in self.stages]
        if stage is not None and stage not in names:
            raise ValueError(f"stage: expected one of {', '.join(names)}, got {stage!r}")
        first = names.index(stage) if stage is not None else 0 if start is None else 1
        if first > 0 and start is None:
            raise ValueError(f"start: the stage {stage} begins with a finished {names[first - 1]}; name its folder")
        if start is not None and first == 0:
            raise ValueError(f"start: the stage {names[0]} is the first one and begins with nothing")
        return self.stages[:first], self.stages[first : first + 1] if stage is not None else self.stages[first:]


def choose_device(device: str) -> torch.device:
    """"auto" is CUDA when there is a usable one. ValueError for anything unknown or absent."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device: expected auto, cpu or cuda, got {device!r}") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda was asked for, but torch sees no CUDA device here; use --device cpu")
    if chosen.type == "cuda" and distributed.size() > 1 and distributed.local_rank() >= torch.cuda.device_count():
        raise ValueError(f"device: there are more processes than GPUs on this machine ({torch.cuda.device_count()}); "
                         f"start one for each, or use --device cpu")
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu or cuda, got {device!r}")
    return chosen
