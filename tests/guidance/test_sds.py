"""SDS against the truth: Gaussian mixtures, where every density, score and integral is known.

Tolerances: sums over quadrature nodes are fp64 and agree to 1e-12 (doubling the nodes moves them less than that);
Monte Carlo runs are bounded by five standard errors, measured in the run.
"""

import pytest
import torch

from text3d_fast.guidance import (
    WEIGHTINGS,
    Conditions,
    GaussianMixture,
    MixturePrior,
    ScoreDistillation,
    TimeRange,
    distillation_loss,
    guided_noise,
)
from text3d_fast.guidance.mixture import _nodes, expected_divergence, expected_gradient

TWO_MODES = GaussianMixture([[-2.0], [2.0]], 0.5)  # alpha = cos(pi t / 2)
RANGES = {"wide": (0.02, 0.98), "low": (0.02, 0.5)}
# brentq on trapezoid sums of 2001 x 1601 points, written separately from this package
STATIONARY = {("sigma2", "wide"): 1.01462, ("sigma2", "low"): 1.95421,
              ("uniform", "wide"): 1.65493, ("uniform", "low"): 1.97835}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Thousands of small operations: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def stationary_point(weighting: str, time_range: tuple[float, float]) -> float:
    """The zero of the expected gradient between the saddle at 0 and the mode, by bisection."""
    low, high = torch.tensor(0.2).double(), torch.tensor(2.5).double()
    for _ in range(50):
        middle = (low + high) / 2
        rising = expected_gradient(TWO_MODES, middle[None], WEIGHTINGS[weighting], time_range) > 0
        low, high = (low, middle) if rising else (middle, high)
    return float(low)


def divergence_slope(x, weighting, time_range):
    """d/dx of E[w sigma / alpha KL], from densities alone: no score formula, no SDS code."""
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(expected_divergence(TWO_MODES, x, weighting, time_range, NODES).sum(), x)
    return slope


NODES = (48, 64)


def quadrature_of_sds(x: float, weighting: str, time_range) -> torch.Tensor:
    """The mean over (t, eps) of what ScoreDistillation.gradient returns for one sample, at quadrature nodes."""
    t, t_weight, noise, noise_weight = _nodes(time_range, NODES)
    t_all, noise_all = (value.flatten() for value in torch.meshgrid(t, noise, indexing="ij"))
    count = len(t_all)
    sds = ScoreDistillation(MixturePrior(TWO_MODES), 0.0, weighting)
    image = torch.full((count, 1, 1, 1), x, dtype=torch.float64)
    gradient, _ = sds.gradient(image, t_all, noise_all.reshape(-1, 1, 1, 1), Conditions([""] * count))
    assert gradient.dtype == torch.float64
    return (gradient.reshape(len(t), -1) * t_weight[:, None] * noise_weight).sum()


@pytest.mark.parametrize("weighting", ["sigma2", "uniform", "kl", "alpha_sigma2"])
@pytest.mark.parametrize("time_range", RANGES.values(), ids=RANGES)
def test_gradient_is_the_slope_of_the_weighted_divergence(weighting, time_range):
    points = torch.tensor([-2.3, -1.0, 0.1, 0.7, 1.0, 1.9, 3.0], dtype=torch.float64)
    truth = divergence_slope(points, WEIGHTINGS[weighting], time_range)
    for x, slope in zip(points, truth, strict=True):
        torch.testing.assert_close(quadrature_of_sds(float(x), weighting, time_range), slope, rtol=1e-9, atol=1e-12)
    analytic = expected_gradient(TWO_MODES, points, WEIGHTINGS[weighting], time_range, NODES)
    torch.testing.assert_close(analytic, truth, rtol=1e-9, atol=1e-12)


