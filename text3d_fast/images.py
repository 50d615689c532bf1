"""Picture files from tensors: PNG, turntables and contact sheets."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from text3d_fast.files import atomic_path


def to_bytes(image: torch.Tensor) -> np.ndarray:
    """[0, 1] to uint8, rounded."""
    return (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


def write_png(path: str | Path, picture: torch.Tensor) -> None:
    """Write [H, W, 3] in [0, 1] as a PNG, atomically."""
    from PIL import Image

    with atomic_path(path) as temporary:
        Image.fromarray(to_bytes(picture)).save(temporary, format="PNG")


def _checked(frames: torch.Tensor) -> torch.Tensor:
    if not isinstance(frames, torch.Tensor) or frames.dim() != 4 or frames.shape[3] != 3 or 0 in frames.shape:
        got = list(frames.shape) if isinstance(frames, torch.Tensor) else type(frames).__name__
        raise ValueError(f"frames: expected a tensor of shape [frames, height, width, 3], none of them 0, got {got}")
    return frames


def write_turntable(path: str | Path, frames: torch.Tensor, fps: float = 15.0) -> None:
    """Write frames [N, H, W, 3] in [0, 1] as an endless GIF, atomically; all share one palette, so nothing flickers."""
    from PIL import Image

    images = [Image.fromarray(f) for f in to_bytes(_checked(frames))]
    # The palette of a strip of up to 8 of the frames serves all.
    chosen = images[:: max(1, len(images) // 8)]
    strip = Image.new("RGB", (chosen[0].width * len(chosen), chosen[0].height))
    for i, image in enumerate(chosen):
        strip.paste(image, (i * image.width, 0))
    palette = strip.quantize(256)
    images = [image.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG) for image in images]
    with atomic_path(path) as temporary:
        images[0].save(temporary, format="GIF", save_all=True, append_images=images[1:], loop=0,
                       duration=max(20, round(1000 / fps)), disposal=1)


def write_views(
    path: str | Path, frames: torch.Tensor, labels: Sequence[str] | None = None, columns: int = 4, gap: int = 4
) -> None:
    """Write frames [N, H, W, 3] in [0, 1] as one PNG, `columns` a row, each with its label, atomically."""
    from PIL import Image, ImageDraw

    data = to_bytes(_checked(frames))
    count, height, width = data.shape[:3]
    if labels is not None and len(labels) != count:
        raise ValueError(f"labels: expected {count}, one for each frame, got {len(labels)}")
    columns = min(columns, count)
    rows = -(-count // columns)
    line = 16 if labels is not None else 0
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + line + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i in range(count):
        left, top = gap + i % columns * (width + gap), gap + i // columns * (height + line + gap)
        sheet.paste(Image.fromarray(data[i]), (left, top))
        if labels is not None:
            draw.text((left + width / 2, top + height + line / 2), labels[i], fill="black", anchor="mm")
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG")
