"""How close a mesh comes to what was asked for: scores against the best fitting member of the class family.

Only what cameras see is compared (visible surfaces): thin walls and interiors that no image shows would punish every
method alike. `score` compares a mesh with one true scene, `fit_member` finds the member to compare with, and the
baselines (best ball, best wrong class, visual hull) say what a score is worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from text3d_fast import ops
from text3d_fast.evaluation.observe import projected_inside, seen_surface, silhouettes, thinned
from text3d_fast.geometry import Mesh
from text3d_fast.toybox.bank import even_cameras
from text3d_fast.toybox.objects import CLASSES
from text3d_fast.toybox.render import Surface
from text3d_fast.toybox.scenes import Description, Scene, build_scene, middle_parameters

_VIEWS, _SIZE = 28, 96
_FILL = (0.80, 1.02)  # how large a fitted member may be; rendered ones have 0.90 to 1


@dataclass(frozen=True)
class Score:
    """Scores of one mesh.

    f5, f2               F-score of the visible surface at 5 % and 2 % of the truth's longest side
    silhouette_iou       mean over cameras that no training uses
    volume_iou           of the solids, 64^3 samples
    normal_error         mean angle in degrees between matching visible points (within 5 %)
    color_error          mean absolute difference of unlit rgb at matching points, NaN without colours
    euler, true_euler    Euler characteristics; components: connected pieces
    """

    f5: float
    f2: float
    silhouette_iou: float
    volume_iou: float
    normal_error: float
    color_error: float
    euler: int
    true_euler: int
    components: int

    def to_dict(self) -> dict:
        return asdict(self)


def held_out_cameras(count: int = 16) -> Tensor:
    """Cameras [count, 3] between those of the banks, at one distance."""
    cameras = even_cameras(count, -8.0, 65.0)
    cameras[:, 1] += 0.37
    cameras[:, 2] = 2.7
    return cameras


def visible_points(target: Mesh | Scene, limit: int = 20_000) -> Surface:
    """The visible surface from 28 cameras around, thinned to be nearly even in area."""
    return thinned(seen_surface(target, even_cameras(_VIEWS), _SIZE), 0.012, limit)


def _some(surface: Surface, count: int = 4000) -> Tensor:
    """Row numbers of at most `count` points, always the same ones."""
    total = len(surface.positions)
    return torch.randperm(total, generator=torch.Generator().manual_seed(1))[:count]


def nearest(source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Distance [N] and index [N] of the nearest of target [M, 3] for each of source [N, 3]."""
    if not len(target):
        return torch.full((len(source),), torch.inf), torch.zeros(len(source), dtype=torch.int64)
    found = [torch.cdist(rows, target).min(1) for rows in source.split(2048)]
    if not found:
        return torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def size_of(points: Tensor) -> float:
    """The longest side of the bounding box."""
    return float((points.amax(0) - points.amin(0)).max()) if len(points) else 0.0


def f_score(points: Tensor, truth: Tensor, radius: float) -> float:
    """Harmonic mean of the shares of points within `radius` of the truth and of the truth within it of the points."""
    return _f_score(nearest(points, truth)[0], nearest(truth, points)[0], radius)


def _f_score(forward: Tensor, backward: Tensor, radius: float) -> float:
    if not len(forward) or not len(backward):
        return 0.0
    precision, recall = float((forward < radius).float().mean()), float((backward < radius).float().mean())
    return 2 * precision * recall / max(precision + recall, 1e-9)


def silhouette_iou(first: Tensor, second: Tensor) -> float:
    """Mean intersection over union of masks [B, H, W]; two empty masks agree."""
    both, either = (first & second).sum((1, 2)), (first | second).sum((1, 2))
    return float(torch.where(either > 0, both / either.clamp_min(1), 1.0).mean())


def _lattice(resolution: int = 64) -> Tensor:
    axis = (torch.arange(resolution) + 0.5) * 2 / resolution - 1
    return torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1)


