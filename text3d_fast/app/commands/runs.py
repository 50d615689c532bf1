"""What `generate` and `edit` have in common: options of a run, its folder, and what is said when it ends."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg

from text3d_fast.app.commands.outcome import INTERRUPTED, explain, fail
from text3d_fast.errors import EmptyMesh, Interrupted, ProcessLost

CHECKPOINT = "checkpoint.safetensors"
LEAST_MEMORY = 700 << 20  # of addresses


@dataclass(kw_only=True)
class RunOptions:
    """Where the result goes and how it is made."""

    steps: Annotated[int | None, arg(metavar="N")] = None
    """Steps of optimization, of all stages that run together; the default depends on the model, and of edit is the most
    that it may take. With --resume, more than were planned go on beyond them."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one."""
    out: Annotated[Path | None, arg(metavar="DIR")] = None
    """The folder for the results; by default runs/PROMPT."""
    resume: bool = False
    """Go on from the checkpoint in OUT."""
    live: bool = False
    """Show the run in the browser: pictures from your camera, loss, pause, stop (needs the extra `viewer`). Only this
    machine reaches the page, which stays until it is closed."""
    port: int = 8080
    """Where --live listens, or the next free one."""
    mp4: bool = False
    """Write turntable.mp4, too: 72 views of 512 pixels (needs the extra `video`)."""
    threads: Annotated[int | None, arg(metavar="N")] = None
    """CPU threads; by default what torch chooses."""
    set: Annotated[tuple[str, ...], arg(metavar="NAME=VALUE ...")] = ()
    """Other settings by their names in config.yaml, e.g. --set guidance.weight=7.5 field.levels=12."""
    quiet: bool = False
    """Print nothing but errors."""


@dataclass
class Job:
    """One run: a prompt, a seed, the folder of the result, and whether to go on from what is there."""

    prompt: str
    seed: int
    out: Path
    resume: bool


@dataclass
class Command:
    """What is to be run.

    make      settings -> a pipeline
    run       (pipeline, job, callback, report) -> a result
    words     that start the command again: "generate", "a red mug"; `own` its options that are not in RunOptions
    finished  called with each job and its result, or the EmptyMesh that came instead
    """

    make: Callable[[dict], Any]
    run: Callable[[Any, Job, Callable, Callable], Any]
    words: list[str]
    own: list[str] = dataclasses.field(default_factory=list)
    finished: Callable[[Job, Any], Any] | None = None


def optimize(command: Command, jobs: Sequence[Job], options: RunOptions, out: Path) -> int:
    """Run the jobs and say what comes of them; returns the exit status, of several jobs the worst.

    out: the folder that the command names, to be said to whoever interrupts it
    """
    if options.steps is not None and options.steps < 1:
        return fail(f"--steps: expected a positive number, got {options.steps}")
    from text3d_fast.app.progress import Progress

    job = next(iter(jobs), None)
    first = os.environ.get("RANK", "0") == "0"  # of several processes, the one that shows and writes
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress(options.quiet or not first))
        progress.say("loading")  # seconds
        try:
            check_memory()
            from text3d_fast.pipelines import distributed

            stack.enter_context(distributed.join())
            settings = dict(parse_setting(text) for text in options.set)
            set_threads(options)
            if options.mp4:
                check_video()
            watchers, live = [progress] if first else [], None
            if options.live and first:
                from text3d_fast.app.live import LiveView

                live = stack.enter_context(LiveView(port=options.port, say=progress.say))
                watchers.append(live)
                progress.say(f"live at {live.address}")

            def step(number: int, state: Any) -> None:
                for watcher in watchers:
                    watcher.step(number, state)

            def report(what: str, done: float) -> None:
                for watcher in watchers:
                    watcher.report(what, done)

            with distributed.giving_reasons():
                pipeline, status = command.make(settings), 0
                for job in jobs:
                    try:
                        for watcher in watchers:
                            watcher.begin(pipeline, job.prompt, job.out)
                        outcome = command.run(pipeline, job, step, report)
                        if options.mp4 and first:
                            write_turntables(outcome, job.out)
                        for watcher in watchers:
                            watcher.end(outcome)
                    except EmptyMesh as error:
                        outcome, status = error, explain(error)
                    if command.finished is not None:
                        command.finished(job, outcome)
            if live is not None:
                with contextlib.suppress(KeyboardInterrupt):
                    live.wait()
            return status
        except Interrupted as stop:
            what = f"Stopped after step {stop.step}; everything is saved in {job.out}"
        except KeyboardInterrupt:  # before the first step, or while the mesh is made
            if job is None or not (job.out / CHECKPOINT).is_file():
                raise
            what = f"Stopped; the last checkpoint is in {job.out}"
        except Exception as error:
            lost = isinstance(error, ProcessLost)
            if lost:
                distributed.speak_for_the_first()
            status = explain(error)
            if status is None:
                raise
            if (lost or progress.stage is not None) and (job.out / CHECKPOINT).is_file():
                print(f"The last checkpoint is in {job.out}. To go on:\n  {resume_command(command, options, out)}",
                      file=sys.stderr)
            return status
    if first:
        print(f"\n{what}. To go on:\n  {resume_command(command, options, out)}", file=sys.stderr)
    return INTERRUPTED


