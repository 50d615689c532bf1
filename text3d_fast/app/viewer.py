"""A picture of a mesh, relit, over a background or inside another scene; or a live view in the browser."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from text3d_fast.app.page import address_of, check_address, close_page, open_page
from text3d_fast.errors import OutputError
from text3d_fast.geometry import Mesh, glb_bytes, read_mesh
from text3d_fast.images import read_image, write_png
from text3d_fast.scene.cameras import Cameras
from text3d_fast.scene.lights import Lights
from text3d_fast.scene.mesh_renderer import MeshRendering, render_meshes

FOV = math.radians(40.0)
VIEW_NAME = r"(rgb|normal)_\d{3}\.png"  # of `export_views`


@dataclass
class ViewSettings:
    """Angles in degrees. distance: in radii of the mesh's bounding ball, None: so that it fills the picture.
    light: direction towards the light, in the world; colours are rgb in 0..1 (the light's may be brighter).
    """

    azimuth: float = 30.0
    elevation: float = 20.0
    distance: float | None = None
    size: int = 512
    light: tuple[float, float, float] = (0.6, 1.0, 0.8)
    light_color: tuple[float, float, float] = (0.8, 0.8, 0.8)
    ambient: tuple[float, float, float] = (0.3, 0.3, 0.3)
    background: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def checked(self) -> ViewSettings:
        """The same. ValueError names what is not a number or out of its range."""
        ranges = {"azimuth": (-1e6, 1e6), "elevation": (-90, 90), "distance": (0.1, 90), "size": (1, 8192),
                  "light": (-1e6, 1e6), "light_color": (0, 100), "ambient": (0, 100), "background": (0, 1)}
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            values = value if isinstance(value, tuple) else (value,)
            if value is not None and not all(low <= v <= high for v in values):
                given = " ".join(f"{v:g}" for v in values)
                raise ValueError(f"{name.replace('_', ' ')}: expected {low:g} to {high:g}, got {given}")
        if not any(self.light):
            raise ValueError("light: expected a direction other than 0 0 0")
        return self


def bounding_ball(mesh: Mesh) -> tuple[Tensor, float]:
    """The middle of the bounding box, and the largest distance of a vertex from it: float64, of what faces use.

    ValueError for a mesh without faces or without extent.
    """
    if not len(mesh.faces):
        raise ValueError("mesh: expected at least one face, got none")
    used = mesh.vertices[mesh.faces.unique().long()].double()
    center = (used.amin(0) + used.amax(0)) / 2
    radius = float((used - center).norm(dim=1).max())
    if not radius > 0:
        raise ValueError("mesh: all its points coincide, there is nothing to see")
    return center, radius


def _placed(mesh: Mesh, center: Tensor, radius: float) -> Mesh:
    """Moved and scaled in float64: coordinates may be anything that float32 holds. With normals."""
    placed = dataclasses.replace(mesh, vertices=((mesh.vertices.double() - center) / radius).float())
    return placed if placed.normals is not None else placed.with_normals()


def read_background(path: str | Path, size: int) -> Tensor:
    """An image as [1, size, size, 3] in 0..1, cropped to a square around its middle. ValueError if it is none."""
    from PIL import ImageOps

    square = ImageOps.fit(read_image(path, f"background image {path}"), (size, size))
    return torch.from_numpy(np.array(square, np.float32))[None] / 255


@torch.no_grad()
def view(
    mesh: Mesh, settings: ViewSettings, scene: Mesh | None = None, background: Tensor | None = None,
    device: torch.device | str = "cpu", mode: str = "lambertian",
) -> MeshRendering:
    """Render `mesh`, and `scene` around it in its own coordinates, with common depth and light.

    background: [1, size, size, 3] instead of settings.background. mode: as of `render_meshes`.
    """
    settings = settings.checked()
    center, radius = bounding_ball(mesh)
    meshes = [_placed(m, center, radius).to(device) for m in (mesh, scene) if m is not None]
    distance = settings.distance if settings.distance is not None else 1.08 / math.sin(FOV / 2)
    cameras = Cameras.orbit(math.radians(settings.elevation), math.radians(settings.azimuth), distance, FOV,
                            settings.size, device)
    towards = torch.tensor([settings.light], device=device)
    far_away = 1e3 * torch.nn.functional.normalize(towards, dim=-1, eps=1e-30)  # practically parallel light
    lights = Lights(far_away, *(torch.tensor([c], device=device) for c in (settings.light_color, settings.ambient)))
    if background is None:
        background = torch.tensor([settings.background])
    return render_meshes(meshes, cameras, background.to(device), lights, mode, two_sided=True)


def write_view(
    mesh_path: str | Path, out: str | Path, settings: ViewSettings, scene_path: str | Path | None = None,
    background_path: str | Path | None = None, device: torch.device | str = "cpu",
) -> Path:
    """Read, render, write a PNG. ValueError or OSError name the file that is at fault."""
    settings.checked()
    mesh = read_mesh(mesh_path)
    scene = None if scene_path is None else read_mesh(scene_path)
    background = None if background_path is None else read_background(background_path, settings.size)
    rendering = view(mesh, settings, scene, background, device)
    write_png(out, rendering.color[0])
    return Path(out)


def export_views(
    mesh_path: str | Path, folder: str | Path, count: int, settings: ViewSettings, device: torch.device | str = "cpu"
) -> Path:
    """`count` views once around, from the front: rgb_000.png and normal_000.png (world normals n / 2 + 1 / 2, before
    black), and so on, as GPTEval3D takes them; the light turns with the camera.

    Raises ValueError for a folder that holds anything else, OutputError if it cannot be written.
    """
    if not 1 <= count <= 1000:
        raise ValueError(f"export views: expected 1 to 1000, got {count}")
    folder, settings = Path(folder), settings.checked()
    mesh = read_mesh(mesh_path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        others = sorted(entry.name for entry in folder.iterdir() if not re.fullmatch(VIEW_NAME, entry.name))
    except OSError as error:
        raise OutputError(f"cannot write into {folder}: {error.strerror or error}") from error
    if others:
        raise ValueError(f"{folder} holds other files than views ({', '.join(others[:3])}): choose another folder with "
                         f"--out")
    for number in range(count):
        azimuth, (x, y, z) = 2 * math.pi * number / count, settings.light
        light = (x * math.cos(azimuth) + z * math.sin(azimuth), y, z * math.cos(azimuth) - x * math.sin(azimuth))
        placed = dataclasses.replace(settings, azimuth=math.degrees(azimuth), light=light)
        write_png(folder / f"rgb_{number:03}.png", view(mesh, placed, device=device).color[0])
        placed.background = (0.0, 0.0, 0.0)
        write_png(folder / f"normal_{number:03}.png", view(mesh, placed, device=device, mode="normals").color[0])
    return folder


def serve(
    mesh_path: str | Path, scene_path: str | Path | None = None, port: int = 8080, host: str = "127.0.0.1"
) -> None:
    """Show the mesh in a browser until Ctrl-C, on `port` or the next free one, to this machine only unless `host` is
    another address of it (0.0.0.0: all).

    ImportError if viser is not installed; ValueError or OSError name a file, port or host that is at fault.
    """
    import time

    check_address(host, port)
    paths = {"mesh": mesh_path, "scene": scene_path}
    meshes = {name: read_mesh(path) for name, path in paths.items() if path is not None}
    center, radius = bounding_ball(meshes["mesh"])
    server = open_page(host, port)
    for name, mesh in meshes.items():
        server.scene.add_glb(f"/{name}", glb_bytes(_placed(mesh, center, radius)))
    print(f"{address_of(server)}  (Ctrl-C ends)", flush=True)
    try:
        while True:
            time.sleep(3600)
    finally:
        close_page(server)

