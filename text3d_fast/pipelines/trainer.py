"""The loop round every stage: clock, callbacks, checkpoints, Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from text3d_fast.errors import Interrupted, OutputError, is_out_of_memory
from text3d_fast.pipelines import distributed
from text3d_fast.pipelines.run_folder import RunFolder
from text3d_fast.pipelines.stage import Stage, StepState, StopRequest

Callback = Callable[[int, StepState], Any]
MakeStage = Callable[[Stage | None], Stage]


class Trainer:
    """Runs stages one after the other, each made from the one before.

    stages    (name, make) in order; make(previous) builds a stage
    folder    where checkpoints and previews go, None: nowhere
    callback  called after each step with its number within the stage (from 1) and a StepState; its time does not count
    """

    def __init__(
        self, stages: Sequence[tuple[str, MakeStage]], folder: RunFolder | None = None,
        callback: Callback | None = None,
    ):
        self.stages, self.folder, self.callback = list(stages), folder, callback

    def run(self, resume: bool = False, finished: Stage | None = None) -> Stage:
        """The last stage, finished. resume: from the folder's checkpoint. finished: the stage before the first one."""
        names = [name for name, _ in self.stages]
        checkpoint = self.folder.checkpoint(names) if resume and self.folder is not None else None
        reached = 0 if checkpoint is None else names.index(checkpoint.stage)
        stage = finished
        for place, (_, make) in enumerate(self.stages):
            stage = make(stage)
            if place < reached:
                self.folder.restore_finished(stage)
                continue
            if checkpoint is not None and place == reached:
                stage.restore(checkpoint.tensors, checkpoint.step, checkpoint.seconds)
            self._optimize(stage)
            if self.folder is not None and place + 1 < len(self.stages):
                self.folder.keep_finished(stage)
        return stage

    def _optimize(self, stage: Stage) -> None:
        recent: deque[float] = deque(maxlen=50)
        with catch_interrupt() as interrupt:
            while stage.step_done < stage.config.steps:
                started = time.perf_counter()
                state = self._step(stage)
                stage.step_done += 1
                recent.append(time.perf_counter() - started)
                stage.seconds += recent[-1]
                state.rate, state.request = len(recent) / max(sum(recent), 1e-9), interrupt
                if self.callback is not None:
                    self.callback(stage.step_done, state)
                stop = distributed.any_of(interrupt.requested)
                if self.folder is not None:
                    self.folder.after_step(stage, force=stop)
                if stop:
                    raise Interrupted(stage.step_done)

    def _step(self, stage: Stage) -> StepState:
        """One step. If memory does not suffice for it, what was done before is saved first."""
        drawn = {name: generator.get_state() for name, generator in stage.generators().items()}
        try:
            return stage.step()
        except (MemoryError, RuntimeError) as error:
            alone = distributed.size() == 1  # saving is done by all together, and the others are in their step
            if is_out_of_memory(error) and alone and self.folder is not None and stage.step_done:
                for name, generator in stage.generators().items():
                    generator.set_state(drawn[name])
                with contextlib.suppress(MemoryError, OutputError):
                    self.folder.after_step(stage, force=True)
            raise


@contextlib.contextmanager
def catch_interrupt() -> Iterator[StopRequest]:
    """Turns the first Ctrl-C (or SIGTERM, SIGHUP) into a request, so that a step is never cut in half; the second one
    acts at once, unless there are several processes: torchrun passes each on to all, beside what they got themselves.
    """
    interrupt = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return

    def request(number, frame) -> None:
        if interrupt.requested and distributed.size() == 1:
            raise KeyboardInterrupt
        interrupt.requested = True

    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    previous = {number: signal.signal(number, request) for number in numbers}
    try:
        yield interrupt
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
