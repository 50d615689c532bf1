"""`text3d-fast generate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes, Positional, arg

from text3d_fast.app.commands.outcome import fail
from text3d_fast.app.commands.runs import RunOptions, optimize, option_words, parse_setting

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
    seed: int = 0
    """The same seed gives the same result on the same machine."""
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
        options = self.run
        if self.help_settings:
            try:
                print_settings(self.make(dict(parse_setting(text) for text in options.set)))
            except (OSError, ValueError) as error:
                return fail(str(error))
            return 0

        def run(pipeline, out, callback):
            return pipeline.run(self.prompt, options.steps, self.seed, out, callback, options.resume, self.stage,
                                self.start)

        own = option_words(self, ("prompt", "run"))
        return optimize(self.prompt, options, self.make, run, ["generate", self.prompt], own)

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
        allowed = "" if known is None else f"{known.low:g} to {known.high:g}"
        source = "--set" if name in pipeline.changes else pipeline.source(name)
        table.add_row(name, str(value_of(pipeline.config, name)), allowed, source, known.about if known else "")
    Console().print(table, markup=False)
