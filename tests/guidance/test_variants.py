"""CSD, SDS-Bridge and ISM on Gaussian mixtures, against their formulas written out."""

import pytest
import torch

from text3d_fast.guidance import (
    DISTILLATIONS,
    Conditions,
    GaussianMixture,
    MixturePrior,
    NoiseSchedule,
    ParticleScore,
    TimeRange,
)

MIXTURE = GaussianMixture([[-2.0], [2.0], [0.0]], 0.5)
PRIOR = MixturePrior(MIXTURE, labels={"a mug": [1], "a mug, blurry": [1, 2]})
ALL, MUG, BLURRY = ([0.0, 0.0, 0.0], [float("-inf"), 0.0, float("-inf")], [float("-inf"), 0.0, 0.0])


def draws(count: int = 9):
    x, noise = torch.randn(2, count, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return x, torch.linspace(0.1, 0.9, count, dtype=torch.float64), noise, Conditions(["a mug"] * count)


def eps(x_t, t, log_weights):
    return MIXTURE.noise(x_t.flatten(1), t, torch.tensor(log_weights).double()).reshape(x_t.shape)


def like(value, x):
    return value.reshape(-1, 1, 1, 1).to(x)


def test_csd_is_the_guidance_alone():
    x, t, noise, conditions = draws()
    x_t = PRIOR.schedule.add_noise(x, noise, t)
    given, _ = DISTILLATIONS["csd"](PRIOR, 7.0, "uniform").gradient(x, t, noise, conditions)
    torch.testing.assert_close(given, 7 * (eps(x_t, t, MUG) - eps(x_t, t, ALL)))
    # what SDS of the same weight has besides is its gradient without guidance
    sds, plain = (DISTILLATIONS["sds"](PRIOR, w, "uniform").gradient(x, t, noise, conditions)[0] for w in (7.0, 0.0))
    torch.testing.assert_close(sds - plain, given)


def test_bridge_goes_from_the_source_to_the_text():
    x, t, noise, conditions = draws()
    x_t = PRIOR.schedule.add_noise(x, noise, t)
    bridge = DISTILLATIONS["bridge"](PRIOR, 7.0, "uniform", source="blurry")
    given, _ = bridge.gradient(x, t, noise, conditions)
    torch.testing.assert_close(given, 7 * (eps(x_t, t, MUG) - eps(x_t, t, BLURRY)))


def test_ism_is_an_interval_of_the_inversion():
    x, t, noise, conditions = draws()
    ism = DISTILLATIONS["ism"](PRIOR, 6.5, "uniform", (0.1, 0.9), interval=0.1, stride=0.5)
    given, _ = ism.gradient(x, t, noise, conditions)
    x_s, empty = x, None
    for now, then in ((0 * t, (t - 0.1) / 2), ((t - 0.1) / 2, t - 0.1), (t - 0.1, t)):
        empty = eps(x_s, now, ALL)
        alpha, sigma = (like(value, x) for value in PRIOR.schedule.alpha_sigma(now))
        alpha_then, sigma_then = (like(value, x) for value in PRIOR.schedule.alpha_sigma(then))
        x_s = alpha_then * (x_s - sigma * empty) / alpha + sigma_then * empty
    towards, away = eps(x_s, t, MUG), eps(x_s, t, ALL)
    torch.testing.assert_close(given, towards + 6.5 * (towards - away) - empty)
    assert torch.equal(ism.gradient(x, t, noise + 1, conditions)[0], given)  # nothing is drawn


def test_ism_at_the_first_steps_of_a_discrete_schedule():
    prior = MixturePrior(GaussianMixture([[2.0]], 0.5, schedule=NoiseSchedule.from_alphas_cumprod(
        torch.linspace(0.9999, 0.01, 1000))))
    x = torch.zeros(4, 1, 1, 1)
    t = torch.tensor([0.0, 0.01, 0.05, 0.06])
    gradient, _ = DISTILLATIONS["ism"](prior, 0.0).gradient(x, t, x, Conditions([""] * 4))
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("name", DISTILLATIONS)
def test_every_one_is_called_alike_and_goes_to_the_text(name):
    """From between the modes towards the one that the text names; the sign of each gradient."""
    score = (ParticleScore(PRIOR.schedule),) if name == "vsd" else ()
    options = {"source": "blurry"} if name == "bridge" else {}
    loss = DISTILLATIONS[name](PRIOR, *score, guidance_weight=5.0, time_range=TimeRange(0.1, 0.9), **options)
    count = 64
    images = torch.linspace(0.2, 1.2, count).reshape(-1, 1, 1, 1).requires_grad_()
    conditions = Conditions(["a mug"] * count)
    if name == "vsd":
        loss.train_score(images, conditions)
    result = loss(images, conditions, 0.5, torch.Generator().manual_seed(0))
    result.loss.backward()
    torch.testing.assert_close(images.grad, result.gradient / count)
    assert float(images.grad.mean()) < 0 and int(result.skipped) == 0


def test_perp_neg_leaves_what_the_text_and_the_negative_share():
    prior = MixturePrior(
        GaussianMixture([[2.0, 0.0], [2.0, 1.5], [-1.0, -1.0]], 0.5), (2, 1, 1),
        {"front": [0], "back": [1], "no": [2]},
    )
    x, noise = torch.randn(2, 3, 2, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.3, 0.5, 0.7], dtype=torch.float64)
    conditions = Conditions(["front", "front", "back"])
    negatives = {"front": {"back": 0.8, "no": 0.3}}
    given, _ = DISTILLATIONS["sds"](prior, 4.0, "uniform", perp_neg=negatives).gradient(x, t, noise, conditions)
    plain, _ = DISTILLATIONS["sds"](prior, 4.0, "uniform").gradient(x, t, noise, conditions)
    x_t = prior.schedule.add_noise(x, noise, t)
    front, back, no, empty = (prior.predict_noise(x_t, t, Conditions([name] * 3)).flatten(1)
                              for name in ("front", "back", "no", ""))
    expected = plain.flatten(1).clone()
    for row in range(2):
        towards = front[row] - empty[row]
        for other, amount in ((back, 0.8), (no, 0.3)):
            away = other[row] - empty[row]
            expected[row] -= 5 * amount * (away - (away @ towards) / (towards @ towards) * towards)
    torch.testing.assert_close(given.flatten(1), expected)  # and the third row, without negatives, as before
    unguided = DISTILLATIONS["sds"](prior, 0.0, "uniform", perp_neg=negatives).gradient(x, t, noise, conditions)[0]
    torch.testing.assert_close(unguided, prior.predict_noise(x_t, t, conditions) - noise)
