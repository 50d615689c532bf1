"""What `generate` shows: a progress bar with loss, rate and time left, and a summary."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

if TYPE_CHECKING:
    from text3d_fast.pipelines.pipeline import Pipeline
    from text3d_fast.pipelines.results import Result
    from text3d_fast.pipelines.stage import StepState


class Progress:
    """A context whose `step` is a callback for `Pipeline.run`."""

    def __init__(self, pipeline: Pipeline, prompt: str, steps: int | None, quiet: bool = False):
        self.console = Console(stderr=True, quiet=quiet)
        self.steps = steps or pipeline.config.total_steps()
        self.loss = 0.0
        self.bar = Bar(
            TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[rate]} steps/s"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=self.console,
        )
        self.console.print(f"[bold]{prompt}[/bold]  model {pipeline.model}, {self.steps} steps on {pipeline.device}")
        self.task = self.bar.add_task("optimizing", total=self.steps, loss="-", rate="-")

    def __enter__(self) -> Progress:
        self.started = False
        return self

    def __exit__(self, *error) -> None:
        self.bar.stop()

    def step(self, step: int, state: StepState) -> None:
        if not self.started:  # not before: priors show a bar of their own while they prepare
            self.bar.start()
            self.started = True
        fields = {}
        if step % 10 == 0 or step == 1:  # reading a number waits for a GPU
            loss = float(state.loss)
            self.loss = loss if self.loss == 0 else 0.8 * self.loss + 0.2 * loss
            fields = {"loss": f"{self.loss:.4f}", "rate": f"{state.rate:.1f}"}
        self.bar.update(self.task, description=state.stage.name, completed=step, total=state.stage.config.steps,
                        **fields)

    def summary(self, result: Result) -> None:
        metrics, figures = result.metrics, result.metrics["metrics"]
        seconds = metrics["seconds"]
        self.console.print(
            f"done in {seconds['total']:.0f} s ({metrics['seconds_per_step'] * 1000:.0f} ms a step, "
            f"export {seconds['export']:.0f} s, {metrics['peak_memory_bytes'] / 2**30:.1f} GiB): "
            f"{figures['faces']} faces, {figures['components']} piece(s)"
        )
        for warning in result.warnings:
            self.console.print(f"[yellow]warning:[/yellow] {warning}")
