"""Perspective cameras around the origin, and how they are drawn during optimization.

Y is up, an object's front faces +Z. Azimuth turns from +Z towards +X (0 front, 90 the object's left side, 180 back,
270 its right side), elevation rises from the horizon. Cameras look along their own -Z with +X right and +Y up (OpenGL).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass
class Cameras:
    """B perspective cameras with square pixels that share one image size.

    camera_to_world  [B, 4, 4]
    fov_y            [B] vertical field of view, radians
    height, width    pixels
    elevation, azimuth, distance   [B], radians and world units, where the camera was placed on a sphere; None otherwise
    window           [B, 3] (x, y, size) of the part of the picture that is shown, None: all of it. The whole picture is
                     -1..1 in x (right) and y (up), a window reaches `size` to each side of (x, y): (0, 0, 1) is
                     everything, (0, 0, 0.5) a focal length twice as long, (0.5, 0.5, 0.5) the upper right quarter
    """

    camera_to_world: Tensor
    fov_y: Tensor
    height: int
    width: int
    elevation: Tensor | None = None
    azimuth: Tensor | None = None
    distance: Tensor | None = None
    window: Tensor | None = None

    def __post_init__(self) -> None:
        if self.camera_to_world.ndim != 3 or tuple(self.camera_to_world.shape[1:]) != (4, 4):
            raise ValueError(f"camera_to_world: expected shape [B, 4, 4], got {list(self.camera_to_world.shape)}")
        count = len(self.camera_to_world)
        for name in ("fov_y", "elevation", "azimuth", "distance"):
            value = getattr(self, name)
            if value is not None and tuple(value.shape) != (count,):
                raise ValueError(f"{name}: expected shape [{count}], got {list(value.shape)}")
        if self.window is not None and tuple(self.window.shape) != (count, 3):
            raise ValueError(f"window: expected shape [{count}, 3], got {list(self.window.shape)}")
        if self.height < 1 or self.width < 1:
            raise ValueError(f"height, width: expected positive sizes, got {self.height}, {self.width}")

    def __len__(self) -> int:
        return len(self.camera_to_world)

    def __getitem__(self, rows: slice | Tensor) -> Cameras:
        """Some of the cameras: a slice, or a tensor of indices or booleans."""
        if isinstance(rows, int):
            rows = slice(rows, rows + 1 or None)
        return self._map(lambda value: value[rows])

    @property
    def device(self) -> torch.device:
        return self.camera_to_world.device

    @property
    def position(self) -> Tensor:
        """[B, 3] in the world."""
        return self.camera_to_world[:, :3, 3]

    @property
    def condition(self) -> Tensor | None:
        """[B, 3] elevation, azimuth (radians), distance as `guidance.Conditions.camera` takes them; None if unknown."""
        if self.elevation is None or self.azimuth is None or self.distance is None:
            return None
        return torch.stack([self.elevation, self.azimuth, self.distance], -1)

    def to(self, device: torch.device | str) -> Cameras:
        return self._map(lambda value: value.to(device))

    def _map(self, function: Callable[[Tensor], Tensor]) -> Cameras:
        fields = (self.camera_to_world, self.fov_y, self.elevation, self.azimuth, self.distance, self.window)
        matrix, fov_y, *known = (None if value is None else function(value) for value in fields)
        return Cameras(matrix, fov_y, self.height, self.width, *known)

    def resized(self, height: int, width: int | None = None) -> Cameras:
        """The same cameras with another number of pixels (width defaults to height)."""
        return replace(self, height=height, width=height if width is None else width)

    def zoomed(self, window: Tensor) -> Cameras:
        """The same cameras showing a part [B, 3] of what they show now (see `window`)."""
        if self.window is not None:
            x, y, size = self.window.unbind(-1)
            window = torch.stack([x + size * window[:, 0], y + size * window[:, 1], size * window[:, 2]], -1)
        return replace(self, window=window.to(self.device))

    def rays(self) -> tuple[Tensor, Tensor]:
        """Origins and unit directions through the pixel centres, both [B, height, width, 3]; row 0 is the top."""
        half = torch.tan(self.fov_y / 2)
        options = {"dtype": half.dtype, "device": half.device}
        up = 1 - (torch.arange(self.height, **options) + 0.5) * 2 / self.height
        right = ((torch.arange(self.width, **options) + 0.5) * 2 / self.width - 1) * self.width / self.height
        local = torch.stack(torch.broadcast_tensors(right[None], up[:, None]), -1)
        if self.window is not None:
            centre = self.window[:, None, None, :2] * local.new_tensor([self.width / self.height, 1.0])
            local = centre + self.window[:, None, None, 2:] * local
        rotation = self.camera_to_world[:, None, None, :3, :3]
        offset = (rotation[..., :2] * (local * half[:, None, None, None])[..., None, :]).sum(-1)
        direction = offset - rotation[..., 2]
        direction = direction / direction.norm(dim=-1, keepdim=True)
        return self.position[:, None, None].expand_as(direction), direction

    def world_to_camera(self) -> Tensor:
        """[B, 4, 4], the inverse of camera_to_world (a rotation and a translation)."""
        rotation = self.camera_to_world[:, :3, :3].transpose(1, 2)
        inverse = torch.zeros_like(self.camera_to_world)
        inverse[:, :3, :3] = rotation
        inverse[:, :3, 3] = -(rotation @ self.position[..., None])[..., 0]
        inverse[:, 3, 3] = 1
        return inverse

    def projection(self, near: float = 0.1, far: float = 100.0) -> Tensor:
        """[B, 4, 4] OpenGL clip matrix (camera to clip space, depth -1..1 from near to far)."""
        focal = 1 / torch.tan(self.fov_y / 2)
        matrix = focal.new_zeros(len(self), 4, 4)
        matrix[:, 0, 0] = focal * self.height / self.width
        matrix[:, 1, 1] = focal
        matrix[:, 2, 2] = -(far + near) / (far - near)
        matrix[:, 2, 3] = -2 * far * near / (far - near)
        matrix[:, 3, 2] = -1
        if self.window is not None:  # clip x, y become (x - centre w) / size, and w is -z
            x, y, part = self.window.unbind(-1)
            matrix[:, 0, 2], matrix[:, 1, 2] = x / part, y / part
            matrix[:, :2, :2] = matrix[:, :2, :2] / part[:, None, None]
        return matrix

    @staticmethod
    def look_at(position: Tensor, target: Tensor | None, fov_y: Tensor, height: int, width: int | None = None,
                up: Tensor | None = None, **known: Tensor | None) -> Cameras:
        """Cameras at position [B, 3] that look at target [B, 3] (default: the origin), up [B, 3] (default: +Y).

        Looking straight along `up` is allowed: the picture's top is then the limit from lower elevations.
        """
        target = torch.zeros_like(position) if target is None else target
        up = position.new_tensor([0.0, 1.0, 0.0]).expand_as(position) if up is None else up
        backward = torch.nn.functional.normalize(position - target, dim=-1)
        right = torch.linalg.cross(up, backward)
        azimuth = known.get("azimuth")
        if azimuth is not None:
            spare = torch.stack([torch.cos(azimuth), torch.zeros_like(azimuth), -torch.sin(azimuth)], -1).to(position)
        else:
            spare = position.new_tensor([1.0, 0.0, 0.0]).expand_as(position)
        right = torch.where(right.norm(dim=-1, keepdim=True) < 1e-6, spare, right)
        right = torch.nn.functional.normalize(right, dim=-1)
        matrix = torch.zeros(len(position), 4, 4, dtype=position.dtype, device=position.device)
        matrix[:, :3, 0] = right
        matrix[:, :3, 1] = torch.linalg.cross(backward, right)
        matrix[:, :3, 2] = backward
        matrix[:, :3, 3] = position
        matrix[:, 3, 3] = 1
        return Cameras(matrix, fov_y, height, height if width is None else width, **known)

    @staticmethod
    def orbit(elevation: Tensor | float, azimuth: Tensor | float, distance: Tensor | float, fov_y: Tensor | float,
              size: int | tuple[int, int], device: torch.device | str | None = None) -> Cameras:
        """Cameras on a sphere that look at the origin.

        elevation, azimuth, fov_y in radians, distance in world units: numbers or tensors [B] (broadcast together);
        size is the pixels of a square image, or (height, width).
        """
        values = [torch.as_tensor(value, dtype=torch.float32, device=device).reshape(-1)
                  for value in (elevation, azimuth, distance, fov_y)]
        elevation, azimuth, distance, fov_y = (value.clone() for value in torch.broadcast_tensors(*values))
        height, width = (size, size) if isinstance(size, int) else size
        return Cameras.look_at(sphere_point(elevation, azimuth, distance), None, fov_y, height, width,
                               elevation=elevation, azimuth=azimuth, distance=distance)


def sphere_point(elevation: Tensor, azimuth: Tensor, distance: Tensor) -> Tensor:
    """[B, 3] world position of a point on the sphere, angles in radians."""
    flat = distance * torch.cos(elevation)
    return torch.stack([flat * torch.sin(azimuth), distance * torch.sin(elevation), flat * torch.cos(azimuth)], -1)


@dataclass
class CameraDistribution:
    """Random cameras for optimization. Angles in degrees, lengths in world units; every range is (low, high).

    elevation        drawn uniform in angle; with `area`, that share of the draws is uniform in area on the sphere
    jitter_position  half-width of a uniform offset of the position in each coordinate
    jitter_target    standard deviation of the point looked at
    jitter_up        standard deviation added to the up vector
    zoom             each picture shows a part of it, so many times larger, anywhere inside; (1, 1): all of it

    The angles and distance that cameras carry (and priors are given) are those before the jitter.
    """

    elevation: tuple[float, float] = (-10.0, 60.0)
    azimuth: tuple[float, float] = (0.0, 360.0)
    distance: tuple[float, float] = (2.5, 3.0)
    fov_y: tuple[float, float] = (40.0, 40.0)
    area: float = 0.0
    jitter_position: float = 0.0
    jitter_target: float = 0.0
    jitter_up: float = 0.0
    zoom: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        for name in ("elevation", "azimuth", "distance", "fov_y", "zoom"):
            low, high = getattr(self, name)
            if not low <= high:
                raise ValueError(f"{name}: expected (low, high) with low <= high, got ({low}, {high})")
            setattr(self, name, (float(low), float(high)))
        if self.distance[0] <= 0 or self.fov_y[0] <= 0 or self.fov_y[1] >= 180:
            raise ValueError("distance, fov_y: expected positive distances and angles between 0 and 180 degrees")
        if self.zoom[0] < 1:
            raise ValueError(f"zoom: expected at least 1, got {self.zoom}")

    @classmethod
    def dreamfusion(cls, size: int = 64) -> CameraDistribution:
        """DreamFusion's ranges (Poole et al., appendix A.2), for an object in a ball of radius about 0.7."""
        focal = [math.degrees(2 * math.atan(size / 2 / (share * size))) for share in (1.35, 0.7)]
        return cls(elevation=(-10, 90), distance=(1.0, 1.5), fov_y=(focal[0], focal[1]), area=0.5,
                   jitter_position=0.1, jitter_target=0.2, jitter_up=0.02)

    def scaled(self, factor: float) -> CameraDistribution:
        """The same views of a scene that is `factor` times as large."""
        return replace(self, distance=(self.distance[0] * factor, self.distance[1] * factor),
                       jitter_position=self.jitter_position * factor, jitter_target=self.jitter_target * factor)

    def choose(self, known: Tensor, count: int, size: int | tuple[int, int],
               generator: torch.Generator | None = None) -> Cameras:
        """`count` of the `known` cameras [N, 3] (elevation, azimuth in radians, distance) within the elevations.

        For priors that know a finite set of views exactly. ValueError if none of them lies in the range.
        """
        low, high = self.elevation
        degrees = torch.rad2deg(known[:, 0])
        inside = known[(degrees >= low - 1e-3) & (degrees <= high + 1e-3)]
        if not len(inside):
            raise ValueError(f"elevation: none of the {len(known)} known cameras lies within {low} to {high} degrees")
        rows = torch.randint(len(inside), (count,), generator=generator)
        cameras = Cameras.orbit(*inside[rows].unbind(1), math.radians(sum(self.fov_y) / 2), size)
        return self._zoomed(cameras, generator)

    def around(self, count: int, views: int, size: int | tuple[int, int],
               generator: torch.Generator | None = None) -> Cameras:
        """`count` cameras in groups of `views`: those of a group stand evenly round the object, at one elevation and
        distance and with one field of view, each looking at the middle. ValueError unless count is a multiple.
        """
        if count % views:
            raise ValueError(f"batch: expected a multiple of {views}, the prior's views of an object, got {count}")
        first = replace(self, jitter_position=0.0, jitter_target=0.0, jitter_up=0.0, zoom=(1.0, 1.0)).sample(
            count // views, size, generator)
        elevation, azimuth, distance, fov_y = (
            value.repeat_interleave(views) for value in (first.elevation, first.azimuth, first.distance, first.fov_y))
        turn = torch.arange(count) % views * (2 * math.pi / views)
        return Cameras.orbit(elevation, (azimuth + turn) % (2 * math.pi), distance, fov_y, size)

    def _zoomed(self, cameras: Cameras, generator: torch.Generator | None) -> Cameras:
        """Some part of each picture; draws nothing if `zoom` leaves no choice."""
        if self.zoom == (1.0, 1.0):
            return cameras
        source = cameras.device if generator is None else generator.device
        draw = torch.rand(len(cameras), 3, generator=generator, device=source).to(cameras.device)
        part = 1 / (self.zoom[0] + (self.zoom[1] - self.zoom[0]) * draw[:, 2:])
        return cameras.zoomed(torch.cat([(2 * draw[:, :2] - 1) * (1 - part), part], -1))

    def sample(self, count: int, size: int | tuple[int, int], generator: torch.Generator | None = None,
               device: torch.device | str | None = None) -> Cameras:
        """`count` cameras with images of `size`; the azimuths of a batch are spread, one in each of `count` sectors."""
        source = device if generator is None else generator.device

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return low + (high - low) * torch.rand(*(shape or (count,)), generator=generator, device=source)

        def normal(scale: float) -> Tensor:
            return scale * torch.randn(count, 3, generator=generator, device=source)

        angle = uniform(*self.elevation)
        low, high = (math.sin(math.radians(bound)) for bound in self.elevation)
        by_area = torch.rad2deg(torch.asin(uniform(low, high)))
        elevation = torch.deg2rad(torch.where(uniform(0, 1) < self.area, by_area, angle))
        sector = (self.azimuth[1] - self.azimuth[0]) / max(count, 1)
        start = torch.arange(count, device=source) * sector + self.azimuth[0]
        azimuth = start + uniform(0, sector)
        if self.azimuth[1] - self.azimuth[0] == 360.0:  # a full circle has no first sector
            azimuth = (azimuth + uniform(0, 360, 1)) % 360
        azimuth = torch.deg2rad(azimuth)
        distance = uniform(*self.distance)
        fov_y = torch.deg2rad(uniform(*self.fov_y))
        position = sphere_point(elevation, azimuth, distance)
        up = position.new_tensor([0.0, 1.0, 0.0]).expand(count, 3)
        target = None
        if self.jitter_position or self.jitter_target or self.jitter_up:
            position = position + uniform(-self.jitter_position, self.jitter_position, count, 3)
            target = normal(self.jitter_target)
            up = up + normal(self.jitter_up)
        height, width = (size, size) if isinstance(size, int) else size
        cameras = Cameras.look_at(position, target, fov_y, height, width, up,
                                  elevation=elevation, azimuth=azimuth, distance=distance)
        cameras = self._zoomed(cameras, generator)
        return cameras if device is None else cameras.to(device)