def inside_mesh(mesh: Mesh, resolution: int = 64, layers: int = 24) -> Tensor:
    """Which cell centres of [-1, 1]^3 lie inside, bool [x, y, z]: layers of an orthographic view along z, counted
    with the sign of their faces, so that overlapping closed pieces count as one solid."""
    inside = torch.zeros(resolution, resolution, resolution, dtype=torch.int32)
    if not len(mesh.faces):
        return inside > 0
    flip = mesh.vertices * torch.tensor([1.0, 1.0, -1.0])  # clip depth grows away from a viewer at +Z
    position = torch.cat([flip, torch.ones_like(flip[:, :1])], 1)[None].contiguous()
    corner = mesh.vertices[mesh.faces.long()]
    facing = torch.linalg.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0])[:, 2].sign().int()
    centers = (torch.arange(resolution) + 0.5) * 2 / resolution - 1
    with ops.DepthPeeler(position, mesh.faces, (resolution, resolution), grad_db=False) as peeler:
        for _ in range(layers):
            rast, _ = peeler.rasterize_next_layer()
            ids = rast[0, ..., 3].long()
            if not bool((ids > 0).any()):
                break
            entered = torch.where(ids > 0, facing[(ids - 1).clamp_min(0)], 0)
            behind = centers < -rast[0, ..., 2, None]
            inside += (entered[..., None] * behind).permute(1, 0, 2)  # rows are y, columns x
    return inside > 0


def volume_iou(mesh: Mesh | Scene, scene: Scene, resolution: int = 64) -> float:
    """Intersection over union of the solids on the cell centres of [-1, 1]^3."""
    true = scene.sdf(_lattice(resolution)) < 0
    ours = mesh.sdf(_lattice(resolution)) < 0 if isinstance(mesh, Scene) else inside_mesh(mesh, resolution)
    return float((ours & true).sum() / (ours | true).sum().clamp_min(1))


def topology(mesh: Mesh) -> tuple[int, int]:
    """Euler characteristic and number of connected pieces, after merging vertices at the same place (1e-5)."""
    if not len(mesh.faces):
        return 0, 0
    _, merged = torch.unique((mesh.vertices * 1e5).round().long(), dim=0, return_inverse=True)
    faces = merged[mesh.faces.long()]
    faces = faces[(faces[:, 0] != faces[:, 1]) & (faces[:, 1] != faces[:, 2]) & (faces[:, 2] != faces[:, 0])]
    edges = torch.unique(torch.cat([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]).sort(1).values, dim=0)
    used = torch.unique(faces)
    label = torch.arange(int(merged.max()) + 1)
    while True:  # every vertex takes the smallest label around it, and that label's own label
        smallest = torch.minimum(label[edges[:, 0]], label[edges[:, 1]])
        lower = label.scatter_reduce(0, edges[:, 0], smallest, "amin").scatter_reduce(0, edges[:, 1], smallest, "amin")
        lower = lower[lower]
        if torch.equal(lower, label):
            break
        label = lower
    return len(used) - len(edges) + len(faces), len(torch.unique(label[used]))


