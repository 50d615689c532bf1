"""Renders Toybox scenes by sphere tracing.

`trace` finds the surface seen by every sub-pixel, `shade` turns it into images: shaded (ambient + Lambertian point
light), textureless (the same on white) or a normal map. Images are premultiplied rgb and alpha, row 0 at the top.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from text3d_fast.toybox.scenes import Scene

FOV_Y = math.radians(40.0)
_BLOCK = 4  # sub-pixels a side that share the first, coarse march
_HIT = 8e-4
_NORMAL_STEP = 4e-3


@dataclass(frozen=True)
class Surface:
    """What B cameras see of a scene: S hits, in the order of `index`.

    index [S] int64: flat sub-pixel (view, row, column) of each hit, of shape (B, size * supersample, same);
    positions, normals, albedo [S, 3]; view [S] the camera of each hit; eye [B, 3] the camera positions.
    """

    index: torch.Tensor
    view: torch.Tensor
    positions: torch.Tensor
    normals: torch.Tensor
    albedo: torch.Tensor
    eye: torch.Tensor
    size: int
    supersample: int


@dataclass(frozen=True)
class Light:
    """A point light per view and an ambient term: position [B, 3], color [B, 3], ambient [B, 3]."""

    position: torch.Tensor
    color: torch.Tensor
    ambient: torch.Tensor


def camera_frame(elevation: torch.Tensor, azimuth: torch.Tensor) -> torch.Tensor:
    """Rotation [B, 3, 3] of orbit cameras (radians): columns right, up, backward (towards the camera)."""
    ce, se, ca, sa = elevation.cos(), elevation.sin(), azimuth.cos(), azimuth.sin()
    right = torch.stack([ca, torch.zeros_like(ca), -sa], -1)
    up = torch.stack([-se * sa, ce, -se * ca], -1)
    back = torch.stack([ce * sa, se, ce * ca], -1)
    return torch.stack([right, up, back], -1)


def _march(
    scene: Scene,
    origin: torch.Tensor,
    direction: torch.Tensor,
    start: torch.Tensor,
    stop: torch.Tensor,
    cone: float,
    steps: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Walks rays [R] until the surface is closer than cone * t + _HIT; returns t [R] and which arrived (bool [R])."""
    t, arrived = start.clone(), torch.zeros_like(start, dtype=torch.bool)
    active = torch.arange(len(t))
    where, o, d, end = t, origin, direction, stop
    for _ in range(steps):
        distance = scene.sdf(o + where[:, None] * d)
        limit = cone * where + _HIT
        near = distance < limit
        # a cone may only advance as far as its edge is free
        where = torch.where(near, where, where + (distance - cone * where) / (1 + cone))
        done = near | (where > end)
        if done.any():
            t[active] = where
            arrived[active[near]] = True
            keep = (~done).nonzero()[:, 0]
            if not len(keep):
                return t, arrived
            active, where, o, d, end = active[keep], where[keep], o[keep], d[keep], end[keep]
    t[active] = where
    arrived[active] = True  # grazing rays that never settle lie on a silhouette; the caller checks the distance left
    return t, arrived


