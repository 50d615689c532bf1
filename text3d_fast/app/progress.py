"""What a run shows in the terminal: a bar with loss, rate and time left, or a line now and then; and its log."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from text3d_fast.app.messages import messages
from text3d_fast.lines import LOG, Lines, show

if TYPE_CHECKING:
    from text3d_fast.pipelines.pipeline import Pipeline
    from text3d_fast.pipelines.results import Result
    from text3d_fast.pipelines.stage import StepState


class Progress:
    """A context around one or several runs; `step` and `report` are the callbacks of `Pipeline.run`."""

    def __init__(self, quiet: bool = False):
        self.console = Console(stderr=True, quiet=quiet)
        self.lines = Lines(self.console)
        self.loss, self.stage = 0.0, None
        self.bar: Bar | None = None
        self._messages = messages(self.say)

    def say(self, text: str, style: str | None = None) -> None:
        show(self.console, text, style)

    def __enter__(self) -> Progress:
        self._messages.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._stop()
        self._messages.__exit__(*error)

    def begin(self, pipeline: Pipeline, prompt: str, out: Path) -> None:
        """Of one run; its lines go into `out`/run.log, too."""
        self.stage, self.lines.log = None, out / LOG
        understood = pipeline.prior.canonical(prompt)
        self.say(f"{prompt}" + (f" (understood as: {understood})" if understood != prompt else ""), style="bold")
        guidance = pipeline.about().get("guidance", {})
        others = set(guidance.values()) - {pipeline.prior.name}
        models = ", ".join(f"{name} in {stage}" for stage, name in guidance.items()) if others else pipeline.model
        self.say(f"model {models}, on {pipeline.device}")

    def step(self, step: int, state: StepState) -> None:
        steps, name = state.stage.config.steps, state.stage.name
        if state.stage is not self.stage:  # not before: priors show a bar of their own while they prepare
            self.stage, self.loss = state.stage, 0.0
            self._start(TextColumn("loss {task.fields[loss]}  {task.fields[rate]} steps/s"))
            self.task = self.bar.add_task(name, total=steps, loss="-", rate="-")
        fields = {}
        if step % 10 == 0 or step == 1:  # reading a number waits for a GPU
            loss = float(state.loss)
            self.loss = loss if self.loss == 0 else 0.8 * self.loss + 0.2 * loss
            fields = {"loss": f"{self.loss:.4f}", "rate": f"{state.rate:.1f}"}
        self.bar.update(self.task, completed=step, **fields)
        if self.loss:
            left = (steps - step) / max(state.rate, 1e-9)
            self.lines.say(f"{name}: step {step} of {steps}, loss {self.loss:.4f}, {state.rate:.1f} steps/s, "
                           f"{left:.0f} s left", step == steps or state.stopping)
        if step == steps:
            self._stop()

    def report(self, what: str, done: float) -> None:
        """What happens after the steps, and the share of it that is done."""
        if self.bar is None:
            self._start()
            self.task = self.bar.add_task("exporting", total=1.0)
            if not self.console.is_terminal:
                self.say("exporting")
        self.bar.update(self.task, completed=done, description=f"exporting: {what}")
        if done >= 1:
            self._stop()

    def end(self, result: Result) -> None:
        metrics, figures = result.metrics, result.metrics["metrics"]
        seconds, stages = metrics["seconds"], metrics["stages"]
        each = ", ".join(f"{name} {stage['steps']} steps of {stage['seconds_per_step'] * 1000:.0f} ms"
                         for name, stage in stages.items())
        line = (f"done in {seconds['total']:.0f} s ({each}, export {seconds['export']:.0f} s, "
                f"{metrics['peak_memory_bytes'] / 2**30:.1f} GiB): "
                f"{figures['faces']} faces, {figures['components']} piece(s)")
        self.lines.note(line)
        self.say(line)
        for warning in result.warnings:
            self.say(f"warning: {warning}", style="yellow")

    def _start(self, *columns: TextColumn) -> None:
        """A new bar; shown on a terminal only."""
        self._stop()
        counts = (MofNCompleteColumn(), *columns) if columns else ()
        self.bar = Bar(TextColumn("[bold]{task.description}"), BarColumn(), *counts, TimeElapsedColumn(),
                       TextColumn("left"), TimeRemainingColumn(), console=self.console)
        if self.console.is_terminal:
            self.bar.start()

    def _stop(self) -> None:
        if self.bar is not None and self.console.is_terminal:  # elsewhere it would leave an empty line
            self.bar.stop()
        self.bar = None
