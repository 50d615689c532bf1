"""How a model is loaded and what is descended, as settings of a run; what is said before a long one."""

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from tiny_models import save_model

from text3d_fast.errors import CheckpointError, ModelError, ModelWarning
from text3d_fast.guidance import (
    DISTILLATIONS,
    DiffusionPrior,
    ModelOptions,
    load_prior,
)
from text3d_fast.guidance.variants import BridgeDistillation, ClassifierScoreDistillation, IntervalScoreMatching
from text3d_fast.pipelines import DreamFusion, Magic3D
from text3d_fast.pipelines.checkpoint import save_state
from text3d_fast.pipelines.run_folder import CHECKPOINT, RunFolder

SMALL = {"size": 16, "field.max_resolution": 32, "field.log2_table_size": 8, "sampling.step": 0.2,
         "sampling.occupancy": 8, "mesh_resolution": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "model")


def test_options_reach_the_model_and_are_kept(folder):
    pipeline = DreamFusion(str(folder), "cpu", settings=SMALL | {
        "prior.dtype": "bfloat16", "prior.vae_slicing": True, "prior.prediction": "v_prediction"})
    assert isinstance(pipeline.prior, DiffusionPrior)
    assert str(pipeline.prior.dtype) == "torch.bfloat16" and pipeline.prior.prediction_type == "v_prediction"
    assert pipeline.config.prior == ModelOptions(dtype="bfloat16", vae_slicing=True, prediction="v_prediction")
    assert type(pipeline.config).from_yaml(pipeline.config.to_yaml()) == pipeline.config
    with pytest.raises(ModelError, match="dtype: expected one of float32, float16, bfloat16, got 'int8'"):
        DreamFusion(str(folder), "cpu", settings={"prior.dtype": "int8"})
    with pytest.raises(ModelError, match="lora: .*nothing.safetensors: no such file"):
        DreamFusion(str(folder), "cpu", settings={"prior.lora": "nothing.safetensors"})
    with pytest.raises(ValueError, match="prior.colour: no such setting"):
        DreamFusion(str(folder), "cpu", settings={"prior.colour": 1})
    with pytest.raises(ValueError, match="prior.compile: expected bool, got 'yes, please'"):
        DreamFusion(str(folder), "cpu", settings={"prior.compile": "yes, please"})


def test_options_are_for_models_that_are_loaded(folder):
    with pytest.raises(ModelError, match="prior.offload: analytic is built in and takes no such option"):
        load_prior("analytic", options=ModelOptions(offload=True))
    with pytest.raises(ValueError, match="prior.dtype: the prior is an own one"):
        DreamFusion(prior=load_prior(str(folder)), settings={"prior.dtype": "float32"})
    magic = Magic3D(str(folder), "cpu", settings={"prior.vae_slicing": True}, fine_model="analytic")
    assert magic.fine_prior.kind == "exact"


def test_a_run_goes_on_with_its_model_as_it_was(folder, tmp_path):
    pipeline = DreamFusion(str(folder), "cpu", settings=SMALL)
    config = pipeline.config.updated({"prompt": "a red mug", "model": str(folder)})
    run = RunFolder(tmp_path / "run")
    run.open(config, resume=False)
    run.close()
    save_state(tmp_path / "run" / CHECKPOINT, {}, {"stage": "dreamfusion"})
    other = config.updated({"prior.prediction": "sample"})
    with pytest.raises(CheckpointError, match="holds a run with prior.prediction = None, not 'sample'"):
        RunFolder(tmp_path / "run").open(other, resume=True)
    lean = {"prior.vae_slicing": True}
    again = RunFolder(tmp_path / "run").open(config.updated(lean), resume=True, changes=lean)
    assert again.prior.vae_slicing


@pytest.mark.parametrize(("name", "kind"), [
    ("csd", ClassifierScoreDistillation), ("bridge", BridgeDistillation), ("ism", IntervalScoreMatching)])
def test_the_residual_is_a_setting(folder, name, kind):
    assert DISTILLATIONS[name] is kind
    pipeline = DreamFusion(str(folder), "cpu", settings=SMALL | {"guidance.distillation": name})
    stage = pipeline._make(pipeline.config.updated({"prompt": "a red mug"}), pipeline.stages[0], None)
    assert type(stage.distill) is kind
    loads = pipeline.prior.texts.loads
    assert bool(stage.step().loss.isfinite())
    assert pipeline.prior.texts.loads == loads == 1  # every prompt was embedded before
    with pytest.raises(ValueError, match="jacobian: only sds has one"):
        pipeline.config.updated({"guidance.jacobian": True})
    with pytest.raises(ValueError, match="distillation: expected sds, csd, bridge or ism, got 'vsd'"):
        pipeline.config.updated({"guidance.distillation": "vsd"})


def test_views_are_pushed_off_each_other(folder, monkeypatch):
    pipeline = DreamFusion(str(folder), "cpu", settings=SMALL | {
        "guidance.perp_neg": 0.8, "cameras.elevation": [0, 10], "cameras.azimuth": [170, 190]})
    stage = pipeline._make(pipeline.config.updated({"prompt": "a red mug"}), pipeline.stages[0], None)
    asked, predict = [], pipeline.prior.predict_noise
    monkeypatch.setattr(pipeline.prior, "predict_noise", lambda x, t, conditions: asked.append(conditions.texts)
                        or predict(x, t, conditions))
    stage.step()
    assert asked == [["a red mug, back view", "", "a red mug, side view", "a red mug, front view"]]
    assert pipeline.prior.texts.loads == 1


def test_a_run_of_hours_is_foretold(folder, monkeypatch):
    pipeline = DreamFusion(str(folder), "cpu", settings=SMALL)
    monkeypatch.setattr(DiffusionPrior, "seconds_a_picture", lambda self: 75.0)
    config = pipeline.config.updated({"steps": 10_000})
    with pytest.warns(ModelWarning, match=r"about 75 s a step on this CPU, and all steps about 9 days.*tiny_auto"):
        pipeline._foretell(config, pipeline.stages)


@pytest.mark.filterwarnings("error")
def test_a_short_run_is_not(folder):
    pipeline = DreamFusion(str(folder), "cpu", settings=SMALL)
    assert pipeline.prior.seconds_a_picture() is None  # too small to be spoken of
    pipeline._foretell(pipeline.config, pipeline.stages)


def test_latent_models_get_a_fine_scene(folder):
    config = DreamFusion(str(folder), "cpu").config
    assert (config.field.max_resolution, config.field.log2_table_size) == (4096, 19)
    assert 500 < 2 * config.sampling.radius / config.sampling.step < 520
