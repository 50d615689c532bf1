"""Multi-view priors: shared attention against a plain reference, cameras in fours, the original checkpoint's names."""

import contextlib
import json
import math

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from tiny_models import save_model, save_single_file

from text3d_fast.errors import EmptyMesh, ModelError
from text3d_fast.guidance import Conditions, DiffusionPrior, LoraPrior, ScoreDistillation
from text3d_fast.guidance.models.multiview import share_attention
from text3d_fast.guidance.models.settings import multiview_pose
from text3d_fast.pipelines import DreamFusion
from text3d_fast.scene.cameras import CameraDistribution, Cameras

VIEWS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = save_model(tmp_path_factory.mktemp("models") / "multiview", unet={
        "class_embed_type": "projection", "projection_class_embeddings_input_dim": 16, "use_linear_projection": True})
    (folder / "text3d.json").write_text(json.dumps({"views": VIEWS, "conditions": ["pose"]}))
    return folder


@pytest.fixture(scope="module")
def prior(folder):
    return DiffusionPrior.from_pretrained(folder)


def around(groups=1):
    return CameraDistribution().around(groups * VIEWS, VIEWS, 32, torch.Generator().manual_seed(0))


def batch(groups=1, seed=0):
    x_t = torch.randn(groups * VIEWS, 4, 16, 16, generator=torch.Generator().manual_seed(seed))
    conditions = Conditions(["a red mug"] * len(x_t), pose=around(groups).camera_to_world)
    return x_t, torch.full((len(x_t),), 0.5), conditions


def test_shared_attention_is_attention_over_all_views():
    """Against softmax(Q K^T) V written out over the tokens of all views; cross-attention is left alone."""
    import diffusers

    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=16, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=8)
    share_attention(unet, VIEWS)
    block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    x, text = torch.randn(2 * VIEWS, 5, 16), torch.randn(2 * VIEWS, 7, 16)
    self_attention = block.attn1
    query, key, value = (getattr(self_attention, f"to_{name}")(x) for name in "qkv")
    heads = self_attention.heads
    for group in range(2):
        rows = slice(group * VIEWS, (group + 1) * VIEWS)
        q, k, v = (part[rows].reshape(VIEWS * 5, heads, -1).transpose(0, 1) for part in (query, key, value))
        weights = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]), -1)
        expected = self_attention.to_out[0]((weights @ v).transpose(0, 1).reshape(VIEWS, 5, 16))
        torch.testing.assert_close(self_attention(x)[rows], expected)
    one = torch.cat([block.attn2(x[row : row + 1], text[row : row + 1]) for row in range(len(x))])
    torch.testing.assert_close(block.attn2(x, text), one)


def test_views_of_a_group_see_each_other_and_groups_do_not(prior):
    x_t, t, conditions = batch(2)
    answer = prior.predict_noise(x_t, t, conditions)
    changed = x_t.clone()
    changed[1] += 1
    moved = (prior.predict_noise(changed, t, conditions) - answer).flatten(1).norm(dim=1)
    assert bool((moved[:VIEWS] > 1e-5).all())
    assert float(moved[VIEWS:].max()) < 1e-5
    with pytest.raises(ValueError, match="expected a multiple of 4 rows"):
        prior.predict_noise(x_t[:3], t[:3], conditions[:3])


def test_the_camera_reaches_the_network(prior):
    x_t, t, conditions = batch()
    other = Conditions(conditions.texts, pose=conditions.pose.roll(1, 0))
    assert not torch.allclose(prior.predict_noise(x_t, t, conditions), prior.predict_noise(x_t, t, other), atol=1e-5)


def test_cameras_of_a_group_stand_at_right_angles():
    cameras = CameraDistribution(elevation=(10, 30), fov_y=(20, 60)).around(8, 4, 32, torch.Generator().manual_seed(1))
    for start in (0, 4):
        group = slice(start, start + 4)
        turns = torch.rad2deg(cameras.azimuth[group].diff()) % 360
        torch.testing.assert_close(turns, torch.full((3,), 90.0), rtol=0, atol=1e-3)
        for value in (cameras.elevation, cameras.distance, cameras.fov_y):
            assert torch.equal(value[group], value[start].expand(4))
        flat = torch.nn.functional.normalize(cameras.position[group][:, [0, 2]], dim=1)
        torch.testing.assert_close(flat @ flat.T, torch.tensor(  # cosines between the four
            [[1.0, 0, -1, 0], [0, 1, 0, -1], [-1, 0, 1, 0], [0, -1, 0, 1]]), rtol=0, atol=1e-5)
    assert not torch.equal(cameras.azimuth[0], cameras.azimuth[4])
    with pytest.raises(ValueError, match="batch: expected a multiple of 4"):
        CameraDistribution().around(6, 4, 32)


