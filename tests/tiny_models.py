"""Random small models in the folder formats that users have: Stable Diffusion, DeepFloyd-IF-like, Toybox-like."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch

WORDS = ["a", "red", "blue", "mug", "chair", "front", "side", "back", "view", ","]


def save_text_encoder(folder: Path, width: int = 16, length: int = 12) -> None:
    import tokenizers
    import transformers

    vocabulary = {word: i for i, word in enumerate(["<start>", "<end>", "<unknown>", *WORDS])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unknown>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 0), ("<end>", 1)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<start>", eos_token="<end>", pad_token="<end>", unk_token="<unknown>",
        model_max_length=length,
    )
    tokenizer.save_pretrained(folder / "tokenizer")
    encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=length, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    ))
    encoder.save_pretrained(folder / "text_encoder")


def save_model(
    folder: Path,
    latent: bool = True,
    prediction_type: str = "epsilon",
    unet: dict | None = None,
    vae: dict | None = None,
    scheduler: dict | None = None,
    pipeline: str = "StableDiffusionPipeline",
) -> Path:
    """A complete folder: 32 x 32 images, latents at 1/2 (or pixels, unshuffled by 2 unless `unet` says otherwise)."""
    import diffusers

    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    channels = 4 if latent else 12
    diffusers.UNet2DConditionModel(**{
        "sample_size": 16, "in_channels": channels, "out_channels": channels, "block_out_channels": (16, 32),
        "layers_per_block": 1, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 16, "attention_head_dim": 4,
        "norm_num_groups": 8, **(unet or {}),
    }).save_pretrained(folder / "unet")
    if latent:
        diffusers.AutoencoderKL(**{
            "block_out_channels": (8, 16), "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2, "latent_channels": 4, "norm_num_groups": 4,
            "sample_size": 32, "scaling_factor": 0.3, **(vae or {}),
        }).save_pretrained(folder / "vae")
    diffusers.DDPMScheduler(**{
        "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
        "prediction_type": prediction_type, **(scheduler or {}),
    }).save_pretrained(folder / "scheduler")
    save_text_encoder(folder)
    components = {
        "unet": ["diffusers", "UNet2DConditionModel"], "scheduler": ["diffusers", "DDPMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    if latent:
        components["vae"] = ["diffusers", "AutoencoderKL"]
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline, **components}))
    return folder


LAYERS = 1  # of the small model's blocks


def unet_key(key: str) -> str:
    """The original name of a U-Net weight (the inverse of what diffusers does when it converts)."""
    fixed = {"class_embedding.linear_1": "camera_embed.0", "class_embedding.linear_2": "camera_embed.2",
             "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
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


def save_single_file(folder: Path, path: Path) -> None:
    """The weights of a folder by `save_model` with linear projections, under the original names."""
    import safetensors.torch

    read = {name: safetensors.torch.load_file(next((folder / name).glob("*.safetensors")))
            for name in ("unet", "vae", "text_encoder")}
    whole = {f"model.diffusion_model.{unet_key(key)}": value for key, value in read["unet"].items()}
    whole |= {f"first_stage_model.{vae_key(key)}": value for key, value in read["vae"].items()}
    whole |= {f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}": value
              for key, value in read["text_encoder"].items()}
    assert len(whole) == sum(len(part) for part in read.values())
    safetensors.torch.save_file(whole, path)