def trace(
    scene: Scene,
    elevation: torch.Tensor,
    azimuth: torch.Tensor,
    distance: torch.Tensor,
    size: int = 64,
    supersample: int = 2,
    fov_y: float = FOV_Y,
) -> Surface:
    """Finds the visible surface for B orbit cameras (radians, world units, all [B]) that look at the origin."""
    views, side = len(elevation), size * supersample
    if side % _BLOCK:
        raise ValueError(f"size * supersample: expected a multiple of {_BLOCK}, got {side}")
    frame = camera_frame(elevation, azimuth)
    eye = frame[..., 2] * distance[:, None]
    half = math.tan(fov_y / 2)

    def rays(count: int, pixel: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        column, row, view = pixel % count, pixel // count % count, pixel // (count * count)
        u, v = ((column + 0.5) * 2 / count - 1) * half, (1 - (row + 0.5) * 2 / count) * half
        local = torch.nn.functional.normalize(torch.stack([u, v, -torch.ones_like(u)], -1), dim=-1)
        return view, eye[view], torch.einsum("rij,rj->ri", frame[view], local)

    def clip(origin: torch.Tensor, direction: torch.Tensor, radius: float) -> tuple[torch.Tensor, ...]:
        middle = -(origin * direction).sum(-1)
        inside = radius**2 - origin.square().sum(-1) + middle.square()
        width = inside.clamp_min(0).sqrt()
        return inside > 0, (middle - width).clamp_min(0.05), middle + width

    coarse = side // _BLOCK
    pixel = torch.arange(views * coarse * coarse)
    view, origin, direction = rays(coarse, pixel)
    cone = 2**0.5 * half / coarse
    # blocks at the edge of the ball: widen it by the block's reach
    seen, near, far = clip(origin, direction, scene.radius + 1.05 * cone * float(distance.max()))
    pixel, origin, direction = pixel[seen], origin[seen], direction[seen]
    t, arrived = _march(scene, origin, direction, near[seen], far[seen], cone, 32)
    pixel, t = pixel[arrived], t[arrived]

    offset = torch.arange(_BLOCK)
    view, row, column = pixel // (coarse * coarse), pixel // coarse % coarse, pixel % coarse
    rows = row[:, None, None] * _BLOCK + offset[:, None]
    columns = column[:, None, None] * _BLOCK + offset
    fine = ((view[:, None, None] * side + rows) * side + columns).reshape(-1)
    start = t.repeat_interleave(_BLOCK * _BLOCK)
    view, origin, direction = rays(side, fine)
    seen, near, far = clip(origin, direction, scene.radius)
    start = torch.maximum(start, near)
    seen &= start < far
    fine, view, origin, direction = fine[seen], view[seen], origin[seen], direction[seen]
    t, arrived = _march(scene, origin, direction, start[seen], far[seen], 0.0, 48)
    fine, view, t, origin, direction = fine[arrived], view[arrived], t[arrived], origin[arrived], direction[arrived]
    positions = origin + t[:, None] * direction
    left = scene.sdf(positions)
    close = left < 3 * _HIT
    if not close.all():
        fine, view, positions, direction = fine[close], view[close], positions[close], direction[close]
        left = left[close]
    positions = positions + left[:, None] * direction
    normals = scene.normals(positions, _NORMAL_STEP)
    return Surface(fine, view, positions, normals, scene.albedo(positions), eye, size, supersample)


def shade(surface: Surface, light: Light | None = None, style: str = "shaded") -> torch.Tensor:
    """Images [B, H, W, 4], premultiplied rgb and alpha in 0..1.

    shaded: albedo * (light colour * max(0, n . l) + ambient); textureless: the same with albedo 1;
    normal map: (n + 1) / 2 in world coordinates. `light` defaults to `default_light`.
    """
    if style == "normal map":
        color = (surface.normals + 1) / 2
    elif style in ("shaded", "textureless"):
        light = default_light(surface.eye) if light is None else light
        toward = torch.nn.functional.normalize(light.position[surface.view] - surface.positions, dim=-1)
        diffuse = (surface.normals * toward).sum(-1, keepdim=True).clamp_min(0)
        color = light.color[surface.view] * diffuse + light.ambient[surface.view]
        if style == "shaded":
            color = color * surface.albedo
        color = color.clamp(0, 1)
    else:
        raise ValueError(f"style: expected 'shaded', 'textureless' or 'normal map', got {style!r}")
    return to_image(surface, color)


def to_image(surface: Surface, values: torch.Tensor) -> torch.Tensor:
    """Averages values [S, C] over sub-pixels: [B, H, W, C + 1], premultiplied values and alpha."""
    views, size, sub = len(surface.eye), surface.size, surface.supersample
    canvas = values.new_zeros(views * (size * sub) ** 2, values.shape[-1] + 1)
    canvas[surface.index] = torch.cat([values, torch.ones_like(values[:, :1])], -1)
    return canvas.view(views, size, sub, size, sub, -1).mean((2, 4))


def default_light(eye: torch.Tensor) -> Light:
    """A white light up and to the right of each camera, with enough ambient light to tell every colour."""
    back = torch.nn.functional.normalize(eye, dim=-1)
    up = torch.tensor([0.0, 1.0, 0.0])
    right = torch.nn.functional.normalize(torch.linalg.cross(up.expand_as(back), back) + 1e-6, dim=-1)
    position = eye + 1.2 * up + 0.9 * right
    return Light(position, torch.full_like(eye, 0.65), torch.full_like(eye, 0.40))


def random_light(eye: torch.Tensor, generator: torch.Generator | None = None) -> Light:
    """A point light near each camera's side of the object (DreamFusion's distribution), nearly white."""
    count = len(eye)
    noise = torch.randn(count, 3, generator=generator)
    reach = 0.8 + 0.7 * torch.rand(count, 1, generator=generator)
    direction = torch.nn.functional.normalize(eye, dim=-1) * 1.2 + torch.tensor([0.0, 0.5, 0.0]) + 0.6 * noise
    length = eye.norm(dim=-1, keepdim=True)
    position = torch.nn.functional.normalize(direction, dim=-1) * length * reach.clamp_min(0.8)
    ambient = 0.30 + 0.25 * torch.rand(count, 1, generator=generator)
    tint = 1 + 0.04 * torch.randn(count, 3, generator=generator)
    return Light(position, (1.03 - ambient) * tint, ambient.expand(-1, 3))


def render(
    scene: Scene,
    elevation: torch.Tensor,
    azimuth: torch.Tensor,
    distance: torch.Tensor,
    size: int = 64,
    supersample: int = 2,
    light: Light | None = None,
    style: str = "shaded",
) -> torch.Tensor:
    """Images [B, size, size, 4] (premultiplied rgb, alpha) of a scene from B orbit cameras in radians."""
    return shade(trace(scene, elevation, azimuth, distance, size, supersample), light, style)


def over(image: torch.Tensor, background: torch.Tensor) -> torch.Tensor:
    """Premultiplied images [..., H, W, 4] over background colours broadcastable to [..., H, W, 3]."""
    return image[..., :3] + (1 - image[..., 3:]) * background
