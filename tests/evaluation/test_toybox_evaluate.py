import csv
import json
from types import SimpleNamespace

import pytest
import torch

from text3d_fast import geometry
from text3d_fast.app.cli import main
from text3d_fast.app.commands.evaluate import Evaluate
from text3d_fast.errors import EmptyMesh
from text3d_fast.evaluation import metrics
from text3d_fast.evaluation import suite as evaluate
from text3d_fast.evaluation.observe import true_mesh
from text3d_fast.toybox.bank import one_thread
from text3d_fast.toybox.captions import PromptError, parse
from text3d_fast.toybox.scenes import build_scene

EXACT = evaluate.Method(evaluate.REFERENCE, "analytic", True)
HALF = evaluate.Method("toybox, camera", "toybox", True)
NOTHING = evaluate.Method("toybox, words", "toybox", False)


class Maker:
    """Stands in for the pipeline: the truth, another class, or no mesh at all."""

    def __init__(self):
        self.calls = 0

    def __call__(self, method, prompt, seed, steps, folder, tick):
        self.calls += 1
        tick(1, 1)
        if method is NOTHING:
            raise EmptyMesh("the mesh is empty")
        folder.mkdir(parents=True, exist_ok=True)
        scene = build_scene(parse(prompt if method is EXACT else "a red teapot"))
        with torch.no_grad():
            mesh = true_mesh(scene, 32)
            geometry.write_mesh(folder / "mesh.glb", mesh)
            return mesh, {"seconds": {"total": 3.0}, "warnings": []}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(metrics, "wrong_classes", lambda description: {"house": build_scene(parse("a red house"))})
    with one_thread():
        yield


