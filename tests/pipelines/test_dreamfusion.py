"""The whole loop on a tiny prior: what is saved, resumed, interrupted, refused."""

import errno
import json
import os
import signal

import pytest
import torch
from red_ball import TINY, RedBall

from text3d_fast.errors import CheckpointError, EmptyMesh, Interrupted, OutputError
from text3d_fast.files import atomic_path
from text3d_fast.pipelines import DreamFusion, DreamFusionConfig
from text3d_fast.pipelines import checkpoint as checkpoints
from text3d_fast.pipelines.checkpoint import load_state


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch):
    """Pictures of a finished run are tested on their own; here they would take most of the time."""
    from text3d_fast.pipelines import pictures, results, surface

    choose = surface.choose_threshold
    monkeypatch.setattr(surface, "choose_threshold", lambda *args: choose(*args, 16))
    monkeypatch.setattr(results, "views", lambda mesh, cameras: pictures.views(mesh, cameras, size=8))
    monkeypatch.setattr(results, "turntable", lambda mesh, cameras: pictures.turntable(mesh, cameras, 2, size=8))


def pipeline(**settings):
    return DreamFusion(prior=RedBall(), device="cpu", settings=TINY | settings)


def test_it_learns_a_red_ball_and_the_files_are_all_there(tmp_path):
    losses = []
    df = pipeline(steps=60, preview_every=30)
    result = df.run("a ball", out=tmp_path / "run", callback=lambda step, state: losses.append(float(state.loss)))
    assert all(torch.isfinite(torch.tensor(losses))) and len(losses) == 60
    assert sum(losses[-20:]) < 0.6 * sum(losses[:20])
    names = {"mesh.glb", "turntable.gif", "views.png", "result.json", "config.yaml", "checkpoint.safetensors",
             "preview.png"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == names
    figures = json.loads((tmp_path / "run" / "result.json").read_text())
    assert figures["status"] == "done" and figures["steps"] == 60 and figures["metrics"]["faces"] > 0
    assert figures["seconds"]["total"] > 0 and figures["peak_memory_bytes"] > 0
    assert result.mesh.colors[:, 0].mean() > 0.6 > 0.4 > result.mesh.colors[:, 1].mean()
    # tan(20 degrees) * 2.75 * sqrt(0.4) is the radius that the disc shows, about 0.62
    assert figures["metrics"]["size"] == pytest.approx([1.24] * 3, abs=0.25)
    assert figures["metrics"]["silhouette_agreement"] > 0.8
    saved = DreamFusionConfig.load(tmp_path / "run" / "config.yaml")
    assert saved.to_yaml() == result.config.to_yaml()


def test_the_prior_is_told_prompt_camera_and_background():
    df = pipeline(view_words="left_right", steps=1)
    df.run("a ball")
    (seen,) = df.prior.seen
    assert seen.texts[0].startswith("a ball, ") and seen.texts[0].endswith(" view")
    assert seen.camera.shape == (1, 3) and seen.background.shape == (1, 3)
    faithful = pipeline(steps=1, **{"guidance.camera": False})
    faithful.run("a ball")
    assert faithful.prior.seen[0].camera is None


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_same_seed_same_result_other_seed_another():
    runs = [pipeline(**{"shading.albedo_until": 0.0}).run("a ball", seed=seed).stage.tensors()
            for seed in (1, 1, 2)]
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


def test_ctrl_c_saves_and_resuming_gives_the_unbroken_result(tmp_path):
    whole = pipeline(**{"shading.albedo_until": 0.0}).run("a ball", out=tmp_path / "whole")

    def press(step, state):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted) as stop:
        pipeline(**{"shading.albedo_until": 0.0}).run("a ball", out=tmp_path / "broken", callback=press)
    assert stop.value.step == 3
    assert load_state(tmp_path / "broken" / "checkpoint.safetensors")[1]["step"] == 3
    assert not (tmp_path / "broken" / "mesh.glb").exists()
    steps = []
    resumed = DreamFusion(prior=RedBall(), device="cpu").run(
        "a ball", out=tmp_path / "broken", resume=True, callback=lambda step, _: steps.append(step))
    assert steps == [4, 5, 6]
    assert same(whole.stage.tensors(), resumed.stage.tensors())
    assert torch.equal(whole.mesh.vertices, resumed.mesh.vertices)


