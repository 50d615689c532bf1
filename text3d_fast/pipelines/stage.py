"""What every stage of every pipeline has in common: state that is saved and restored exactly, one step at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from text3d_fast.errors import CheckpointError
from text3d_fast.geometry import Mesh
from text3d_fast.guidance import Prior, Rows
from text3d_fast.pipelines.checkpoint import optimizer_tensors, restore_optimizer
from text3d_fast.pipelines.config import RunConfig
from text3d_fast.pipelines.distributed import Share, dealt
from text3d_fast.scene.cameras import Cameras


@dataclass
class StopRequest:
    """Whether the run is to be saved and ended after the step it is in."""

    requested: bool = False


@dataclass
class StepState:
    """What a callback is shown after each step; tensors stay on the device. `stop()` saves and ends the run, as Ctrl-C.

    stage       the stage, with its scene, optimizers and configuration
    rendering   the step's pictures
    loss        distillation and penalties; gradient_norm  root mean square of the distillation gradient
    rate        steps a second, over the last 50
    """

    stage: Stage
    rendering: Any
    loss: Tensor
    gradient_norm: Tensor
    rate: float = 0.0
    request: StopRequest = field(default_factory=StopRequest, repr=False)

    def stop(self) -> None:
        """Ask for the run to be saved and ended now: it raises Interrupted."""
        self.request.requested = True

    @property
    def stopping(self) -> bool:
        """Whether a callback or Ctrl-C has asked for that; one that waits for something must look."""
        return self.request.requested


@dataclass
class Look:
    """One look at a scene, with its graph.

    rendering    as `StepState.rendering`; images [B, H, W, 3] of it, in a size that the prior takes
    background   [B, 3] where it is one colour that the prior may be told, otherwise None
    penalties    scalar, weighted, on what was seen
    """

    rendering: Any
    images: Tensor
    cameras: Cameras
    background: Tensor | None
    penalties: Tensor


@dataclass
class Extraction:
    """A finished asset: its cleaned, coloured mesh, figures about it, and warnings in words."""

    mesh: Mesh
    figures: dict[str, Any]
    warnings: list[str] = field(default_factory=list)


class Stage(ABC):
    """One optimization. A pipeline is a list of them, each built from the finished one before it.

    config     the stage's own settings; `run` those of the whole run
    step_done  steps done; seconds  spent on them; earlier  both of the finished stages before, by name
    generator  the one source of random numbers, on the CPU, so that a GPU run draws the same cameras; `index` (the
               place in the pipeline) keeps those of the stages apart
    share      of its views, where several processes share them; None: of all processes
    """

    name: ClassVar[str]

    def __init__(
        self, config: Any, run: RunConfig, prior: Prior, device: torch.device | str = "cpu",
        previous: Stage | None = None, index: int = 0, share: Share | None = None,
    ):
        self.config, self.run, self.prior, self.device = config, run, prior, torch.device(device)
        self.index, self.step_done, self.seconds = index, 0, 0.0
        self.earlier: dict[str, tuple[int, float]] = {} if previous is None else previous.taken
        self.generator = torch.Generator().manual_seed(run.seed + 1000 * index)
        self.share = dealt(1)[1] if share is None else share
        self.build(previous)

    @abstractmethod
    def build(self, previous: Stage | None) -> None:
        """Make everything that is optimized, and its optimizers."""

    @abstractmethod
    def modules(self) -> dict[str, nn.Module]:
        """What is saved, by name."""

    @abstractmethod
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Whose moments are saved, by name; learning rates are set anew each step."""

    def generators(self) -> dict[str, torch.Generator]:
        """Whose states are saved, by name."""
        return {"generator": self.generator}

    @abstractmethod
    def step(self) -> StepState:
        """One step of the optimization; the caller counts."""

    @property
    def parts(self) -> list[Stage]:
        """The stages whose scenes can be looked at: itself, or its particles."""
        return [self]

    @abstractmethod
    def picture(self, cameras: Cameras) -> Tensor:
        """[B, H, W, 3] in 0..1, the scene as it is from these cameras, over white; of one of the `parts`."""

    @abstractmethod
    def preview(self) -> Tensor:
        """[H, W, 3] in 0..1, a picture of the scene as it is."""

    @abstractmethod
    def extract(self) -> list[Extraction]:
        """The finished assets, one for each particle; an empty mesh where there is no surface."""

    @property
    def prompt(self) -> str:
        """What its pictures show, in words."""
        return self.run.prompt

    @property
    def rows(self) -> Rows:
        """The views of a step that this process has. Those of all are drawn, so that they don't depend on that."""
        return Rows(self.generator, self.config.batch, self.share.rows(self.config.batch))

    @property
    def progress(self) -> float:
        """Of this stage, in [0, 1]."""
        return self.step_done / self.config.steps

    @property
    def taken(self) -> dict[str, tuple[int, float]]:
        """Steps and seconds so far, of the stages before and of this one, by name."""
        return {**self.earlier, self.name: (self.step_done, self.seconds)}

    def tensors(self) -> dict[str, Tensor]:
        """The whole state, to be restored exactly."""
        state = {f"{name}/{key}": value for name, module in self.modules().items()
                 for key, value in module.state_dict().items()}
        for name, optimizer in self.optimizers().items():
            state |= optimizer_tensors(optimizer, name)
        return state | {name: generator.get_state() for name, generator in self.generators().items()}

    def restore(self, tensors: dict[str, Tensor], step: int, seconds: float = 0.0) -> None:
        """The inverse of `tensors`. Raises CheckpointError if they are of another configuration."""
        try:
            for name, module in self.modules().items():
                prefix = name + "/"
                part = {key[len(prefix):]: value for key, value in tensors.items() if key.startswith(prefix)}
                module.load_state_dict(part)
            for name, optimizer in self.optimizers().items():
                restore_optimizer(optimizer, tensors, name)
            for name, generator in self.generators().items():
                generator.set_state(tensors[name])
        except (RuntimeError, KeyError, ValueError) as error:
            raise CheckpointError(f"the checkpoint does not fit its configuration: {error}") from error
        self.step_done, self.seconds = step, seconds
