"""The way of a latent model, proven by one that is exact: a bank of renders encoded with a frozen random KL-VAE, the
exact denoiser of those latents, and the gradient that reaches pictures through the encoder.
"""

import math

import diffusers
import pytest
import torch

from text3d_fast.geometry import Mesh
from text3d_fast.guidance import Conditions, ScoreDistillation
from text3d_fast.nn import DeformableTetGrid
from text3d_fast.scene.cameras import Cameras
from text3d_fast.scene.mesh_renderer import render_meshes
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


def test_a_surface_is_found_through_latents(prior):
    """A mesh grows to the size of what it should be, by score distillation in latent space alone. (To a random encoder
    other colours look alike, so nothing is said of them.)
    """
    grid = DeformableTetGrid(16)
    with torch.no_grad():
        grid.sdf.copy_((0.6 - grid.rest_positions().norm(dim=1)).clamp(-0.1, 0.1))
    color = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.Adam([{"params": [grid.sdf], "lr": 0.01}, {"params": [color], "lr": 0.05}])
    distill = ScoreDistillation(prior, 0.0, "sample", (0.02, 0.3))
    generator = torch.Generator().manual_seed(0)

    def render(camera):
        cameras = Cameras.orbit(*prior.known_cameras(BALL)[[camera]].unbind(1), math.radians(40), 32)
        out = render_meshes([Mesh(*grid.mesh())], cameras, torch.full((1, 3), 0.9), mode="albedo",
                            material=lambda points: torch.sigmoid(color).expand_as(points))
        return out.color, out.mask

    def silhouettes():
        truth = torch.from_numpy(prior.bank(BALL).images[:, 0, ..., 3] > 127)
        with torch.no_grad():
            mine = torch.cat([render(camera)[1] for camera in range(12)]) > 0.5
        return float((mine & truth).sum() / (mine | truth).sum())

    before = silhouettes()
    for step in range(48):
        told = Conditions([BALL], prior.known_cameras(BALL)[[5 * step % 12]], torch.full((1, 3), 0.9))
        optimizer.zero_grad()
        distill(render(5 * step % 12)[0], told, generator=generator).loss.backward()
        optimizer.step()
    assert silhouettes() > before + 0.1  # 0.63 -> 0.78