def test_every_sample_is_the_weighted_noise_residual():
    """The noise has mean zero, so the integrals above do not see it; its sign decides the variance."""
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 50, 1, 1, 1, dtype=torch.float64, generator=generator)
    t = torch.linspace(0.02, 0.98, 50, dtype=torch.float64)
    alpha, sigma = TWO_MODES.schedule.alpha_sigma(t)
    x_t = alpha * x.flatten() + sigma * noise.flatten()
    expected = sigma**2 * (TWO_MODES.noise(x_t[:, None], t)[:, 0] - noise.flatten())
    sds = ScoreDistillation(MixturePrior(TWO_MODES), 0.0, "sigma2")
    gradient, _ = sds.gradient(x, t, noise, Conditions([""] * 50))
    torch.testing.assert_close(gradient.flatten(), expected)
    # at the only image there is, eps_theta is eps exactly and nothing is left
    point = GaussianMixture([[0.3]], 1e-9)
    sds = ScoreDistillation(MixturePrior(point), 0.0, "uniform")
    residual, _ = sds.gradient(torch.full_like(x, 0.3), t, noise, Conditions([""] * 50))
    assert float(residual.abs().max()) < 1e-9


def test_uniform_weight_is_the_specs_sigma_over_alpha_divergence():
    points = torch.linspace(-3, 3, 13, dtype=torch.float64)
    t, t_weight, noise, noise_weight = _nodes((0.02, 0.98), NODES)
    alpha, sigma = TWO_MODES.schedule.alpha_sigma(t)
    x = points.clone().requires_grad_()
    x_t = alpha[:, None] * x[:, None, None] + sigma[:, None] * noise
    log_p = TWO_MODES.log_density(x_t[..., None], t[:, None].expand(x_t.shape))
    cross_entropy = -(log_p * noise_weight).sum(-1)  # KL up to q's entropy, which does not depend on x
    (slope,) = torch.autograd.grad((cross_entropy * sigma / alpha * t_weight).sum(), x)
    for point, expected in zip(points, slope, strict=True):
        torch.testing.assert_close(quadrature_of_sds(float(point), "uniform", (0.02, 0.98)), expected,
                                   rtol=1e-9, atol=1e-12)
    assert (quadrature_of_sds(1.0, "sigma2", (0.02, 0.98)) - slope[8]).abs() > 0.05  # the test can tell them apart


def test_monte_carlo_gradient_of_the_loss_matches_quadrature():
    count = 200_000
    sds = ScoreDistillation(MixturePrior(TWO_MODES), 0.0, "uniform")
    x = torch.tensor(1.0, requires_grad=True)
    result = sds(x.expand(count, 1, 1, 1), Conditions([""] * count), generator=torch.Generator().manual_seed(0))
    result.loss.backward()  # the mean over the batch
    truth = expected_gradient(TWO_MODES, torch.tensor([1.0]), WEIGHTINGS["uniform"])[0]
    standard_error = result.gradient.std() / count**0.5
    assert abs(x.grad - truth) < 5 * standard_error
    assert 5 * standard_error < 0.1 * truth.abs()  # and that is a sharp statement


def descend(weighting: str, time_range, starts: list[float], sign: float = 1.0, steps: int = 240):
    """Plain gradient descent on single numbers through the real loss; returns the paths [steps, starts]."""
    generator, each = torch.Generator().manual_seed(1), 512
    sds = ScoreDistillation(MixturePrior(TWO_MODES), 0.0, weighting, time_range)
    x = torch.tensor(starts, requires_grad=True)
    conditions = Conditions([""] * (each * len(starts)))
    path = []
    for step in range(steps):
        path.append(x.detach())
        loss = sds(x.repeat(each).reshape(-1, 1, 1, 1), conditions, generator=generator).loss
        (slope,) = torch.autograd.grad(loss * len(starts), x)
        rate = 0.5 if step < steps // 2 else 0.05
        x = (x - sign * rate * slope).detach().requires_grad_()
    return torch.stack(path)


@pytest.mark.parametrize(("weighting", "time_range"), STATIONARY)
def test_descent_ends_at_the_stationary_point(weighting, time_range):
    low_high = RANGES[time_range]
    truth = stationary_point(weighting, low_high)
    assert truth == pytest.approx(STATIONARY[weighting, time_range], abs=2e-5)
    paths = descend(weighting, low_high, [0.3, -3.0])
    for path, side in ((paths[:, 0], 1), (paths[:, 1], -1)):
        assert float(path[-60:].mean()) == pytest.approx(side * truth, abs=0.03)
        divergence = expected_divergence(TWO_MODES, path[::5], WEIGHTINGS[weighting], low_high, NODES)
        assert divergence[-1] < divergence[0]
        settled = divergence < divergence.min() + 1e-3  # within the noise of the minimum
        assert bool((divergence.diff() < 0)[~settled[:-1]].all())


