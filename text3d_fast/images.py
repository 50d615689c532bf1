"""Picture files: read with limits; PNG, turntables and contact sheets from tensors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from text3d_fast.files import atomic_path

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_PIXELS = 64 << 20  # of a picture that is read
LARGEST_SIDE = 4096  # larger ones are reduced to it


def beside(folder: Path, name: str, most_bytes: int) -> Path:
    """A file that another one in `folder` names, there or in a folder below.

    Raises ValueError for an address, a place outside `folder`, or a file of more than `most_bytes`; OSError if missing.
    """
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+:", name):
        raise ValueError(f"{name[:60]!r} is an address, not a file beside the mesh")
    path, root = (folder / name).resolve(), folder.resolve()
    if not path.is_relative_to(root):
        raise ValueError(f"{name[:60]!r} lies outside the mesh's folder")
    if not path.is_file():
        raise FileNotFoundError(f"no file {name[:60]!r} beside the mesh")
    if path.stat().st_size > most_bytes:
        raise ValueError(f"{name[:60]!r} has more than {most_bytes >> 20} MB")
    return path


def read_image(source: str | Path | bytes, name: str):
    """A file, or its content, as an RGB image of PIL with sides up to 4096; 16 bits become 8.

    Raises ValueError that begins with `name` if it is no picture, damaged or of more than 64 megapixels; OSError if the
    file cannot be opened.
    """
    import io
    import warnings

    from PIL import Image

    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise ValueError(f"{image.width} x {image.height} pixels are more than {MOST_PIXELS >> 20} million")
                if image.mode.startswith("I"):  # 16 bits of grey; converting would clamp them
                    grey = np.asarray(image).astype(np.int64).clip(0, 65535)
                    image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
                image = image.convert("RGB")
    except Image.DecompressionBombError:
        raise ValueError(f"{name}: a picture of more than {MOST_PIXELS >> 20} million pixels") from None
    except Image.UnidentifiedImageError:
        raise ValueError(f"{name}: not a readable image") from None
    except (OSError, SyntaxError, ValueError) as error:  # PIL's words for damage
        raise ValueError(f"{name}: {error}") from error
    if max(image.size) > LARGEST_SIDE:
        image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    return image


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


def video_writer():
    """imageio with FFmpeg. ImportError says what to install where there is none."""
    try:
        import imageio.v3
        import imageio_ffmpeg  # noqa: F401
    except ImportError:
        raise ImportError("mp4 needs FFmpeg, which is 70 MB: pip install 'text3d-fast[video]'") from None
    return imageio.v3


def write_video(path: str | Path, frames: torch.Tensor, fps: float = 24.0) -> None:
    """Write frames [N, H, W, 3] in [0, 1] as an MP4 (H.264, sides even), atomically. ImportError without FFmpeg."""
    writer, data = video_writer(), to_bytes(_checked(frames))
    data = data[:, : data.shape[1] // 2 * 2, : data.shape[2] // 2 * 2]
    with atomic_path(path) as temporary:
        writer.imwrite(temporary, data, extension=".mp4", plugin="FFMPEG", fps=fps, codec="libx264", quality=8,
                       macro_block_size=2, ffmpeg_log_level="error")


def contact_sheet(
    frames: torch.Tensor, labels: Sequence[str] | None = None, columns: int = 4, gap: int = 4
) -> Image:
    """Frames [N, H, W, 3] in [0, 1] in one picture, `columns` a row, each with its label."""
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
    return sheet


def write_views(
    path: str | Path, frames: torch.Tensor, labels: Sequence[str] | None = None, columns: int = 4, gap: int = 4
) -> None:
    """Write `contact_sheet` as a PNG, atomically."""
    sheet = contact_sheet(frames, labels, columns, gap)
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG")
