"""Recipes are chosen by what a model is, and every value knows where it comes from."""

import pytest

pytest.importorskip("diffusers")
from red_ball import RedBall
from tiny_models import save_model

from text3d_fast.guidance import GaussianMixture, MixturePrior
from text3d_fast.guidance.models.diffusion import DiffusionPrior
from text3d_fast.guidance.models.settings import ModelSettings
from text3d_fast.pipelines import DreamFusion, DreamFusionConfig
from text3d_fast.pipelines.recipes import recipe


def test_recipes_follow_the_models_properties(tmp_path):
    latent = DiffusionPrior.from_pretrained(save_model(tmp_path / "latent"))
    config = DreamFusion(prior=latent, device="cpu").config
    assert config.guidance.weight == 100 and config.view_words == "side" and config.steps == 10_000
    assert config.size == 32  # never above the model's own

    folder = save_model(tmp_path / "pixel", latent=False)
    wishes = {"guidance.weight": 4.0, "steps": 700, "guidance.time": [0.02, 0.6], "optimizer.grid": 0.1}
    ModelSettings(
        pixel_unshuffle=2, view_words="left_right", cameras={"elevation": [-5, 50]}, recipe=wishes
    ).save(folder)
    pixel = DiffusionPrior.from_pretrained(folder)
    config = DreamFusion(prior=pixel, device="cpu").config
    assert config.guidance.weight == 4.0 and config.steps == 700 and config.guidance.time == (0.02, 0.6)
    assert config.cameras.elevation == (-5, 50) and config.cameras.azimuth == (0, 360)
    assert config.optimizer.grid == 0.1 and config.optimizer.network == 1e-3 and config.view_words == "left_right"

    pixel.conditions = ("camera",)
    assert "recipe camera" in dict(recipe(pixel, DreamFusionConfig).layers)
    pixel.wishes = {"speed": 3}
    with pytest.raises(ValueError, match="speed: no such setting"):
        DreamFusion(prior=pixel, device="cpu")


def test_every_value_knows_where_it_comes_from():
    found = recipe(RedBall(), DreamFusionConfig)
    assert found.source("guidance.weight") == "recipe exact" and found.source("size") == "the prior"
    assert found.source("penalties.opacity") == "weighting sample" and found.source("batch") == "default"


def test_exact_denoisers_are_not_amplified():
    settings = recipe(MixturePrior(GaussianMixture([[0.0] * 3], 1.0)), DreamFusionConfig).settings()
    assert settings["guidance.weight"] == 0 and settings["guidance.weighting"] == "sample"
