"""What the rasterization examples share: matrices, a cube, and a report picture."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw


def perspective(half_width=0.4, near=1.0, far=50.0) -> torch.Tensor:
    """Clip-space projection [4, 4], y up; half_width is the tangent of half the field of view."""
    scale, depth = 1 / half_width, far - near
    rows = [[scale, 0, 0, 0], [0, scale, 0, 0], [0, 0, -(far + near) / depth, -2 * far * near / depth], [0, 0, -1, 0]]
    return torch.tensor(rows)


def translation(x, y, z) -> torch.Tensor:
    matrix = torch.eye(4)
    matrix[:3, 3] = torch.tensor([x, y, z])
    return matrix


def rotation(quaternion: torch.Tensor) -> torch.Tensor:
    """Quaternion [4] (w, x, y, z), normalized here -> [4, 4], differentiable."""
    w, x, y, z = torch.nn.functional.normalize(quaternion, dim=0)
    one, zero = torch.ones_like(w), torch.zeros_like(w)
    rows = [
        torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y), zero]),
        torch.stack([2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x), zero]),
        torch.stack([2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y), zero]),
        torch.stack([zero, zero, zero, one]),
    ]
    return torch.stack(rows)


def to_clip(matrix: torch.Tensor, vertices: torch.Tensor) -> torch.Tensor:
    """vertices [V, 3] -> [1, V, 4]"""
    return (torch.cat([vertices, torch.ones_like(vertices[:, :1])], 1) @ matrix.T)[None].contiguous()


def cube() -> tuple[torch.Tensor, torch.Tensor]:
    """Corners [8, 3] at +-1 and triangles [12, 3], counter-clockwise from outside."""
    corners = torch.tensor([[x, y, z] for x in (-1.0, 1.0) for y in (-1.0, 1.0) for z in (-1.0, 1.0)])
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    triangles = [t for a, b, c, d in quads for t in ((a, b, c), (a, c, d))]
    return corners, torch.tensor(triangles, dtype=torch.int32)


def write_report(path: str | Path, images: list[torch.Tensor], curves: dict[str, list[float]], side=256) -> None:
    """Images [H, W, 3] with row 0 at the bottom side by side, and under them the curves on a logarithmic scale."""
    width = side * len(images)
    sheet = Image.new("RGB", (width, 2 * side), "white")
    for i, image in enumerate(images):
        pixels = (image.detach().flip(0).clamp(0, 1).numpy() * 255).astype(np.uint8)
        sheet.paste(Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST), (i * side, 0))
    draw = ImageDraw.Draw(sheet)
    logs = {name: np.log10(np.maximum(values, 1e-12)) for name, values in curves.items()}
    low, high = min(v.min() for v in logs.values()), max(v.max() for v in logs.values())
    for decade in range(int(np.floor(low)), int(np.ceil(high)) + 1):
        y = 2 * side - 20 - (decade - low) / max(high - low, 1e-9) * (side - 40)
        if side < y < 2 * side:
            draw.line([(40, y), (width, y)], fill=(220, 220, 220))
            draw.text((2, y - 6), f"1e{decade}", fill="black")
    for (name, values), color in zip(logs.items(), ["crimson", "royalblue", "seagreen"]):
        xs = 40 + np.arange(len(values)) / max(len(values) - 1, 1) * (width - 50)
        ys = 2 * side - 20 - (values - low) / max(high - low, 1e-9) * (side - 40)
        draw.line(list(zip(xs.tolist(), ys.tolist())), fill=color, width=2)
        draw.text((xs[len(xs) // 2], ys[len(ys) // 2] - 14), name, fill=color)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
