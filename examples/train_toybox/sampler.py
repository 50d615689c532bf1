"""Sampling from the learned Toybox prior: DDIM with classifier-free guidance, and sheets of samples."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from examples.train_toybox.model import IMAGE_SIZE, UNSHUFFLE, ToyboxModel, to_images
from text3d_fast.guidance.prior import Conditions

SHEET_PROMPTS = (
    ("a red mug, front view", 20, 20),
    ("a blue chair, left side view", 20, 70),
    ("a green teapot, front view", 20, 0),
    ("an orange teapot, right side view", 20, 290),
    ("a white snowman, front view", 10, -10),
    ("a red car, left side view", 15, 60),
    ("a yellow house, front view", 25, 30),
    ("a purple donut, overhead view", 75, 0),
    ("a green tree", 10, 40),
    ("a red mushroom, front view", 15, 0),
    ("a striped blue ball", 20, 0),
    ("a checkered orange cube, front view", 25, 35),
    ("a tall red cylinder, front view", 15, 0),
    ("a small purple cone", 15, 0),
    ("a red clock, front view", 5, 10),
    ("a blue clock, back view", 10, 170),
    ("a yellow bowl, overhead view", 65, 0),
    ("a green table, left side view", 30, 70),
    ("a red ball on a blue cube, front view", 20, 25),
    ("a black mushroom on a white cylinder", 20, 0),
    ("a red mug, back view, normal map", 20, 200),
    ("a blue car, front view, textureless", 20, 30),
    ("a black chair, back view", 20, 160),
    ("a purple house, right side view", 20, 300),
)


def sheet_conditions(camera: bool = True, background: bool = True) -> Conditions:
    """The conditions of `SHEET_PROMPTS` (cameras at distance 2.75; light grey, or dropped)."""
    texts = [text for text, _, _ in SHEET_PROMPTS]
    angles = torch.tensor([[math.radians(e), math.radians(a), 2.75] for _, e, a in SHEET_PROMPTS])
    grey = torch.full((len(texts), 3), 0.75)
    return Conditions(texts, angles if camera else None, grey if background else None)


def step_sequence(steps: int, count: int) -> list[int]:
    """`steps` discrete steps of a schedule with `count`, from the noisiest down to 0, evenly spaced."""
    if not 1 <= steps <= count:
        raise ValueError(f"steps: expected 1 to {count}, got {steps}")
    return torch.linspace(count - 1, 0, steps).round().long().tolist()


@torch.no_grad()
def sample(
    model: ToyboxModel,
    conditions: Conditions,
    guidance_weight: float = 2.0,
    steps: int = 30,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Images [B, 64, 64, 3] in 0..1 by DDIM without added noise.

    guidance_weight w gives (1 + w) x(text) - w x(empty text), camera and background kept in both; w = 0 is the plain
    conditional model. The noise is drawn on the CPU from `generator`, so that every device sees the same.
    """
    count, side = len(conditions), IMAGE_SIZE // UNSHUFFLE
    x = torch.randn(count, 3 * UNSHUFFLE**2, side, side, generator=generator).to(model.device)
    guided = guidance_weight != 0
    both = Conditions.concatenate([conditions, conditions.unconditional()] if guided else [conditions])
    both = both.to(model.device)
    text = model.embed(model.token_ids(both.texts))
    sequence = step_sequence(steps, len(model.scheduler.alphas_cumprod))
    kept = model.scheduler.alphas_cumprod.double()
    for now, following in zip(sequence, [*sequence[1:], None], strict=True):
        doubled = torch.cat([x, x]) if guided else x
        clean = model.predict(doubled, torch.full((len(doubled),), now, device=x.device), text, both)
        if guided:
            with_text, without = clean.chunk(2)
            clean = with_text + guidance_weight * (with_text - without)
        clean = clean.clamp(-1, 1)
        if following is None:
            return to_images(clean)
        alpha, sigma = float(kept[now].sqrt()), float((1 - kept[now]).sqrt())
        noise = (x - alpha * clean) / sigma
        x = float(kept[following].sqrt()) * clean + float((1 - kept[following]).sqrt()) * noise
    raise AssertionError("unreachable: the last step returns")


def save_sheet(images: Tensor, path: str | Path, columns: int = 8, scale: int = 2) -> None:
    """Writes images [B, H, W, 3] in 0..1 as one PNG, row by row, each pixel `scale` wide."""
    from PIL import Image

    count, height, width, _ = images.shape
    rows = math.ceil(count / columns)
    canvas = torch.ones(rows * columns, height, width, 3)
    canvas[:count] = images.detach().float().cpu()
    canvas = canvas.view(rows, columns, height, width, 3).permute(0, 2, 1, 3, 4).reshape(rows * height, -1, 3)
    canvas = canvas.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((canvas * 255).round().to(torch.uint8).numpy()).save(path)