def test_the_suite_scores_resumes_and_summarizes(small, tmp_path):
    maker = Maker()
    options = {"methods": [EXACT, HALF, NOTHING], "prompts": ["a red mug"], "seeds": [0], "steps": 5, "quiet": True}
    result = evaluate.run(tmp_path, make=maker, **options)
    summary = result["summary"]
    assert summary[EXACT.name]["f5"] > 0.98 and summary[EXACT.name]["euler_right"] == 1.0
    assert summary[EXACT.name]["retrieval"]["rate"] == 1.0 and summary[EXACT.name]["janus"]["rate"] == 0.0
    assert summary[HALF.name]["retrieval"]["rate"] == 0.0
    assert 0 < summary[HALF.name]["f5"] < 0.6 and summary[NOTHING.name]["f5"] == 0.0
    wrong = summary["best wrong class"]
    expected = (summary[HALF.name]["f5"] - wrong["f5"]) / (summary[EXACT.name]["f5"] - wrong["f5"])
    assert summary[HALF.name]["headline"]["f5"] == pytest.approx(expected)
    assert summary[NOTHING.name]["normal_error"] is None
    assert {"best ball", "visual hull"} <= set(summary)
    assert json.loads((tmp_path / "evaluation.json").read_text())["summary"] == json.loads(json.dumps(summary))
    with (tmp_path / "evaluation.csv").open(newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert float(rows[HALF.name]["f5"]) == pytest.approx(summary[HALF.name]["f5"], abs=1e-4)
    assert rows[EXACT.name]["janus"] == "False" and rows[NOTHING.name]["normal_error"] == ""
    assert (tmp_path / "sheet.png").stat().st_size > 1000
    assert f"a red mug | {EXACT.name}: step 1 of 1; 0 of 3 runs done" in (tmp_path / "run.log").read_text()
    assert evaluate.table(summary).row_count == 6

    again = evaluate.run(tmp_path, make=maker, **options)
    assert maker.calls == 3 and again["runs"] == result["runs"]
    score = tmp_path / "runs" / "toybox-camera" / "a-red-mug-0-5" / "score.json"
    score.write_text(score.read_text()[:50])  # cut short: that run alone is made again
    assert evaluate.run(tmp_path, make=maker, **options)["summary"][HALF.name]["f5"] == summary[HALF.name]["f5"]
    assert maker.calls == 4


def test_mistakes_show_before_the_first_run(tmp_path):
    maker = Maker()
    with pytest.raises(PromptError, match="did you mean 'mug'"):
        evaluate.run(tmp_path, methods=[EXACT], prompts=["a red mug", "a red mgu"], make=maker, quiet=True)
    assert maker.calls == 0
    (tmp_path / "file").write_text("")
    assert evaluate.main(Evaluate(quick=True, out=tmp_path / "file")) == 2


def test_the_command_chooses_methods_prompts_and_seeds(small, tmp_path, monkeypatch, capsys):
    asked = []

    def make(method, prompt, seed, steps, folder, tick):
        asked.append((method.name, prompt, seed, steps))
        raise EmptyMesh("the mesh is empty")

    monkeypatch.setattr(evaluate, "dreamfusion", lambda *_: make)
    options = ["--model", "analytic", "--camera-only", "--prompts", "a red mug", "--seeds", "3", "5", "--steps", "7"]
    assert main(["evaluate", *options, "--out", str(tmp_path)]) == 0
    assert asked == [(evaluate.REFERENCE, "a red mug", seed, 7) for seed in (3, 5)]
    assert "evaluation.json" in capsys.readouterr().out


def test_the_pipeline_goes_on_from_a_checkpoint_and_from_nothing_else(tmp_path, monkeypatch):
    calls = []

    class Pipeline:
        def __init__(self, model, device, settings):
            calls.append((model, device, settings))
            self.config = SimpleNamespace(steps=70)

        def run(self, prompt, steps, seed, folder, callback, resume):
            calls.append((prompt, steps, seed, resume, folder.exists()))
            callback(1, None)
            return SimpleNamespace(mesh="mesh", metrics={"seconds": {"total": 1.0}})

    monkeypatch.setattr("text3d_fast.pipelines.DreamFusion", Pipeline)
    make, ticks = evaluate.dreamfusion("cpu"), []
    begun, stopped = tmp_path / "begun", tmp_path / "stopped"
    for folder in (begun, stopped):
        folder.mkdir()
        (folder / "config.yaml").write_text("")
    (stopped / "checkpoint.safetensors").write_text("")
    for folder in (begun, stopped):
        assert make(HALF, "a red mug", 4, None, folder, lambda *step: ticks.append(step))[0] == "mesh"
    assert calls == [
        ("toybox", "cpu", {"guidance.camera": True}),
        ("a red mug", 70, 4, False, False),
        ("a red mug", 70, 4, True, True),
    ]
    assert ticks == [(1, 70), (1, 70)]


def test_settings_of_a_model_are_not_those_of_the_reference(tmp_path, monkeypatch):
    asked = {}

    class Pipeline:
        def __init__(self, model, device, settings):
            asked[model] = settings
            self.config = SimpleNamespace(steps=1)

        def run(self, *_):
            raise EmptyMesh("the mesh is empty")

    monkeypatch.setattr("text3d_fast.pipelines.DreamFusion", Pipeline)
    words = ["evaluate", "--model", "folder/of/a/model", "--camera-only", "--prompts", "a red mug", "--seeds", "0",
             "--out", str(tmp_path), "--set"]
    assert main([*words, "prior.dtype=bfloat16"]) == 0
    assert asked == {"analytic": {"guidance.camera": True},
                     "folder/of/a/model": {"guidance.camera": True, "prior.dtype": "bfloat16"}}


def test_default_methods():
    assert [m.name for m in evaluate.default_methods("analytic")] == [evaluate.REFERENCE, "analytic, words"]
    named = evaluate.default_methods("some/model", quick=True)
    assert [(m.name, m.camera) for m in named] == [
        (evaluate.REFERENCE, True), ("model, camera", True), ("model, words", False)
    ]  # fmt: skip
    assert all(parse(prompt) for prompt in evaluate.PROMPTS)
    assert set(evaluate.QUICK_PROMPTS) <= set(evaluate.PROMPTS)


def test_magic3d_is_judged_by_stage(tmp_path, monkeypatch):
    """The fine stage begins in the folder that the coarse one left; each is a method of its own."""
    from text3d_fast import pipelines

    asked = []

    class Pipeline:
        def __init__(self, model, device, settings=None):
            assert model is None

        def run(self, prompt, steps, seed, folder, callback, resume, stage, start):
            asked.append((stage, start))
            return SimpleNamespace(mesh=stage, metrics={})

    monkeypatch.setattr(pipelines, "Magic3D", Pipeline, raising=False)
    make = evaluate.magic3d("cpu")
    coarse, fine = evaluate.magic3d_methods()
    places = [tmp_path / "runs" / method.slug / "a-red-mug-0-default" for method in (coarse, fine)]
    for method, place in zip((coarse, fine), places, strict=True):
        assert make(method, "a red mug", 0, None, place, lambda *_: None)[0] == method.stage
    assert asked == [("coarse", None), ("fine", places[0])]