def test_the_specs_literal_sign_climbs_the_divergence():
    """Descending along (eps - eps_theta), as the formula is printed, leaves the stationary point behind."""
    truth = STATIONARY["sigma2", "wide"]
    path = descend("sigma2", RANGES["wide"], [1.5], sign=-1.0, steps=60)[:, 0]
    assert abs(path[-1] - truth) > 2 * abs(path[0] - truth)
    divergence = expected_divergence(TWO_MODES, path[[0, -1]], WEIGHTINGS["sigma2"])
    assert divergence[1] > divergence[0]


def test_guided_noise_is_one_plus_w_of_the_text_minus_w_of_nothing_in_one_call():
    class Counting(MixturePrior):
        calls = 0

        def predict_noise(self, x_t, t, conditions):
            self.calls += 1
            return super().predict_noise(x_t, t, conditions)

    prior = Counting(TWO_MODES, labels={"left": [0], "right": [1]})
    x_t, t = torch.linspace(-1, 1, 5).reshape(5, 1, 1, 1), torch.linspace(0.1, 0.9, 5)
    texts, empty = Conditions(["right", "left", "right", "", "left"]), Conditions([""] * 5)
    expected = 8.5 * prior.predict_noise(x_t, t, texts) - 7.5 * prior.predict_noise(x_t, t, empty)
    prior.calls = 0
    torch.testing.assert_close(guided_noise(prior, x_t, t, texts, 7.5), expected, rtol=1e-5, atol=1e-5)
    assert prior.calls == 1
    torch.testing.assert_close(guided_noise(prior, x_t, t, texts, 0), prior.predict_noise(x_t, t, texts))
    torch.testing.assert_close(guided_noise(prior, x_t, t, texts, -1), prior.predict_noise(x_t, t, empty))
    with pytest.raises(ValueError, match=r"texts: .*up"):
        prior.predict_noise(x_t, t, Conditions(["up"] * 5))


def test_guidance_pulls_to_the_mode_the_text_names():
    prior = MixturePrior(TWO_MODES, labels={"right": [1]})
    sds = ScoreDistillation(prior, 4.0, "sigma2")
    x = torch.tensor(-1.5, requires_grad=True)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam([x], 0.08)
    for _ in range(100):
        optimizer.zero_grad()
        sds(x.expand(64, 1, 1, 1), Conditions(["right"] * 64), generator=generator).loss.backward()
        optimizer.step()
    assert x > 1.5


def test_jacobian_gives_the_true_gradient_of_the_diffusion_loss():
    mixture = GaussianMixture([[-2.0, 0.0], [2.0, 1.0], [0.0, -1.0]], torch.tensor([0.5, 0.3, 0.8]))
    sds = ScoreDistillation(MixturePrior(mixture, (2, 1, 1)), 2.0, "sigma2", jacobian=True)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 2, 1, 1, dtype=torch.float64, generator=generator)
    t, noise = torch.linspace(0.05, 0.95, 6).double(), torch.randn(6, 2, 1, 1, dtype=torch.float64, generator=generator)
    conditions = Conditions([""] * 6)
    gradient, value = sds.gradient(x, t, noise, conditions)

    def loss(x):
        x_t = mixture.schedule.add_noise(x, noise, t)
        residual = mixture.noise(x_t.flatten(1), t).reshape(x.shape) - noise
        return mixture.schedule.sigma(t) ** 2 * residual.square().flatten(1).sum(1)

    torch.testing.assert_close(value * 2, loss(x))
    step = 1e-6
    for axis in range(2):
        offset = torch.zeros_like(x)
        offset[:, axis] = step
        difference = (loss(x + offset) - loss(x - offset)) / (2 * step)
        torch.testing.assert_close(gradient[:, axis, 0, 0], difference, rtol=1e-6, atol=1e-7)
    # 2 alpha (eps_hat - eps) d eps_hat / d x_t: without the Jacobian it would be the plain residual
    plain, _ = ScoreDistillation(MixturePrior(mixture, (2, 1, 1)), 2.0, "sigma2").gradient(x, t, noise, conditions)
    assert not torch.allclose(plain, gradient, rtol=0.1)


