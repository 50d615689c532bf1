"""What `generate` shows: a progress bar with loss, rate and time left, and a summary."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

if TYPE_CHECKING:
    from text3d_fast.pipelines.pipeline import Pipeline
    from text3d_fast.pipelines.results import Result
    from text3d_fast.pipelines.stage import StepState


class Progress:
    """A context whose `step` is a callback for `Pipeline.run`: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, pipeline: Pipeline, prompt: str, steps: int | None, quiet: bool = False):
        self.console = Console(stderr=True, quiet=quiet)
        self.loss, self.stage, self.said = 0.0, "", 0.0
        self.bar = Bar(
            TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[rate]} steps/s"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=self.console,
        )
        understood = pipeline.prior.canonical(prompt)
        steps = steps or pipeline.config.total_steps()
        self.say(f"{prompt}" + (f" (understood as: {understood})" if understood != prompt else ""), style="bold")
        self.say(f"model {pipeline.model}, {steps} steps on {pipeline.device}")

    def say(self, text: str, style: str | None = None) -> None:
        """A line as it is: brackets in a prompt are no markup."""
        self.console.print(text, style=style, markup=False, highlight=False)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error) -> None:
        self.bar.stop()

    def step(self, step: int, state: StepState) -> None:
        steps, name = state.stage.config.steps, state.stage.name
        if name != self.stage:  # not before: priors show a bar of their own while they prepare
            self.stage, self.loss = name, 0.0
            self.task = self.bar.add_task(name, total=steps, loss="-", rate="-")
            if self.console.is_terminal:
                self.bar.start()
        fields = {}
        if step % 10 == 0 or step == 1:  # reading a number waits for a GPU
            loss = float(state.loss)
            self.loss = loss if self.loss == 0 else 0.8 * self.loss + 0.2 * loss
            fields = {"loss": f"{self.loss:.4f}", "rate": f"{state.rate:.1f}"}
        self.bar.update(self.task, completed=step, **fields)
        if not self.console.is_terminal and (time.monotonic() - self.said > 15 or step == steps) and self.loss:
            self.said = time.monotonic()
            left = (steps - step) / max(state.rate, 1e-9)
            rate = f"{state.rate:.1f} steps/s, {left:.0f} s left"
            self.say(f"{name}: step {step} of {steps}, loss {self.loss:.4f}, {rate}")
        if step == steps:
            self.bar.stop()
            self.say("exporting: surface, colours, pictures")

    def summary(self, result: Result) -> None:
        metrics, figures = result.metrics, result.metrics["metrics"]
        seconds = metrics["seconds"]
        self.console.print(
            f"done in {seconds['total']:.0f} s ({metrics['seconds_per_step'] * 1000:.0f} ms a step, "
            f"export {seconds['export']:.0f} s, {metrics['peak_memory_bytes'] / 2**30:.1f} GiB): "
            f"{figures['faces']} faces, {figures['components']} piece(s)"
        )
        for warning in result.warnings:
            self.say(f"warning: {warning}", style="yellow")
