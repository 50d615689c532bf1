"""The command line: text3d-fast generate | edit | playground | view | evaluate | bench | doctor.

Imports here are light, so that --help answers at once; torch comes with the command that needs it.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, arg

Backend = Literal["native", "triton", "reference"]
USER_ERROR, EMPTY_MESH, INTERRUPTED = 2, 3, 130


@dataclass
class Generate:
    """Turn a text into a mesh.

    Writes mesh.glb, turntable.gif, views.png, result.json, config.yaml and checkpoint.safetensors into the folder OUT.
    Ctrl-C saves; the same command with --resume goes on from there, to the same result.

    Examples:

      text3d-fast generate "a red mug"

      text3d-fast generate "a blue chair" --model analytic --steps 300

      text3d-fast generate "a red mug" --pipeline magic3d

      text3d-fast generate "a mug" --pipeline prolificdreamer --particles 4

      text3d-fast generate "a corgi" --model path/or/hub-id/of/a/stable-diffusion-model --device cuda
    """

    prompt: Positional[Annotated[str, arg(metavar="PROMPT")]]
    """What to make. The built-in model knows a small world: "a red mug", "a striped ball on a blue cube"."""
    pipeline: Literal["dreamfusion", "magic3d", "prolificdreamer"] = "dreamfusion"
    """The method. magic3d makes a coarse volume, then refines its surface as a textured mesh at higher resolution;
    prolificdreamer makes several different results by variational score distillation."""
    model: Annotated[str | None, arg(metavar="MODEL")] = None
    """The image prior: a folder, a .safetensors file or a hub id of a Stable-Diffusion-class model; "toybox" for
    the learned built-in one, the default; "analytic" for the exact built-in one, which is quicker. Without it, magic3d
    takes the learned one in its coarse stage and the exact one, at 128 of 256 pixels, in its fine stage."""
    fine_model: Annotated[str | None, arg(metavar="MODEL")] = None
    """magic3d: another prior for the fine stage; by default MODEL for both, if it is given."""
    stage: Annotated[str | None, arg(metavar="NAME")] = None
    """Run only this stage of the pipeline: coarse or fine of magic3d; vsd, geometry or texturing of prolificdreamer."""
    start: Annotated[Path | None, arg(metavar="DIR")] = None
    """Begin after the stage that a run in DIR has finished."""
    particles: Annotated[int | None, arg(metavar="N")] = None
    """prolificdreamer: how many results to make side by side; the default is 1."""
    preset: Literal["small", "scene"] | None = None
    """prolificdreamer: small is for two CPU cores; scene is a place seen from within, to be run with --stage vsd."""
    steps: Annotated[int | None, arg(metavar="N")] = None
    """Steps of optimization; the default depends on the model."""
    seed: int = 0
    """The same seed gives the same result on the same machine."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one."""
    out: Annotated[Path | None, arg(metavar="DIR")] = None
    """The folder for the results; by default runs/PROMPT."""
    resume: bool = False
    """Go on from the checkpoint in OUT."""
    no_camera: bool = False
    """Tell the prior the view in words only, as in the paper, even if it could be given the camera."""
    backend: Backend | None = None
    """Insist on one implementation of the ops; an op that it cannot serve is an error."""
    threads: Annotated[int | None, arg(metavar="N")] = None
    """CPU threads; by default what torch chooses."""
    set: Annotated[tuple[str, ...], arg(metavar="NAME=VALUE ...")] = ()
    """Other settings by their names in config.yaml, e.g. --set guidance.weight=7.5 field.levels=12."""
    help_settings: bool = False
    """List all settings for --set with what they may be, their value for this pipeline and model, and where that comes
    from; makes nothing."""
    quiet: bool = False
    """Print nothing but errors."""