class Truth:
    """One true scene with what the scores need of it, computed once."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.points = visible_points(scene)
        self.size = size_of(self.points.positions)
        self.cameras = held_out_cameras()
        self.masks = silhouettes(seen_surface(scene, self.cameras, 128))
        self._euler: int | None = None

    @property
    def euler(self) -> int:
        if self._euler is None:
            self._euler = topology(Mesh(*self.scene.mesh(96)))[0]
        return self._euler


@torch.no_grad()
def score(mesh: Mesh | Scene, truth: Truth | Scene) -> Score:
    """All scores of a mesh (or of another scene, whose topology is then not looked at) against one true scene."""
    truth = Truth(truth) if isinstance(truth, Scene) else truth
    seen, true = visible_points(mesh), truth.points
    # distances from some points to all points: dense targets keep the spacing of points below the 2 % radius
    rows = _some(seen)
    forward, match = nearest(seen.positions[rows], true.positions)
    backward, _ = nearest(true.positions[_some(true)], seen.positions)
    close = forward < 0.05 * truth.size
    normal = color = float("nan")
    if bool(close.any()):
        mine, theirs = rows[close], match[close]
        cosine = (seen.normals[mine] * true.normals[theirs]).sum(-1).clamp(-1, 1)
        normal = float(cosine.acos().rad2deg().mean())
        if isinstance(mesh, Scene) or mesh.colors is not None:
            color = float((seen.albedo[mine] - true.albedo[theirs]).abs().mean())
    masks = silhouettes(seen_surface(mesh, truth.cameras, 128))
    euler, pieces = topology(mesh) if isinstance(mesh, Mesh) else (truth.euler, 1)
    return Score(
        _f_score(forward, backward, 0.05 * truth.size),
        _f_score(forward, backward, 0.02 * truth.size),
        silhouette_iou(masks, truth.masks),
        volume_iou(mesh, truth.scene),
        normal,
        color,
        euler,
        truth.euler,
        pieces,
    )


def _ranges(description: Description) -> list[tuple[str, str, float, float]]:
    rows = [("scene", "fill", *_FILL)]
    for role, thing in zip(("thing", "base"), description.things):
        rows += [(role, name, low, high) for name, (low, high) in CLASSES[thing.kind].ranges.items()]
    return rows


@torch.no_grad()
def fit_member(description: Description, mesh: Mesh, trials: int = 90, seed: int = 0) -> Scene:
    """The member of the description's family that fits a mesh best.

    Searches the class's parameters and the size: random draws, then draws around the best ones. A member is judged by
    its distance to the mesh's visible points, and by what of it lies where the mesh's silhouettes are empty.
    """
    ranges = _ranges(description)
    low, high = (torch.tensor([row[k] for row in ranges]) for k in (2, 3))
    points = visible_points(mesh, 2500).positions
    cameras = even_cameras(_VIEWS)
    lattice = _lattice(22).view(-1, 3)
    lattice = lattice[lattice.norm(dim=-1) < 0.85]
    masks = silhouettes(seen_surface(mesh, cameras, _SIZE))
    empty = lattice[~projected_inside(masks, cameras, lattice).all(0)]
    generator = torch.Generator().manual_seed(seed)

    def build(values: Tensor) -> Scene:
        parameters: dict[str, dict[str, float]] = {}
        for (role, name, *_), value in zip(ranges, values.tolist()):
            parameters.setdefault(role, {})[name] = value
        return build_scene(description, parameters)

    def cost(values: Tensor) -> float:
        scene = build(values)
        apart = scene.sdf(points).abs().mean() if len(points) else torch.tensor(1.0)
        return float(apart + 2 * (-scene.sdf(empty)).clamp_min(0).mean())

    best = (low + high) / 2
    least = cost(best)
    for trial in range(trials):
        draw = torch.rand(len(ranges), generator=generator)
        if trial < trials // 3:
            values = low + draw * (high - low)
        else:
            width = 0.35 * (1 - trial / trials) + 0.03
            values = (best + (2 * draw - 1) * width * (high - low)).clamp(low, high)
        value = cost(values)
        if value < least:
            best, least = values, value
    return build(best)


def ball_mesh(radius: float, center: Sequence[float] = (0.0, 0.0, 0.0), color: Sequence[float] | None = None) -> Mesh:
    """A ball as a mesh."""
    import trimesh

    ball = trimesh.creation.icosphere(3, radius)
    vertices = torch.tensor(ball.vertices, dtype=torch.float32) + torch.tensor(center)
    colors = None if color is None else torch.tensor(color).expand_as(vertices).contiguous()
    return Mesh(vertices, torch.tensor(ball.faces, dtype=torch.int32), colors=colors)


@torch.no_grad()
def best_ball(truth: Truth) -> Mesh:
    """The ball around the truth's middle whose radius gives the best F-score at 5 %, in the truth's mean colour."""
    points = truth.points.positions
    center = (points.amax(0) + points.amin(0)) / 2
    reach = (points - center).norm(dim=-1)
    color = truth.points.albedo.mean(0).tolist()
    balls = [ball_mesh(float(reach.quantile(q)), center.tolist(), color) for q in (0.2, 0.4, 0.6, 0.8)]
    return max(balls, key=lambda ball: f_score(visible_points(ball, 2000).positions, points, 0.05 * truth.size))


@torch.no_grad()
def visual_hull(truth: Truth, resolution: int = 64) -> Mesh:
    """The solid that all silhouettes of 28 cameras allow, grey: what shape from masks alone gives."""
    cameras = even_cameras(_VIEWS)
    masks = silhouettes(seen_surface(truth.scene, cameras, 128))
    grid = ops.TetGrid.kuhn(resolution)
    positions = grid.positions
    hull = torch.ones(len(positions), dtype=torch.bool)
    for mask, camera in zip(masks.split(4), cameras.split(4)):
        hull &= projected_inside(mask, camera, positions).all(0)
    side = resolution + 1
    soft = torch.nn.functional.avg_pool3d(hull.float().view(1, 1, side, side, side), 3, 1, 1).flatten() - 0.5
    return Mesh(*ops.marching_tets(positions, soft, grid))


def wrong_classes(description: Description) -> dict[str, Scene]:
    """The typical member of every other class, in the description's colours."""
    scenes = {}
    for kind in CLASSES:
        if kind != description.thing.kind or description.base is not None:
            other = replace(description, thing=replace(description.thing, kind=kind), base=None)
            scenes[kind] = build_scene(other, middle_parameters(other))
    return scenes
