"""What test_distributed.py has two processes do; `torchrun two_processes.py WHAT FOLDER`."""

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from red_ball import PARTICLES, TINY, RedBall, few_pictures
from tiny_models import save_model

from text3d_fast.guidance import DiffusionPrior
from text3d_fast.pipelines import DreamFusion, ProlificDreamer, distributed
from text3d_fast.pipelines.particles import ParticleStage

LORA = {f"{stage}.{name}": value for stage in ("vsd", "texturing") for name, value in {
    "score.kind": "lora", "score.rate": 1e-2, "guidance.weight": 1.0, "guidance.weighting": "sigma2"}.items()
} | {"vsd.steps": 4, "geometry.steps": 2, "texturing.steps": 4}
SHORT = {"vsd.steps": 6, "geometry.steps": 2, "texturing.steps": 3}
CASES = {  # name: settings of ProlificDreamer, and whether its prior has a network
    "exact": (SHORT | {"particles": 2}, False),
    "uneven": (LORA | {"particles": 3}, True),
    "reused": (LORA | {"particles": 2, "vsd.score.calls": "reused"}, True),
    "shared": (LORA | {"particles": 1, "vsd.batch": 2, "geometry.batch": 2, "texturing.batch": 2}, True),
}


def network(folder: Path) -> DiffusionPrior:
    """A pixel model of random weights."""
    if not folder.exists():
        save_model(folder, latent=False)
        (folder / "text3d.json").write_text(json.dumps({"format": 1, "image_size": 32, "pixel_unshuffle": 2}))
    return DiffusionPrior.from_pretrained(folder)


def results(folder: Path, out: Path | None = None) -> dict[str, dict[str, torch.Tensor]]:
    """The whole state, and the pictures of the results, of each case; `folder` holds the model."""
    done = {}
    for name, (settings, learned) in CASES.items():
        prior = network(folder) if learned else RedBall()
        pipeline = ProlificDreamer(prior=prior, device="cpu", settings=PARTICLES | settings)
        done[name] = _state(pipeline.run("a red mug", out=None if out is None else out / name))
    pipeline = DreamFusion(prior=RedBall(), device="cpu", settings=TINY | {"batch": 4, "shading.albedo_until": 0.0})
    done["dreamfusion"] = _state(pipeline.run("a ball", out=None if out is None else out / "dreamfusion"))
    return done


def _state(result) -> dict[str, torch.Tensor]:
    meshes = {f"colors {number}": mesh.colors for number, mesh in enumerate(result.meshes, 1)}
    meshes |= {f"vertices {number}": mesh.vertices for number, mesh in enumerate(result.meshes, 1)}
    return {**result.stage.tensors(), **meshes, "preview": result.stage.preview()}


def command(what: str, folder: Path) -> int:
    """`generate` of four steps, during the third of which something happens."""
    from text3d_fast.app import cli
    from text3d_fast.pipelines import pipeline

    first = os.environ["RANK"] == "0"

    def step(self, plain=ParticleStage.step):
        state, number = plain(self), self.step_done + 1
        if number < 3:
            return state
        if what == "die" and not distributed.is_first():
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "first dies" and distributed.is_first():
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "sleep" and not distributed.is_first():
            time.sleep(7)
        if what == "fail" and not distributed.is_first():
            raise FloatingPointError("no number")
        if what == "stop" and distributed.is_first() and number == 3:
            os.kill(os.getppid(), signal.SIGINT)
            time.sleep(0.5)
        return state

    arguments = words(folder)
    if what == "go on":
        arguments = [*words(folder if first else folder.with_name(folder.name + " elsewhere")), "--resume"]
    elif what == "differ" and not first:
        arguments += ["--seed", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "load_prior", lambda *_: RedBall())
        patch.setattr(ParticleStage, "step", step)
        return cli.main(arguments)


def words(folder: Path) -> list[str]:
    """The command line."""
    settings = PARTICLES | SHORT | {"checkpoint_every": 2}
    changes = (f"{name}={list(value) if isinstance(value, tuple) else value}" for name, value in settings.items())
    return ["generate", "a ball", "--pipeline", "prolificdreamer", "--device", "cpu", "--out", str(folder), "--set",
            *changes]


if __name__ == "__main__":
    what, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        few_pictures(patch)
        if what != "results":
            raise SystemExit(command(what, folder))
        with contextlib.ExitStack() as stack:
            stack.enter_context(distributed.join())
            found = results(folder / "model", folder / "runs")
            if distributed.is_first():
                torch.save(found, folder / "results.pt")
