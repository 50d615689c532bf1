"""VSD against SDS: what is measured of several results, and the whole comparison on a prior that costs nothing."""

import csv
import json

import pytest
import torch
from red_ball import PARTICLES, RedBall, few_pictures

from text3d_fast.app.cli import main
from text3d_fast.app.commands.outcome import USER_ERROR
from text3d_fast.evaluation import metrics, suite, variational
from text3d_fast.evaluation.observe import true_mesh
from text3d_fast.evaluation.variational import WORLD, Distribution, compare, spread_interval, world_member
from text3d_fast.toybox.bank import one_thread
from text3d_fast.toybox.captions import parse
from text3d_fast.toybox.scenes import build_scene

MUG = parse("a mug")


@pytest.fixture(scope="module")
def world():
    """Four draws from the world's prior: scenes, meshes."""
    with one_thread(), torch.no_grad():
        scenes = [world_member(MUG, number) for number in range(1, 5)]
        return scenes, [true_mesh(scene, 32) for scene in scenes]


def test_the_world_has_the_spread_of_its_prior_and_copies_have_none(world):
    scenes, meshes = world
    members = [scene.parameters for scene in scenes]
    with one_thread():
        found = {WORLD: Distribution.of(meshes, members, "mug"),
                 "copies": Distribution.of(meshes[:1] * 4, members[:1] * 4, "mug")}
        blue = true_mesh(build_scene(parse("a blue mug")), 32)
        found["blue"] = Distribution.of([blue] * 2, members[:2], "mug")
    rows = compare(found, MUG, 4)
    low, high = rows[WORLD]["spread_of_the_prior"]
    assert low < rows[WORLD]["spread"] < high and rows["copies"]["spread"] < 1e-6 < low
    assert all(facts["fit_error"] < 1e-6 for facts in rows[WORLD]["parameters"].values())
    assert rows[WORLD]["diversity"] > 0.02 > 1e-3 > rows["copies"]["diversity"]
    assert rows[WORLD]["colors"]["red"] > 0.9 and rows["blue"]["color_distance"] > 0.9
    # red is (0.86, 0.10, 0.10): (max - min) / max is 0.88, less where the wall's inside or a light mark is seen
    assert rows[WORLD]["saturation"] == pytest.approx(0.86, abs=0.05)
    assert variational.table({"a mug": rows}).row_count == 5


def test_the_interval_is_that_of_uniform_draws():
    low, high = spread_interval(400, torch.zeros(3))
    assert low < 12**-0.5 < high and high - low < 0.02
    wide = spread_interval(4, torch.zeros(1))
    assert wide[0] < 0.15 and wide[1] > 0.4  # four results of one parameter say little
    assert spread_interval(400, torch.full((3,), 0.5))[0] > 0.5


def test_the_whole_comparison(tmp_path, monkeypatch, capsys):
    few_pictures(monkeypatch)
    asked = []
    monkeypatch.setattr("text3d_fast.pipelines.pipeline.load_prior",
                        lambda model, *_: asked.append(model) or RedBall())
    figures = dict.fromkeys(("f5", "f2", "silhouette_iou", "volume_iou", "normal_error", "color_error"), 0.5)
    known = dict.fromkeys(("best ball", "best wrong class", "visual hull"), figures)
    monkeypatch.setattr(suite._Suite, "baselines", lambda self, prompt: known)  # tested with the suite
    fit = metrics.fit_member
    monkeypatch.setattr(metrics, "fit_member", lambda description, mesh: fit(description, mesh, trials=6))
    pipeline = variational._pipeline
    monkeypatch.setattr(variational, "_pipeline", lambda method, count, device, settings: pipeline(
        method, count, device, PARTICLES | settings))
    words = ["evaluate", "--pipeline", "prolificdreamer", "--prompts", "a ball", "--particles", "2", "--steps", "25",
             "--device", "cpu", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "VSD" in shown and "the world" in shown and "saturation" in shown
    content = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    rows = content["distribution"]["a ball"]
    assert list(rows) == ["SDS", "SDS, w = 99", "VSD", WORLD] and all(row["meshes"] == 2 for row in rows.values())
    assert content["summary"][WORLD]["f5"] > 0.9 and content["summary"]["VSD"]["retrieval"]["of"] == 2
    with (tmp_path / "out" / "distribution.csv").open(newline="") as file:
        figures = {(row["method"], row["figure"]): row["value"] for row in csv.DictReader(file)}
    assert float(figures["VSD", "saturation"]) == pytest.approx(rows["VSD"]["saturation"], abs=1e-4)
    assert (tmp_path / "out" / "particles.png").stat().st_size > 1000
    assert len(asked) == 3
    assert main(words) == 0 and len(asked) == 3  # everything is there


def test_what_it_does_not_take_is_said(capsys):
    assert main(["evaluate", "--particles", "2"]) == USER_ERROR
    assert main(["evaluate", "--pipeline", "prolificdreamer", "--seeds", "1"]) == USER_ERROR
    assert "--particles" in capsys.readouterr().err
