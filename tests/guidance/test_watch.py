"""Gradients that are not finite are said at once, and end a run that learns nothing."""

import pytest
import torch

pytest.importorskip("diffusers")

from tiny_models import save_model

from text3d_fast.errors import ModelError, ModelWarning
from text3d_fast.guidance import Conditions, DiffusionPrior, ScoreDistillation
from text3d_fast.guidance.watch import FIRST, LATER, FiniteWatch
from text3d_fast.pipelines import DreamFusion

YES, NO, X = torch.tensor([True, False]), torch.tensor([False, False]), torch.zeros(2, 3)


def test_said_once_and_stopped_after_a_few():
    watch = FiniteWatch()
    with pytest.warns(ModelWarning, match="not finite: its weights hold NaN, or overflow") as said:
        for _ in range(FIRST - 1):
            watch(NO, X)
    assert len(said) == 1
    with pytest.raises(ModelError, match=f"nothing was learned in {FIRST} steps"):
        watch(NO, X)


def test_a_bad_step_now_and_then_is_no_reason_to_stop():
    watch = FiniteWatch()
    watch(YES, X)
    with pytest.warns(ModelWarning):
        for step in range(400):
            watch(YES if step % 7 == 0 else NO, X)
    with pytest.raises(ModelError):
        for _ in range(LATER + 25):
            watch(NO, X)


def test_pictures_that_are_not_finite_are_told_apart():
    with pytest.warns(ModelWarning, match="the pictures given to the prior are not finite"):
        FiniteWatch()(NO, X * torch.nan)


def test_one_nan_in_the_weights_stops_a_run(tmp_path):
    prior = DiffusionPrior.from_pretrained(save_model(tmp_path / "model"))
    with torch.no_grad():
        prior.unet.conv_in.weight[0, 0, 0, 0] = torch.nan
    settings = {"size": 16, "field.log2_table_size": 8, "sampling.step": 0.2, "sampling.occupancy": 8}
    with pytest.warns(ModelWarning), pytest.raises(ModelError, match="the prior's answers are not finite"):
        DreamFusion(prior=prior, device="cpu", settings=settings).run("a red mug", steps=3)
    step = ScoreDistillation(prior)
    with pytest.warns(ModelWarning):
        result = step(torch.rand(1, 32, 32, 3, requires_grad=True), Conditions(["a red mug"]))
    assert int(result.skipped) == 1 and float(result.gradient.abs().max()) == 0
