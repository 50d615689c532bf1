"""Stable Diffusion checkpoints in one file: a small model written under the original key names, read back the same."""

import re

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import safetensors.torch
from tiny_models import save_model

from text3d_fast.errors import ModelError
from text3d_fast.guidance import Conditions, DiffusionPrior, open_model


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The networks are tiny: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


LAYERS = 1  # of the small model's blocks


def unet_key(key: str) -> str:
    """The original name of a U-Net weight (the inverse of what diffusers does when it converts)."""
    fixed = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
             "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    for new, old in fixed.items():
        if key.startswith(new + "."):
            return old + key[len(new):]
    group, block, kind, layer, rest = re.fullmatch(
        r"(down_blocks|up_blocks|mid_block)\.?(\d*)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", key
    ).groups()
    first, layer = int(block or 0) * (LAYERS + 1), int(layer)
    if kind == "downsamplers":
        return f"input_blocks.{1 + first + LAYERS}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{first + LAYERS}.1.{rest}"  # blocks with attention have it as 2; none here
    if kind == "resnets":
        for new, old in (("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("norm2", "out_layers.0"),
                         ("conv2", "out_layers.3"), ("time_emb_proj", "emb_layers.1"),
                         ("conv_shortcut", "skip_connection")):
            rest = rest.replace(new, old)
    slot = 0 if kind == "resnets" else 1
    if group == "mid_block":
        return f"middle_block.{2 * layer if slot == 0 else 1}.{rest}"
    name, offset = ("input_blocks", 1) if group == "down_blocks" else ("output_blocks", 0)
    return f"{name}.{offset + first + layer}.{slot}.{rest}"


def vae_key(key: str, blocks: int = 2) -> str:
    key = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{blocks - 1 - int(found[1])}", key)
    key = re.sub(r"mid_block\.resnets\.(\d+)", lambda found: f"mid.block_{int(found[1]) + 1}", key)
    for new, old in (("down_blocks", "down"), ("resnets", "block"), ("downsamplers.0", "downsample"),
                     ("upsamplers.0", "upsample"), ("conv_shortcut", "nin_shortcut"), ("conv_norm_out", "norm_out"),
                     ("mid_block.attentions.0", "mid.attn_1"), ("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"),
                     ("to_v", "v"), ("to_out.0", "proj_out")):
        key = key.replace(new, old)
    return key


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(the folder, the same weights in one file)."""
    root = tmp_path_factory.mktemp("single")
    folder = save_model(root / "folder", unet={"use_linear_projection": True})
    read = {name: safetensors.torch.load_file(next((folder / name).glob("*.safetensors")))
            for name in ("unet", "vae", "text_encoder")}
    whole = {f"model.diffusion_model.{unet_key(key)}": value for key, value in read["unet"].items()}
    whole |= {f"first_stage_model.{vae_key(key)}": value for key, value in read["vae"].items()}
    whole |= {f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}": value
              for key, value in read["text_encoder"].items()}
    assert len(whole) == sum(len(part) for part in read.values())
    safetensors.torch.save_file(whole, root / "model.safetensors")
    return folder, root / "model.safetensors"


def test_single_file_is_the_same_model(models):
    folder, file = models
    apart, together = DiffusionPrior.from_pretrained(folder), DiffusionPrior.from_pretrained(file, config=folder)
    images, t = torch.rand(2, 32, 32, 3), torch.tensor([0.3, 0.7])
    torch.testing.assert_close(together.encode(images), apart.encode(images))
    x_t, conditions = torch.randn(2, 4, 16, 16), Conditions(["a red mug", ""])
    expected = apart.predict_noise(x_t, t, conditions)
    torch.testing.assert_close(together.predict_noise(x_t, t, conditions), expected)
    about, truth = together.describe(), apart.describe()
    assert about["parameters"] == truth["parameters"] and about["model"] == str(file)
    half = DiffusionPrior.from_pretrained(file, config=folder, dtype=torch.float16)
    torch.testing.assert_close(half.predict_noise(x_t, t, conditions), expected, rtol=0.02, atol=0.02)


def test_single_file_errors(models, tmp_path, monkeypatch):
    import huggingface_hub

    folder, file = models

    def unreachable(*arguments, **options):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ModelError, match=r"holds weights only.*Pass config=FOLDER"):
        open_model(file)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cut.safetensors: not a complete safetensors file"):
        open_model(cut, config=folder)
    weights = safetensors.torch.load_file(file)
    lora = tmp_path / "lora.safetensors"
    safetensors.torch.save_file({"lora_unet.down.weight": torch.zeros(2, 2)}, lora)
    with pytest.raises(ModelError, match="not a whole Stable Diffusion checkpoint"):
        open_model(lora, config=folder)
    xl = tmp_path / "xl.safetensors"
    key = "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"
    safetensors.torch.save_file(weights | {key: torch.zeros(2)}, xl)
    with pytest.raises(ModelError, match="recognized as xl_base"):
        open_model(xl, config=folder)
    del weights["model.diffusion_model.out.2.bias"]
    safetensors.torch.save_file(weights, tmp_path / "short.safetensors")
    with pytest.raises(ModelError, match="unet (does not fit .*conv_out.bias|cannot be loaded .*weights are missing)"):
        DiffusionPrior.from_pretrained(tmp_path / "short.safetensors", config=folder)
