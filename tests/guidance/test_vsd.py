"""VSD against the truth: Gaussian mixtures, where the prior's and the particles' scores are known.

Whether particles are distributed as the prior is decided by the energy distance between them and fresh samples, against
its distribution under permutations of the two sets (the 95 % point).
"""

import copy

import pytest
import torch

from text3d_fast.guidance import (
    WEIGHTINGS,
    Conditions,
    GaussianMixture,
    MixturePrior,
    NoiseSchedule,
    ParticleScore,
    ScoreDistillation,
    VariationalScoreDistillation,
)
from text3d_fast.guidance.mixture import expected_gradient

TWO_MODES = GaussianMixture([[-2.0], [2.0]], 0.5)  # alpha = cos(pi t / 2)
PRIOR = MixturePrior(TWO_MODES)
RANGE = (0.02, 0.98)
PARTICLES = 128


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Thousands of small operations: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def energy_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| of two samples [n, D], [m, D] (V-statistic)."""
    return float(2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean())


def permutation_threshold(a: torch.Tensor, b: torch.Tensor, permutations: int = 400, level: float = 0.95) -> float:
    """The energy distance that two samples of one distribution stay below with probability `level`."""
    generator = torch.Generator().manual_seed(5)
    pooled = torch.cat([a, b])
    distances = torch.cdist(pooled, pooled)
    first = torch.zeros(permutations, len(pooled), dtype=pooled.dtype)
    for row in first:
        row[torch.randperm(len(pooled), generator=generator)[: len(a)]] = 1
    second = 1 - first
    n, m = len(a), len(b)
    cross, inner, outer = (((p @ distances) * q).sum(1) for p, q in ((first, second), (first, first), (second, second)))
    return float((2 * cross / (n * m) - inner / n**2 - outer / m**2).quantile(level))


def evolve(loss, start: torch.Tensor, steps: int, rate: float, each: int = 8, train: int = 0) -> torch.Tensor:
    """Gradient descent of particles [n, 1] along `each` samples a step; `train` steps of the score before each."""
    generator = torch.Generator().manual_seed(1)
    x = start.clone().requires_grad_()
    conditions = Conditions([""] * (each * len(x)))
    for step in range(steps):
        if isinstance(loss, VariationalScoreDistillation):
            if loss.score.module is None:
                loss.train_score_encoded(x.reshape(-1, 1, 1, 1), Conditions([""] * len(x)))
            for _ in range(train - (loss.calls == "reused")):
                loss.train_score_encoded(x.repeat(each, 1).reshape(-1, 1, 1, 1), conditions, generator)
        value = loss.from_encoded(x.repeat(each, 1).reshape(-1, 1, 1, 1), conditions, step / steps, generator).loss
        (slope,) = torch.autograd.grad(value * len(x), x)
        decay = min(1.0, 4 * (1 - step / steps))  # the last quarter averages the sampling noise away
        x = (x - rate * decay * slope).detach().requires_grad_()
    return x.detach()


def start() -> torch.Tensor:
    return 0.7 * torch.randn(PARTICLES, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def truth() -> torch.Tensor:
    return TWO_MODES.sample(512, torch.Generator().manual_seed(7))


def test_the_two_sample_test_accepts_samples_and_rejects_what_is_not():
    accepted = 0
    for seed in range(20):
        drawn = TWO_MODES.sample(PARTICLES, torch.Generator().manual_seed(100 + seed))
        accepted += energy_distance(drawn, truth()) < permutation_threshold(drawn, truth())
    assert accepted >= 17  # 19 expected; fewer than 17 has a chance of 1.6 %, and the seeds are fixed
    wider = GaussianMixture([[-2.0], [2.0]], 1.2).sample(PARTICLES, torch.Generator().manual_seed(3))
    assert energy_distance(wider, truth()) > permutation_threshold(wider, truth())


def test_one_exact_particle_is_score_distillation():
    """eps_phi is then the drawn noise: (x_t - alpha x) / sigma, in fp64 to a few roundings of x / sigma."""
    count = 64
    generator = torch.Generator().manual_seed(0)
    prior = MixturePrior(GaussianMixture(torch.randn(5, 12, generator=generator), 0.3), (3, 2, 2))
    x = torch.randn(1, 3, 2, 2, dtype=torch.float64, generator=generator).expand(count, -1, -1, -1)
    noise = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    t = torch.linspace(0.02, 0.98, count, dtype=torch.float64)
    conditions = Conditions([""] * count)
    vsd = VariationalScoreDistillation(prior, ParticleScore(prior.schedule), 6.5)
    vsd.train_score_encoded(x[:1], conditions[:1])
    expected, _ = ScoreDistillation(prior, 6.5).gradient(x, t, noise, conditions)
    given, _ = vsd.gradient(x, t, noise, conditions)
    torch.testing.assert_close(given, expected, rtol=1e-12, atol=1e-12)
    vsd.train_score_encoded(torch.cat([x[:1], x[:1] + 1]), conditions[:2])
    other, _ = vsd.gradient(x, t, noise, conditions)
    assert float((other - expected).abs().max()) > 1e-2  # two particles are something else


def test_the_particle_score_is_the_gradient_of_the_log_density():
    generator = torch.Generator().manual_seed(0)
    particles, x_t = torch.randn(2, 7, 3, 1, 1, dtype=torch.float64, generator=generator)
    t = torch.linspace(0.1, 0.9, 7, dtype=torch.float64)
    schedule = NoiseSchedule.cosine()
    alpha, sigma = schedule.alpha_sigma(t)
    leaf = x_t.flatten(1).requires_grad_()
    squared = (leaf[:, None] - alpha[:, None, None] * particles.flatten(1)).square().sum(-1)
    (slope,) = torch.autograd.grad(torch.logsumexp(-squared / (2 * sigma[:, None] ** 2), 1).sum(), leaf)
    score = ParticleScore(schedule)
    score.observe(particles)
    expected = -sigma[:, None] * slope
    torch.testing.assert_close(score.predict_noise(x_t, t, Conditions([""] * 7)).flatten(1), expected)


# brentq on trapezoid sums, as in test_sds.py
@pytest.mark.parametrize(("weighting", "stationary"), [("uniform", 1.65493), ("sigma2", 1.01462)])
def test_particles_become_samples_and_score_distillation_does_not(weighting, stationary):
    vsd = VariationalScoreDistillation(PRIOR, ParticleScore(PRIOR.schedule), 0.0, weighting, RANGE)
    particles = evolve(vsd, start(), 150, 1.0)
    assert energy_distance(particles, truth()) < permutation_threshold(particles, truth())
    assert float(particles.abs().std()) == pytest.approx(0.5, abs=0.05)  # the spread within the modes

    modes = evolve(ScoreDistillation(PRIOR, 0.0, weighting, RANGE), start(), 200, 0.6)
    assert energy_distance(modes, truth()) > 2 * permutation_threshold(modes, truth())
    # they sit on the stationary point instead, where the expected gradient changes its sign, up to the steps' noise
    assert float(modes.abs().median()) == pytest.approx(stationary, abs=0.05)
    sides = torch.tensor([stationary - 0.05, stationary + 0.05])
    below, above = expected_gradient(TWO_MODES, sides, WEIGHTINGS[weighting], RANGE)
    assert below < 0 < above


class SmallScore:
    """eps(x_t, t) for numbers: what the learned score's rule can train in a second."""

    prediction_type = "epsilon"

    def __init__(self, schedule: NoiseSchedule, width: int = 64):
        torch.manual_seed(0)
        self.schedule = schedule
        self.module = torch.nn.Sequential(
            torch.nn.Linear(4, width), torch.nn.SiLU(), torch.nn.Linear(width, width), torch.nn.SiLU(),
            torch.nn.Linear(width, 1),
        ).double()

    def predict(self, x_t, t, conditions):
        alpha, sigma = (value.double() for value in self.schedule.alpha_sigma(t))
        seen = torch.stack([x_t.flatten(), alpha, sigma, x_t.flatten() * sigma], 1)
        return self.module(seen).reshape(x_t.shape)

    predict_noise = predict