def check_memory() -> None:
    """MemoryError where torch could not even be loaded: its libraries would end the process in their own way."""
    try:
        import resource
    except ImportError:  # Windows
        return
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY and limit < LEAST_MEMORY:
        raise MemoryError(f"this process may have {limit >> 20} MB, by ulimit -v, and needs {LEAST_MEMORY >> 20} to "
                          f"begin with")


def check_video() -> None:
    """ImportError if a video could not be written: said before the first step."""
    from text3d_fast.images import video_writer

    video_writer()


def write_turntables(result: Any, out: Path) -> None:
    """turntable.mp4, of further particles turntable-2.mp4 and so on. OutputError if they cannot be written."""
    from text3d_fast.images import write_video
    from text3d_fast.pipelines.pictures import turntable

    for number, mesh in enumerate(result.meshes, 1):
        frames = turntable(mesh, result.stage.config.cameras, 72, 512)
        write_video(out / f"turntable{'' if number == 1 else f'-{number}'}.mp4", frames)


def set_threads(options: RunOptions) -> None:
    """ValueError for a number that cannot be."""
    if options.threads is None:
        return
    import torch

    cores = os.cpu_count() or 1
    if not 1 <= options.threads <= 4096:
        raise ValueError(f"--threads: expected 1 to {cores}, the cores of this machine, got {options.threads}")
    if options.threads > cores and not options.quiet:
        print(f"--threads {options.threads}: this machine has {cores} cores, so {cores} are used", file=sys.stderr)
    torch.set_num_threads(min(options.threads, cores))


def parse_setting(text: str) -> tuple[str, object]:
    """"guidance.weight=7.5" to a name and a value, read as YAML."""
    import yaml

    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ValueError(f"--set: expected NAME=VALUE, got {text!r}")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError:
        raise ValueError(f"--set {name}: cannot read the value {value!r}") from None


def model_settings(texts: Sequence[str]) -> dict[str, Any]:
    """The settings `prior.*` of a command that has no others. ValueError for those."""
    settings = dict(parse_setting(text) for text in texts)
    for name in settings:
        if not name.startswith("prior."):
            raise ValueError(f"--set {name}: only prior.* can be set here, how the model is loaded; "
                             f"generate --help-settings lists them")
    return settings


def slug(text: str) -> str:
    """A name for a folder: "A red Mug!" is a-red-mug."""
    return "-".join(re.findall(r"[a-z0-9]+", text.lower()))[:60] or "run"


def default_folder(prompt: str, resume: bool, root: Path = Path("runs")) -> Path:
    """runs/a-red-mug, or the next free runs/a-red-mug-2; to resume, the newest of them."""
    stem = slug(prompt)
    number, folder = 1, root / stem
    while folder.exists():
        number, newest = number + 1, folder
        folder = root / f"{stem}-{number}"
    return newest if resume and number > 1 else folder


def option_words(options: Any, leave_out: tuple[str, ...] = ()) -> list[str]:
    """The words of a command line for the options of a dataclass that differ from their defaults."""
    words = []
    for entry in dataclasses.fields(options):
        value = getattr(options, entry.name)
        if entry.name in leave_out or value in (entry.default, None):
            continue
        words.append("--" + entry.name.replace("_", "-"))
        if value is not True:
            words += [str(part) for part in value] if isinstance(value, tuple) else [str(value)]
    return words


def resume_command(command: Command, options: RunOptions, out: Path) -> str:
    """The command line that continues this run."""
    shared = option_words(options, ("resume", "out"))
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    started = ["text3d-fast"] if processes == "1" else ["torchrun", "--nproc-per-node", processes, "-m", "text3d_fast"]
    return shlex.join([*started, *command.words, "--resume", "--out", str(out), *command.own, *shared])
