"""Magic3D on a tiny prior: both stages, alone and together, resumed, stepped back, edited, and its command line."""

import json
import os
import signal

import pytest
import torch
from red_ball import TINY, RedBall

from text3d_fast.errors import CheckpointError, EmptyMesh, Interrupted, ModelWarning, OutputError
from text3d_fast.pipelines import Magic3D, Magic3DConfig
from text3d_fast.pipelines.checkpoint import load_state
from text3d_fast.pipelines.magic3d import Edit, FineStage
from text3d_fast.pipelines.mesh_stage import remove_loose_parts
from text3d_fast.scene.cameras import Cameras

RUN = ("mesh_resolution", "preview_every", "checkpoint_every")
SETTINGS = {name if name in RUN else f"coarse.{name}": value for name, value in TINY.items()} | {
    "coarse.steps": 30, "fine.steps": 12, "fine.size": 24, "fine.surface.resolution": 16,
    "fine.surface.further_levels": 1, "fine.guidance.weight": 0.0, "fine.guidance.weighting": "sample",
    "fine.shading.lit": 0.0, "fine.optimizer.grid": 0.05, "fine.optimizer.network": 0.02,
}


@pytest.fixture(scope="module", autouse=True)
def few_pictures():
    """Pictures of a finished run are tested on their own; here they would take most of the time."""
    from text3d_fast.pipelines import mesh_stage, pictures, results, surface

    choose = surface.choose_threshold
    with pytest.MonkeyPatch.context() as patch:
        for module in (surface, mesh_stage):
            patch.setattr(module, "choose_threshold", lambda *args: choose(*args, 16))
        patch.setattr(results, "views", lambda mesh, cameras: pictures.views(mesh, cameras, size=8))
        patch.setattr(results, "turntable", lambda mesh, cameras: pictures.turntable(mesh, cameras, 2, size=8))
        yield


class BlueBall(RedBall):
    """The same disc in another colour."""

    color = (0.1, 0.1, 0.9)


def pipeline(prior=None, **settings):
    return Magic3D(prior=prior or RedBall(), device="cpu", settings=SETTINGS | settings)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, few_pictures):
    """A whole run in a folder."""
    folder = tmp_path_factory.mktemp("magic3d") / "run"
    return folder, pipeline().run("a ball", out=folder)


def test_both_stages_make_a_red_ball(finished):
    folder, result = finished
    for name in ("mesh.glb", "views.png", "result.json", "config.yaml", "coarse.safetensors", "checkpoint.safetensors"):
        assert (folder / name).is_file()
    figures = json.loads((folder / "result.json").read_text())
    assert figures["status"] == "done" and figures["pipeline"] == "magic3d" and figures["steps"] == 42
    assert {name: stage["steps"] for name, stage in figures["stages"].items()} == {"coarse": 30, "fine": 12}
    spent = sum(stage["seconds"] for stage in figures["stages"].values())
    assert figures["seconds"]["optimization"] == pytest.approx(spent, abs=0.02)
    assert figures["guidance"] == {"coarse": "red ball", "fine": "red ball"}
    assert result.mesh.is_closed() and result.mesh.euler_characteristic() == 2
    assert result.mesh.colors[:, 0].mean() > 0.6 > 0.4 > result.mesh.colors[:, 1].mean()
    assert figures["metrics"]["size"] == pytest.approx([1.24] * 3, abs=0.3)  # as in DreamFusion's test
    assert Magic3DConfig.load(folder / "config.yaml").to_yaml() == result.config.to_yaml()


def test_the_fine_stage_starts_from_the_coarse_folder_to_the_same_result(finished, tmp_path):
    _, whole = finished
    pipeline().run("a ball", out=tmp_path / "coarse", stage="coarse")
    alone = pipeline().run("a ball", out=tmp_path / "fine", start=tmp_path / "coarse")
    torch.testing.assert_close(alone.mesh.vertices, whole.mesh.vertices, rtol=0, atol=0)
    torch.testing.assert_close(alone.mesh.colors, whole.mesh.colors, rtol=0, atol=0)
    assert list(alone.metrics["stages"]) == ["coarse", "fine"] and alone.metrics["steps"] == 42
    edit = Edit(tmp_path / "fine", "cpu", BlueBall())  # what the fine stage began with is there, too
    figures = edit.run("a blue ball", 1, out=tmp_path / "edit").metrics
    assert figures["steps"] == 1 and list(figures["stages"]) == ["edit"]
    with pytest.raises(ValueError, match="start: the stage fine begins with a finished coarse"):
        pipeline().run("a ball", stage="fine")
    with pytest.raises(CheckpointError):
        pipeline().run("a ball", start=tmp_path / "nothing")


