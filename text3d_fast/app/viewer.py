"""A picture of a mesh, relit, over a background or inside another scene; or a live view in the browser."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from text3d_fast.geometry import Mesh, glb_bytes, read_mesh
from text3d_fast.images import write_png
from text3d_fast.scene.cameras import Cameras
from text3d_fast.scene.lights import Lights
from text3d_fast.scene.mesh_renderer import MeshRendering, render_meshes

FOV = math.radians(40.0)


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


def bounding_ball(mesh: Mesh) -> tuple[Tensor, float]:
    """The middle of the bounding box, and the largest distance of a vertex from it."""
    center = (mesh.vertices.amin(0) + mesh.vertices.amax(0)) / 2
    return center, float((mesh.vertices - center).norm(dim=1).max())


def _placed(mesh: Mesh, center: Tensor, radius: float) -> Mesh:
    return dataclasses.replace(mesh, vertices=(mesh.vertices - center) / max(radius, 1e-12))


def read_background(path: str | Path, size: int) -> Tensor:
    """An image as [1, size, size, 3] in 0..1, cropped to a square around its middle. ValueError if it is none."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            square = ImageOps.fit(image.convert("RGB"), (size, size))
    except UnidentifiedImageError:
        raise ValueError(f"background image: {path} is not a readable image") from None
    return torch.from_numpy(np.array(square, np.float32))[None] / 255


@torch.no_grad()
def view(
    mesh: Mesh, settings: ViewSettings, scene: Mesh | None = None, background: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> MeshRendering:
    """Render `mesh`, and `scene` around it in its own coordinates, with common depth and light.

    background: [1, size, size, 3] instead of settings.background.
    """
    center, radius = bounding_ball(mesh)
    meshes = [_placed(m, center, radius).to(device) for m in (mesh, scene) if m is not None]
    distance = settings.distance if settings.distance is not None else 1.08 / math.sin(FOV / 2)
    if distance <= 0:
        raise ValueError(f"distance: expected a positive number, got {distance}")
    cameras = Cameras.orbit(math.radians(settings.elevation), math.radians(settings.azimuth), distance, FOV,
                            settings.size, device)
    towards = torch.tensor([settings.light], device=device)
    if not towards.norm() > 0:
        raise ValueError(f"light: expected a direction other than 0, got {settings.light}")
    far_away = 1e3 * torch.nn.functional.normalize(towards, dim=-1)  # practically parallel light
    lights = Lights(far_away, *(torch.tensor([c], device=device) for c in (settings.light_color, settings.ambient)))
    if background is None:
        background = torch.tensor([settings.background])
    return render_meshes(meshes, cameras, background.to(device), lights, two_sided=True)


def write_view(
    mesh_path: str | Path, out: str | Path, settings: ViewSettings, scene_path: str | Path | None = None,
    background_path: str | Path | None = None, device: torch.device | str = "cpu",
) -> Path:
    """Read, render, write a PNG. ValueError or OSError name the file that is at fault."""
    mesh = read_mesh(mesh_path)
    scene = None if scene_path is None else read_mesh(scene_path)
    background = None if background_path is None else read_background(background_path, settings.size)
    rendering = view(mesh, settings, scene, background, device)
    write_png(out, rendering.color[0])
    return Path(out)


def serve(mesh_path: str | Path, scene_path: str | Path | None = None, port: int = 8080) -> None:
    """Show the mesh in a browser until Ctrl-C, on `port` or the next free one.

    RuntimeError if viser is not installed; ValueError or OSError name a file that is at fault.
    """
    try:
        import viser
    except ImportError:
        raise RuntimeError("the live view needs viser: pip install 'text3d-fast[viewer]'") from None
    import time

    paths = {"mesh": mesh_path, "scene": scene_path}
    meshes = {name: read_mesh(path) for name, path in paths.items() if path is not None}
    center, radius = bounding_ball(meshes["mesh"])
    server = viser.ViserServer(port=port)
    server.scene.set_up_direction("+y")
    # the default environment's light alone burns out bright colours
    server.scene.configure_environment_map("studio", environment_intensity=0.3)
    for name, mesh in meshes.items():
        shown = mesh if mesh.normals is not None else mesh.with_normals()
        server.scene.add_glb(f"/{name}", glb_bytes(_placed(shown, center, radius)))
    server.initial_camera.position = (1.2, 0.9, 2.6)
    server.initial_camera.look_at = (0.0, 0.0, 0.0)
    print(f"http://localhost:{server.get_port()}  (Ctrl-C ends)", flush=True)
    try:
        while True:
            time.sleep(3600)
    finally:
        server.stop()
