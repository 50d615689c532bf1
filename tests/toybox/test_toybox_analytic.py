import numpy as np
import pytest
import torch

from text3d_fast.guidance import Conditions, Prior
from text3d_fast.toybox import bank, render
from text3d_fast.toybox.analytic import AnalyticPrior
from text3d_fast.toybox.captions import PromptError, parse


@pytest.fixture(autouse=True)
def one_thread():
    """Small operations: threads that wait for one another only cost time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def prior(folder, monkeypatch):
    monkeypatch.setenv("TEXT3D_CACHE", str(folder))
    return AnalyticPrior(members=2, cameras=60, progress=False)


def _images(bank_, rows, background):
    planes = torch.from_numpy(bank_.images[rows]).flatten(0, 1).double() / 255
    return render.over(planes, background.double()).permute(0, 3, 1, 2) * 2 - 1


@pytest.mark.parametrize("time", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("view", ["", ", left side view"])
def test_it_is_the_softmax_over_the_images(prior, time, view):
    background = torch.tensor([[0.2, 0.7, 0.4]])
    bank_ = prior.bank("a red mug")
    words = ["left side" if view else None] * len(bank_.cameras)
    from text3d_fast.toybox.captions import view_word

    keep = [k for k, c in enumerate(bank_.cameras) if words[k] in (None, view_word(float(c[0]), float(c[1])))]
    images = _images(bank_, keep, background[0])
    generator = torch.Generator().manual_seed(0)
    t = torch.tensor([time])
    alpha, sigma = (v.double() for v in prior.schedule.alpha_sigma(t))
    x_t = alpha * images[7] + sigma * torch.randn(images[7].shape, generator=generator, dtype=torch.float64)
    distance = (x_t - alpha * images).square().sum((1, 2, 3))
    expected = torch.einsum("n,nchw->chw", torch.softmax(-distance / (2 * sigma**2), 0), images)
    conditions = Conditions(["a red mug" + view], None, background)
    clean = prior.predict_sample(x_t.float()[None], t, conditions)[0]
    # fp32 sums of 12288 products, divided by 2 sigma^2 before the softmax
    assert torch.allclose(clean.double(), expected, atol=2e-3)
    noise = prior.predict_noise(x_t.float()[None], t, conditions)[0]
    assert torch.allclose(alpha * clean + sigma * noise, x_t, atol=1e-5)


def test_without_a_background_every_ground_counts(prior):
    t = torch.tensor([0.05])
    alpha, _ = prior.schedule.alpha_sigma(t)
    image = _images(prior.bank("a red mug"), [9], torch.tensor([0.9, 0.9, 0.9]))[:1].float()
    dropped = Conditions(["a red mug"], None, torch.full((1, 3), torch.nan))
    clean = prior.predict_sample(alpha.float() * image, t, dropped)
    assert torch.allclose(clean, image, atol=1e-3)


def test_the_camera_chooses_the_view(prior):
    # with pure noise as input the estimate is the mean image of the nearest camera
    camera = torch.tensor(
        [[0.3, 1.6, 2.7], [0.3, 4.7, 2.7]]
    )  # the mug's handle points at the first, away from the second
    t = torch.tensor([0.999, 0.999])
    conditions = Conditions(["a red mug"] * 2, camera, torch.ones(2, 3))
    x = prior.predict_sample(torch.zeros(2, 3, 64, 64), t, conditions)
    for k in range(2):
        near = bank.angles_between(camera[k : k + 1], prior.bank("a red mug").cameras)[0].argmin()
        images = _images(prior.bank("a red mug"), [int(near)], torch.ones(3))
        # the bank's distance differs by up to 10 %: the same colour in the middle, not the same silhouette
        assert torch.allclose(
            x[k, :, 28:36, 28:36].mean((1, 2)), images.mean(0)[:, 28:36, 28:36].mean((1, 2)).float(), atol=0.1
        )


def test_distance_scales_the_image(prior):
    conditions = [Conditions(["a red ball"], torch.tensor([[0.3, 1.0, d]]), torch.ones(1, 3)) for d in (2.5, 3.0)]
    t = torch.tensor([0.999])
    cover = [(prior.predict_sample(torch.zeros(1, 3, 64, 64), t, c)[0, 1] < 0.5).sum().item() for c in conditions]
    # tan(asin(r / d)) for r = 0.74
    expected = ((3.0**2 - 0.74**2) / (2.5**2 - 0.74**2)) * 1.0
    assert cover[0] / cover[1] == pytest.approx(expected, rel=0.06)


def test_interface(prior):
    assert isinstance(prior, Prior)
    images = torch.rand(2, 64, 64, 3)
    assert prior.encode(images).shape == (2, 3, 64, 64)
    x = torch.randn(2, 3, 64, 64, requires_grad=True)
    camera = torch.tensor([[0.1, 0.2, 2.7], [torch.nan] * 3])
    noise = prior.predict_noise(x, torch.tensor([0.3, 0.6]), Conditions(["a red mug", ""], camera, None))
    noise.sum().backward()
    assert noise.shape == x.shape and x.grad.isfinite().all()
    with pytest.raises(PromptError, match="did you mean 'mug'"):
        prior.predict_noise(x, torch.tensor([0.3, 0.6]), Conditions(["a red mgu", ""]))
    with pytest.raises(ValueError, match="x_t: expected shape"):
        prior.predict_noise(x[:, :, ::2], torch.tensor([0.3, 0.6]), Conditions(["a red mug", ""]))


def test_a_broken_cache_file_is_rendered_again(folder, monkeypatch):
    monkeypatch.setenv("TEXT3D_CACHE", str(folder / "other"))
    first = bank.caption_bank(parse("a red ball"), 4, 1, 16, progress=False)
    first = bank.Bank(first.images.copy(), first.cameras)  # not mapped from the file that is cut short below
    (path,) = (folder / "other" / "toybox").glob("*.npy")
    path.write_bytes(path.read_bytes()[:300])
    again = bank.caption_bank(parse("a red ball, front view"), 4, 1, 16, progress=False)
    assert np.array_equal(first.images, again.images) and path.stat().st_size > 4 * 16 * 16 * 4
    blocked = folder / "file"
    blocked.write_text("")
    monkeypatch.setenv("TEXT3D_CACHE", str(blocked))
    unwritable = bank.caption_bank(parse("a red ball"), 4, 1, 16, progress=False)
    assert np.array_equal(first.images, unwritable.images)


def test_even_cameras_are_even():
    cameras = bank.even_cameras(500)
    gap = bank.angles_between(cameras, cameras).fill_diagonal_(9).min(1).values.rad2deg()
    probe = bank.even_cameras(3000)
    reach = bank.angles_between(probe, cameras).min(1).values.rad2deg()
    assert gap.min() > 3 and reach.max() < 7 and reach.mean() < 3.5


def test_a_window_is_the_true_part_of_the_picture(folder, monkeypatch):
    monkeypatch.setenv("TEXT3D_CACHE", str(folder))
    prior = AnalyticPrior(members=1, cameras=6, progress=False, image_size=32, detail=64)
    bank_ = prior.bank("a red mug")
    assert isinstance(bank_.images, np.memmap)  # read as far as it is looked at
    camera, background = bank_.cameras[3:4], torch.tensor([[0.2, 0.7, 0.4]])
    t, x = torch.tensor([0.3]), torch.zeros(1, 3, 32, 32)

    def clean(window):
        window = None if window is None else torch.tensor([window])
        return prior.predict_sample(x, t, Conditions(["a red mug"], camera, background, window=window))[0]

    whole = _images(bank_, [3], background[0])[0].float()
    assert torch.allclose(clean((-0.5, 0.5, 0.5)), whole[:, :32, :32], atol=1e-5)  # the upper left quarter, as rendered
    assert torch.allclose(clean((0.25, -0.25, 0.5)), whole[:, 24:56, 24:56], atol=1e-5)
    reduced = torch.nn.functional.avg_pool2d(whole, 2)
    assert torch.allclose(clean((0.0, 0.0, 1.0)), reduced, atol=1e-5)
    assert torch.allclose(clean(None), reduced, atol=1e-5)
    words = prior.predict_sample(x, t, Conditions(["a red mug"], None, background))
    assert words.shape == x.shape  # any view, reduced to 32
    corner = torch.tensor([[-0.5, 0.5, 0.5]])
    anywhere = prior.predict_sample(x, t, Conditions(["a red mug"], None, background, window=corner))
    corners = torch.stack([image[:, :32, :32] for image in _images(bank_, range(6), background[0])]).float()
    alpha, sigma = prior.schedule.alpha_sigma(t)
    weights = torch.softmax(-(alpha * corners).square().sum((1, 2, 3)) / (2 * sigma**2), 0)
    assert torch.allclose(anywhere[0], torch.einsum("n,nchw->chw", weights, corners), atol=2e-3)
    with pytest.raises(ValueError, match="detail: expected a multiple of image_size = 32"):
        AnalyticPrior(image_size=32, detail=40)


def test_banks_are_the_same_on_any_number_of_threads(folder, monkeypatch):
    monkeypatch.setenv("TEXT3D_CACHE", str(folder / "one"))
    first = bank.caption_bank(parse("a striped blue mug"), 5, 2, 64, progress=False)
    monkeypatch.setenv("TEXT3D_CACHE", str(folder / "two"))
    torch.set_num_threads(3)
    assert np.array_equal(first.images, bank.caption_bank(parse("a striped blue mug"), 5, 2, 64, progress=False).images)
