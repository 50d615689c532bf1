"""A page in the browser that shows a run while it optimizes: pictures from the visitor's camera, loss, pause, stop."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from text3d_fast.app.page import address_of, close_page, open_page
from text3d_fast.geometry import glb_bytes
from text3d_fast.images import to_bytes
from text3d_fast.scene.cameras import Cameras

if TYPE_CHECKING:
    from text3d_fast.pipelines import Result
    from text3d_fast.pipelines.pipeline import Pipeline
    from text3d_fast.pipelines.stage import Stage, StepState

EVERY = 1.0  # seconds between pictures for a visitor who does not move
MOVING = 0.1  # and for one who does
SHARE = 0.2  # of the run's time, at most, for pictures; when paused or moving they may take all of it
AIM = 0.15  # seconds that a picture should take: its size follows
ROWS = (48, 512)  # smallest and largest height of a picture
POINTS = 400  # of the loss's curve
GRACE = 3.0  # seconds after which a page that was reloaded would be back


@dataclass
class _Visitor:
    """What a visitor has been shown: from which camera, when, how long it took, of which step, how high."""

    place: tuple[float, int] | None = None
    at: float = -1e9
    took: float = 0.0
    step: int = -1
    rows: int = 128
    sharp: bool = False


class LiveView:
    """A page on `port` or the next free one; `step` is a callback for `Pipeline.run`. A context.

        with LiveView() as live:
            live.end(DreamFusion().run("a red mug", callback=live.step))
            live.wait()

    Everything is rendered between two steps by the run's own thread, and nothing while nobody looks. The run's result
    is the same to the bit. Raises as `open_page` does.
    """

    def __init__(self, title: str = "text3d-fast", host: str = "127.0.0.1", port: int = 8080,
                 say: Callable[[str], Any] = print):
        self.server = server = open_page(host, port, title)
        self.address, self.say = address_of(server), say
        self._resume, self._stop = threading.Event(), threading.Event()
        self._resume.set()
        self._visitors: dict[int, _Visitor] = {}
        self._losses: list[tuple[int, float]] = []
        self._stage: Stage | None = None
        self._prompt, self._told, self._meshes = "", 0.0, []
        gui = server.gui
        self._text = gui.add_markdown("loading")
        self._bar = gui.add_progress_bar(0.0, animated=True)
        self._curve = None
        self._choice = None
        self._pause = gui.add_button("Pause", disabled=True)
        self._end = gui.add_button("Stop and save", disabled=True)
        self._pause.on_click(lambda _: self.pause(self._resume.is_set()))
        self._end.on_click(lambda _: self._stop.set())

    def __enter__(self) -> LiveView:
        return self

    def __exit__(self, *error) -> None:
        self.close()

    @property
    def watched(self) -> bool:
        """Whether anybody looks."""
        return bool(self.server.get_clients())

    def pause(self, on: bool = True) -> None:
        """Hold the run after its next step, or let it go on."""
        (self._resume.clear if on else self._resume.set)()
        self._pause.label = "Go on" if on else "Pause"

    def stop(self) -> None:
        """Save and end the run after its next step."""
        self._stop.set()

    def begin(self, pipeline: Pipeline, prompt: str, out: Path) -> None:
        """Of one run."""
        for mesh in self._meshes:
            mesh.remove()
        self._meshes, self._stage, self._prompt = [], None, prompt
        self._say("preparing")
        self._bar.value, self._bar.animated = 0.0, True

    def report(self, what: str, done: float) -> None:
        """What happens after the steps."""
        self._buttons(False)
        self._say(f"exporting: {what}")
        self._bar.value, self._bar.animated = 100.0 * done, done < 1

    def step(self, step: int, state: StepState) -> None:
        """The callback: a picture for each visitor whose turn it is, the figures, and what the buttons ask for."""
        if state.stage is not self._stage:
            self._begin(state.stage)
        if step % 10 == 0 or step == 1:  # reading a number waits for a GPU
            self._losses.append((step, float(state.loss)))
            if len(self._losses) > POINTS:
                del self._losses[1::2]
        if self.watched:
            self._tell(step, state)
            self._pictures(step)
        if not self._resume.is_set():
            self._hold(step, state)
        if self._stop.is_set():
            self._buttons(False)
            self._say(f"stopped after step {step}, saved")
            state.stop()

    def _hold(self, step: int, state: StepState) -> None:
        self.say("paused in the browser")
        self._tell(step, state, "paused")
        while not (self._resume.is_set() or self._stop.is_set() or state.stopping):
            if self.watched:
                self._pictures(step, paused=True)
            self._resume.wait(0.03)
        self.pause(False)

    def _begin(self, stage: Stage) -> None:
        self._stage, self._losses, self._prompt = stage, [], self._prompt or stage.run.prompt
        for visitor in self._visitors.values():
            visitor.step = -1
        self._particles(len(stage.parts))
        self._buttons(True)

    def _particles(self, count: int) -> None:
        """A choice of what is shown, where there are several."""
        if self._choice is not None:
            self._choice.remove()
            self._choice = None
        if count > 1:
            names = [str(number) for number in range(1, count + 1)]
            self._choice = self.server.gui.add_dropdown("Particle", names, initial_value=names[0])

    @property
    def _chosen(self) -> int:
        return 0 if self._choice is None else int(self._choice.value) - 1

    def _say(self, text: str) -> None:
        """Below the prompt; prompts are no markup."""
        prompt = "".join("\\" + letter if letter in r"\`*_{}[]<>()#+-.!|~$" else letter for letter in self._prompt)
        self._text.content = f"**{prompt}**  \n{text}"

    def _buttons(self, on: bool) -> None:
        self._pause.disabled = self._end.disabled = not on

    def _tell(self, step: int, state: StepState, note: str = "") -> None:
        """Progress and the loss's curve, now and then."""
        now, steps = time.monotonic(), state.stage.config.steps
        if now - self._told < EVERY and step < steps and not note:
            return
        self._told = now
        left = (steps - step) / max(state.rate, 1e-9)
        note = note or ("exporting" if step == steps else f"{state.rate:.1f} steps/s, {left:.0f} s left")
        self._say(f"{state.stage.name}: step {step} of {steps}, loss {self._losses[-1][1]:.4f}  \n{note}")
        self._bar.value = 100.0 * step / steps
        if len(self._losses) > 1:
            data = tuple(np.array(column, np.float64) for column in zip(*self._losses))
            if self._curve is None:
                from viser import uplot

                series = (uplot.Series(label="step"), uplot.Series(label="loss", stroke="#2563eb", width=2))
                scales = {"x": uplot.Scale(time=False, auto=True), "y": uplot.Scale(auto=True)}
                self._curve = self.server.gui.add_uplot(data, series, scales=scales, aspect=2.0)
            else:
                self._curve.data = data

    def _pictures(self, step: int, paused: bool = False) -> None:
        """One for each visitor who moved, or has waited long enough for news; a sharp one for who rests in a pause."""
        clients = self.server.get_clients()
        self._visitors = {number: self._visitors.get(number, _Visitor()) for number in clients}
        for number, client in clients.items():
            seen, now = self._visitors[number], time.monotonic()
            place = (client.camera.update_timestamp, self._chosen)
            moved, news = place != seen.place, step != seen.step
            sharpen = paused and not seen.sharp
            wait = max(MOVING, seen.took) if moved else max(EVERY, seen.took / SHARE)
            if not (moved or news or sharpen) or now - seen.at < wait:
                continue
            seen.place, seen.at, seen.step, seen.sharp = place, now, step, sharpen and not moved
            picture = self.picture(client.camera, ROWS[1] if seen.sharp else seen.rows, self._chosen)
            if not seen.sharp:
                seen.took = time.monotonic() - now
                seen.rows = int(min(max(seen.rows * min(max((AIM / seen.took) ** 0.5, 0.5), 1.5), ROWS[0]), ROWS[1]))
            client.scene.set_background_image(picture, format="jpeg", jpeg_quality=85)

    def picture(self, camera: Any, rows: int, part: int = 0) -> np.ndarray:
        """uint8 [rows, W, 3] of the scene as it is, from a viser camera."""
        device = self._stage.device

        def row(values: Any) -> torch.Tensor:
            return torch.tensor(np.asarray(values, np.float32), device=device)[None]

        view = Cameras.look_at(row(camera.position), row(camera.look_at), row(camera.fov), rows,
                               max(1, round(rows * camera.aspect)), row(camera.up_direction))
        return to_bytes(self._stage.parts[part].picture(view)[0])

    def end(self, result: Result) -> None:
        """The finished meshes in place of the pictures."""
        for client in self.server.get_clients().values():
            client.scene.set_background_image(None)
        self._particles(len(result.meshes))
        self._meshes = [self.server.scene.add_glb(f"/mesh-{number}", glb_bytes(mesh), visible=number == 1)
                        for number, mesh in enumerate(result.meshes, 1)]

        def choose(_) -> None:
            for number, mesh in enumerate(self._meshes):
                mesh.visible = number == self._chosen

        if self._choice is not None:
            self._choice.on_update(choose)
        figures = result.metrics["metrics"]
        self._say(f"done in {result.metrics['seconds']['total']:.0f} s, {figures['faces']} faces")

    def wait(self) -> None:
        """Keep the page as long as somebody looks; Ctrl-C ends it."""
        seen = time.monotonic()
        while time.monotonic() - seen < GRACE:
            if self.watched:
                seen = time.monotonic()
            time.sleep(0.2)

    def close(self) -> None:
        close_page(self.server)