def test_poses_are_those_of_mvdream():
    """Its object faces +X, Z is up: from the front the camera stands at +X and looks along -X, at distance 1."""
    pose = Cameras.orbit(torch.tensor([0.0, 0.0]), torch.tensor([0.0, math.pi / 2]), torch.tensor([3.0, 3.0]),
                         torch.tensor([0.7, 0.7]), 8).camera_to_world
    front, left = multiview_pose(pose).reshape(2, 4, 4)
    torch.testing.assert_close(front[:3, 3], torch.tensor([1.0, 0, 0]))
    torch.testing.assert_close(left[:3, 3], torch.tensor([0.0, 1, 0]), rtol=0, atol=1e-6)
    torch.testing.assert_close(front[:3, 1], torch.tensor([0.0, 0, 1]))  # up
    torch.testing.assert_close(front[:3, 2], front[:3, 3])  # backwards
    torch.testing.assert_close(torch.linalg.det(front[:3, :3]), torch.tensor(1.0))


def test_a_step_draws_one_t_for_each_group(prior):
    images = torch.rand(8, 32, 32, 3, requires_grad=True)
    conditions = Conditions(["a red mug"] * 8, pose=around(2).camera_to_world)
    step = ScoreDistillation(prior, 49.0)(images, conditions, generator=torch.Generator().manual_seed(0))
    assert torch.equal(step.t[:4], step.t[0].expand(4)) and torch.equal(step.t[4:], step.t[4].expand(4))
    assert float(step.t[0]) != float(step.t[4])
    step.loss.backward()
    assert float(images.grad.norm()) > 0
    with pytest.raises(ValueError, match="images: expected a multiple of 4"):
        ScoreDistillation(prior)(images[:3], conditions[:3])


def test_a_run_shows_it_four_sides(prior):
    pipeline = DreamFusion(prior=prior, device="cpu", settings={
        "size": 16, "field.max_resolution": 32, "field.log2_table_size": 8, "sampling.step": 0.2,
        "sampling.occupancy": 8, "mesh_resolution": 16})
    assert pipeline.config.batch == 4 and pipeline.config.view_words == "none"
    seen = []
    encode = prior.encode
    prior.encode = lambda images: seen.append(len(images)) or encode(images)
    try:
        with contextlib.suppress(EmptyMesh):  # two steps of a random prior
            pipeline.run("a red mug", steps=2)
    finally:
        del prior.encode
    assert seen == [4, 4]


def test_the_second_score_shares_attention_too(prior):
    x_t, t, conditions = batch()
    adapted = LoraPrior(prior)
    assert adapted.views == VIEWS
    torch.testing.assert_close(adapted.predict_noise(x_t, t, conditions), prior.predict_noise(x_t, t, conditions))


def test_the_original_checkpoints_names(folder, prior, tmp_path):
    save_single_file(folder, tmp_path / "mvdream.safetensors")
    plain = save_model(tmp_path / "plain", unet={"use_linear_projection": True})  # the family's configurations
    loaded = DiffusionPrior.from_pretrained(tmp_path / "mvdream.safetensors", config=plain)
    assert loaded.views == 4 and loaded.conditions == ("pose",)
    x_t, t, conditions = batch()
    torch.testing.assert_close(loaded.predict_noise(x_t, t, conditions), prior.predict_noise(x_t, t, conditions))


def test_bad_settings_are_named(folder):
    text = (folder / "text3d.json").read_text()
    try:
        (folder / "text3d.json").write_text(json.dumps({"views": 0, "conditions": ["pose"]}))
        with pytest.raises(ModelError, match="views: expected a positive integer"):
            DiffusionPrior.from_pretrained(folder)
    finally:
        (folder / "text3d.json").write_text(text)


def test_memory_is_that_of_a_whole_group(folder):
    from text3d_fast.guidance import open_model
    from text3d_fast.guidance.models.memory import estimate

    model = open_model(folder)
    group = estimate(model, torch.device("cpu"))
    assert group == estimate(model, torch.device("cpu"), pictures=VIEWS) and group.operations > 0
