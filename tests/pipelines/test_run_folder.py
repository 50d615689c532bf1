"""What happens to folders: whose they are, who is in them, what may change when a run goes on."""

import subprocess
import sys

import pytest
import torch
from red_ball import TINY, RedBall

from text3d_fast.errors import CheckpointError, OutputError
from text3d_fast.geometry import read_mesh
from text3d_fast.pipelines import DreamFusion, pipeline, results, surface
from text3d_fast.pipelines.config import DreamFusionConfig, Magic3DConfig
from text3d_fast.pipelines.run_folder import RunFolder
from text3d_fast.pipelines.settings import SETTINGS, names_of, setting_of

SETTINGS_OF_A_STEP = TINY | {"steps": 2}


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch):
    monkeypatch.setattr(surface, "choose_threshold", lambda *args: ("auto", 1.0))
    monkeypatch.setattr(results, "views", lambda mesh, cameras: torch.zeros(8, 8, 8, 3))
    monkeypatch.setattr(results, "turntable", lambda mesh, cameras: torch.zeros(2, 8, 8, 3))


def run(out, steps=None, resume=False, **changes):
    settings = changes if resume else SETTINGS_OF_A_STEP | changes
    return DreamFusion(prior=RedBall(), device="cpu", settings=settings).run("a ball", steps, out=out, resume=resume)


def test_nobodys_files_are_touched(tmp_path):
    theirs = {"config.yaml": "name: mine", "preview.png": "a picture", ".probe": "x"}
    for name, text in theirs.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(OutputError, match="not empty and holds no run"):
        run(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == theirs
    with pytest.raises(ValueError, match=r"sampling\.step: expected 0.0001 to 1"):
        run(tmp_path, **{"sampling.step": -1.0})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == theirs


def test_an_empty_folder_is_fine_and_stays_after_a_failure(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(pipeline.Trainer, "run", lambda *args: (_ for _ in ()).throw(RuntimeError("stop")))
    with pytest.raises(RuntimeError, match="stop"):
        run(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


def test_a_second_run_says_who_holds_the_folder(tmp_path):
    code = (f"import sys; from text3d_fast.pipelines.run_folder import RunFolder\n"
            f"from text3d_fast.pipelines.config import DreamFusionConfig\n"
            f"folder = RunFolder({str(tmp_path / 'run')!r}); folder.open(DreamFusionConfig(), False)\n"
            f"print('in', flush=True)\n"
            f"sys.stdin.read()")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as other:
        assert other.stdout.readline() == "in\n"
        with pytest.raises(OutputError, match=f"in use by another run .process {other.pid}"):
            run(tmp_path / "run")
        other.kill()
    run(tmp_path / "run")  # the lock went with the process; its configuration was ours
    assert not (tmp_path / "run" / ".lock").exists()


def test_leftovers_of_a_killed_run_are_removed_and_nothing_else(tmp_path):
    run(tmp_path / "run")
    left, kept = tmp_path / "run" / ".turntable.x1y2z3w4.gif", tmp_path / "run" / ".notes.txt"
    left.write_text("half")
    kept.write_text("mine")
    run(tmp_path / "run", resume=True)
    assert not left.exists() and kept.exists()


def test_a_finished_run_goes_on_to_more_steps_but_not_to_fewer(tmp_path):
    run(tmp_path / "run")
    longer = run(tmp_path / "run", steps=4, resume=True)
    assert longer.metrics["steps"] == 4 and longer.config.steps == 4
    with pytest.raises(CheckpointError, match="not fewer"):
        run(tmp_path / "run", steps=3, resume=True)


def test_further_steps_go_to_the_stages_that_are_left():
    config = Magic3DConfig().updated({"coarse.steps": 60, "fine.steps": 40})
    assert (config.with_steps(200).coarse.steps, config.with_steps(200).fine.steps) == (120, 80)
    longer = config.with_steps(140, ["fine"])
    assert (longer.coarse.steps, longer.fine.steps) == (60, 140)


def test_resuming_takes_what_is_harmless_and_refuses_the_rest(tmp_path):
    run(tmp_path / "run")
    assert run(tmp_path / "run", resume=True, mesh_resolution=20).config.mesh_resolution == 20
    assert DreamFusionConfig.load(tmp_path / "run" / "config.yaml").mesh_resolution == 20
    with pytest.raises(CheckpointError, match="guidance.weight = 0.0"):
        run(tmp_path / "run", resume=True, **{"guidance.weight": 3.0})


def test_an_old_checkpoint_of_no_stage_is_named(tmp_path):
    run(tmp_path / "run")
    with pytest.raises(CheckpointError, match="is of the stage dreamfusion, expected coarse"):
        RunFolder(tmp_path / "run").checkpoint(["coarse"])


@pytest.mark.parametrize("name, value", [
    ("guidance.weight", float("nan")), ("guidance.weight", float("inf")), ("penalties.opacity", (float("nan"),) * 2),
    ("optimizer.grid", -1.0), ("field.hidden", 0), ("field.base_resolution", 0), ("field.blob_width", 0.0),
    ("sampling.update_every", 0), ("field.max_resolution", 1_000_000_000), ("sampling.radius", 100.0),
    ("mesh_resolution", 15), ("texture", -5), ("seed", 2**63),
])
def test_every_setting_has_a_range(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected"):
        DreamFusionConfig().updated({name: value})


def test_all_numbers_of_a_configuration_are_in_the_table():
    config, free = DreamFusionConfig(), {"pipeline", "prompt", "model", "background", "view_words"}
    for name in names_of(config):
        value = config
        for part in name.split("."):
            value = getattr(value, part)
        if isinstance(value, int | float | tuple) and not isinstance(value, bool) and name not in free:
            assert setting_of(name), name
    assert all(entry.about and (entry.low is None or entry.low < entry.high) for entry in SETTINGS.values())


def test_a_wrong_name_shows_the_nearest():
    with pytest.raises(ValueError, match=r"guidance\.weigth: no such setting, did you mean guidance\.weight\?"):
        DreamFusionConfig().updated({"guidance.weigth": 3})


def test_a_result_shows_itself_and_its_mesh_saves_itself(tmp_path):
    result = run(None)
    page = result._repr_html_()
    assert page.startswith('<img src="data:image/png;base64,') and "<td>prompt</td><td>a ball</td>" in page
    assert "<td>faces</td>" in page
    result.mesh.save(tmp_path / "ball.glb")
    assert len(read_mesh(tmp_path / "ball.glb").faces) == len(result.mesh.faces)


def test_what_happens_after_the_steps_is_reported():
    said = []
    DreamFusion(prior=RedBall(), device="cpu", settings=SETTINGS_OF_A_STEP).run(
        "a ball", report=lambda what, done: said.append((what, done)))
    assert said[0] == ("surface and colours", 0.0) and said[-1] == ("done", 1.0)
    assert [done for _, done in said] == sorted(done for _, done in said)