def learned(calls: str = "separate") -> VariationalScoreDistillation:
    score = SmallScore(PRIOR.schedule)
    return VariationalScoreDistillation(PRIOR, score, 0.0, "uniform", RANGE, score_rate=1e-2, calls=calls)


@pytest.mark.parametrize("calls", ["separate", "reused"])
def test_a_learned_score_passes_too(calls):
    vsd = learned(calls)
    particles = evolve(vsd, start(), 200, 1.0, each=4, train=2)
    assert energy_distance(particles, truth()) < permutation_threshold(particles, truth())


def test_reused_calls_train_the_score_as_their_own_step_would():
    x = start()[:16].reshape(-1, 1, 1, 1)
    conditions = Conditions([""] * 16)
    separate, reused = learned(), learned("reused")
    before = copy.deepcopy(reused.score.module.state_dict())
    first = separate.from_encoded(x, conditions, generator=torch.Generator().manual_seed(3)).gradient
    second = reused.from_encoded(x, conditions, generator=torch.Generator().manual_seed(3)).gradient
    torch.testing.assert_close(first, second)  # the score before its step
    moved = [float((before[name] - value).abs().max()) for name, value in reused.score.module.state_dict().items()]
    assert all(step == pytest.approx(1e-2, rel=0.1) for step in moved)  # AdamW's first step
    torch.testing.assert_close(before, separate.score.module.state_dict(), rtol=0, atol=0)


