"""The details of the mean image: their harmonics, the regression that finds them, and when they are drawn."""

import math

import numpy as np
import pytest
import torch

from examples.train_toybox.dataset import RenderedImages, render_dataset
from examples.train_toybox.details import _regress, detailed, fit_details
from examples.train_toybox.model import DETAILED, ToyboxModel
from text3d_fast.guidance.prior import Conditions
from text3d_fast.toybox.captions import view_word
from text3d_fast.toybox.learned.mean_image import HARMONICS, NEAR, RISE, TURN, MeanImage, harmonics, nearness, zoomed
from text3d_fast.toybox.objects import COLORS
from text3d_fast.toybox.scenes import Description, Thing, random_description

SMALL = (32, 32, 32)


def waves(count, seed=0):
    """Harmonics of random cameras, and those cameras."""
    generator = torch.Generator().manual_seed(seed)
    low, span = torch.tensor([-0.2, 0.0, 2.4]), torch.tensor([1.3, 2 * math.pi, 0.6])
    camera = low + span * torch.rand(count, 3, generator=generator)
    model = ToyboxModel.build(0, SMALL)
    return harmonics(model.condition_vector(Conditions([""] * count, camera))), camera


def test_harmonics_against_the_formula():
    found, camera = waves(5)
    elevation, azimuth, distance = camera.double().unbind(1)

    def series(angle, count):
        return [angle * 0 + 1, *(f(k * angle) for k in range(1, count + 1) for f in (torch.cos, torch.sin))]

    turn, rise = series(azimuth, TURN), series(2 * elevation, RISE)
    expected = [a * b for a in turn for b in rise]
    assert found.shape == (5, HARMONICS)
    # eight products of fp32 numbers near 1
    torch.testing.assert_close(found.double(), torch.stack(expected, 1), atol=1e-5, rtol=0)


def test_zoomed_and_nearness():
    """Sizes on the image go with 1 / distance; enlarging a ramp by two leaves half of its range."""
    camera = torch.tensor([[0, 0, 2.75], [0, 0, 5.5]])
    vector = ToyboxModel.build(0, SMALL).condition_vector(Conditions([""] * 2, camera))
    torch.testing.assert_close(nearness(vector), torch.tensor([NEAR, NEAR / 2]))
    ramp = ((torch.arange(64) + 0.5) / 32 - 1).expand(2, 1, 64, 64)
    near, far = zoomed(ramp, torch.tensor([2.0, 0.5]), 48)
    at = (torch.arange(48) + 0.5) / 24 - 1
    torch.testing.assert_close(near[0, 7], at / 2)
    # outside the image there is nothing; the pixels at its edge are half inside
    torch.testing.assert_close(far[0, 24], torch.where(at.abs() < 0.5, 2 * at, 0.0))


def test_no_camera_no_details():
    assert not harmonics(torch.zeros(2, 12)).any()


