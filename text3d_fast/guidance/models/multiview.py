"""Multi-view models (MVDream's class): pictures of one object from several sides are denoised together.

Such a model is a Stable Diffusion U-Net in whose self-attention the pictures of a group see each other, and whose time
embedding has the camera added by a small network: a `UNet2DConditionModel` with class_embed_type "projection" of 16
numbers, and these processors. In the original checkpoint that network is called camera_embed, here class_embedding.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def share_attention(unet: Any, views: int) -> None:
    """Let groups of `views` rows of the batch, one after the other, see each other in every self-attention (attn1)."""
    from diffusers.models.attention_processor import AttnProcessor2_0

    class SharedAttention(AttnProcessor2_0):
        """[groups * views, L, C] is attended to as [groups, views * L, C]."""

        def __call__(self, attention: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
                     *arguments: Any, **options: Any) -> Tensor:
            rows, length, channels = hidden_states.shape
            if rows % views:
                raise ValueError(f"x_t: expected a multiple of {views} rows, the views of an object, got {rows}")
            together = hidden_states.reshape(rows // views, views * length, channels)
            out = super().__call__(attention, together, None, *arguments, **options)
            return out.reshape(rows, length, out.shape[-1])

    unet.set_attn_processor({
        name: SharedAttention() if name.endswith("attn1.processor") else processor
        for name, processor in unet.attn_processors.items()
    })
