"""Removing what is not the object: floaters, and the walls of cavities that nobody can see."""

from dataclasses import asdict, dataclass

import torch

from text3d_fast.geometry.mesh import Mesh


@dataclass
class Dropped:
    """A component that was removed. centre and size: of its bounding box; volume is negative for a cavity."""

    reason: str
    faces: int
    area: float
    volume: float
    centre: tuple[float, float, float]
    size: tuple[float, float, float]


@dataclass
class CleaningReport:
    """kept: number of components left; kept_area and dropped_area: of the surface, in squared units."""

    kept: int
    kept_area: float
    dropped_area: float
    dropped: list[Dropped]

    def to_dict(self) -> dict:
        return asdict(self)


def clean_mesh(
    mesh: Mesh, smallest: float = 0.05, cavities: bool = True, most: int | None = None
) -> tuple[Mesh, CleaningReport]:
    """Drop floaters and cavities of a closed mesh; return what is left and a report of what went.

    smallest: components with less area than this share of the largest one's are floaters.
    cavities: also drop components whose faces look inwards, which are hollows inside of another.
    most: keep at most so many components, the largest by area.
    """
    if not 0 <= smallest <= 1:
        raise ValueError(f"smallest: expected a share between 0 and 1, got {smallest}")
    if len(mesh.faces) == 0:
        return mesh, CleaningReport(0, 0.0, 0.0, [])
    component = mesh.components()
    count = int(component.max()) + 1
    corners = mesh.corners()
    a, b, c = corners.double().unbind(1)

    def per_component(values: torch.Tensor) -> torch.Tensor:
        return torch.zeros(count, dtype=values.dtype, device=values.device).index_add_(0, component, values)

    areas = per_component(mesh.area_vectors().norm(dim=-1))
    volumes = per_component((torch.linalg.cross(a, b) * c).sum(-1) / 6)
    faces = torch.bincount(component, minlength=count)
    spread = component[:, None].expand(-1, 3)
    low = torch.full((count, 3), torch.inf, device=areas.device).scatter_reduce_(0, spread, corners.amin(1), "amin")
    high = torch.full((count, 3), -torch.inf, device=areas.device).scatter_reduce_(0, spread, corners.amax(1), "amax")

    solid = volumes > 0 if cavities and bool((volumes > 0).any()) else torch.ones_like(volumes, dtype=torch.bool)
    largest = areas[solid].max()
    reasons = ["" if s else "cavity" for s in solid.tolist()]
    order = sorted(range(count), key=lambda i: -float(areas[i]))
    kept = 0
    for i in order:
        if reasons[i]:
            continue
        if float(areas[i]) < smallest * float(largest):
            reasons[i] = "floater"
        elif most is not None and kept >= most:
            reasons[i] = "beyond the largest"
        else:
            kept += 1
    keep = torch.tensor([not r for r in reasons], device=component.device)
    dropped = [
        Dropped(reasons[i], int(faces[i]), float(areas[i]), float(volumes[i]),
                tuple(((low[i] + high[i]) / 2).tolist()), tuple((high[i] - low[i]).tolist()))
        for i in order if reasons[i]
    ]  # fmt: skip
    report = CleaningReport(kept, float(areas[keep].sum()), float(areas[~keep].sum()), dropped)
    return (mesh if bool(keep.all()) else mesh.select_faces(keep[component])), report
