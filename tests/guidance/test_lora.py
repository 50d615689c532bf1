"""A LoRA of a diffusion prior as the second score: small random U-Nets in the folder format."""

import copy

import pytest
import torch
from tiny_models import save_model

from text3d_fast.guidance import Conditions, DiffusionPrior, LoraPrior, TimeRange, VariationalScoreDistillation
from text3d_fast.guidance.distillation import draw

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "eps")


@pytest.fixture
def prior(folder):
    return DiffusionPrior.from_pretrained(folder)


def poses(count: int) -> torch.Tensor:
    return torch.eye(4) + 0.3 * torch.randn(count, 4, 4, generator=torch.Generator().manual_seed(3))


def sample(count: int = 3, pose: bool = True):
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(count, 4, 16, 16, generator=generator)
    t = torch.linspace(0.2, 0.8, count)
    return x_t, t, Conditions(["a red mug"] * count, pose=poses(count) if pose else None)


def shake(lora: LoraPrior, size: float = 0.3) -> None:
    """Random B and camera weights, as if trained."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in lora.module.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)


def test_starts_as_the_base_and_shares_its_weights(prior):
    lora = LoraPrior(prior)
    x_t, t, conditions = sample()
    with torch.no_grad():
        assert torch.equal(lora.predict_noise(x_t, t, conditions), prior.predict_noise(x_t, t, conditions))
    own = {parameter.data_ptr() for parameter in lora.module.parameters()}
    shared = {parameter.data_ptr() for parameter in prior.unet.parameters()}
    assert not own & shared
    assert {parameter.data_ptr() for parameter in lora._adapted.unet.parameters()} <= own | shared
    attention = sum(name.split(".")[-1] in ("to_q", "to_k", "to_v") for name, _ in prior.unet.named_modules())
    assert len(lora.module["layers"]) == attention * 4 // 3  # and the output projection
    assert all(layer["A"].out_features == 4 for layer in lora.module["layers"].values())


def test_only_the_adapters_learn_and_the_prior_stays(prior):
    lora = LoraPrior(prior)
    x_t, t, conditions = sample()
    before = prior.predict_noise(x_t, t, conditions)
    shake(lora)
    assert torch.equal(prior.predict_noise(x_t, t, conditions), before)
    lora.predict(x_t, t, conditions).square().mean().backward()
    assert all(parameter.grad is None for parameter in prior.unet.parameters())
    assert not any(parameter.requires_grad for parameter in prior.unet.parameters())
    assert all(parameter.grad.abs().max() > 0 for parameter in lora.module.parameters())


def test_an_adapted_projection_is_w_x_plus_b_a_x(prior):
    lora = LoraPrior(prior, rank=2)
    shake(lora)
    name = next(name for name in lora.module["layers"] if name.endswith("to_q"))
    layer = lora.module["layers"][name]
    x = torch.randn(2, 5, layer["A"].in_features)
    base = prior.unet.get_submodule(name.replace("/", "."))
    adapted = lora._adapted.unet.get_submodule(name.replace("/", "."))
    torch.testing.assert_close(adapted(x), base(x) + x @ layer["A"].weight.T @ layer["B"].weight.T)


def test_the_camera_acts_by_row_and_can_be_dropped(prior):
    lora = LoraPrior(prior)
    shake(lora)
    x_t, t, conditions = sample()
    with torch.no_grad():
        full = lora.predict(x_t, t, conditions)
        conditions.pose[1] = torch.nan
        partly = lora.predict(x_t, t, conditions)
        without = lora.predict(x_t, t, sample(pose=False)[2])
    torch.testing.assert_close(partly[[0, 2]], full[[0, 2]])
    torch.testing.assert_close(partly[1], without[1])
    assert float((full - without).abs().flatten(1).amax(1).min()) > 1e-3
    with pytest.raises(ValueError, match=r"pose: expected shape \[1, 4, 4\], got \[1, 16\]"):
        Conditions(["a"], pose=torch.zeros(1, 16))


def test_rows_that_are_not_adapted_are_the_bases(prior):
    lora = LoraPrior(prior)
    shake(lora)
    x_t, t, conditions = sample()
    rows = torch.tensor([False, True, False])
    with torch.no_grad():
        mixed = lora.predict_noise(x_t, t, conditions, rows)
        torch.testing.assert_close(mixed[~rows], prior.predict_noise(x_t, t, conditions)[~rows])
        torch.testing.assert_close(mixed[rows], lora.predict_noise(x_t, t, conditions)[rows])
        assert float((mixed[1] - prior.predict_noise(x_t, t, conditions)[1]).abs().max()) > 1e-3


@pytest.mark.parametrize("guidance", [0.0, 6.5])
def test_one_call_gives_what_separate_calls_give(prior, guidance):
    lora = LoraPrior(prior)
    shake(lora)
    x, _, conditions = sample()
    calls, negatives = [], {"a red mug": {"a blue mug": 0.5}}
    counted = lora._adapted.unet.register_forward_hook(lambda *_: calls.append("score"))
    base = prior.unet.register_forward_hook(lambda *_: calls.append("prior"))
    gradients = {}
    for mode in ("separate", "together"):
        vsd = VariationalScoreDistillation(prior, lora, guidance, calls=mode, score_prompt="a mug", perp_neg=negatives)
        gradients[mode] = vsd.from_encoded(x, conditions, generator=torch.Generator().manual_seed(1)).gradient
    counted.remove()
    base.remove()
    assert calls == ["prior", "score", "score"]
    # fp32 sums in another order, times the guidance: 1e-5 of the gradient's size
    scale = float(gradients["separate"].abs().max())
    torch.testing.assert_close(gradients["together"], gradients["separate"], rtol=1e-4, atol=1e-5 * scale)


def test_training_lowers_the_denoising_loss_and_resumes_exactly(prior):
    images = torch.rand(2, 32, 32, 3, generator=torch.Generator().manual_seed(2))
    conditions = Conditions(["a red mug"] * 2, pose=poses(2))

    def run(vsd, generator, steps):
        return [float(vsd.train_score(images, conditions, generator)) for _ in range(steps)]

    def new():
        return VariationalScoreDistillation(prior, LoraPrior(prior), score_rate=1e-2)

    generator = torch.Generator().manual_seed(0)
    whole = new()
    losses = run(whole, generator, 30)
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])
    saved = {"module": {k: v.clone() for k, v in whole.modules["score"].state_dict().items()},
             "optimizer": whole.optimizers["score"].state_dict(), "generator": generator.get_state()}
    saved = copy.deepcopy(saved)
    expected = run(whole, generator, 3)
    resumed = new()
    resumed.modules["score"].load_state_dict(saved["module"])
    resumed.optimizers["score"].load_state_dict(saved["optimizer"])
    generator.set_state(saved["generator"])
    assert run(resumed, generator, 3) == expected


def test_the_update_follows_the_gradient_of_the_mean_square_error(prior):
    lora, same = LoraPrior(prior), LoraPrior(prior)
    shake(lora, 0.1), shake(same, 0.1)
    x, _, conditions = sample()
    vsd = VariationalScoreDistillation(prior, lora, pose_dropout=0.0)
    loss = vsd.train_score_encoded(x, conditions, torch.Generator().manual_seed(0))
    t, noise = draw(x, prior.schedule, TimeRange(0.0, 1.0), 0.0, torch.Generator().manual_seed(0))
    expected = (same.predict(prior.schedule.add_noise(x, noise, t), t, conditions) - noise).square().mean()
    expected.backward()
    assert float(loss) == float(expected.detach())
    for given, truth in zip(lora.module.parameters(), same.module.parameters(), strict=True):
        torch.testing.assert_close(given.grad, truth.grad, rtol=1e-4, atol=1e-5 * float(truth.grad.abs().max()))


def test_pose_dropout_drops_that_share(prior):
    lora = LoraPrior(prior)
    seen = []
    lora.module["camera"].register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    vsd = VariationalScoreDistillation(prior, lora, pose_dropout=0.5)
    x, _, conditions = sample(40)
    vsd.train_score_encoded(x, conditions, torch.Generator().manual_seed(0))
    assert 10 < int((seen[0] == 0).all(1).sum()) < 30  # a dropped pose is a row of zeros, whose output is masked
    assert bool(conditions.pose.isfinite().all())  # the caller's is left alone


def test_a_half_precision_base_keeps_fp32_adapters(folder):
    prior = DiffusionPrior.from_pretrained(folder, dtype=torch.bfloat16)
    lora = LoraPrior(prior)
    assert {parameter.dtype for parameter in lora.module.parameters()} == {torch.float32}
    vsd = VariationalScoreDistillation(prior, lora, 6.5, calls="together", score_rate=1e-3)
    x, _, conditions = sample()
    for _ in range(2):
        loss = vsd.train_score_encoded(x, conditions, torch.Generator().manual_seed(0))
        result = vsd.from_encoded(x, conditions, generator=torch.Generator().manual_seed(0))
    assert bool(loss.isfinite()) and int(result.skipped) == 0 and result.gradient.dtype == torch.float32
    assert all(bool(layer["B"].weight.any()) for layer in lora.module["layers"].values())


def test_an_eps_prior_beside_a_lora_that_predicts_v(prior, tmp_path):
    other = DiffusionPrior.from_pretrained(save_model(tmp_path / "v", prediction_type="v_prediction"))
    lora = LoraPrior(other)
    x, _, conditions = sample()
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    t = torch.tensor([0.2, 0.5, 0.9])
    vsd = VariationalScoreDistillation(prior, lora, 0.0, "uniform")
    gradient, _ = vsd.gradient(x, t, noise, conditions)
    alpha, sigma = (value[:, None, None, None] for value in prior.schedule.alpha_sigma(t))
    x_t = alpha * x + sigma * noise
    with torch.no_grad():
        velocity = lora.predict(x_t, t, conditions)
        expected = prior.predict(x_t, t, conditions) - (alpha * velocity + sigma * x_t)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="together needs a LoraPrior of the prior itself"):
        VariationalScoreDistillation(prior, lora, calls="together")
    # a perfect v network has no loss: alpha eps - sigma x is what it is trained on
    target = prior.schedule.target(x, noise, t, "v_prediction")
    torch.testing.assert_close(prior.schedule.to_noise(target, x_t, t, "v_prediction"), noise, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(prior.schedule.to_sample(target, x_t, t, "v_prediction"), x, rtol=1e-4, atol=1e-5)
