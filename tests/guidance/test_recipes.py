"""Recipes are chosen by what a model is."""

import pytest

pytest.importorskip("diffusers")
from tiny_models import save_model

from text3d_fast.guidance import GaussianMixture, MixturePrior
from text3d_fast.guidance.models.diffusion import DiffusionPrior
from text3d_fast.guidance.models.settings import ModelSettings
from text3d_fast.guidance.recipes import choose_recipe


def test_recipes_follow_the_models_properties(tmp_path):
    latent = DiffusionPrior.from_pretrained(save_model(tmp_path / "latent"))
    recipe = choose_recipe(latent)
    assert recipe.name == "latent" and recipe.guidance_weight == 100 and recipe.view_words == "side"
    assert recipe.render_size == 32  # never above the model's own

    folder = save_model(tmp_path / "pixel", latent=False)
    ModelSettings(
        pixel_unshuffle=2, view_words="left_right", cameras={"elevation": [-5, 50]},
        recipe={"guidance_weight": 4.0, "steps": 700, "time_range": {"high": 0.6}, "learning_rates": {"grid": 0.1}},
    ).save(folder)
    pixel = DiffusionPrior.from_pretrained(folder)
    recipe = choose_recipe(pixel)
    assert recipe.name == "pixel" and recipe.guidance_weight == 4.0 and recipe.steps == 700
    assert recipe.time_range.at(0.0) == (0.02, 0.6)
    assert recipe.cameras["elevation"] == (-5, 50) and recipe.cameras["azimuth"] == (0, 360)
    assert recipe.learning_rates["grid"] == 0.1 and recipe.learning_rates["network"] == 1e-3
    assert recipe.view_prompts().phrase(0.0, 1.5) == "left side view"
    assert choose_recipe(latent).learning_rates["grid"] == 1e-2  # nobody else's changed

    pixel.settings.conditions = ["camera"]
    assert choose_recipe(pixel).name == "camera"
    pixel.settings.recipe = {"speed": 3}
    with pytest.raises(ValueError, match="recipe: 'speed'"):
        choose_recipe(pixel)
    pixel.settings.recipe = {"time_range": {"middle": 3}}
    with pytest.raises(ValueError, match="recipe: .*middle"):
        choose_recipe(pixel)


def test_the_pipeline_starts_from_the_recipe(tmp_path):
    from text3d_fast.pipelines.recipes import default_config

    folder = save_model(tmp_path / "pixel", latent=False)
    wishes = {"guidance_weight": 4.0, "time_range": {"final_high": 0.5, "kind": "linear"}}
    ModelSettings(pixel_unshuffle=2, cameras={"distance": [2, 2.5]}, recipe=wishes).save(folder)
    config = default_config(DiffusionPrior.from_pretrained(folder), str(folder))
    assert config.guidance.weight == 4.0 and config.steps == 10_000 and config.size == 32
    assert config.guidance.time == (0.02, 0.98) and config.guidance.final_time == (0.02, 0.5)
    assert config.cameras.distance == (2, 2.5) and config.cameras.fov_y == (35, 50)


def test_exact_denoisers_are_not_amplified():
    recipe = choose_recipe(MixturePrior(GaussianMixture([[0.0] * 3], 1.0)))
    assert recipe.name == "exact" and recipe.guidance_weight == 0 and recipe.weighting == "sample"
