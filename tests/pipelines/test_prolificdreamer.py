"""ProlificDreamer on tiny priors: three stages of several particles, their LoRA, resumed to the bit."""

import json
import os
import signal

import pytest
import torch
from red_ball import PARTICLES, RedBall, few_pictures
from tiny_models import save_model

from text3d_fast.errors import Interrupted
from text3d_fast.guidance import DiffusionPrior
from text3d_fast.pipelines import ProlificDreamer, ProlificDreamerConfig
from text3d_fast.pipelines.recipes import PRESETS
from text3d_fast.scene.cameras import CameraDistribution


@pytest.fixture(scope="module", autouse=True)
def quick():
    with pytest.MonkeyPatch.context() as patch:
        few_pictures(patch)
        yield


class NormalBall(RedBall):
    normal_words = "normal map"


@pytest.fixture(scope="module")
def unet(tmp_path_factory):
    pytest.importorskip("peft")
    folder = save_model(tmp_path_factory.mktemp("models") / "pixel", latent=False)
    settings = {"format": 1, "image_size": 32, "pixel_unshuffle": 2}
    (folder / "text3d.json").write_text(json.dumps(settings))
    return DiffusionPrior.from_pretrained(folder)


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_two_particles_through_three_stages(tmp_path):
    prior, vertices, words = NormalBall(), {}, {}

    def watch(step, state):
        stage = state.stage
        words.setdefault(stage.name, set()).update(prior.seen[-1].texts)
        if stage.name != "vsd" and step in (1, stage.config.steps):
            vertices[stage.name, step] = [p.scene.tets.mesh()[0].clone() for p in stage.particles.values()]

    folder = tmp_path / "run"
    result = ProlificDreamer(prior=prior, device="cpu", settings=PARTICLES).run("a ball", out=folder, callback=watch)
    assert len(result.meshes) == 2
    for name in ("mesh.glb", "mesh-2.glb", "views.png", "vsd.safetensors", "geometry.safetensors"):
        assert (folder / name).is_file()
    for mesh in result.meshes:
        assert mesh.is_closed()
        assert mesh.colors[:, 0].mean() > 0.6 > 0.4 > mesh.colors[:, 1].mean()
    assert not torch.equal(result.meshes[0].vertices, result.meshes[1].vertices)
    # the second stage shows normal maps and says so, the third one leaves the geometry as it was
    assert all(", normal map, " in text for text in words["geometry"])
    assert not any("normal map" in text for text in words["vsd"] | words["texturing"])
    for first, last in zip(vertices["texturing", 1], vertices["texturing", 10], strict=True):
        assert torch.equal(first, last)
    assert json.loads((folder / "result.json").read_text())["particles"] == 2
    assert ProlificDreamerConfig.load(folder / "config.yaml").to_yaml() == result.config.to_yaml()


def test_the_geometry_stages_negative_prompts_are_of_its_captions():
    prior, negatives = NormalBall(), {}

    def watch(step, state):
        negatives[state.stage.name] = state.stage.distill.perp_neg

    settings = PARTICLES | {"vsd.steps": 20, "geometry.steps": 1, "texturing.steps": 1,
                            "geometry.guidance.perp_neg": 0.5}
    ProlificDreamer(prior=prior, device="cpu", settings=settings).run("a ball", callback=watch)
    assert negatives["geometry"] and all(text.startswith("a ball, normal map, ") for text in negatives["geometry"])


LORA = {"score.kind": "lora", "score.rate": 1e-2, "guidance.weight": 1.0, "guidance.weighting": "sigma2"}


def with_lora(prior, each_step="all", **settings):
    changed = {f"{stage}.{name}": value for stage in ("vsd", "texturing") for name, value in LORA.items()}
    changed |= {"vsd.steps": 3, "geometry.steps": 1, "texturing.steps": 3, "vsd.each_step": each_step}
    return ProlificDreamer(prior=prior, device="cpu", settings=PARTICLES | changed | settings)


@pytest.mark.parametrize("at", ["vsd", "texturing"])
def test_resuming_gives_the_unbroken_result_with_its_lora(unet, tmp_path, at):
    each = "one" if at == "vsd" else "all"
    whole = with_lora(unet, each).run("a red mug", out=tmp_path / "whole")
    initial = {name: value.clone() for name, value in with_lora(unet)._make(
        whole.config, ProlificDreamer.stages[0], None).distill.modules["score"].state_dict().items()}
    learned = whole.stage.distill.modules["score"].state_dict()
    assert any(not torch.equal(initial[name], learned[name]) for name in learned if name.startswith("layers"))

    def press(step, state):
        if state.stage.name == at and step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        with_lora(unet, each).run("a red mug", out=tmp_path / "broken", callback=press)
    resumed = with_lora(unet, each).run("a red mug", out=tmp_path / "broken", resume=True)
    assert same(whole.stage.tensors(), resumed.stage.tensors())
    assert any(name.startswith("score/layers") for name in resumed.stage.tensors())
    assert len(resumed.meshes) == 2


def test_a_lost_particle_is_said_and_the_others_go_on(tmp_path):
    def erase(step, state):
        if state.stage.name == "vsd" and step == 4:
            field = state.stage.particles[1].field
            with torch.no_grad():
                field.output.weight.zero_()
                field.output.bias.fill_(-100.0)

    settings = PARTICLES | {"vsd.steps": 4, "geometry.steps": 1, "texturing.steps": 1}
    result = ProlificDreamer(prior=RedBall(), device="cpu", settings=settings).run("a ball", callback=erase)
    assert len(result.meshes) == 1 and "particle 1 of 2 is lost" in result.warnings[0]


def test_what_does_not_go_together_is_said():
    with pytest.raises(ValueError, match="network"):
        ProlificDreamer(prior=RedBall(), settings=PARTICLES | {"vsd.score.kind": "lora"}).run("a ball")
    with pytest.raises(ValueError, match="batch"):
        ProlificDreamer(prior=RedBall(), settings=PARTICLES | {"vsd.batch": 2}).run("a ball")
    with pytest.raises(ValueError, match="each_step"):
        ProlificDreamer(prior=RedBall(), settings=PARTICLES | {"vsd.each_step": "one"})
    with pytest.raises(ValueError, match="particles"):
        ProlificDreamer(prior=RedBall(), settings=PARTICLES | {"particles": 0})


def test_a_scene_is_empty_in_its_middle():
    pipeline = ProlificDreamer(prior=RedBall(), device="cpu", settings=PARTICLES | PRESETS["scene"])
    stage = pipeline._make(pipeline.config, ProlificDreamer.stages[0], None)
    points = torch.tensor([[0.0, 0.0, 0.0], [0.9, 0.9, 0.9]])
    for particle in stage.particles.values():
        middle, outside = particle.field(points, None).density.tolist()
        assert middle < 1e-2 < 1.0 < outside
    assert isinstance(stage.config.cameras, CameraDistribution) and stage.config.cameras.distance[1] < 0.5
