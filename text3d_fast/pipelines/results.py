"""From an optimized scene to a mesh, pictures and figures."""

from __future__ import annotations

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
from text3d_fast.pipelines.config import DreamFusionConfig
from text3d_fast.pipelines.pictures import VIEW_LABELS, mesh_silhouettes, turntable, views, volume_views
from text3d_fast.pipelines.run_folder import RunFolder
from text3d_fast.pipelines.training import Training

# Shares above which a warning is given.
FOG = 0.15
FLOATERS = 0.01


@dataclass
class Result:
    """What a run gives.

    mesh      the cleaned surface, with a texture or vertex colours (unlit albedo)
    views     [8, H, W, 3] pictures of it in 0..1, every 45 degrees from the front
    metrics   everything in result.json
    training  the scene, for further pictures
    """

    mesh: geometry.Mesh
    views: Tensor
    metrics: dict[str, Any]
    config: DreamFusionConfig
    training: Training = field(repr=False)

    @property
    def warnings(self) -> list[str]:
        return self.metrics["warnings"]


def finish(training: Training, folder: RunFolder | None) -> Result:
    """Extract, clean and colour the mesh, take pictures, write files. Raises EmptyMesh, OutputError."""
    started = time.perf_counter()
    config = training.config
    mesh, metrics, warnings = extract(training)
    fog = measure_fog(training)
    metrics["fog"] = round(fog, 4)
    if fog > FOG:
        warnings.append(f"fog: {fog:.0%} of what is visible is half transparent; more steps may harden it")
    metrics = {
        "status": "done" if len(mesh.faces) else "empty",
        "prompt": config.prompt, "model": config.model, "seed": config.seed, "steps": training.step,
        "seconds": {"optimization": round(training.seconds, 2)},
        "seconds_per_step": round(training.seconds / max(training.step, 1), 4),
        "peak_memory_bytes": peak_memory(training.device), "device": device_name(training.device),
        "threads": config.threads, "metrics": metrics, "warnings": warnings, "versions": versions(),
    }
    pictures = views(mesh, config)
    if len(mesh.faces) and folder is not None:
        try:
            geometry.write_mesh(folder / "mesh.glb", mesh)
            images.write_turntable(folder / "turntable.gif", turntable(mesh, config))
            images.write_views(folder / "views.png", pictures, VIEW_LABELS)
        except OSError as error:
            raise OutputError(f"cannot write into {folder.path}: {error.strerror or error}") from error
    spent = time.perf_counter() - started
    metrics["seconds"] |= {"export": round(spent, 2), "total": round(training.seconds + spent, 2)}
    if folder is not None:
        write_text(folder / "result.json", json.dumps(metrics, indent=2) + "\n")
    if not len(mesh.faces):
        raise EmptyMesh("the mesh is empty: nothing in the scene became dense enough; try more steps or another seed")
    return Result(mesh, pictures, metrics, config, training)


@torch.no_grad()
def extract(training: Training) -> tuple[geometry.Mesh, dict[str, Any], list[str]]:
    """The cleaned, coloured mesh, figures about it, and warnings."""
    field, config = training.field, training.config
    density = geometry.averaged_density(training.renderer.visible_density(field), config.sampling.step,
                                      resolution=config.mesh_resolution, device=training.device)
    level, agreement = choose_threshold(training, density)
    if level is None:
        nothing = torch.zeros(0, 3, device=training.device)
        return geometry.Mesh(nothing, nothing.int()), {"vertices": 0, "faces": 0}, []
    mesh, threshold = geometry.extract_mesh(density, config.mesh_resolution, level, device=training.device)
    mesh, report = geometry.clean_mesh(mesh)
    warnings = []
    floaters = [piece for piece in report.dropped if piece.reason != "cavity"]
    area = sum(piece.area for piece in floaters)
    if floaters and area > FLOATERS * report.kept_area:
        warnings.append(f"floaters: {len(floaters)} loose pieces with {area / (area + report.kept_area):.0%} of the "
                        f"surface were removed")
    figures = {
        "vertices": len(mesh.vertices), "faces": len(mesh.faces), "threshold": round(threshold, 3),
        "silhouette_agreement": round(agreement, 4),
        "components": report.kept, "floaters_removed": len(floaters),
        "cavities_removed": len(report.dropped) - len(floaters),
    }
    if len(mesh.faces):
        def albedo(points: Tensor) -> Tensor:
            return field(points).albedo

        mesh.colors = geometry.sample_colors(albedo, mesh.vertices)
        if config.texture:
            mesh = geometry.bake_texture(geometry.unwrap(mesh, config.texture), albedo, config.texture)
        low, high = mesh.vertices.amin(0), mesh.vertices.amax(0)
        figures["size"] = [round(value, 3) for value in (high - low).tolist()]
    return mesh, figures, warnings


@torch.no_grad()
def choose_threshold(
    training: Training, density: Callable[[Tensor], Tensor], resolution: int = 64
) -> tuple[float | str | None, float]:
    """The level to cut `density` at: the one whose mesh has the silhouettes of the volume (opacity above one half).

    A surface that is opaque only over several samples, as thin or soft ones are, would vanish or fray at a fixed
    density. Also returns the mean intersection over union of the silhouettes, from 8 sides. None: nothing is opaque.
    """
    azimuths, elevations = [45.0 * k for k in range(8)], (10.0, 50.0)
    seen = torch.cat([volume_views(training, azimuths[k::2], elevations[k], 96, "albedo")[1] > 0.5 for k in (0, 1)])
    best: tuple[float | str, float] = ("auto", 0.0)
    if not bool(seen.any()):
        return None, 0.0
    level: float | str = "auto"
    for _ in range(8):
        mesh, used = geometry.extract_mesh(density, resolution, level, device=training.device)
        mesh, _ = geometry.clean_mesh(mesh)
        masks = torch.cat([mesh_silhouettes(mesh, training.config, azimuths[k::2], elevations[k], 96) for k in (0, 1)])
        either = (masks | seen).sum()
        agreement = float((masks & seen).sum() / either) if either else 0.0
        if agreement > best[1] + 1e-3:
            best = used, agreement
        level = used * 0.6
        if level <= 0:
            break
    return best


@torch.no_grad()
def measure_fog(training: Training) -> float:
    """The share of the visible opacity that lies in half-transparent pixels (0.1 to 0.9), edges not counted."""
    _, opacity = volume_views(training, [0.0, 90.0, 180.0, 270.0], size=64, mode="albedo")
    covered = (opacity > 0.05).float()[:, None]
    inner = 1 - torch.nn.functional.max_pool2d(1 - covered, 5, stride=1, padding=2)
    inner = inner[:, 0] > 0
    half = inner & (opacity > 0.1) & (opacity < 0.9)
    return float(half.sum()) / max(float(inner.sum()), 1.0)


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
