"""DreamFusion (Poole et al., 2022): a radiance field whose pictures, from every side, please an image prior."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from text3d_fast.guidance import Conditions, Prior, ScoreDistillation, TimeRange
from text3d_fast.guidance.prompts import ViewPrompts
from text3d_fast.pipelines.config import DreamFusionConfig
from text3d_fast.pipelines.priors import canonical_prompt, known_conditions, load_prior
from text3d_fast.pipelines.recipes import default_config
from text3d_fast.pipelines.results import Result, finish
from text3d_fast.pipelines.run_folder import Interrupted, RunFolder, catch_interrupt
from text3d_fast.pipelines.training import Training
from text3d_fast.scene.background import random_background
from text3d_fast.scene.cameras import Cameras
from text3d_fast.scene.regularizers import entropy_loss, opacity_loss, thickness_loss
from text3d_fast.scene.volume_renderer import Rendering


@dataclass
class StepState:
    """What a callback is shown after each step; tensors stay on the device.

    training    the scene and the optimizer
    rendering   the step's pictures
    loss        distillation and penalties; gradient_norm  root mean square of the distillation gradient
    rate        steps a second, over the last 50
    """

    training: Training
    rendering: Rendering
    loss: Tensor
    gradient_norm: Tensor
    rate: float


Callback = Callable[[int, StepState], Any]


class DreamFusion:
    """Text to a mesh by score distillation.

    model     None or "toybox": the learned prior of the Toybox world; "analytic": its exact one; or a folder,
              a .safetensors file or a hub id of a Stable-Diffusion-class model
    device    "auto", "cpu" or "cuda"
    prior     an own `guidance.Prior` instead of a model
    config    all settings; by default those that suit the prior. `settings` replaces some of them, by dotted path:
              DreamFusion("analytic", settings={"guidance.weight": 7.5, "field.levels": 12})
    """

    def __init__(
        self,
        model: str | None = None,
        device: str = "auto",
        config: DreamFusionConfig | None = None,
        prior: Prior | None = None,
        settings: dict[str, Any] | None = None,
    ):
        self.device = choose_device(device)
        if prior is not None:
            self.prior, self.model = prior, model or type(prior).__name__
        else:
            self.prior, self.model = load_prior(model, self.device)
        config = config or default_config(self.prior, self.model)
        self.config = config.updated(settings or {})

    def run(
        self,
        prompt: str,
        steps: int | None = None,
        seed: int = 0,
        out: str | Path | None = None,
        callback: Callback | None = None,
        resume: bool = False,
    ) -> Result:
        """Optimize a scene for the prompt and extract its mesh.

        out       a folder for mesh.glb, pictures, result.json, config.yaml and checkpoint.safetensors; None: no files
        callback  called after each step with its number (from 1) and a StepState
        resume    continue from out's checkpoint, with its configuration; the result is that of an unbroken run

        Raises ValueError for prompts the prior has no words for, OutputError for files that cannot be written or
        read, Interrupted after Ctrl-C (everything is saved by then).
        """
        config = self.config.updated({
            "prompt": canonical_prompt(self.prior, prompt), "model": self.model, "seed": seed,
            "steps": self.config.steps if steps is None else steps, "threads": torch.get_num_threads(),
        })
        if out is None:
            return self._optimize(config, None, resume, callback)
        folder = RunFolder(out)
        config = folder.open(config, resume, any_steps=steps is None)
        try:
            return self._optimize(config, folder, resume, callback)
        except BaseException:
            folder.discard()  # nothing half-written: unless a checkpoint was made, the folder is as before
            raise

    def _optimize(
        self, config: DreamFusionConfig, folder: RunFolder | None, resume: bool, callback: Callback | None
    ) -> Result:
        training = Training(config, self.device)
        if folder is not None and resume:
            folder.restore(training)
        views = ViewPrompts(config.view_words)
        if hasattr(self.prior, "prepare"):
            self.prior.prepare([*views.all(config.prompt), config.guidance.negative_prompt])
        distill = self._distillation(config)
        recent: deque[float] = deque(maxlen=50)
        with catch_interrupt() as interrupt:
            while training.step < config.steps:
                started = time.perf_counter()
                state = self._step(training, distill, views)
                recent.append(time.perf_counter() - started)
                training.seconds += recent[-1]
                state.rate = len(recent) / max(sum(recent), 1e-9)
                if callback is not None:
                    callback(training.step, state)
                if folder is not None:
                    folder.after_step(training, force=interrupt.requested)
                if interrupt.requested:
                    raise Interrupted(training.step, folder)
        return finish(training, folder)

    def _step(self, training: Training, distill: ScoreDistillation, views: ViewPrompts) -> StepState:
        """One step of the paper's section 3."""
        config, progress, generator = training.config, training.progress, training.generator
        training.prepare_step()

        # 1. a random camera, light and background
        cameras = self._cameras(config, generator)
        lights = config.lights.sample(cameras, generator)
        mode = config.shading.sample(progress, generator)
        color = random_background(config.batch, generator, self.device)
        background = color
        if training.background is not None:
            background = training.background(cameras.rays()[1])

        # 2. a picture
        normals = config.field.normals if training.penalty("orientation") > 0 or mode != "albedo" else None
        rendering = training.renderer(training.field, cameras, background, lights, mode, normals, generator)

        # 3. score distillation, with the prompt of the view
        known = known_conditions(self.prior)
        conditions = Conditions(
            views(config.prompt, cameras.elevation, cameras.azimuth),
            cameras.condition if config.guidance.camera and "camera" in known else None,
            color if config.guidance.background and "background" in known and training.background is None else None,
        )
        # The noise too is drawn on the CPU: 64^2 x 3 numbers cost nothing, and a seed means the same everywhere.
        distilled = distill(rendering.color, conditions, progress, generator)
        loss = distilled.loss + self._penalties(training, rendering)

        # 4. a step of Adam
        training.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        training.optimizer.step()
        training.step += 1
        return StepState(training, rendering, loss.detach(), distilled.gradient_norm, 0.0)

    def _cameras(self, config: DreamFusionConfig, generator: torch.Generator) -> Cameras:
        """Random ones, or some of those that the prior knows exactly, if it is told the camera at all."""
        views = getattr(self.prior, "known_cameras", None) if config.guidance.camera else None
        if views is None:
            cameras = config.cameras.sample(config.batch, config.size, generator)
        else:
            cameras = config.cameras.choose(views(config.prompt), config.batch, config.size, generator)
        return cameras.to(self.device)

    def _penalties(self, training: Training, rendering: Rendering) -> Tensor:
        terms = {
            "orientation": lambda: rendering.orientation,
            "opacity": lambda: opacity_loss(rendering.opacity),
            "entropy": lambda: entropy_loss(rendering.opacity),
            "thickness": lambda: thickness_loss(rendering.depth_variance, rendering.opacity),
        }
        total = torch.zeros((), device=self.device)
        for name, term in terms.items():
            weight = training.penalty(name)
            if weight > 0:
                total = total + weight * term()
        return total

    def _distillation(self, config: DreamFusionConfig) -> ScoreDistillation:
        chosen = config.guidance
        final = chosen.final_time or (None, None)
        kind = "constant" if chosen.final_time is None else "linear"
        return ScoreDistillation(
            self.prior, chosen.weight, chosen.weighting,
            TimeRange(*chosen.time, *final, kind=kind, end=chosen.time_end),
            jacobian=chosen.jacobian, clip=chosen.clip, negative_prompt=chosen.negative_prompt,
        )


def choose_device(device: str) -> torch.device:
    """"auto" is CUDA when there is a usable one. ValueError for anything unknown or absent."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device: expected auto, cpu or cuda, got {device!r}") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda was asked for, but torch sees no CUDA device here; use --device cpu")
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu or cuda, got {device!r}")
    return chosen
