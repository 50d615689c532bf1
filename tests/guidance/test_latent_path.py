"""The way of a latent model, proven by one that is exact: a bank of renders encoded with a frozen random KL-VAE, the
exact denoiser of those latents, and the gradient that reaches pictures through the encoder.
"""

import diffusers
import pytest
import torch

from text3d_fast.guidance import Conditions, ScoreDistillation
from text3d_fast.toybox.analytic import AnalyticPrior
from text3d_fast.toybox.render import over

BALL, MUG = "a red ball", "a blue mug"


class ExactLatent(AnalyticPrior):
    """E[z | z_t] over the encoded renders of the nearest camera; 32 x 32 pictures, 4 x 16 x 16 latents."""

    kind = "latent"

    def __init__(self, **options):
        super().__init__(members=2, cameras=12, progress=False, image_size=32, **options)
        torch.manual_seed(0)
        self.vae = diffusers.AutoencoderKL(
            block_out_channels=(16, 16), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, sample_size=32,
        ).eval().requires_grad_(False)

    def encode(self, images):
        return 4 * self.vae.encode(images.permute(0, 3, 1, 2) * 2 - 1).latent_dist.mode()  # spread about 1

    @torch.no_grad()
    def latents(self, conditions, k):
        """[N, 4, 16, 16] of what row k of the conditions allows."""
        planes = self._images(conditions.texts[k], conditions.camera[k], None, conditions.camera.device).planes
        images = planes.view(-1, 4, 32, 32).permute(0, 2, 3, 1)
        return self.encode(over(images, conditions.background[k]))

    def predict_noise(self, x_t, t, conditions):
        alpha, sigma = self.schedule.alpha_sigma(t)
        rows = []
        for k in range(len(x_t)):
            clean = self.latents(conditions, k)
            distance = (x_t[k] - alpha[k] * clean).square().flatten(1).sum(1)
            mean = torch.einsum("n,nchw->chw", torch.softmax(-distance / (2 * sigma[k] ** 2), 0), clean)
            rows.append((x_t[k] - alpha[k] * mean) / sigma[k])
        return torch.stack(rows)


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEXT3D_CACHE", str(tmp_path_factory.mktemp("cache")))
        prior = ExactLatent()
        prior.prepare([BALL, MUG])
        yield prior


def conditions(prior, text, camera=5):
    return Conditions([text], prior.known_cameras(text)[[camera]], torch.tensor([[0.3, 0.6, 0.5]]))


def test_the_gradient_goes_through_the_encoder(prior):
    """d loss / d picture is the encoder's transposed Jacobian of the latent gradient, to the bit of autograd."""
    images = torch.rand(1, 32, 32, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
    distill = ScoreDistillation(prior, 0.0, "sample", (0.1, 0.5))
    step = distill(images, conditions(prior, MUG), generator=torch.Generator().manual_seed(2))
    step.loss.backward()
    again = images.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad(prior.encode(again), again, step.gradient / step.gradient.numel())
    torch.testing.assert_close(images.grad, expected)
    assert images.grad.abs().sum() > 0


@pytest.mark.parametrize("text", [BALL, MUG])
def test_a_picture_is_found_through_its_latents(prior, text):
    """From grey, score distillation in latent space finds the very render, in latents and in pixels."""
    told = conditions(prior, text)
    clean = prior.latents(told, 0)[:1]
    truth = over((prior._images(text, told.camera[0], None, torch.device("cpu")).planes[:1]).view(1, 4, 32, 32)
                 .permute(0, 2, 3, 1), told.background[0])
    images = torch.full((1, 32, 32, 3), 0.5, requires_grad=True)
    optimizer = torch.optim.Adam([images], 0.03)
    distill = ScoreDistillation(prior, 0.0, "sample", (0.02, 0.3))
    generator = torch.Generator().manual_seed(0)
    before = (prior.encode(images) - clean).detach().square().mean(), (images - truth).detach().square().mean()
    for _ in range(120):
        optimizer.zero_grad()
        distill(images.clamp(0, 1), told, generator=generator).loss.backward()
        optimizer.step()
    found = images.detach().clamp(0, 1)
    members = prior.latents(told, 0)  # either member of the family is an answer
    latent = (prior.encode(found) - members).square().flatten(1).mean(1).min()
    assert latent < 0.05 * before[0]
    assert (found - truth).square().mean() < 0.3 * before[1]  # 3072 pixels from 1024 latents: not all is determined
