"""Texture sampling in plain torch: the oracle for `ops.texture`. Any floating dtype, differentiable."""

from collections.abc import Sequence

import torch

FILTERS = ("nearest", "linear", "linear-mipmap-nearest", "linear-mipmap-linear")
BOUNDARIES = ("wrap", "clamp", "zero", "cube")

# OpenGL cube faces +X -X +Y -Y +Z -Z: for each the major axis and its sign, then the axis and sign of s and of t.
CUBE_FACES = (
    (0, 1, 2, -1, 1, -1),
    (0, -1, 2, 1, 1, -1),
    (1, 1, 0, 1, 2, 1),
    (1, -1, 0, 1, 2, -1),
    (2, 1, 0, 1, 1, -1),
    (2, -1, 0, -1, 1, -1),
)


def downsample(level: torch.Tensor) -> torch.Tensor:
    """One mip step of [..., H, W, C]: the mean of 2 x 2 texels; a side of 1 stays 1.

    Sums of slices: a mean over two dimensions, both inner ones, takes torch 15 times as long on a CPU.
    """
    *lead, height, width, channels = level.shape
    scale = 1.0
    if height > 1:
        upper, lower = level.reshape(*lead, height // 2, 2, width * channels).unbind(-2)
        level, height, scale = upper + lower, height // 2, scale / 2
    if width > 1:
        left, right = level.reshape(*lead, height, width // 2, 2, channels).unbind(-2)
        level, width, scale = left + right, width // 2, scale / 2
    return level.reshape(*lead, height, width, channels) * scale


def cube_coordinates(direction: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Directions [..., 3] -> face [...] and (s, t) [..., 2] in [0, 1], differentiable within the face."""
    magnitude = direction.abs()
    axis = torch.where((magnitude[..., 2] > magnitude[..., 0]) & (magnitude[..., 2] > magnitude[..., 1]), 2,
                       torch.where(magnitude[..., 1] > magnitude[..., 0], 1, 0))  # ties: x before y before z
    major = direction.gather(-1, axis[..., None])[..., 0]
    face = 2 * axis + (major < 0)
    table = torch.tensor(CUBE_FACES, device=direction.device)[face]
    signs = table[..., [3, 5]].to(direction.dtype)
    st = direction.gather(-1, table[..., [2, 4]]) * signs / major.abs()[..., None]
    return face, 0.5 * st + 0.5


def cube_texel(
    face: torch.Tensor, column: torch.Tensor, row: torch.Tensor, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Texels up to one step outside a face -> linear index over the six faces, and whether it lies off a corner."""
    table = torch.tensor(CUBE_FACES, device=face.device)[face]
    axis, sign, s_axis, s_sign, t_axis, t_sign = table.unbind(-1)
    # Surface coordinates in half texels: the face's plane at +-size, centres at odd or even steps in between.
    s, t = 2 * column + 1 - size, 2 * row + 1 - size
    off = (s.abs() > size) | (t.abs() > size)
    corner = (s.abs() > size) & (t.abs() > size)
    point = torch.zeros((*face.shape, 3), dtype=torch.long, device=face.device)
    point = point.scatter(-1, axis[..., None], (sign * torch.where(off, size - 1, size))[..., None])
    point = point.scatter(-1, s_axis[..., None], (s_sign * s.clamp(-size, size))[..., None])
    point = point.scatter(-1, t_axis[..., None], (t_sign * t.clamp(-size, size))[..., None])
    # Folded over the edge: the coordinate that overshot is now the major one.
    major = (point.abs() == size).long().argmax(-1)
    new_face = 2 * major + (point.gather(-1, major[..., None])[..., 0] < 0)
    table = torch.tensor(CUBE_FACES, device=face.device)[new_face]
    s = point.gather(-1, table[..., 2:3])[..., 0] * table[..., 3]
    t = point.gather(-1, table[..., 4:5])[..., 0] * table[..., 5]
    column, row = (s + size - 1) // 2, (t + size - 1) // 2
    return (new_face * size + row.clamp(0, size - 1)) * size + column.clamp(0, size - 1), corner


def _fetch(level: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """level [B or 1, texels, C], index [B, N] -> [B, N, C]"""
    level = level.expand(index.shape[0], -1, -1)
    return level.gather(1, index[..., None].expand(-1, -1, level.shape[-1]))


def sample_level(level: torch.Tensor, coordinates: torch.Tensor, boundary: str, nearest: bool) -> torch.Tensor:
    """One level at [B, N, 2] (cube: directions [B, N, 3]) -> [B, N, C]."""
    cube = boundary == "cube"
    height, width = level.shape[-3:-1]
    texels = level.reshape(level.shape[0], (6 if cube else 1) * height * width, level.shape[-1])
    if cube:
        face, st = cube_coordinates(coordinates)
    else:
        st = coordinates - coordinates.floor() if boundary == "wrap" else coordinates
    size = torch.tensor([width, height], dtype=st.dtype, device=st.device)
    if nearest:
        column, row = (st * size).floor().clamp(-1, max(width, height)).long().unbind(-1)
        inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        column, row = column.clamp(0, width - 1), row.clamp(0, height - 1)
        index = row * width + column + (face * width * height if cube else 0)
        value = _fetch(texels, index)
        return value * inside[..., None] if boundary == "zero" else value
    position = st * size - 0.5
    if boundary == "clamp":
        position = torch.minimum(position.clamp(min=0), size - 1)
    if boundary == "zero":
        position = torch.minimum(position.clamp(min=-1), size)  # one texel of zeros around is all of the outside
    low = position.detach().floor()
    fraction = position - low
    column, row = low.long().unbind(-1)
    values, corners, weights = [], [], []
    for dy in (0, 1):
        for dx in (0, 1):
            x, y = column + dx, row + dy
            weight = fraction[..., 0] if dx else 1 - fraction[..., 0]
            weight = weight * (fraction[..., 1] if dy else 1 - fraction[..., 1])
            corner = torch.zeros_like(x, dtype=torch.bool)
            if cube:
                index, corner = cube_texel(face, x, y, width)
            elif boundary == "wrap":
                index = y % height * width + x % width
            else:
                index = y.clamp(0, height - 1) * width + x.clamp(0, width - 1)
            value = _fetch(texels, index)
            if boundary == "zero":
                value = value * ((x >= 0) & (x < width) & (y >= 0) & (y < height))[..., None]
            values.append(value), corners.append(corner), weights.append(weight)
    # Off a cube's corner there is no texel: its weight goes to the other three in equal parts.
    missing = sum(w * c for w, c in zip(weights, corners)) / 3
    kept = [torch.where(c, torch.zeros_like(w), w + missing) for w, c in zip(weights, corners)]
    return sum(w[..., None] * v for w, v in zip(kept, values))


def _at_least(x: torch.Tensor, bound: float) -> torch.Tensor:
    """The larger of both; the bound for NaN."""
    return torch.where(x > bound, x, torch.full_like(x, bound))


def mip_level(coordinates, uv_da, bias, height, width, levels, boundary):
    """Level [B, N] in [0, levels - 1] from image-space derivatives [B, N, 4] (cube: [B, N, 6]).

    On a cube the derivatives are projected at the direction as it is: the level passes no gradient to the direction.
    """
    coordinates = coordinates.detach()
    if uv_da is None:
        level = torch.zeros_like(coordinates[..., 0])
    else:
        # NaN is the finest level, without a gradient
        derivative = torch.where(uv_da.isnan().any(-1, keepdim=True), torch.zeros_like(uv_da), uv_da)
        derivative = derivative.reshape(*uv_da.shape[:-1], uv_da.shape[-1] // 2, 2)  # [..., coordinate, (X, Y)]
        if boundary == "cube":
            face, st = cube_coordinates(coordinates)
            axis, sign, s_axis, s_sign, t_axis, t_sign = torch.tensor(CUBE_FACES, device=face.device)[face].unbind(-1)
            pick = lambda a: derivative.gather(-2, a[..., None, None].expand(*a.shape, 1, 2))[..., 0, :]
            major = coordinates.gather(-1, axis[..., None]).abs()
            d_major = pick(axis) * sign[..., None]
            centred = 2 * st - 1
            derivative = torch.stack(
                [0.5 * (pick(s_axis) * s_sign[..., None] - centred[..., :1] * d_major) / major,
                 0.5 * (pick(t_axis) * t_sign[..., None] - centred[..., 1:] * d_major) / major], -2)
        size = torch.tensor([width, height], dtype=derivative.dtype, device=derivative.device)
        d = derivative * size[:, None]
        a, b, c = (d[..., 0] ** 2).sum(-1), (d[..., 1] ** 2).sum(-1), (d[..., 0] * d[..., 1]).sum(-1)
        root = _at_least(0.25 * (a - b) ** 2 + c**2, 1e-30).sqrt()
        level = 0.5 * torch.log2(_at_least(0.5 * (a + b) + root, 1e-30))
    if bias is not None:
        level = level + torch.where(bias.isnan(), -torch.inf, bias)
    return level.clamp(0, levels - 1)


def texture(
    mips: Sequence[torch.Tensor],
    uv: torch.Tensor,
    uv_da: torch.Tensor | None,
    bias: torch.Tensor | None,
    filter_mode: str,
    boundary_mode: str,
) -> torch.Tensor:
    """mips: level 0 first, each [B or 1, H, W, C] (cube: [B or 1, 6, N, N, C]); the rest as `ops.texture`."""
    batch, height, width = uv.shape[:3]
    coordinates = uv.reshape(batch, height * width, uv.shape[-1])
    # NaN and infinite coordinates and the direction 0 sample 0 and pass no gradient: look up any other place for them.
    valid = coordinates.isfinite().all(-1, keepdim=True)
    if boundary_mode == "cube":
        valid = valid & (coordinates != 0).any(-1, keepdim=True)
    coordinates = torch.where(valid, coordinates, torch.ones_like(coordinates))
    if filter_mode in ("nearest", "linear"):
        out = sample_level(mips[0], coordinates, boundary_mode, filter_mode == "nearest")
        return torch.where(valid, out, 0).reshape(batch, height, width, mips[0].shape[-1])
    flat = lambda x: None if x is None else x.reshape(batch, height * width, *x.shape[3:])
    level = mip_level(coordinates, flat(uv_da), flat(bias), *mips[0].shape[-3:-1], len(mips), boundary_mode)
    if filter_mode == "linear-mipmap-nearest":
        chosen = (level.detach() + 0.5).floor().clamp(max=len(mips) - 1)
        weights = [(chosen == i).to(level.dtype) for i in range(len(mips))]
    else:
        low = level.detach().floor().clamp(max=max(len(mips) - 2, 0))
        fraction = level - low
        weights = [(low == i) * (1 - fraction) + (low == i - 1) * fraction for i in range(len(mips))]
    out = sum(w[..., None] * sample_level(m, coordinates, boundary_mode, False) for w, m in zip(weights, mips))
    return torch.where(valid, out, 0).reshape(batch, height, width, mips[0].shape[-1])
