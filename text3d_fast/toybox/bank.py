"""Banks of Toybox renders: a few members of a caption's family from many cameras, rendered once and kept on disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from text3d_fast.files import atomic_path
from text3d_fast.toybox.captions import caption
from text3d_fast.toybox.objects import CLASSES, COLORS
from text3d_fast.toybox.render import Light, camera_frame, random_light, shade, trace
from text3d_fast.toybox.scenes import Description, Scene, Thing, build_scene, middle_parameters, sample_parameters

VERSION = 3  # of scenes and renderer: older banks on disk are not read


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread: for thousands of small operations, where threads mostly wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def cache_folder() -> Path:
    """Where banks live: $TEXT3D_CACHE, or text3d-fast in the user's cache folder; without a home, a temporary one."""
    chosen = os.environ.get("TEXT3D_CACHE")
    if chosen:
        return Path(chosen)
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # neither HOME nor an entry in passwd, as in some containers
        caches = Path(tempfile.gettempdir())
    return caches / "text3d-fast"


def even_cameras(count: int, low: float = -12.0, high: float = 82.0) -> torch.Tensor:
    """Cameras [count, 3] (elevation, azimuth in radians, distance), even over the zone of elevations low..high degrees.

    A golden-angle spiral; the distances 2.5 to 3 follow a low-discrepancy sequence.
    """
    k = torch.arange(count, dtype=torch.float64)
    bottom, top = math.sin(math.radians(low)), math.sin(math.radians(high))
    elevation = torch.asin(bottom + (top - bottom) * (k + 0.5) / count)
    azimuth = (k * math.pi * (3 - 5**0.5)) % (2 * math.pi)
    distance = 2.5 + 0.5 * ((k * 0.7548776662466927) % 1)
    return torch.stack([elevation, azimuth, distance], -1).float()


def angles_between(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Angles [A, B] in radians between the viewing directions of cameras [A, >=2] and [B, >=2]."""

    def direction(camera: torch.Tensor) -> torch.Tensor:
        elevation, azimuth = camera[:, 0].double(), camera[:, 1].double()
        flat = elevation.cos()
        return torch.stack([flat * azimuth.sin(), elevation.sin(), flat * azimuth.cos()], -1)

    return (direction(first) @ direction(second).T).clamp(-1, 1).acos()


@dataclass(frozen=True)
class Bank:
    """images uint8 [cameras, members, H, W, 4] (premultiplied rgb, alpha), mapped from disk where they are cached, and
    cameras [cameras, 3].
    """

    images: np.ndarray
    cameras: torch.Tensor

    @property
    def members(self) -> int:
        return self.images.shape[1]


def family(description: Description, members: int) -> list[Scene]:
    """The typical member of a description's class and `members` - 1 random ones, always the same."""
    generator = torch.Generator().manual_seed(20_240)
    parameters = [middle_parameters(description)]
    parameters += [sample_parameters(description, generator) for _ in range(members - 1)]
    return [build_scene(description, chosen) for chosen in parameters]


def caption_bank(description: Description, cameras: int = 500, members: int = 2, size: int = 64, **options) -> Bank:
    """The bank of one caption (its view word does not count)."""
    plain = replace(description, view=None)
    name = f"{caption(plain)}|{members}"
    return _cached(name, lambda: family(plain, members), plain.style, even_cameras(cameras), size, **options)


def empty_bank(cameras: int = 48, size: int = 64, **options) -> Bank:
    """The bank of the empty caption: one member of every class, the colours spread over the classes."""

    def scenes() -> list[Scene]:
        colors = list(COLORS)
        return [build_scene(Description(Thing(kind, colors[(3 * k) % 8]))) for k, kind in enumerate(CLASSES)]

    return _cached("", scenes, "shaded", even_cameras(cameras), size, **options)


def _cached(name: str, scenes, style: str, cameras: torch.Tensor, size: int, progress: bool = True) -> Bank:
    key = json.dumps([VERSION, name, len(cameras), size])
    path = cache_folder() / "toybox" / f"bank-{hashlib.sha256(key.encode()).hexdigest()[:20]}.npy"
    known = _mapped(path, len(cameras), size)
    if known is not None:
        return Bank(known, cameras)
    images = _render(name, scenes(), style, cameras, size, progress)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as part:
            np.save(part, images)
        images = _mapped(path, len(cameras), size)
    except OSError:
        pass  # an unwritable cache only costs the time to render again
    return Bank(images, cameras)


def _mapped(path: Path, cameras: int, size: int) -> np.ndarray | None:
    """The bank on disk, read as far as it is looked at; None if it is not there, or cut short: render it again."""
    try:
        images = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return images if images.shape[0] == cameras and images.shape[2:] == (size, size, 4) else None


@torch.no_grad()
def _render(name: str, scenes: list[Scene], style: str, cameras: torch.Tensor, size: int, progress: bool) -> np.ndarray:
    from rich.console import Console
    from rich.progress import Progress

    images = np.empty((len(cameras), len(scenes), size, size, 4), np.uint8)
    generator = torch.Generator().manual_seed(7)
    eyes = camera_frame(cameras[:, 0], cameras[:, 1])[..., 2] * cameras[:, 2:]
    jobs = [(member, rows, random_light(eyes[rows], generator)) for member in range(len(scenes))
            for rows in torch.arange(len(cameras)).split(max(1, 16 * 64**2 // size**2))]

    def draw(member: int, rows: torch.Tensor, light: Light) -> int:
        with torch.no_grad():  # of this thread
            surface = trace(scenes[member], *cameras[rows].unbind(1), size)
            image = shade(surface, light, style)
        images[rows.numpy(), member] = (image * 255).round().to(torch.uint8).numpy()
        return len(rows)

    workers = torch.get_num_threads()
    with (
        one_thread(), ThreadPoolExecutor(workers) as pool,
        Progress(console=Console(stderr=True), transient=True, disable=not progress) as bar,
    ):
        task = bar.add_task(f"rendering {name.split('|')[0] or 'the empty caption'}", total=len(cameras) * len(scenes))
        for done in pool.map(lambda job: draw(*job), jobs):
            bar.advance(task, done)
    return images
