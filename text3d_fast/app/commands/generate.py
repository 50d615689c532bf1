"""`text3d-fast generate`."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes, Positional, arg

from text3d_fast.app.commands.batch import Batch, batch_folder, read_prompts
from text3d_fast.app.commands.outcome import fail
from text3d_fast.app.commands.runs import (
    Command,
    Job,
    RunOptions,
    default_folder,
    optimize,
    option_words,
    parse_setting,
)

Backend = Literal["native", "triton", "reference"]


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
      text3d-fast generate --prompts prompts.txt --seeds 0 1 2
      torchrun --nproc-per-node 2 -m text3d_fast generate "a mug" --pipeline prolificdreamer --particles 4
      text3d-fast generate "a corgi" --model path/or/hub-id/of/a/stable-diffusion-model --device cuda
    """

    prompt: Positional[Annotated[str | None, arg(metavar="PROMPT")]] = None
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
    lora: Annotated[tuple[str, ...], arg(metavar="FILE ...")] = ()
    """LoRA files on top of MODEL, each FILE or FILE:STRENGTH; --help-settings names the other options of models."""
    stage: Annotated[str | None, arg(metavar="NAME")] = None
    """Run only this stage of the pipeline: coarse or fine of magic3d; vsd, geometry or texturing of prolificdreamer."""
    start: Annotated[Path | None, arg(metavar="DIR")] = None
    """Begin after the stage that a run in DIR has finished."""
    particles: Annotated[int | None, arg(metavar="N")] = None
    """prolificdreamer: how many results to make side by side; the default is 1."""
    preset: Literal["small", "scene"] | None = None
    """prolificdreamer: small is for two CPU cores; scene is a place seen from within, to be run with --stage vsd."""
    seed: int = 0
    """The same seed gives the same result on the same machine."""
    seeds: Annotated[tuple[int, ...], arg(metavar="N ...")] = ()
    """A run with each of these, in a folder of its own, and one contact sheet."""
    prompts: Annotated[Path | None, arg(metavar="FILE")] = None
    """A prompt on each line instead of PROMPT: a run with each of these, likewise."""
    no_camera: bool = False
    """Tell the prior the view in words only, as in the paper, even if it could be given the camera."""
    backend: Backend | None = None
    """Insist on one implementation of the ops; an op that it cannot serve is an error."""
    help_settings: bool = False
    """List all settings for --set with what they may be, their value for this pipeline and model, and where that comes
    from; makes nothing."""
    run: Annotated[RunOptions, OmitArgPrefixes] = field(default_factory=RunOptions)

    def __call__(self) -> int:
        for name in ("particles", "preset"):
            if getattr(self, name) is not None and self.pipeline != "prolificdreamer":
                return fail(f"--{name}: only --pipeline prolificdreamer has it")
        if self.fine_model is not None and self.pipeline != "magic3d":
            return fail("--fine-model: only --pipeline magic3d has a fine stage")
        if (self.prompt is None) == (self.prompts is None):
            return fail("expected a PROMPT or --prompts FILE" + ("" if self.prompt is None else ", got both"))
        options = self.run
        if self.help_settings:
            try:
                print_settings(self.make(dict(parse_setting(text) for text in options.set)))
            except (OSError, ValueError) as error:
                return fail(str(error))
            return 0

        def run(pipeline, job, callback, report):
            return pipeline.run(job.prompt, options.steps, job.seed, job.out, callback, job.resume, self.stage,
                                self.start, report)

        command = Command(self.make, run, ["generate", *([] if self.prompt is None else [self.prompt])],
                          option_words(self, ("prompt", "run")))
        if self.prompts is None and not self.seeds:
            out = options.out or default_folder(self.prompt, options.resume)
            return optimize(command, [Job(self.prompt, self.seed, out, options.resume)], options, out)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            return fail("--prompts, --seeds: several processes (torchrun) make one result at a time")
        try:
            prompts = [self.prompt] if self.prompts is None else read_prompts(self.prompts)
            out = options.out or batch_folder(self.prompts, self.prompt, options.resume)
            batch = Batch(prompts, self.seeds or (self.seed,), out, options.resume, options.steps is not None)
        except ValueError as error:
            return fail(str(error))
        command.make, command.finished = partial(self.make_all, batch), batch.finished
        return optimize(command, batch.jobs, options, out)

    def make_all(self, batch: Batch, settings: dict):
        """The pipeline, which has words for all the prompts, and the batch's folder. ValueError names the line."""
        pipeline = self.make(settings)
        for row in batch.rows:
            pipeline.prior.canonical(row["prompt"])
        batch.write()
        return pipeline

    def make(self, settings: dict):
        """The pipeline that these options describe."""
        from text3d_fast import backends, pipelines
        from text3d_fast.pipelines.recipes import PRESETS

        backends.use_backend(self.backend)
        kind = {"dreamfusion": pipelines.DreamFusion, "magic3d": pipelines.Magic3D,
                "prolificdreamer": pipelines.ProlificDreamer}[self.pipeline]
        if self.no_camera:
            several = len(kind.stages) > 1
            settings |= {f"{stage.name}.guidance.camera" if several else "guidance.camera": False
                         for stage in kind.stages}
        if self.lora:
            settings |= {"prior.lora": list(self.lora)}
        if self.preset is not None:
            settings = PRESETS[self.preset] | settings
        if self.particles is not None:
            settings |= {"particles": self.particles}
        further = {} if self.fine_model is None else {"fine_model": self.fine_model}
        return kind(self.model, self.run.device, settings=settings, **further)


def print_settings(pipeline) -> None:
    """Every setting: value, range, where it comes from, a sentence."""
    from rich.console import Console
    from rich.table import Table

    from text3d_fast.pipelines.settings import names_of, setting_of, value_of

    table = Table("setting", "value", "allowed", "from", "what it is", box=None)
    for name in names_of(pipeline.config):
        known = setting_of(name)
        allowed = "" if known is None or known.low is None else f"{known.low:g} to {known.high:g}"
        source = "--set" if name in pipeline.changes else pipeline.source(name)
        table.add_row(name, str(value_of(pipeline.config, name)), allowed, source, known.about if known else "")
    Console().print(table, markup=False)