def test_regression_finds_pictures_that_turn_with_the_camera():
    """Two pictures that follow cos az and sin az, the second in one colour only, under noise of their own size."""
    x, _ = waves(12000)
    colors = torch.arange(len(x)) % 2
    first, second = torch.randn(2, 60, generator=torch.Generator().manual_seed(1))
    row = 1 + 2 * RISE  # harmonics of one azimuth frequency
    true = x[:, row, None] * first + colors[:, None] * x[:, 2 * row, None] * second
    seen = true + torch.randn(true.shape, generator=torch.Generator().manual_seed(2))
    half = slice(0, 6000), slice(6000, None)
    amplitude, pictures = _regress([(seen[h], x[h], colors[h]) for h in half], 2)
    assert pictures.dtype == torch.int8 and int(pictures.abs().amax()) == 127
    answers = (amplitude @ pictures.double()) / 127
    found = torch.einsum("nh,nhp->np", x.double(), answers[colors])
    # noise: sqrt(2 of 60 directions * 119 unknowns / 6000 a colour) = 0.03; ridge: 0.001 * 2 / 0.5; bytes: 1 / 254
    assert float((found - true).norm() / true.norm()) < 0.06
    # a colour that was never seen has what the two have in common: the smallest parts and whole that explain both
    expected = x.double() @ (answers[0] + answers[1]) / 3
    assert float((x.double() @ answers[7] - expected).norm() / expected.norm()) < 0.1


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A model with an untrained mean image, teapots, and its details solved from them."""
    folder = tmp_path_factory.mktemp("teapots")
    render_dataset(folder, 256, front=0.25, two_objects=0.0, textureless=0.0, normal=0.0, kinds=("teapot",))
    model, data = ToyboxModel.build(0, SMALL).eval(), RenderedImages(folder)
    assert {d.thing.kind for d in data.descriptions} == {"teapot"}
    fit_details(model, [data])
    return model, data


def test_details_tell_the_sides_apart(fitted):
    """The drawn difference of front and back, projected on that of the renders (spout and handle change places)."""
    model, data = fitted
    words = np.array([view_word(float(c[0]), float(c[1])) for c in data.camera])
    true, drawn = [], []
    for word in ("front", "back"):
        rows = (words == word).nonzero()[0]
        texts, camera = ["a red teapot"] * len(rows), torch.from_numpy(data.camera[rows])
        vector = model.condition_vector(Conditions(texts, camera))
        with torch.no_grad():
            drawn.append(model.mean_image.details(model.embed(model.token_ids(texts)), vector)[:, 3].mean(0))
        true.append(1 - torch.from_numpy(data.images(rows)[..., 3]).float().mean(0) / 255)
    true, drawn = true[0] - true[1], drawn[0] - drawn[1]
    # 32 renders of a colour, so the ridge takes much of it
    assert 0.3 < float((true * drawn).sum() / (true * true).sum()) < 1.2


def test_a_class_without_renders_has_no_pictures(fitted):
    details, start = fitted[0].mean_image.details, 0
    for kind, count in DETAILED.items():
        drawn = details.pictures[start : start + count].detach().flatten(1).any(1)
        assert bool(drawn.all() if kind == "teapot" else not drawn.any()), kind
        start += count


def test_text_chooses_the_details(fitted):
    model, _ = fitted
    details, group = model.mean_image.details, list(DETAILED).index("teapot")

    @torch.no_grad()
    def share(layer, text):
        return layer(model.embed(model.token_ids([text])).mean(1)).softmax(1)[0]

    for color, text in (
        ("red", "a red teapot"), ("blue", "a blue teapot, back view"), ("green", "a striped green teapot")
    ):
        assert float(share(details.choice, text)[group]) > 0.9, text
        assert float(share(details.color, text)[list(COLORS).index(color)]) > 0.9, text
    for text in ("", "a red mug, back view", "a small red teapot", "a red teapot on a blue cube, front view",
                 "a red teapot, left side view, normal map", "a white house"):
        assert float(share(details.choice, text)[group]) < 0.1, text


def test_bytes_survive_a_file(fitted, tmp_path):
    model, _ = fitted
    model.save(tmp_path, torch.float32)
    details, loaded = model.mean_image.details, ToyboxModel.load(tmp_path).mean_image.details
    assert loaded.pictures.dtype == torch.int8 and loaded.pictures.any()
    text, vector = torch.randn(2, 5, 96), torch.tensor([[1.0, 0.5, 0.8, 0.6, 0.8, 0, 0, 0.2]]).expand(2, -1)
    with torch.no_grad():
        torch.testing.assert_close(loaded(text, vector), details(text, vector), atol=0, rtol=0)


def test_datasets_of_chosen_classes(tmp_path):
    """The same call goes on where it stopped; a class that does not exist is named."""
    for _ in range(2):
        render_dataset(tmp_path, 2, kinds=("ball", "cube"))
    assert {d.thing.kind for d in RenderedImages(tmp_path).descriptions} <= {"ball", "cube"}
    with pytest.raises(ValueError, match="kinds: expected some of ball, .*, got zebra"):
        random_description(kinds=("zebra",))


def test_which_images_have_details():
    snowman = Thing("snowman", "red")
    assert detailed(Description(snowman)) and detailed(Description(Thing("clock", "red", "striped"), view="back"))
    for other in (Description(Thing("mug", "red")), Description(snowman, Thing("cube", "blue")),
                  Description(snowman, style="normal map"), Description(Thing("snowman", "red", size="small"))):
        assert not detailed(other)


def test_a_mean_image_without_details():
    plain = MeanImage()
    assert plain.details is None
    model = ToyboxModel.build(0, SMALL)
    model.denoiser.mean_image = plain
    with pytest.raises(ValueError, match="no place for details"):
        fit_details(model, [])