@dataclass
class Edit:
    """Change a finished result of magic3d with another prompt; what that does not change stays.

    Takes at most 30 % of the steps that the result took, with its priors and settings.

    Example:

      text3d-fast edit runs/a-red-mug "a blue mug"
    """

    folder: Positional[Annotated[Path, arg(metavar="RESULT_DIR")]]
    """What `generate --pipeline magic3d` wrote."""
    prompt: Positional[Annotated[str, arg(metavar="PROMPT")]]
    """What to make of it."""
    steps: Annotated[int | None, arg(metavar="N")] = None
    """Steps of optimization; by default as many as may be."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one."""
    out: Annotated[Path | None, arg(metavar="DIR")] = None
    """The folder for the results; by default runs/PROMPT."""
    resume: bool = False
    """Go on from the checkpoint in OUT."""
    threads: Annotated[int | None, arg(metavar="N")] = None
    """CPU threads; by default what torch chooses."""
    set: Annotated[tuple[str, ...], arg(metavar="NAME=VALUE ...")] = ()
    """Other settings by their names in config.yaml, e.g. --set edit.guidance.weight=7.5."""
    quiet: bool = False
    """Print nothing but errors."""


@dataclass
class Playground:
    """Compare sampling and distillation losses on pictures: what the loss does, without a 3D scene.

    Writes figure7.png (ancestral sampling, SDS, VSD, CSD, ISM and SDS-Bridge side by side), grid.png (the first three
    at several guidance weights), table.csv and table.json (saturation, sharpness, diversity) into the folder OUT.

    Examples:

      text3d-fast playground "a red mug"

      text3d-fast playground "a mug" --no-grid --count 8 --steps 300
    """

    prompt: Positional[Annotated[str, arg(metavar="PROMPT")]]
    """What the pictures show."""
    model: Annotated[str | None, arg(metavar="MODEL")] = None
    """The image prior, as for generate; latent models are refused (their decoder is not kept)."""
    count: int = 4
    """Pictures by each method."""
    steps: int = 80
    """Steps of each loss."""
    weights: tuple[float, ...] = (1.0, 3.0, 7.5, 30.0, 100.0)
    """Guidance weights of the grid, in the (1 + w) / w form."""
    no_grid: bool = False
    """Only the figure."""
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    out: Annotated[Path | None, arg(metavar="DIR")] = None
    """The folder for the results; by default runs/playground-PROMPT."""
    quiet: bool = False
    """Print nothing but errors."""


@dataclass
class View:
    """Show a mesh: as a picture, relit and composited, or live in the browser.

    Examples:

      text3d-fast view runs/a-red-mug/mesh.glb --out mug.png

      text3d-fast view mug.glb --out mug.png --light -1 1 0 --light-color 1 0.7 0.4 --ambient 0.1 0.1 0.2

      text3d-fast view mug.glb --scene room.glb --azimuth 60

      text3d-fast view mug.glb --serve
    """

    mesh: Positional[Annotated[Path, arg(metavar="MESH")]]
    """A .glb, .gltf, .obj, .ply or .stl."""
    out: Annotated[Path, arg(metavar="PNG")] = Path("view.png")
    """The picture to write."""
    azimuth: float = 30.0
    """Degrees around the mesh: 0 its front (+Z), 90 its left side."""
    elevation: float = 20.0
    """Degrees above the horizon."""
    distance: Annotated[float | None, arg(metavar="D")] = None
    """In radii of the mesh; by default it fills the picture."""
    size: int = 512
    """Pixels a side."""
    light: tuple[float, float, float] = (0.6, 1.0, 0.8)
    """Direction towards the light."""
    light_color: tuple[float, float, float] = (0.8, 0.8, 0.8)
    """Red, green, blue."""
    ambient: tuple[float, float, float] = (0.3, 0.3, 0.3)
    """Light from everywhere."""
    background: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Colour behind everything."""
    background_image: Annotated[Path | None, arg(metavar="IMAGE")] = None
    """A picture behind everything, cropped to a square."""
    scene: Annotated[Path | None, arg(metavar="MESH")] = None
    """Another mesh, drawn in the same depth and light: the room the first one stands in."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    serve: bool = False
    """Show it in the browser until Ctrl-C instead of writing a picture (needs the extra `viewer`)."""
    port: int = 8080
    """Where --serve listens, or the next free one."""
    host: str = "127.0.0.1"
    """The address on which --serve listens: by default only this machine reaches it; 0.0.0.0 opens it to all."""


