"""How a diffusion model is loaded: the group `prior` of a run's settings, and the options of `load_prior`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

# What changes speed and memory, but no result beyond rounding
HARMLESS = ("vae_slicing", "offload", "compile")


@dataclass(kw_only=True)
class ModelOptions:
    """Options of `DiffusionPrior.from_pretrained`, by their names there.

    dtype             of the networks: "float32", "float16" or "bfloat16"; None: fp16 on CUDA, fp32 elsewhere
    prediction        "epsilon", "v_prediction" or "sample", where a file does not say it or says it wrongly
    revision          of the hub repository
    config            for a single file: a folder or hub id with the configurations and tokenizer of its family
    tiny_autoencoder  folder or hub id of an AutoencoderTiny to encode with: about a tenth of the VAE's cost
    lora              LoRA files put on top, each FILE or FILE:STRENGTH
    embeddings        textual-inversion files; a prompt names them by the word in the file, or the file's name
    vae_slicing       encode one picture at a time and recompute it in the backward pass: less memory, more time
    offload           text encoder and VAE stay in the computer's memory: less of the GPU's
    compile           the U-Net by torch.compile: some minutes at the start, faster steps on a GPU
    """

    dtype: str | None = None
    prediction: str | None = None
    revision: str | None = None
    config: str | None = None
    tiny_autoencoder: str | None = None
    lora: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()
    vae_slicing: bool = False
    offload: bool = False
    compile: bool = False

    def given(self) -> dict[str, Any]:
        """Those that are not the defaults."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self)
                if getattr(self, entry.name) != entry.default}
