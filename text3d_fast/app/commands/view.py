"""`text3d-fast view`."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from text3d_fast.app.commands.outcome import fail


@dataclass
class View:
    """Show a mesh: as a picture, relit and composited, or live in the browser.

    Examples:
      text3d-fast view runs/a-red-mug/mesh.glb --out mug.png
      text3d-fast view mug.glb --out mug.png --light -1 1 0 --light-color 1 0.7 0.4 --ambient 0.1 0.1 0.2
      text3d-fast view mug.glb --scene room.glb --azimuth 60
      text3d-fast view mug.glb --export-views 120 --elevation 15 --out data/ours/0/0
      text3d-fast view mug.glb --serve
    """

    mesh: Positional[Annotated[Path, arg(metavar="MESH")]]
    """A .glb, .gltf, .obj, .ply or .stl."""
    out: Annotated[Path | None, arg(metavar="PATH")] = None
    """The picture to write, by default view.png; of --export-views the folder, by default views."""
    export_views: Annotated[int | None, arg(metavar="N")] = None
    """Write a folder of N views once around, from the front, instead: rgb_000.png, normal_000.png and so on, the layout
    of GPTEval3D, which wants 120."""
    azimuth: float = 30.0
    """Degrees around the mesh: 0 its front (+Z), 90 its left side."""
    elevation: float = 20.0
    """Degrees above the horizon."""
    distance: Annotated[float | None, arg(metavar="D")] = None
    """In radii of the mesh; by default it fills the picture."""
    size: int = 512
    """Pixels a side."""
    light: tuple[float, float, float] = (0.6, 1.0, 0.8)
    """Direction towards the light."""
    light_color: tuple[float, float, float] = (0.8, 0.8, 0.8)
    """Red, green, blue."""
    ambient: tuple[float, float, float] = (0.3, 0.3, 0.3)
    """Light from everywhere."""
    background: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Colour behind everything."""
    background_image: Annotated[Path | None, arg(metavar="IMAGE")] = None
    """A picture behind everything, cropped to a square."""
    scene: Annotated[Path | None, arg(metavar="MESH")] = None
    """Another mesh, drawn in the same depth and light: the room the first one stands in."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    serve: bool = False
    """Show it in the browser until Ctrl-C instead of writing a picture (needs the extra `viewer`)."""
    port: int = 8080
    """Where --serve listens, or the next free one."""
    host: str = "127.0.0.1"
    """The address on which --serve listens: by default only this machine reaches it; 0.0.0.0 opens it to all."""

    def __call__(self) -> int:
        import warnings

        from text3d_fast.app import viewer as viewing
        from text3d_fast.geometry import MeshWarning
        from text3d_fast.pipelines.pipeline import choose_device

        names = [entry.name for entry in dataclasses.fields(viewing.ViewSettings)]
        settings = viewing.ViewSettings(**{name: getattr(self, name) for name in names})
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("always", MeshWarning)
                warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
                if self.serve:
                    viewing.serve(self.mesh, self.scene, self.port, self.host)
                    return 0
                device = choose_device(self.device)
                if self.export_views is not None:
                    print(viewing.export_views(self.mesh, self.out or "views", self.export_views, settings, device))
                    return 0
                out = self.out or Path("view.png")
                print(viewing.write_view(self.mesh, out, settings, self.scene, self.background_image, device))
        except (ValueError, OSError, RuntimeError, ImportError) as error:
            return fail(str(error))
        return 0
