"""`generate --live` without a browser: the server is real, the visitor is not."""

import builtins
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from red_ball import TINY, RedBall

viser = pytest.importorskip("viser", reason="the extra `viewer` is not installed")

from text3d_fast.app import cli, live  # noqa: E402
from text3d_fast.app.commands.outcome import INTERRUPTED, USER_ERROR  # noqa: E402
from text3d_fast.errors import Interrupted  # noqa: E402
from text3d_fast.pipelines import DreamFusion, Magic3D, ProlificDreamer, results, surface  # noqa: E402
from text3d_fast.scene.cameras import Cameras  # noqa: E402


class Visitor:
    """A viser client in front of the object; keeps what it is shown."""

    def __init__(self):
        self.pictures = []
        self.camera = SimpleNamespace(
            position=np.array([0.0, 0.0, 2.75]), look_at=np.zeros(3), up_direction=np.array([0.0, 1.0, 0.0]),
            fov=0.7, aspect=1.5, update_timestamp=1.0)
        self.scene = SimpleNamespace(set_background_image=lambda image, **_: self.pictures.append(image))


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch):
    monkeypatch.setattr(surface, "choose_threshold", lambda *args: ("auto", 1.0))
    monkeypatch.setattr(results, "views", lambda mesh, cameras: torch.zeros(8, 8, 8, 3))
    monkeypatch.setattr(results, "turntable", lambda mesh, cameras: torch.zeros(2, 8, 8, 3))


@pytest.fixture
def page(monkeypatch):
    """A page and its visitor; pictures are due at every step."""
    monkeypatch.setattr(live, "EVERY", 0.0)
    monkeypatch.setattr(live, "SHARE", 1e9)
    with live.LiveView(port=8490, say=lambda text: None) as view:
        visitor = Visitor()
        monkeypatch.setattr(view.server, "get_clients", lambda: {0: visitor})
        yield view, visitor


def run(callback=None, **options):
    settings = TINY | options.pop("settings", {})
    return DreamFusion(prior=RedBall(), device="cpu", settings=settings).run("a ball", callback=callback, **options)