@dataclass
class Evaluate:
    """Measure the quality of generated meshes against the truth, over the built-in world.

    Examples:

      text3d-fast evaluate --quick

      text3d-fast evaluate --model analytic --camera-only --seeds 0 --prompts "a red mug" "a blue chair"
    """

    quick: bool = False
    """A part of the suite, at most 20 minutes on 2 CPU cores: 4 prompts, seed 0, 300 steps."""
    pipeline: Literal["dreamfusion", "magic3d"] = "dreamfusion"
    """magic3d: the mesh of its coarse stage beside that of its fine stage, with the camera given."""
    model: Annotated[str | None, arg(metavar="MODEL")] = None
    """The prior to measure beside the analytic one; as for generate, by default "toybox"."""
    camera_only: bool = False
    """Leave out the runs that tell the prior the view in words only."""
    prompts: Annotated[tuple[str, ...], arg(metavar="PROMPT ...")] = ()
    """By default 21."""
    seeds: Annotated[tuple[int, ...], arg(metavar="N ...")] = ()
    """One run for each; by default 0 1 2."""
    steps: Annotated[int | None, arg(metavar="N")] = None
    """By default as for generate."""
    out: Path = Path("runs/evaluation")
    """The folder for meshes, table and JSON; an interrupted evaluation goes on where it stopped."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass
class Bench:
    """Measure the speed of the ops, beside the peers that are installed (pytest benchmarks --benchmark-only)."""

    only: Annotated[str | None, arg(metavar="NAME")] = None
    """Only benchmarks whose name contains this."""
    csv: Annotated[Path | None, arg(metavar="FILE")] = None
    """Write the table there as well."""


@dataclass
class Doctor:
    """Say which backend serves which op on this machine, and why not the others."""

    model: Annotated[str | None, arg(metavar="MODEL")] = None
    """Also describe this model: what it predicts, shapes, memory, licence. Nothing is loaded."""


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 done, 1 failed, 2 a mistake in the request, 3 empty mesh, 130 Ctrl-C."""
    if (sys.argv[1:] if arguments is None else arguments) == ["--version"]:
        from text3d_fast import __version__

        print(f"text3d-fast {__version__}")
        return 0
    command = tyro.extras.subcommand_cli_from_dict(
        {"generate": Generate, "edit": Edit, "playground": Playground, "view": View, "evaluate": Evaluate,
         "bench": Bench, "doctor": Doctor},
        prog="text3d-fast",
        description="Text to 3D with 2D diffusion models, with and without a GPU.",
        args=arguments,
        config=(FlagCreatePairsOff,),
    )
    run = {Generate: generate, Edit: edit, Playground: playground, View: view, Evaluate: evaluate, Bench: bench,
           Doctor: doctor}[type(command)]
    try:
        return run(command)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def generate(options: Generate) -> int:
    for name in ("particles", "preset"):
        if getattr(options, name) is not None and options.pipeline != "prolificdreamer":
            return fail(f"--{name}: only --pipeline prolificdreamer has it")
    if options.fine_model is not None and options.pipeline != "magic3d":
        return fail("--fine-model: only --pipeline magic3d has a fine stage")
    from text3d_fast import backends, pipelines
    from text3d_fast.pipelines.recipes import PRESETS

    kind = {"dreamfusion": pipelines.DreamFusion, "magic3d": pipelines.Magic3D,
            "prolificdreamer": pipelines.ProlificDreamer}[options.pipeline]

    def make(settings: dict):
        backends.use_backend(options.backend)
        if options.no_camera:
            several = len(kind.stages) > 1
            settings |= {f"{stage.name}.guidance.camera" if several else "guidance.camera": False
                         for stage in kind.stages}
        if options.preset is not None:
            settings = PRESETS[options.preset] | settings
        if options.particles is not None:
            settings |= {"particles": options.particles}
        further = {} if options.fine_model is None else {"fine_model": options.fine_model}
        return kind(options.model, options.device, settings=settings, **further)

    if options.help_settings:
        try:
            print_settings(make(dict(parse_setting(text) for text in options.set)))
        except (OSError, ValueError) as error:
            return fail(str(error))
        return 0

    def run(pipeline, out, progress):
        return pipeline.run(options.prompt, options.steps, options.seed, out, progress.step, options.resume,
                            options.stage, options.start)

    return optimize(options, make, run)


