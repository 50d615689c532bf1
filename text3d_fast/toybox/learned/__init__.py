"""The learned prior of Toybox: its networks and weights in the diffusers format."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from text3d_fast.guidance import Prior

WEIGHTS = Path(__file__).with_name("weights")


def load(device: "torch.device") -> "Prior":
    """The shipped model."""
    from text3d_fast.guidance.models.diffusion import DiffusionPrior  # not before it is asked for: seconds of imports

    return DiffusionPrior.from_pretrained(WEIGHTS, device=device)
