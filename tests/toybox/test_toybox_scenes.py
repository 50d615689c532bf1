import json
import math

import numpy as np
import pytest
import torch

from examples.train_toybox import dataset
from text3d_fast.toybox import captions, render, scenes
from text3d_fast.toybox.objects import CLASSES, COLORS


@pytest.fixture(autouse=True)
def one_thread():
    """Small operations: threads that wait for one another only cost time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", CLASSES)
def test_every_class_fits_and_shows_its_color(kind):
    generator = _generator(1)
    color = captions.DEFAULT_COLORS[kind]
    description = captions.parse(f"a {color} {kind}")
    scene = scenes.build_scene(description, scenes.sample_parameters(description, generator))
    elevation, azimuth = torch.tensor([0.3, 0.3, 0.9]), torch.tensor([0.0, 2.0, 4.0])
    surface = render.trace(scene, elevation, azimuth, torch.full((3,), 2.7), size=32)
    assert surface.positions.norm(dim=-1).max() < scenes.SCENE_RADIUS
    assert scene.sdf(surface.positions).abs().max() < 4e-3  # three hit thresholds and the last step
    own = (surface.albedo - torch.tensor(COLORS[color])).abs().sum(-1) < 1e-3
    assert own.float().mean() > 0.2
    # the outside of the ball is empty
    far = torch.nn.functional.normalize(torch.randn(500, 3, generator=generator), dim=-1) * scenes.SCENE_RADIUS
    assert scene.sdf(far).min() > 0


@pytest.mark.parametrize("prompt", ["a red mug", "a tall green tree", "a teapot on a black table", "a bowl"])
def test_distances_are_safe_for_sphere_tracing(prompt):
    # |sdf(p) - sdf(q)| <= |p - q|, with 6 % for ellipsoids, whose distance is of first order
    scene = scenes.build_scene(captions.parse(prompt))
    p = torch.rand(20_000, 3, generator=_generator()) * 1.6 - 0.8
    q = p + 0.02 * torch.randn(20_000, 3, generator=_generator(1))
    slope = (scene.sdf(p) - scene.sdf(q)).abs() / (p - q).norm(dim=-1)
    near = scene.sdf(p).abs() < 0.3
    assert slope[near].quantile(0.999) < 1.06


def test_left_is_plus_x_and_front_plus_z():
    # the mug's handle is on its own left (+X): at the right of the front view, hidden from the right side
    scene = scenes.build_scene(captions.parse("a red mug"))
    azimuth = torch.tensor([0.0, 90.0, 180.0, 270.0]).deg2rad()
    alpha = render.render(scene, torch.zeros(4), azimuth, torch.full((4,), 2.7))[..., 3]
    column = (alpha * torch.arange(64)).sum((1, 2)) / alpha.sum((1, 2)) - 31.5
    edge = [(a.sum(0) > 0).nonzero()[:, 0] for a in alpha]
    thin = [(a[:, int(e.max()) - 4].sum() < a[:, int(e.min()) + 4].sum()) for a, e in zip(alpha, edge, strict=True)]
    assert bool(thin[0]) and not bool(thin[2])
    assert column[1].abs() < 0.2 and column[3].abs() < 0.2
    # the snowman's nose points to +Z: only the front view shows orange
    snowman = scenes.build_scene(captions.parse("a white snowman"))
    rgb = render.render(snowman, torch.zeros(4), azimuth, torch.full((4,), 2.7))
    orange = ((rgb[..., 0] > 1.8 * rgb[..., 2]) & (rgb[..., 3] > 0.9)).sum((1, 2))
    assert orange[0] > 2 and orange[2] == 0
    ahead = torch.tensor([[0.0, 0.0, 0.79]])
    assert snowman.sdf(ahead) < snowman.sdf(-ahead)


def test_render_of_a_ball_is_the_analytic_disc():
    scene = scenes.build_scene(captions.parse("a red ball"), {"scene": {"fill": 1.0}, "thing": {"height": 1.0}})
    radius = float(-scene.sdf(torch.zeros(1, 3)))
    image = render.render(scene, torch.tensor([0.4]), torch.tensor([1.0]), torch.tensor([2.7]), supersample=4)
    # the silhouette of a ball is a cone of half angle asin(r / d)
    disc = math.tan(math.asin(radius / 2.7)) / math.tan(math.radians(20)) * 32
    assert float(image[..., 3].sum()) == pytest.approx(math.pi * disc**2, rel=7e-3)  # hits up to 2.4e-3 off the surface
    normal = render.render(scene, torch.zeros(1), torch.zeros(1), torch.tensor([2.7]), size=64, style="normal map")[
        0, 31:33, 31:33, :3
    ].mean((0, 1))
    assert torch.allclose(normal, torch.tensor([0.5, 0.5, 1.0]), atol=0.01)


def test_shading_is_the_formula():
    scene = scenes.build_scene(captions.parse("a green cube"))
    surface = render.trace(scene, torch.zeros(1), torch.zeros(1), torch.tensor([2.7]))
    light = render.Light(
        torch.tensor([[0.5, 1.0, 2.0]]), torch.tensor([[0.7, 0.6, 0.5]]), torch.tensor([[0.2, 0.3, 0.1]])
    )
    image = render.shade(surface, light)[0]
    point = surface.positions[surface.positions[:, :2].norm(dim=-1).argmin()]
    toward = torch.nn.functional.normalize(light.position[0] - point, dim=-1)
    expected = torch.tensor(COLORS["green"]) * (light.color[0] * toward[2] + light.ambient[0])
    assert torch.allclose(image[31:33, 31:33, :3].mean((0, 1)), expected, atol=0.01)


def test_mesh_is_closed_and_faces_outwards():
    import trimesh

    vertices, faces = scenes.build_scene(captions.parse("a red mug")).mesh(64)
    mesh = trimesh.Trimesh(vertices.numpy(), faces.numpy(), process=True)
    assert mesh.is_watertight and mesh.volume > 0
    assert mesh.euler_number == 0  # the handle is one hole


def test_captions_round_trip():
    generator = _generator(3)
    for _ in range(200):
        description = scenes.random_description(generator)
        text = captions.training_caption(description, 0.3, 2.0, generator)
        back = captions.parse(text)
        assert captions.caption(back) == text
        assert back.things == description.things and back.style == description.style
        assert scenes.Description.from_dict(json.loads(json.dumps(description.to_dict()))) == description


@pytest.mark.parametrize(
    ("prompt", "meaning"),
    [
        ("Crimson cup, from behind", "a red mug, back view"),
        ("a photo of a little chequered doughnut", "a small checkered purple donut"),
        ("an orange sphere atop a tall navy box, overhead view", "an orange ball on a tall blue cube, overhead view"),
        ("a teapot, left side view, textureless", "a blue teapot, left side view, textureless"),
        ("a car, normal map", "a red car, normal map"),
        ("", ""),
    ],
)
def test_synonyms(prompt, meaning):
    assert captions.canonical(prompt) == meaning


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a red mgu", "did you mean 'mug'"),
        ("a pink mug", "'pink' is not in the vocabulary"),
        ("a red", "no object"),
        ("a red blue mug", "cannot both"),
        ("a mug on a ball", "base: expected one of"),
        ("a mug on a cube on a table", "at most two"),
    ],
)
def test_prompts_without_words_are_refused_with_the_vocabulary(prompt, message):
    with pytest.raises(captions.PromptError, match=message) as caught:
        captions.parse(prompt)
    assert all(name in str(caught.value) for name in (*CLASSES, *COLORS))


def test_view_words_and_statistics():
    degrees = math.radians
    assert captions.view_word(0.2, degrees(359)) == "front"
    assert captions.view_word(0.2, degrees(90)) == "left side"
    assert captions.view_word(0.2, degrees(180)) == "back"
    assert captions.view_word(0.2, degrees(-80)) == "right side"
    assert captions.view_word(degrees(70), 1.0) == "overhead"
    elevation, azimuth, distance = dataset.sample_cameras(4000, _generator())
    words = [captions.view_word(float(e), float(a)) for e, a in zip(elevation, azimuth, strict=True)]
    # binomial standard error 0.007
    assert words.count("front") / 4000 == pytest.approx(0.70, abs=0.03)
    assert min(words.count(word) for word in scenes.VIEWS) > 150
    assert distance.min() >= 1.6 and distance.max() <= 3.0
    description = captions.parse("a red mug")
    said = [captions.training_caption(description, 0.2, 0.0, _generator(k)) for k in range(2000)]
    assert said.count("a red mug") / 2000 == pytest.approx(0.30, abs=0.04)
    assert said.count("a red mug, front view") / 2000 == pytest.approx(0.65, abs=0.04)


def test_held_out_pairs_are_a_fifth_and_never_drawn():
    assert len(scenes.HELD_OUT_PAIRS) == 26 and len(scenes.TRAINING_PAIRS) == 102
    assert {kind for kind, _ in scenes.HELD_OUT_PAIRS} == set(CLASSES)
    assert {color for _, color in scenes.HELD_OUT_PAIRS} == set(COLORS)
    generator = _generator()
    drawn = {(t.kind, t.color) for _ in range(500) for t in scenes.random_description(generator).things}
    assert not drawn & set(scenes.HELD_OUT_PAIRS)


def test_dataset_is_resumable_and_reads_back(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "SHARD", 8)
    dataset.render_dataset(tmp_path, 12, seed=5, size=16)
    first = [path.read_bytes() for path in sorted(tmp_path.glob("shard-*"))]
    (tmp_path / "shard-00001.npy").unlink()
    dataset.render_dataset(tmp_path, 12, seed=5, size=16)
    assert [path.read_bytes() for path in sorted(tmp_path.glob("shard-*"))] == first
    images = dataset.RenderedImages(tmp_path)
    assert len(images) == 12 and images.images(np.array([0, 11, 3])).shape == (3, 16, 16, 4)
    assert images.camera.shape == (12, 3)
    record = images.records[9]
    scene = scenes.build_scene(images.descriptions[9], record["parameters"])
    light = render.Light(*(torch.tensor([record["light"][key]]) for key in ("position", "color", "ambient")))
    view = [torch.tensor([record[key]]) for key in ("elevation", "azimuth", "distance")]
    again = render.render(scene, *view, size=16, light=light, style=images.descriptions[9].style)[0]
    assert (again * 255 - torch.from_numpy(images.images(np.array([9]))[0])).abs().mean() < 0.6
    with pytest.raises(ValueError, match="another folder"):
        dataset.render_dataset(tmp_path, 12, seed=6, size=16)


@pytest.mark.parametrize("word, hint", [
    ("mugg", "did you mean 'mug'"), ("rde", "did you mean 'red'"), ("bal", "did you mean 'ball'"), ("corgi", ""),
    ("not", ""), ("horse", ""), ("stone", ""), ("cat", ""), ("two", "there is one object, or one on another"),
    ("three", "there is one object"),
])
def test_only_misspelt_words_get_a_suggestion(word, hint):
    with pytest.raises(captions.PromptError) as error:
        captions.canonical(f"a {word} mug")
    said = str(error.value).splitlines()[0].partition("is not in the vocabulary")[2]
    assert said.startswith(f"; {hint}") if hint else said == ""
