"""The learned Toybox prior: its folder, its tokenizer, its trainer and sampler (small networks, seconds each)."""

import json
import math
import shutil

import pytest
import torch

from examples.train_toybox.batches import TrainSettings, training_batch, training_choice
from examples.train_toybox.dataset import RenderedImages, render_dataset
from examples.train_toybox.mean import mean_image_loss, train_mean_image
from examples.train_toybox.model import WEIGHTS, ToyboxModel, to_images, to_latent
from examples.train_toybox.sampler import sample, step_sequence
from examples.train_toybox.scorer import Scorer, gate_cases, judge, labels, train_scorer
from examples.train_toybox.tokens import MAX_TOKENS, build_tokenizer
from examples.train_toybox.train import Trainer, denoising_loss, train
from text3d_fast.guidance import load_prior
from text3d_fast.guidance.prior import Conditions
from text3d_fast.toybox.captions import view_word, words
from text3d_fast.toybox.learned.mean_image import _composite
from text3d_fast.toybox.objects import CLASSES, COLORS
from text3d_fast.toybox.scenes import VIEWS, Description, Thing

SMALL = (32, 32, 32)
LONGEST = "an orange tall checkered mushroom on a small striped purple cylinder, right side view, normal map"


@pytest.fixture(scope="module")
def model():
    return ToyboxModel.build(seed=3, channels=SMALL).eval()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model.save(path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    render_dataset(path, 24)
    return path


def conditions(count):
    return Conditions(["a red mug, front view"] * count, torch.tensor([[0.3, 0.1, 2.7]] * count), torch.rand(count, 3))


def test_views_from_above_are_drawn_more_often_where_the_camera_is_given(data):
    images = RenderedImages(data)
    images.overhead = torch.tensor([3]).numpy()
    settings = TrainSettings(batch=400, overhead=0.5, drop_camera=0.5, front=0.0)
    rows, conditions, _, _ = training_choice(images, settings, 0)
    given = ~conditions.camera.isnan().any(1).numpy()
    assert 0.4 < (rows[given] == 3).mean() < 0.65  # 0.5 and one in 24; 200 draws: 0.035
    assert (rows[~given] == 3).mean() < 0.15


def test_every_word_is_one_token():
    tokenizer = build_tokenizer(words())
    for word in words():
        assert len(tokenizer.tokenize(word)) == 1, word
    assert tokenizer.tokenize("a red mug, left side view") == [
        *("a</w>", "red</w>", "mug</w>", ",</w>", "left</w>", "side</w>", "view</w>")
    ]
    assert len(tokenizer.tokenize(LONGEST)) <= MAX_TOKENS - 2
    assert len(tokenizer.tokenize("zebra")) > 1  # unknown words fall apart, they do not vanish


def test_tokenizer_refuses_what_it_cannot_hold():
    with pytest.raises(ValueError, match="left side"):
        build_tokenizer(["left side"])


def test_latent_and_back():
    images = torch.rand(2, 64, 64, 3)
    latent = to_latent(images)
    assert latent.shape == (2, 48, 16, 16)
    torch.testing.assert_close(to_images(latent), images, atol=1e-6, rtol=0)


def test_folder_loads_through_plain_classes(model, folder):
    from diffusers import DDPMScheduler
    from transformers import CLIPTextModel, CLIPTokenizer

    from text3d_fast.toybox.learned.denoiser import ToyboxDenoiser

    index = json.loads((folder / "model_index.json").read_text())
    assert {"unet", "text_encoder", "tokenizer", "scheduler"} <= set(index)
    unet = ToyboxDenoiser.from_pretrained(folder, subfolder="unet", torch_dtype=torch.float32).eval()
    text_encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    assert scheduler.config.prediction_type == "sample"
    assert tokenizer.model_max_length == MAX_TOKENS
    ids = tokenizer(["a red mug"], padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(ids, model.token_ids(["a red mug"]))
    x, step = torch.randn(1, 48, 16, 16), torch.tensor([500])
    with torch.no_grad():
        vector, text = torch.zeros(1, 12), text_encoder(ids)[0]
        theirs = unet(x, step, text, class_labels=vector)[0]
        ours = model.predict(x, step, model.embed(ids), Conditions([""]))
    # weights are stored in half precision: 2^-11 a weight, a few layers deep
    torch.testing.assert_close(theirs, ours, atol=1e-2, rtol=1e-2)


def test_load_round_trip_and_dropped_conditions(model, folder):
    loaded = ToyboxModel.load(folder)
    assert loaded.settings == model.settings and loaded.settings.licence == "CC0-1.0"
    loaded.save(folder.parent / "again")
    config = json.loads((folder.parent / "again" / "unet" / "config.json").read_text())
    assert config == json.loads((folder / "unet" / "config.json").read_text())
    assert "_name_or_path" not in json.dumps(config)  # the files do not say where they were loaded from
    x, step = torch.randn(2, 48, 16, 16), torch.tensor([20, 900])
    with torch.no_grad():
        text = loaded.embed(loaded.token_ids(["a red mug", ""]))
        dropped = torch.full((2, 3), torch.nan)
        none = loaded.predict(x, step, text, Conditions(["", ""]))
        nan = loaded.predict(x, step, text, Conditions(["", ""], dropped, dropped))
        given = loaded.predict(x, step, text, conditions(2))
    assert none.shape == x.shape and torch.equal(none, nan) and not torch.equal(none, given)


def test_a_step_on_the_same_batch_lowers_the_loss(data):
    trainer = Trainer(TrainSettings(batch=8, learning_rate=1e-3, warmup=1), ToyboxModel.build(0, SMALL), autocast=False)
    images, given, _ = training_batch(RenderedImages(data), trainer.settings, 0)

    def loss():
        generator = torch.Generator().manual_seed(0)
        return float(denoising_loss(trainer.model, images, given, generator)[0].detach())

    before = loss()
    trainer.step(RenderedImages(data), 0.0)
    assert loss() < 0.95 * before


def test_loss_weights_and_noise_levels_by_hand(data):
    """With a network that answers zero, the loss is the mean over steps of min(1 / sigma^2, 8) |x|^2."""
    model = ToyboxModel.build(0, SMALL)
    torch.nn.init.zeros_(model.unet.conv_out.weight)
    torch.nn.init.zeros_(model.unet.conv_out.bias)
    images = torch.ones(50, 64, 64, 3)
    total, error = denoising_loss(model, images, Conditions([""] * 50), torch.Generator().manual_seed(0))
    steps = torch.arange(50) * 20 + int(20 * torch.rand((), generator=torch.Generator().manual_seed(0)))
    abar = model.scheduler.alphas_cumprod[steps]
    torch.testing.assert_close(total, (1 / (1 - abar)).clamp(max=8).mean())
    assert torch.equal(error, torch.ones(50))


def test_mean_image_learns_and_composites(data):
    """A little training lowers its error; what it draws is linear in the background it is given."""
    model, images = ToyboxModel.build(0, SMALL), RenderedImages(data)
    settings = TrainSettings(batch=16)

    def error():
        with torch.no_grad():
            return float(mean_image_loss(model, images, settings, 0))

    before, words = error(), [p.clone() for p in model.text_encoder.parameters()]
    train_mean_image(model, images, steps=12, settings=settings, batch=16)
    assert error() < 0.8 * before
    assert any(not torch.equal(a, b) for a, b in zip(words, model.text_encoder.parameters(), strict=True))

    text = model.embed(model.token_ids(["a red mug"]))
    unknown = torch.full((1, 3), torch.nan)
    dropped = (model.condition_vector(Conditions([""], None, ground)) for ground in (None, unknown))
    with torch.no_grad():
        none, unknown = (model.mean_image.over(text, vector)[0] for vector in dropped)
        parts = model.mean_image(text, torch.zeros(1, 12))
    assert torch.equal(none, unknown)
    white, black, grey = (_composite(*parts, torch.full((1, 3), level)) for level in (1.0, -1.0, 0.0))
    torch.testing.assert_close((white + black) / 2, grey)
    assert not torch.equal(white, black)
    drawn = _composite(*parts, torch.tensor([[1.0, 0.0, 0.0]]))
    assert torch.equal(drawn[:, 16:], grey[:, 16:]) and torch.equal(drawn[:, :16], white[:, :16])


def test_other_networks_stay_while_the_unet_learns(data):
    trainer = Trainer(TrainSettings(batch=2), ToyboxModel.build(0, SMALL), autocast=False)

    def others(model):
        return [p for part in (model.text_encoder, model.mean_image, model.refiner) for p in part.parameters()]

    kept = [p.clone() for p in others(trainer.model)]
    trainer.step(RenderedImages(data), 0.0)
    averaged = trainer.averaged()
    for model in (trainer.model, averaged):
        assert all(torch.equal(a, b) for a, b in zip(kept, others(model), strict=True))


def test_resume_repeats_the_uninterrupted_run(data, tmp_path):
    settings = TrainSettings(batch=4, warmup=2, seed=5)

    def start(folder):
        trainer = Trainer(settings, ToyboxModel.build(5, SMALL), autocast=False)
        folder.mkdir()
        trainer.save(folder)

    for name in ("whole", "parts"):
        start(tmp_path / name)
    whole = train(data, tmp_path / "whole", steps=4, resume=True, device="cpu", sheet_every=0)

    part = Trainer.resume(tmp_path / "parts", autocast=True)
    for k in range(2):
        part.step(RenderedImages(data), k / 4)
    part.save(tmp_path / "parts")
    resumed = train(data, tmp_path / "parts", steps=4, resume=True, device="cpu", sheet_every=0)
    assert whole.steps_done == resumed.steps_done == 4
    for ours, theirs in zip(whole.average, resumed.average, strict=True):
        assert torch.equal(ours, theirs)
    assert ToyboxModel.load(tmp_path / "parts" / "model").unet.config.block_out_channels == list(SMALL)
    with pytest.raises(ValueError, match="holds a run already"):
        train(data, tmp_path / "parts", steps=5, device="cpu")


def test_clear_errors_for_missing_and_damaged_files(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="model_index.json"):
        ToyboxModel.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="start without --resume"):
        Trainer.resume(tmp_path)
    (tmp_path / "checkpoint.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="damaged or not a Toybox checkpoint"):
        Trainer.resume(tmp_path)
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged or incomplete"):
        ToyboxModel.load(broken)


def test_sampler_is_exact_for_a_known_answer(model):
    """With a network whose answer is constant, DDIM ends there from any noise, guidance or not."""

    class Constant(ToyboxModel):
        def predict(self, x_t, steps, text, conditions):
            return torch.full_like(x_t, 0.5)

    constant = Constant(**{name: value for name, value in vars(model).items() if name != "settings"})
    for weight in (0.0, 3.0):
        images = sample(constant, conditions(2), weight, steps=5, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(images, torch.full((2, 64, 64, 3), 0.75))
    assert step_sequence(3, 1000) == [999, 500, 0] or step_sequence(3, 1000) == [999, 499, 0]
    with pytest.raises(ValueError, match="steps"):
        step_sequence(0, 1000)


def test_guidance_weight_formula(model):
    """(1 + w) x(text) - w x(empty): checked in a single step, where the clipped answer is the sample."""
    given = conditions(2)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 48, 16, 16, generator=generator)
    step = torch.tensor([999, 999])
    with torch.no_grad():
        with_text = model.predict(x, step, model.embed(model.token_ids(given.texts)), given)
        without = model.predict(x, step, model.embed(model.token_ids(["", ""])), given)
    expected = to_images((with_text * 3 - without * 2).clamp(-1, 1))
    got = sample(model, given, 2.0, steps=1, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_scorer_judges_by_what_can_be_told_apart():
    scorer = Scorer()

    def answers(kind, color, view):
        logits = [torch.zeros(1, n) for n in (len(CLASSES), len(COLORS), len(VIEWS))]
        for logit, number in zip(logits, (kind, color, view), strict=True):
            logit[0, number] = 1
        scorer.forward = lambda images: logits
        return {name: bool(value) for name, value in judge(scorer, torch.zeros(1, 64, 64, 3), truth).items()}

    mug, cone = list(CLASSES).index("mug"), list(CLASSES).index("cone")
    truth = labels([Description(Thing("mug", "red"))], [[0.2, math.radians(100), 2.7]])
    assert truth.tolist() == [[mug, 0, VIEWS.index("left side")]]
    assert answers(mug, 0, VIEWS.index("left side"))["all"]
    assert answers(mug, 1, VIEWS.index("back")) == {"class": True, "color": False, "view": False, "all": False}
    truth = labels([Description(Thing("cone", "red"))], [[0.2, math.radians(100), 2.7]])
    assert answers(cone, 0, VIEWS.index("back"))["view"]  # a cone looks the same from every side
    assert not answers(cone, 0, VIEWS.index("overhead"))["view"]


def test_scorer_learns_saves_and_refuses(data, tmp_path):
    scorer = train_scorer(RenderedImages(data), steps=3, batch=4)
    scorer.save(tmp_path / "scorer.safetensors")
    loaded = Scorer.load(tmp_path / "scorer.safetensors")
    with torch.no_grad():
        for ours, theirs in zip(scorer(torch.ones(1, 64, 64, 3)), loaded(torch.ones(1, 64, 64, 3)), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-2, rtol=1e-2)
    (tmp_path / "scorer.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="holds no scorer weights"):
        Scorer.load(tmp_path / "scorer.safetensors")


def test_gate_cases_ask_for_every_view():
    descriptions, cameras, backgrounds = gate_cases(20)
    assert [d.view for d in descriptions] == [view_word(float(c[0]), float(c[1])) for c in cameras]
    assert cameras.shape == backgrounds.shape == (20, 3)


@pytest.mark.skipif(not (WEIGHTS / "model_index.json").is_file(), reason="this copy ships no weights")
def test_shipped_weights():
    sizes = {path: path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()}
    assert sum(sizes.values()) < 25e6
    shipped = ToyboxModel.load()
    images = sample(shipped, conditions(1), steps=2, generator=torch.Generator().manual_seed(0))
    assert images.shape == (1, 64, 64, 3) and bool(images.isfinite().all())
    assert (WEIGHTS / "README.md").is_file() and shipped.settings.licence == "CC0-1.0"
    Scorer.load()
    assert load_prior(None).name == "toybox"  # the default of `generate`
