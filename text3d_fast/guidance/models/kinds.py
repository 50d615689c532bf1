"""What a .safetensors file is, from the names in its header: said where a whole model was expected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LORA = ("lora_unet_", "lora_te", "lora_transformer_")
_LORA_PARTS = (".lora_A.", ".lora_B.", ".lora_up.", ".lora_down.", ".lora.up.", ".lora.down.", ".lora_linear_layer.",
               ".hada_w1_", ".lokr_w")


def is_lora(header: Mapping[str, Any]) -> bool:
    return any(key.startswith(_LORA) or any(part in key for part in _LORA_PARTS) for key in header)


def is_embedding(header: Mapping[str, Any]) -> bool:
    """A textual inversion: a few vectors, by the name of the word or of no word (emb_params)."""
    return 0 < len(header) <= 4 and all(len(entry["shape"]) <= 2 and "." not in key for key, entry in header.items())


def part_of_a_model(header: Mapping[str, Any]) -> str | None:
    """A sentence on what the file is and what to do with it; None for what may be a whole checkpoint."""
    def has(*starts: str) -> bool:
        return any(key.startswith(starts) for key in header)

    if is_lora(header):
        return "a LoRA, not a whole model: give the model that it was made for, and this file as --lora"
    if is_embedding(header):
        return ("a textual inversion, not a whole model: give the model that it was made for, and this file as "
                "--set prior.embeddings=FILE")
    if has("control_model.", "controlnet_cond_embedding.", "input_hint_block."):
        return "a ControlNet, which adds a picture as a condition: it is of no use here; give the model itself"
    if has("ip_adapter.", "image_proj."):
        return "an IP-Adapter, which adds a picture as a condition: it is of no use here; give the model itself"
    if has("double_blocks.", "joint_blocks.", "transformer_blocks.", "model.diffusion_model.double_blocks.",
           "model.diffusion_model.joint_blocks."):
        return "a diffusion transformer (Flux, SD3 and the like), which has no U-Net"
    unet, vae, text = (has(prefix) for prefix in ("model.diffusion_model.", "first_stage_model.", "cond_stage_model."))
    if not unet and (vae or {"encoder.conv_in.weight", "decoder.conv_in.weight"} <= set(header)):
        return ("a VAE alone, not a whole model: it belongs into a diffusers folder, as "
                "vae/diffusion_pytorch_model.safetensors")
    if (unet and not vae and not text and not has("conditioner.")) or has("down_blocks."):
        return ("a U-Net alone, not a whole model: it needs the text encoder and VAE of its family, in a diffusers "
                "folder")
    if not unet and (text or has("text_model.")):
        return "a text encoder alone, not a whole model"
    return None