def test_a_visitor_sees_the_scene_and_changes_nothing(page):
    view, visitor = page
    watched, alone = run(view.step), run()
    assert torch.equal(watched.mesh.vertices, alone.mesh.vertices)
    assert torch.equal(watched.mesh.colors, alone.mesh.colors)
    assert len(visitor.pictures) == TINY["steps"]
    height, width = visitor.pictures[-1].shape[:2]
    assert visitor.pictures[-1].dtype == np.uint8 and abs(width / height - 1.5) < 0.02
    assert (visitor.pictures[-1][0, 0] == 255).all() and visitor.pictures[-1][height // 2, width // 2].max() < 250
    assert "step 6 of 6" in view._text.content and view._bar.value == 100 and view._curve is None  # one figure of loss
    view.end(watched)
    assert visitor.pictures[-1] is None and "faces" in view._text.content


def test_nobody_costs_nothing(page, monkeypatch):
    view, _ = page
    monkeypatch.setattr(view.server, "get_clients", dict)
    monkeypatch.setattr(view, "picture", lambda *args: pytest.fail("rendered for nobody"))
    run(view.step)


def test_pause_holds_the_run_and_shows_where_the_visitor_goes(page):
    view, visitor = page
    steps = []

    def step(number, state):
        steps.append(number)
        if number == 2:
            view.pause()
        view.step(number, state)

    worker = threading.Thread(target=run, args=(step,))
    worker.start()
    wait_for(lambda: "paused" in view._text.content)
    wait_for(lambda: len(visitor.pictures[-1]) == live.ROWS[1])  # a sharp one of where the visitor rests
    shown = len(visitor.pictures)
    visitor.camera.position, visitor.camera.update_timestamp = np.array([0.0, 2.75, 0.1]), 2.0
    wait_for(lambda: len(visitor.pictures) > shown)
    assert steps[-1] == 2
    view.pause(False)
    worker.join(30)
    assert steps[-1] == TINY["steps"]


def test_stop_saves(page, tmp_path):
    view, _ = page

    def step(number, state):
        if number == 3:
            view.stop()
        view.step(number, state)

    with pytest.raises(Interrupted, match="after step 3"):
        run(step, out=tmp_path / "run")
    assert "stopped after step 3, saved" in view._text.content
    resumed, whole = run(out=tmp_path / "run", resume=True), run()
    assert torch.equal(resumed.mesh.vertices, whole.mesh.vertices)


def test_stop_ends_a_pause(page, tmp_path):
    view, _ = page
    view.pause()
    threading.Timer(0.5, view.stop).start()
    with pytest.raises(Interrupted, match="after step 1"):
        run(view.step, out=tmp_path / "run")


@pytest.mark.parametrize("kind", [Magic3D, ProlificDreamer])
def test_every_stage_of_every_pipeline_can_be_looked_at(page, kind, monkeypatch):
    view, visitor = page
    from text3d_fast.pipelines import mesh_stage

    monkeypatch.setattr(mesh_stage, "choose_threshold", lambda *_: ("auto", 1.0))
    of_run = ("mesh_resolution", "preview_every", "checkpoint_every")
    first = kind.stages[0].name
    settings = {name if name in of_run else f"{first}.{name}": value for name, value in TINY.items()}
    for stage in kind.stages[1:]:
        settings |= {f"{stage.name}.steps": 3, f"{stage.name}.size": 24, f"{stage.name}.surface.resolution": 16}
    more = {"fine_prior": RedBall()} if kind is Magic3D else {}
    if kind is ProlificDreamer:
        settings["particles"] = 2
    seen = {}

    def step(number, state):
        view.step(number, state)
        seen.setdefault(state.stage.name, []).append(visitor.pictures[-1])
        assert len(state.stage.parts) == settings.get("particles", 1)

    result = kind(prior=RedBall(), device="cpu", settings=settings, **more).run("a ball", callback=step)
    assert list(seen) == [stage.name for stage in kind.stages]
    for pictures in seen.values():
        assert (pictures[-1] < 250).any(-1).mean() > 0.01  # something before the white
    view.end(result)
    if kind is ProlificDreamer:
        view._choice.value = "2"
        wait_for(lambda: view._meshes[1].visible and not view._meshes[0].visible)


def test_the_picture_is_that_of_the_visitors_camera(page):
    view, visitor = page
    kept = []
    run(lambda number, state: (view.step(number, state), kept.append(state.stage)))
    rows = 40
    view_from = Cameras.orbit(0.4, 0.8, 2.2, 0.7, (rows, 60))
    ours = kept[-1].picture(view_from)[0]
    visitor.camera.position = view_from.position[0].numpy()
    theirs = view.picture(visitor.camera, rows)
    assert np.abs(theirs / 255 - ours.numpy()).max() < 0.01


def test_the_command(page, tmp_path, monkeypatch, capsys):
    from text3d_fast.pipelines import pipeline

    view, visitor = page
    monkeypatch.setattr(pipeline, "load_prior", lambda model, device, options: RedBall())
    monkeypatch.setattr(live, "LiveView", lambda **options: view)
    monkeypatch.setattr(view, "close", lambda: None)
    monkeypatch.setattr(view, "wait", lambda: view.stop())
    small = [f"{name}={list(value) if isinstance(value, tuple) else value}" for name, value in TINY.items()]
    words = ["generate", "a ball", "--live", "--out", str(tmp_path / "run"), "--set", *small]
    assert cli.main(words) == 0
    assert "live at http://localhost:" in capsys.readouterr().err and len(visitor.pictures) > 3
    words[4] = str(tmp_path / "stopped")  # `stop` is still asked for
    assert cli.main(words) == INTERRUPTED
    assert "Stopped after step 1; everything is saved" in capsys.readouterr().err


def test_one_page_for_several_runs(page, tmp_path, monkeypatch):
    from text3d_fast.pipelines import pipeline

    view, visitor = page
    monkeypatch.setattr(pipeline, "load_prior", lambda model, device, options: RedBall())
    monkeypatch.setattr(live, "LiveView", lambda **options: view)
    monkeypatch.setattr(view, "close", lambda: None)
    monkeypatch.setattr(view, "wait", lambda: None)
    small = [f"{name}={list(value) if isinstance(value, tuple) else value}" for name, value in TINY.items()]
    words = ["generate", "a ball", "--seeds", "0", "1", "--live", "--out", str(tmp_path / "all"), "--set", *small]
    assert cli.main(words) == 0
    meshes = [k for k, picture in enumerate(visitor.pictures) if picture is None]  # where a mesh came in its place
    assert meshes == [TINY["steps"], 2 * TINY["steps"] + 1] and len(view._meshes) == 1


def test_without_viser_one_sentence(tmp_path, monkeypatch, capsys):
    original = builtins.__import__

    def without(name, *args, **options):
        if name == "viser":
            raise ImportError(name)
        return original(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["generate", "a ball", "--live"]) == USER_ERROR
    assert "pip install 'text3d-fast[viewer]'" in capsys.readouterr().err and not list(tmp_path.iterdir())


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)
