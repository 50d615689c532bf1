"""The refiner of the learned prior: what it adds, how it is trained, where it is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from examples.train_toybox import refine
from examples.train_toybox.batches import TrainSettings, training_batch
from examples.train_toybox.dataset import RenderedImages, render_dataset
from examples.train_toybox.model import ToyboxModel
from examples.train_toybox.refine import MARK_WEIGHT, refining_loss, train_refiner
from text3d_fast.guidance.models.diffusion import DiffusionPrior
from text3d_fast.guidance.prior import Conditions
from text3d_fast.toybox.learned.refiner import VARIANCE, Refiner

SMALL = (32, 32, 32)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    render_dataset(folder, 64, front=0.25, two_objects=0.0, kinds=("snowman", "ball"))
    return RenderedImages(folder)


def inputs(count=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(4, count, 48, 16, 16, generator=generator)
    return images, torch.randn(count, 5, 96, generator=generator), torch.randn(count, 12, generator=generator)


def silent(refiner):
    """The refiner with a last layer that adds nothing."""
    torch.nn.init.zeros_(refiner.last.weight)
    torch.nn.init.zeros_(refiner.last.bias)
    return refiner


@torch.no_grad()
def test_without_an_addition_it_is_the_best_linear_estimate():
    """x_t / alpha errs by sigma^2 / alpha^2, the U-Net by VARIANCE: weighed by their inverses."""
    (noisy, clean, mean, details), text, vector = inputs()
    alpha = torch.tensor([0.999, 0.02])
    found = silent(Refiner())(noisy, clean, mean, details, torch.tensor([20, 980]), alpha, text, vector)
    alpha = alpha.double().view(-1, 1, 1, 1)
    precise = alpha**2 / (1 - alpha**2)
    expected = (noisy / alpha * precise + clean / VARIANCE) / (precise + 1 / VARIANCE)
    # 1 - alpha^2 = 0.002 in fp32 is exact to 3e-5; the weights to as much
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_it_sees_every_input():
    """A change of any input changes the answer; of images also away from the pixel that changed, but not far away."""
    refiner = Refiner().eval()
    torch.nn.init.normal_(refiner.last.weight)
    images, text, vector = inputs(1)
    steps, alpha = torch.tensor([500]), torch.tensor([0.7])

    def answer(images=images, steps=steps, text=text, vector=vector):
        return refiner(*images, steps, alpha, text, vector)

    plain = answer()
    for k in range(4):
        changed = images.clone()
        changed[k, 0, :, 1, 1] += 1
        difference = (answer(changed) - plain).abs().amax((0, 1))
        assert difference[1, 2] > 0 and difference[2, 2] > 0
        # 13 cells of 2 x 2 pixels on either side: first, last and dilations 1 + 2 + 4 + 2 + 1 + 1
        assert not difference[9:].any() and not difference[:, 9:].any()
    assert not torch.equal(answer(steps=torch.tensor([501])), plain)
    assert not torch.equal(answer(text=text + 1), plain)
    for k in range(12):
        changed = vector.clone()
        changed[0, k] += 0.1
        assert not torch.equal(answer(vector=changed), plain), k


def test_the_loss_by_hand(data, monkeypatch):
    """Around a network that adds nothing, with U-Net answers and details that are known."""
    model = ToyboxModel.build(0, SMALL).eval()
    images, conditions, _ = training_batch(data, TrainSettings(batch=2), 0)
    zero, drawn = torch.zeros(2, 48, 16, 16), torch.zeros(2, 4, 64, 64)
    drawn[:, 0, 30, 30] = -0.4  # a quarter of it on average over the four channels
    monkeypatch.setattr(model, "coarse", lambda *_: (zero, zero, zero))
    monkeypatch.setattr(model, "refine", lambda coarse, *_: coarse[0])
    monkeypatch.setattr(model.mean_image.details, "forward", lambda *_: drawn)
    loss, before, after = refining_loss(model, images, conditions, torch.Generator().manual_seed(3), 1.0)
    inner = (2 * images - 1)[:, 8:-8, 8:-8].square()
    marks = torch.zeros(48, 48, 1)
    marks[22, 22] = 0.1
    levels = (torch.arange(2) + torch.rand((), generator=torch.Generator().manual_seed(3))) / 2
    weight = torch.tensor([4 * math.exp(-2.4 * int(1000 * u) / 1000) for u in levels])
    expected = (weight * (inner * (1 + MARK_WEIGHT * marks)).mean((1, 2, 3))).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.stack([before, after]), inner.mean().expand(2))


def test_training_helps_and_touches_nothing_else(data, monkeypatch):
    """A fresh refiner for the shipped U-Net, on the same images and noise again and again."""
    model = ToyboxModel.load()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.denoiser.refiner = Refiner()
    others = (model.unet, model.text_encoder, model.mean_image)
    kept = [p.clone() for part in others for p in part.parameters()]
    settings, rows, calls = replace(refine.SETTINGS, batch=4, learning_rate=1e-3, warmup=5), [], []
    images, conditions, _ = training_batch(data, settings, 0)

    def batch(*_):
        return images, conditions, torch.Generator().manual_seed(0)

    @torch.no_grad()
    def loss():
        return float(refining_loss(model, *batch())[0])

    monkeypatch.setattr(refine, "training_batch", batch)
    before = loss()
    train_refiner(model, data, 30, settings=settings, report=rows.append, keep=lambda: calls.append(1), keep_minutes=0)
    assert all(torch.equal(a, b) for a, b in zip(kept, (p for o in others for p in o.parameters()), strict=True))
    assert [row["step"] for row in rows] == [10, 20, 30] and len(calls) == 31
    # 0.83 of it was left; before any step the linear estimate alone was at work
    assert loss() < 0.9 * before


def test_ctrl_c_keeps_the_averaged_weights(data, monkeypatch, capsys):
    model, kept, count = ToyboxModel.build(0, SMALL), [], 0

    def interrupted(*arguments):
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return refining_loss(*arguments)

    monkeypatch.setattr(refine, "refining_loss", interrupted)
    train_refiner(model, data, 100, settings=TrainSettings(batch=2),
                  keep=lambda: kept.append(model.refiner.last.weight.detach().clone()))
    assert "stopped at step 2" in capsys.readouterr().out
    assert len(kept) == 1 and torch.equal(kept[0], model.refiner.last.weight)


def test_focus_on_detailed_classes(data):
    part = data.subset([k for k, d in enumerate(data.descriptions) if d.thing.kind == "snowman"])
    assert 0 < len(part) < len(data) and {d.thing.kind for d in part.descriptions} == {"snowman"}
    again = part.subset([1, 0])
    row = [k for k, d in enumerate(data.descriptions) if d.thing.kind == "snowman"][1]
    assert (again.images([0])[0] == data.images([row])[0]).all() and (again.camera[0] == data.camera[row]).all()
    assert set(part.front) | set(part.not_front) == set(range(len(part)))
    assert len(data.subset([])) == 0


def test_prior_and_trainer_answer_alike(data, tmp_path):
    """`DiffusionPrior`, which loads the folder's parts by itself, against `ToyboxModel.predict`."""
    model = ToyboxModel.build(0, SMALL).eval()
    torch.nn.init.normal_(model.refiner.last.weight, std=0.05)
    model.save(tmp_path / "model", torch.float32)
    prior = DiffusionPrior.from_pretrained(tmp_path / "model")
    _, conditions, generator = training_batch(data, TrainSettings(batch=3), 0)
    x, steps = torch.randn(3, 48, 16, 16, generator=generator), torch.tensor([5, 400, 990])
    with torch.no_grad():
        ours = model.predict(x, steps, model.embed(model.token_ids(conditions.texts)), conditions)
        theirs = prior.predict(x, steps / 999, conditions)
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)
    assert prior.describe()["parameters"]["unet"] == sum(p.numel() for p in model.denoiser.parameters())
    assert prior.canonical("a crimson cup") == "a red mug"


def test_gradients_pass_through_to_the_noisy_image():
    model = ToyboxModel.build(0, SMALL).eval()
    x = torch.randn(1, 48, 16, 16, requires_grad=True)
    text = model.embed(model.token_ids(["a red mug"]))
    model.predict(x, torch.tensor([100]), text, Conditions(["a red mug"])).square().sum().backward()
    assert torch.isfinite(x.grad).all() and (x.grad.abs().amax((2, 3)) > 0).all()