def print_settings(pipeline) -> None:
    """Every setting: value, range, where it comes from, a sentence."""
    from rich.console import Console
    from rich.table import Table

    from text3d_fast.pipelines.settings import names_of, setting_of, value_of

    table = Table("setting", "value", "allowed", "from", "what it is", box=None)
    for name in names_of(pipeline.config):
        known = setting_of(name)
        allowed = "" if known is None else f"{known.low:g} to {known.high:g}"
        source = "--set" if name in pipeline.changes else pipeline.source(name)
        table.add_row(name, str(value_of(pipeline.config, name)), allowed, source, known.about if known else "")
    Console().print(table, markup=False)


def edit(options: Edit) -> int:
    from text3d_fast.pipelines import magic3d

    def make(settings: dict):
        return magic3d.Edit(options.folder, options.device, settings=settings)

    def run(pipeline, out, progress):
        return pipeline.run(options.prompt, options.steps, out, progress.step, options.resume)

    return optimize(options, make, run)


def optimize(options: Generate | Edit, make: Callable, run: Callable) -> int:
    """make(settings) a pipeline, run(pipeline, out, progress) it, and say what came of it."""
    if options.steps is not None and options.steps < 1:
        return fail(f"--steps: expected a positive number, got {options.steps}")
    try:
        settings = dict(parse_setting(text) for text in options.set)
    except ValueError as error:
        return fail(str(error))
    import torch

    from text3d_fast.app.progress import Progress
    from text3d_fast.errors import EmptyMesh, Interrupted, OutputError

    out = options.out or default_folder(options.prompt, options.resume)
    if options.threads is not None:
        cores = os.cpu_count() or 1
        if not 1 <= options.threads <= 4096:
            return fail(f"--threads: expected 1 to {cores}, the cores of this machine, got {options.threads}")
        if options.threads > cores and not options.quiet:
            print(f"--threads {options.threads}: this machine has {cores} cores, so {cores} are used", file=sys.stderr)
        torch.set_num_threads(min(options.threads, cores))
    try:
        pipeline = make(settings)
        with Progress(pipeline, options.prompt, options.steps, quiet=options.quiet) as progress:
            result = run(pipeline, out, progress)
    except Interrupted as stop:
        again = resume_command(options, out)
        print(f"\nStopped after step {stop.step}; everything is saved in {out}. To go on:\n  {again}", file=sys.stderr)
        return INTERRUPTED
    except KeyboardInterrupt:  # before the first step, or while the mesh is made
        if not (out / "checkpoint.safetensors").is_file():
            raise
        again = resume_command(options, out)
        print(f"\nStopped; the last checkpoint is in {out}. To go on:\n  {again}", file=sys.stderr)
        return INTERRUPTED
    except EmptyMesh as error:
        print(f"error: {error}", file=sys.stderr)
        return EMPTY_MESH
    except (OutputError, ValueError) as error:
        return fail(str(error))
    except RuntimeError as error:
        if type(error) is RuntimeError and "backend" not in str(error) and "out of memory" not in str(error):
            raise
        return fail(str(error))
    if not options.quiet:
        progress.summary(result)
    return 0


def playground(options: Playground) -> int:
    from text3d_fast.app import playground as comparing
    from text3d_fast.errors import OutputError

    out = options.out or default_folder(f"playground {options.prompt}", False)
    try:
        comparing.compare(options, out)
    except (OutputError, ValueError) as error:
        return fail(str(error))
    return 0