@pytest.mark.parametrize("stop", [("coarse", 7), ("fine", 5)])
def test_resume_is_exact_in_either_stage(finished, tmp_path, stop):
    _, whole = finished

    def interrupt(step, state):
        if (state.stage.name, step) == stop:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        pipeline().run("a ball", out=tmp_path / "run", callback=interrupt)
    resumed = pipeline().run("a ball", out=tmp_path / "run", resume=True)
    torch.testing.assert_close(resumed.mesh.vertices, whole.mesh.vertices, rtol=0, atol=0)
    torch.testing.assert_close(resumed.mesh.colors, whole.mesh.colors, rtol=0, atol=0)


def test_a_run_is_not_resumed_with_another_fine_model(finished):
    folder, _ = finished
    other = Magic3D(prior=RedBall(), device="cpu", settings=SETTINGS, fine_model="analytic-fine")
    with pytest.raises(CheckpointError, match="fine_model = '', not 'analytic-fine'"):
        other.run("a ball", out=folder, resume=True)


def test_a_mesh_that_vanishes_is_stepped_back_and_said(tmp_path):
    seen = []

    def vanish(step, state):
        if state.stage.name == "fine":
            seen.append(float(state.stage.kept.scale))
            if step in (4, 7):
                with torch.no_grad():
                    state.stage.scene.tets.sdf.fill_(-1.0)

    result = pipeline().run("a ball", out=tmp_path / "run", callback=vanish)
    assert result.metrics["metrics"]["steps_back"] == 2 and len(result.mesh.faces)
    assert any("vanished 2 times, last at step 7" in warning for warning in result.warnings)
    assert seen[3] == 1.0 and seen[4] == 0.5 and seen[-1] == 0.25


def test_an_empty_coarse_stage_is_said_in_words():
    with pytest.raises(EmptyMesh, match="coarse stage left nothing"):
        pipeline(**{"coarse.field.sharpness": 1e-9, "coarse.steps": 1}).run("a ball")


def test_parts_of_pictures_and_their_conditions():
    class Windows(RedBall):
        conditions = ("camera", "background", "window")

    magic = pipeline(Windows(), **{"fine.steps": 1, "fine.cameras.zoom": (2.0, 2.0)})
    magic.run("a ball")
    assert magic.prior.seen[0].window is None  # the coarse stage sees all of it
    assert float(magic.prior.seen[-1].window[0, 2]) == pytest.approx(0.5)
    assert pipeline(Windows()).default_config().fine.cameras.zoom == (1.0, 2.0)
    assert pipeline().default_config().fine.cameras.zoom == (1.0, 1.0)


def test_loose_parts_and_cavities_go():
    from text3d_fast.geometry import Mesh
    from text3d_fast.nn import DeformableTetGrid

    tets = DeformableTetGrid(48)
    x = tets.rest_positions()
    with torch.no_grad():
        ball, hole = 0.5 - x.norm(dim=1), x.norm(dim=1) - 0.2
        floater = 0.1 - (x - torch.tensor([0.8, 0.8, 0.8])).norm(dim=1)
        tets.sdf.copy_(torch.maximum(torch.minimum(ball, hole), floater))
    assert int(Mesh(*tets.mesh()).components().max()) == 2
    remove_loose_parts(tets)
    mesh = Mesh(*tets.mesh())
    assert int(mesh.components().max()) == 0 and mesh.volume() == pytest.approx(0.52, rel=0.05)


def test_editing_changes_what_the_prompt_changes(finished, tmp_path):
    folder, before = finished
    settings = {"edit.optimizer.grid": 0.2, "edit.optimizer.network": 0.1}
    after = Edit(folder, "cpu", BlueBall(), settings=settings).run("a blue ball", out=tmp_path / "edit")
    assert after.metrics["steps"] == 12 and after.config.prompt == "a blue ball"  # 30 % of 42
    assert after.mesh.colors[:, 2].mean() > after.mesh.colors[:, 0].mean()
    sizes = [mesh.vertices.amax(0) - mesh.vertices.amin(0) for mesh in (before.mesh, after.mesh)]
    torch.testing.assert_close(*sizes, atol=0.1, rtol=0)
    with pytest.raises(ValueError, match="steps: expected 1 to 12, 30% of the result's, got 13"):
        Edit(folder, "cpu", BlueBall()).run("a blue ball", 13)


