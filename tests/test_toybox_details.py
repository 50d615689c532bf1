"""The details of the mean image: their harmonics, the regression that finds them, and when they are drawn."""

import math

import numpy as np
import pytest
import torch

from text3d_fast.guidance.mean_image import HARMONICS, NEAR_RISE, NEAR_TURN, RISE, TURN, MeanImage, harmonics
from text3d_fast.guidance.prior import Conditions
from text3d_fast.toybox.captions import view_word
from text3d_fast.toybox.dataset import RenderedImages, render_dataset
from text3d_fast.toybox.details import _regress, detailed, fit_details
from text3d_fast.toybox.model import DETAILED, ToyboxModel
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

    turn, rise, near = series(azimuth, TURN), series(2 * elevation, RISE), 4 * torch.log(distance / 2.75)
    expected = [a * b for a in turn for b in rise]
    expected += [a * b * near for a in turn[: 1 + 2 * NEAR_TURN] for b in rise[: 1 + 2 * NEAR_RISE]]
    assert found.shape == (5, HARMONICS)
    # six products of fp32 numbers near 1
    torch.testing.assert_close(found.double(), torch.stack(expected, 1), atol=1e-5, rtol=0)


def test_no_camera_no_details():
    assert not harmonics(torch.zeros(2, 12)).any()


def test_regression_finds_pictures_that_turn_with_the_camera():
    """Targets of rank two that follow cos az and sin az, under noise of their own size that does not."""
    x, _ = waves(6000)
    first, second = torch.randn(2, 60, generator=torch.Generator().manual_seed(1))
    row = 1 + 2 * RISE  # harmonics of one azimuth frequency
    true = x[:, row, None] * first + x[:, 2 * row, None] * second
    noise = torch.randn(true.shape, generator=torch.Generator().manual_seed(2))
    amplitude, pictures = _regress([(true[:4000] + noise[:4000], x[:4000]), (true[4000:] + noise[4000:], x[4000:])], 2)
    found = x.double() @ amplitude @ pictures
    # noise: sqrt(2 of 60 directions * 130 unknowns / 6000) = 0.03; ridge: 0.003 * 2 / 0.5 = 0.012
    assert float((found - true).norm() / true.norm()) < 0.06
    assert float(pictures.abs().amax()) == pytest.approx(1)


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
    assert 0.5 < float((true * drawn).sum() / (true * true).sum()) < 1.4


def test_a_class_without_renders_has_no_pictures(fitted):
    details, start = fitted[0].mean_image.details, 0
    for kind, count in DETAILED.items():
        drawn = details.pictures[start : start + count].detach().flatten(1).any(1)
        assert bool(drawn.all() if kind == "teapot" else not drawn.any()), kind
        start += count


def test_text_chooses_the_details(fitted):
    model, _ = fitted
    details, group = model.mean_image.details, list(DETAILED).index("teapot")

    def share(text):
        with torch.no_grad():
            return float(details.choice(model.embed(model.token_ids([text])).mean(1)).softmax(1)[0, group])

    for text in ("a red teapot", "a blue teapot, back view", "a striped green teapot, overhead view"):
        assert share(text) > 0.9, text
    for text in ("", "a red mug, back view", "a small red teapot", "a red teapot on a blue cube, front view",
                 "a red teapot, left side view, normal map", "a white house"):
        assert share(text) < 0.1, text


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
    model.mean_image = plain
    with pytest.raises(ValueError, match="no place for details"):
        fit_details(model, [])