def view(options: View) -> int:
    import warnings

    from text3d_fast.app import viewer as viewing
    from text3d_fast.errors import OutputError
    from text3d_fast.geometry import MeshWarning
    from text3d_fast.pipelines.pipeline import choose_device

    names = [entry.name for entry in dataclasses.fields(viewing.ViewSettings)]
    settings = viewing.ViewSettings(**{name: getattr(options, name) for name in names})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", MeshWarning)
            warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
            if options.serve:
                viewing.serve(options.mesh, options.scene, options.port, options.host)
                return 0
            device = choose_device(options.device)
            print(viewing.write_view(options.mesh, options.out, settings, options.scene, options.background_image,
                                     device))
    except (OutputError, ValueError, OSError, RuntimeError) as error:
        return fail(str(error))
    return 0


def evaluate(options: Evaluate) -> int:
    try:
        from text3d_fast.evaluation import suite
    except ImportError:
        return fail("this copy of the package has no evaluation suite")
    return suite.main(options) or 0


def bench(options: Bench) -> int:
    import importlib.util
    import subprocess

    folder = Path(__file__).resolve().parents[2] / "benchmarks"
    if not folder.is_dir():
        return fail("the benchmarks come with the source tree: clone the repository and `pip install -e .[bench]`")
    if importlib.util.find_spec("pytest_benchmark") is None:
        return fail("pytest-benchmark is not installed: pip install -e .[bench]")
    command = [sys.executable, "-m", "pytest", str(folder), "--benchmark-only", "-rs"]
    if options.only:
        command += ["-k", options.only]
    if options.csv:
        data = options.csv.with_suffix(".json")
        command.append(f"--benchmark-json={data}")
    status = subprocess.call(command, cwd=folder.parent)
    if status == 5:  # pytest's word for "no tests"
        return fail(f"--only {options.only}: no benchmark's name contains it; they are those of benchmarks/bench_*.py")
    if options.csv and data.is_file():
        write_benchmark_csv(data, options.csv)
    return status


def write_benchmark_csv(data: Path, path: Path) -> None:
    """pytest-benchmark's JSON as a table: name, group, times in seconds, rounds."""
    import csv
    import json

    rows = json.loads(data.read_text(encoding="utf-8"))["benchmarks"]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "group", "min", "median", "mean", "stddev", "rounds"])
        for row in rows:
            stats = row["stats"]
            writer.writerow([row["name"], row["group"], *(stats[k] for k in ("min", "median", "mean", "stddev")),
                             stats["rounds"]])


def doctor(options: Doctor) -> int:
    from text3d_fast.app import doctor as report

    return report.doctor(options.model)


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


def default_folder(prompt: str, resume: bool, root: Path = Path("runs")) -> Path:
    """runs/a-red-mug, or the next free runs/a-red-mug-2; to resume, the newest of them."""
    import re

    stem = "-".join(re.findall(r"[a-z0-9]+", prompt.lower()))[:60] or "run"
    number, folder = 1, root / stem
    while folder.exists():
        number, newest = number + 1, folder
        folder = root / f"{stem}-{number}"
    return newest if resume and number > 1 else folder


def resume_command(options: Generate | Edit, out: Path) -> str:
    """The command line that continues this run."""
    import shlex

    what = ["edit", str(options.folder)] if isinstance(options, Edit) else ["generate"]
    words = ["text3d-fast", *what, options.prompt, "--resume", "--out", str(out)]
    for entry in dataclasses.fields(options):
        value = getattr(options, entry.name)
        if entry.name in ("folder", "prompt", "resume", "out", "set") or value in (entry.default, None):
            continue
        name = "--" + entry.name.replace("_", "-")
        words += [name] if value is True else [name, str(value)]
    if options.set:
        words += ["--set", *options.set]
    return shlex.join(words)


def fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return USER_ERROR


if __name__ == "__main__":
    raise SystemExit(main())