def test_what_cannot_be_edited_is_said(finished, tmp_path):
    folder, _ = finished
    with pytest.raises(OutputError, match="nothing is no folder of a run: there is no .*config.yaml"):
        Edit(tmp_path / "nothing", "cpu", BlueBall())
    with pytest.raises(ValueError, match="fine.size: that stage is done; settings of an edit begin with edit"):
        Edit(folder, "cpu", BlueBall(), settings={"fine.size": 32})
    pipeline().run("a ball", out=tmp_path / "coarse", stage="coarse")
    with pytest.raises(CheckpointError, match="coarse has not come to the stage fine, only to coarse: go on with"):
        Edit(tmp_path / "coarse", "cpu", BlueBall()).run("a blue ball")

    def interrupt(step, state):
        if (state.stage.name, step) == ("fine", 5):
            state.stop()

    with pytest.raises(Interrupted):
        pipeline().run("a ball", out=tmp_path / "half", callback=interrupt)
    with pytest.raises(CheckpointError, match="half stopped at step 5 of 12 of the stage fine: finish it first"):
        Edit(tmp_path / "half", "cpu", BlueBall()).run("a blue ball")


def test_an_edit_of_an_edit_begins_where_that_ended(finished, tmp_path):
    folder, _ = finished
    Edit(folder, "cpu", BlueBall()).run("a blue ball", out=tmp_path / "blue")
    with pytest.raises(CheckpointError, match="blue holds a run of edit, not of magic3d"):
        pipeline().run("a blue ball", start=tmp_path / "blue")
    for name, start in (("again", "blue"), ("third", "again")):
        seen = []
        again = Edit(tmp_path / start, "cpu", BlueBall())
        result = again.run("a blue ball", 1, tmp_path / name, lambda step, state, seen=seen: seen.append(state))
        before = load_state(tmp_path / start / "checkpoint.safetensors")[0]
        moved = (seen[0].stage.scene.tets.sdf - before["scene/tets.sdf"]).abs().max()
        assert 0 < moved < 3 * again.config.edit.optimizer.sdf * seen[0].stage.scene.tets.spacing
        assert result.metrics["steps"] == 1 and again.most_steps == 12
        assert again.config.edit.optimizer == Edit(folder, "cpu", BlueBall()).config.edit.optimizer  # not 25 times


def test_a_start_for_another_prompt_is_said(finished, tmp_path):
    pipeline().run("a ball", out=tmp_path / "coarse", stage="coarse")
    with pytest.warns(ModelWarning, match="coarse was made for 'a ball'; the stages after it are asked for 'a cube'"):
        pipeline().run("a cube", start=tmp_path / "coarse")


def test_steps_are_those_of_the_stages_that_run(finished, tmp_path):
    coarse = pipeline().run("a ball", 10, out=tmp_path / "coarse", stage="coarse")
    assert coarse.metrics["steps"] == 10
    fine = pipeline().run("a ball", 3, out=tmp_path / "fine", start=tmp_path / "coarse", stage="fine")
    assert {name: stage["steps"] for name, stage in fine.metrics["stages"].items()} == {"coarse": 10, "fine": 3}
    longer = pipeline().run("a ball", 5, out=tmp_path / "fine", start=tmp_path / "coarse", stage="fine", resume=True)
    assert longer.metrics["stages"]["fine"]["steps"] == 5


def test_ctrl_c_between_the_stages_loses_nothing(finished, tmp_path, monkeypatch):
    def interrupt(self, previous):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FineStage, "build", interrupt)
        pipeline().run("a ball", out=tmp_path / "run")
    resumed = pipeline().run("a ball", out=tmp_path / "run", resume=True)
    torch.testing.assert_close(resumed.mesh.vertices, finished[1].mesh.vertices, rtol=0, atol=0)


def test_an_edit_goes_on_to_more_steps(finished, tmp_path):
    folder, _ = finished
    Edit(folder, "cpu", BlueBall()).run("a blue ball", 2, out=tmp_path / "edit")
    longer = Edit(folder, "cpu", BlueBall()).run("a blue ball", 4, out=tmp_path / "edit", resume=True)
    assert longer.metrics["steps"] == 4


def test_coarse_defaults_are_the_papers():
    coarse = Magic3DConfig().coarse
    assert (coarse.field.blob_scale, coarse.field.blob_width, coarse.field.density) == (10.0, 0.5, "softplus")
    cameras = Cameras.orbit(torch.full((400,), 0.3), torch.linspace(0, 6, 400), 2.5, 0.8, 4)
    lights = coarse.lights.sample(cameras, torch.Generator().manual_seed(0))
    cosine = torch.nn.functional.cosine_similarity(lights.position, cameras.position, dim=-1)
    assert cosine.min() > 0.5 - 1e-3 and cosine.min() < 0.55  # within 60 degrees of the axis
    torch.testing.assert_close(lights.diffuse + lights.ambient, torch.ones(400, 3))
    assert lights.diffuse.min() < 0.1 and lights.diffuse.max() > 0.9