def test_jacobian_of_a_prior_without_gradient_is_refused():
    class Detached(MixturePrior):
        def predict_noise(self, x_t, t, conditions):
            return super().predict_noise(x_t, t, conditions).detach()

    sds = ScoreDistillation(Detached(TWO_MODES), 0.0, jacobian=True)
    with pytest.raises(ValueError, match="jacobian: Detached.predict_noise is not differentiable"):
        sds(torch.zeros(2, 1, 1, 1), Conditions(["", ""]))


def test_loss_has_exactly_the_gradient_given_and_the_mean_scale():
    x = torch.randn(3, 4, 5, 5, requires_grad=True)
    gradient = torch.randn(3, 4, 5, 5) * 1e-4
    loss = distillation_loss(x, gradient)
    (loss * 7).backward()
    assert torch.equal(x.grad, 7 * gradient / x.numel())
    torch.testing.assert_close(loss.detach(), 0.5 * ((x - (x - gradient.double())) ** 2).mean().float())
    assert distillation_loss(x.half(), gradient).dtype == torch.float32
    with pytest.raises(ValueError, match="gradient: expected x's shape"):
        distillation_loss(x, gradient[:1])


def test_broken_images_are_skipped_clipped_and_counted():
    class Broken(MixturePrior):
        def predict_noise(self, x_t, t, conditions):
            predicted = super().predict_noise(x_t, t, conditions)
            return torch.where((torch.arange(len(x_t)) % 4 == 1).reshape(-1, 1, 1, 1), torch.inf, predicted)

    x = torch.zeros(4, 1, 1, 1, requires_grad=True)
    result = ScoreDistillation(Broken(TWO_MODES), 0.0, "uniform", clip=0.1)(x + 1, Conditions([""] * 4))
    result.loss.backward()
    assert int(result.skipped) == 1
    assert bool(x.grad.isfinite().all()) and float(x.grad[1]) == 0
    assert bool((result.gradient.abs() <= 0.1 + 1e-6).all()) and float(result.gradient_norm) > 0


def test_same_generator_same_gradient():
    sds = ScoreDistillation(MixturePrior(TWO_MODES), 0.0)
    runs = [sds(torch.ones(8, 1, 1, 1), Conditions([""] * 8), generator=torch.Generator().manual_seed(s))
            for s in (3, 3, 4)]
    assert torch.equal(runs[0].gradient, runs[1].gradient) and torch.equal(runs[0].t, runs[1].t)
    assert not torch.equal(runs[0].gradient, runs[2].gradient)


def test_time_range_anneals():
    assert TimeRange().at(0.7) == (0.02, 0.98)
    step = TimeRange(final_high=0.5, kind="step", end=0.2)
    assert step.at(0.19) == (0.02, 0.98) and step.at(0.2) == (0.02, 0.5)
    assert TimeRange(0.0, 1.0, 0.2, 0.4, "linear").at(0.5) == pytest.approx((0.1, 0.7))
    assert TimeRange(0.0, 1.0, final_high=0.0, kind="sqrt").at(0.25) == pytest.approx((0.0, 0.5))
    t = step.sample(1000, 0.5, torch.Generator().manual_seed(0))
    assert 0.02 <= float(t.min()) and 0.45 < float(t.max()) <= 0.5
    with pytest.raises(ValueError, match="low, high"):
        TimeRange(0.5, 0.2)
    with pytest.raises(ValueError, match="kind: expected"):
        TimeRange(kind="cosine")


def test_errors_name_the_argument():
    prior = MixturePrior(TWO_MODES)
    with pytest.raises(ValueError, match="weighting: expected one of"):
        ScoreDistillation(prior, weighting="snr")
    with pytest.raises(ValueError, match="clip: expected"):
        ScoreDistillation(prior, clip=0.0)
    with pytest.raises(ValueError, match="images: expected"):
        ScoreDistillation(prior)(torch.zeros(3, 1, 1, 1), Conditions([""]))
    with pytest.raises(TypeError, match="texts: expected a list"):
        Conditions("a mug")
    with pytest.raises(ValueError, match=r"camera: expected shape \[1, 3\]"):
        Conditions(["a mug"], camera=torch.zeros(3))