def test_a_reused_call_leaves_the_graph_of_the_pictures_alone():
    vsd = learned("reused")
    vsd.score.prediction_type = "v_prediction"  # its target has the picture in it
    particles = start()[:4].reshape(-1, 1, 1, 1).clone().requires_grad_()
    found = vsd.from_encoded(2 * particles, Conditions([""] * 4), generator=torch.Generator().manual_seed(3))
    assert particles.grad is None
    found.loss.backward()
    torch.testing.assert_close(particles.grad, 2 * found.gradient.to(particles) / 4)


def test_resume_is_exact():
    def steps(vsd, x, generator, count):
        for _ in range(count):
            vsd.train_score_encoded(x, Conditions([""] * len(x)), generator)
            x = x - vsd.from_encoded(x, Conditions([""] * len(x)), generator=generator).gradient
        return x

    x = start()[:8].reshape(-1, 1, 1, 1)
    generator = torch.Generator().manual_seed(0)
    whole = learned()
    middle = steps(whole, x, generator, 3)
    saved = copy.deepcopy((
        {name: module.state_dict() for name, module in whole.modules.items()},
        {name: optimizer.state_dict() for name, optimizer in whole.optimizers.items()},
        generator.get_state(),
    ))
    end = steps(whole, middle, generator, 3)
    resumed = learned()
    for name, state in saved[0].items():
        resumed.modules[name].load_state_dict(state)
    for name, state in saved[1].items():
        resumed.optimizers[name].load_state_dict(state)
    generator.set_state(saved[2])
    assert torch.equal(steps(resumed, middle, generator, 3), end)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="calls: expected one of"):
        VariationalScoreDistillation(PRIOR, ParticleScore(PRIOR.schedule), calls="both")
    with pytest.raises(ValueError, match="calls: together needs a LoraPrior"):
        VariationalScoreDistillation(PRIOR, SmallScore(PRIOR.schedule), calls="together")
    with pytest.raises(ValueError, match="calls: reused needs a score that learns"):
        VariationalScoreDistillation(PRIOR, ParticleScore(PRIOR.schedule), calls="reused")
    with pytest.raises(ValueError, match="score: its noise schedule differs"):
        VariationalScoreDistillation(PRIOR, ParticleScore(NoiseSchedule.from_alphas_cumprod(torch.linspace(1, 0, 50))))
    with pytest.raises(RuntimeError, match="no particles yet"):
        VariationalScoreDistillation(PRIOR, ParticleScore(PRIOR.schedule)).from_encoded(
            torch.zeros(1, 1, 1, 1), Conditions([""]))