def test_a_network_background_is_trained_and_batches_work():
    class AnyBackground(RedBall):
        conditions = ("camera",)

        def predict_noise(self, x_t, t, conditions):
            assert conditions.background is None
            conditions.background = torch.full((len(conditions), 3), 0.5)
            return super().predict_noise(x_t, t, conditions)

    df = DreamFusion(prior=AnyBackground(), device="cpu", settings=TINY | {"batch": 2, "background": "network"})
    before = []
    result = df.run("a ball", callback=lambda _, state: before.append(
        state.stage.background.layers[2].bias.detach().clone()))
    assert not torch.equal(before[0], before[-1])
    assert len(df.prior.seen[0]) == 2 and result.config.background == "network"


def test_existing_output_needs_resume_and_resume_needs_output(tmp_path):
    pipeline(steps=1).run("a ball", out=tmp_path / "run")
    with pytest.raises(OutputError, match="--resume"):
        pipeline(steps=1).run("a ball", out=tmp_path / "run")
    with pytest.raises(CheckpointError, match="nothing to resume"):
        pipeline().run("a ball", out=tmp_path / "other", resume=True)
    assert not (tmp_path / "other").exists()
    with pytest.raises(CheckpointError, match="seed"):
        pipeline(steps=1).run("a ball", seed=5, out=tmp_path / "run", resume=True)


@pytest.mark.parametrize("damage", [b"", b"not a checkpoint at all", None])
def test_corrupt_checkpoints_are_named(tmp_path, damage):
    pipeline(steps=1).run("a ball", out=tmp_path / "run")
    path = tmp_path / "run" / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-100] if damage is None else damage)
    with pytest.raises(CheckpointError, match="damaged"):
        pipeline(steps=1).run("a ball", out=tmp_path / "run", resume=True)


def test_a_checkpoint_of_another_shape_is_refused(tmp_path):
    pipeline(steps=1).run("a ball", out=tmp_path / "run")
    path = tmp_path / "run" / "config.yaml"
    path.write_text(path.read_text().replace("hidden: 8", "hidden: 9"))
    with pytest.raises(CheckpointError, match="has field.hidden = 9, but the checkpoint was made with 8"):
        DreamFusion(prior=RedBall(), device="cpu").run("a ball", out=tmp_path / "run", resume=True)


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    path.write_text("before")
    with pytest.raises(OutputError, match="No space left"), atomic_path(path) as part:
        part.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]

    import safetensors.torch

    def full(*args, **kwargs):
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OutputError, match="No space left"):
        checkpoints.save_state(path, {"a": torch.zeros(1)}, {})
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot make the folder"):
        pipeline(steps=1).run("a ball", out=tmp_path / "file" / "run")


def test_a_run_that_fails_early_leaves_no_folder(tmp_path):
    def fail(step, state):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        pipeline().run("a ball", out=tmp_path / "run", callback=fail)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_mesh_is_an_error_that_leaves_a_report(tmp_path):
    df = pipeline(steps=1, **{"field.blob_scale": 0.0, "field.sharpness": 1e-9})
    with pytest.raises(EmptyMesh, match="empty"):
        df.run("a ball", out=tmp_path / "run")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "empty"
    assert not (tmp_path / "run" / "mesh.glb").exists()


def test_config_round_trip_and_errors():
    config = DreamFusionConfig().updated({"guidance.weight": 7.5, "penalties.opacity": (0.0, 0.1)})
    again = DreamFusionConfig.from_yaml(config.to_yaml())
    assert again == config and again.guidance.weight == 7.5
    assert DreamFusionConfig.from_yaml("guidance: {weight: 1e2}").guidance.weight == 100.0
    with pytest.raises(ValueError, match=r"field\.colour"):
        config.updated({"field.colour": 1})
    with pytest.raises(ValueError, match=r"steps: expected int"):
        DreamFusionConfig.from_yaml("steps: many")
    with pytest.raises(ValueError, match="x.yaml"):
        DreamFusionConfig.from_yaml("steps: [", "x.yaml")
    with pytest.raises(ValueError, match="background"):
        config.updated({"background": "green"})


def test_prompts_outside_the_vocabulary_and_devices():
    from text3d_fast.toybox.analytic import AnalyticPrior

    prior = AnalyticPrior(progress=False)
    assert prior.canonical("a crimson cup") == "a red mug"
    with pytest.raises(ValueError, match="did you mean"):
        prior.canonical("a red mugg")
    with pytest.raises(ValueError, match="prompt"):
        RedBall().canonical("  ")
    with pytest.raises(ValueError, match="device"):
        DreamFusion(prior=RedBall(), device="tpu9")
