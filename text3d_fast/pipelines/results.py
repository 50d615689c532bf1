"""What a run gives: meshes, pictures, figures, and their files."""

from __future__ import annotations

import base64
import html
import io
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from text3d_fast import geometry, images
from text3d_fast.errors import EmptyMesh, OutputError
from text3d_fast.files import write_text
from text3d_fast.pipelines import distributed
from text3d_fast.pipelines.config import RunConfig
from text3d_fast.pipelines.pictures import VIEW_LABELS, turntable, views
from text3d_fast.pipelines.run_folder import RunFolder
from text3d_fast.pipelines.stage import Extraction, Stage

Report = Callable[[str, float], Any]


@dataclass
class Result:
    """What a run gives.

    mesh      the cleaned surface, with a texture or vertex colours (unlit albedo)
    views     [8, H, W, 3] pictures of it in 0..1, every 45 degrees from the front
    meshes    of all particles; `mesh` is the first one
    metrics   everything in result.json
    stage     the last stage with its scene, for further pictures
    """

    mesh: geometry.Mesh
    views: Tensor
    meshes: list[geometry.Mesh]
    metrics: dict[str, Any]
    config: RunConfig
    stage: Stage = field(repr=False)

    @property
    def warnings(self) -> list[str]:
        return self.metrics["warnings"]

    def _repr_html_(self) -> str:
        """What a notebook shows: the views and the figures."""
        picture = io.BytesIO()
        images.contact_sheet(self.views, VIEW_LABELS).save(picture, format="PNG")
        shown = {name: self.metrics[name] for name in ("prompt", "model", "seed", "steps")}
        shown |= {"seconds": self.metrics["seconds"]["total"], **self.metrics["metrics"]}
        rows = "".join(f"<tr><td>{html.escape(name)}</td><td>{html.escape(str(value))}</td></tr>"
                       for name, value in shown.items())
        notes = "".join(f"<p>warning: {html.escape(text)}</p>" for text in self.warnings)
        return (f'<img src="data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}" '
                f'alt="{html.escape(self.metrics["prompt"])}"><table>{rows}</table>{notes}')


def finish(stage: Stage, folder: RunFolder | None, about: dict[str, Any], report: Report | None = None) -> Result:
    """Extract the assets, take pictures, write files. `about` goes into result.json. Raises EmptyMesh, OutputError."""
    started = time.perf_counter()
    report = report or (lambda what, done: None)
    report("surface and colours", 0.0)
    run, assets = stage.run, stage.extract()
    solid = [asset for asset in assets if len(asset.mesh.faces)]
    report("pictures", 0.5)
    pictures = [views(asset.mesh, stage.config.cameras) for asset in solid or assets[:1]]
    if folder is not None and distributed.is_first():
        _write(folder, stage, solid, pictures, report)
    report("done", 1.0)
    spent = time.perf_counter() - started
    steps, optimization = (sum(part) for part in zip(*stage.taken.values(), strict=True))
    metrics = {
        "status": "done" if solid else "empty", "pipeline": run.pipeline,
        "prompt": run.prompt, "model": run.model, "seed": run.seed, "steps": steps, **about,
        "seconds": {"optimization": round(optimization, 2), "export": round(spent, 2),
                    "total": round(optimization + spent, 2)},
        "stages": {name: {"steps": done, "seconds": round(took, 2), "seconds_per_step": round(took / max(done, 1), 4)}
                   for name, (done, took) in stage.taken.items()},
        "peak_memory_bytes": peak_memory(stage.device), "device": device_name(stage.device),
        "threads": run.threads, "metrics": (solid or assets)[0].figures,
        "warnings": [warning for asset in assets for warning in asset.warnings], "versions": versions(),
    }
    if len(assets) > 1:
        metrics["assets"] = [asset.figures for asset in assets]
    if distributed.size() > 1:
        metrics["processes"] = distributed.size()
    if folder is not None and distributed.is_first():
        write_text(folder / "result.json", json.dumps(metrics, indent=2) + "\n")
    if not solid:
        raise EmptyMesh("the mesh is empty: nothing in the scene became dense enough; try more steps or another seed")
    return Result(solid[0].mesh, pictures[0], [asset.mesh for asset in solid], metrics, run, stage)


def _write(
    folder: RunFolder, stage: Stage, assets: list[Extraction], pictures: list[Tensor], report: Report
) -> None:
    """mesh.glb, turntable.gif and views.png; mesh-2.glb and so on for further particles, one row of pictures each."""
    try:
        for number, asset in enumerate(assets, 1):
            end = "" if number == 1 else f"-{number}"
            report("files", 0.6 + 0.4 * (number - 1) / len(assets))
            geometry.write_mesh(folder / f"mesh{end}.glb", asset.mesh)
            images.write_turntable(folder / f"turntable{end}.gif", turntable(asset.mesh, stage.config.cameras))
        if assets:
            images.write_views(folder / "views.png", torch.cat(pictures), VIEW_LABELS * len(assets))
    except OSError as error:
        raise OutputError(f"cannot write into {folder.path}: {error.strerror or error}") from error


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU's allocator, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.processor() or platform.machine()})"


def versions() -> dict[str, str]:
    from importlib import metadata

    found = {"python": platform.python_version()}
    for name in ("text3d-fast", "torch", "diffusers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
