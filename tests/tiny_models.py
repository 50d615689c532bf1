"""Random small models in the folder formats that users have: Stable Diffusion, DeepFloyd-IF-like, Toybox-like."""

from __future__ import annotations

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
    import json

    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline, **components}))
    return folder
