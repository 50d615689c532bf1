"""VSD against SDS over the built-in world: are its results better, less saturated, more diverse, and can we tell?

Each method makes n particles of a prompt by ProlificDreamer's first stage, from the same initial fields; what moves
them is the only difference. Beside them stand n members of the world's own family, drawn from its known prior and
measured alike: what a perfect sampler would score, and how exact the measures are.

A prompt of this world always means one colour ("a mug" is "a red mug"), and the family's continuous parameters are
uniform in known ranges. So the prior's colours are those of its members, and diversity is the spread of the parameters.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from text3d_fast.errors import EmptyMesh
from text3d_fast.evaluation import suite
from text3d_fast.evaluation.metrics import held_out_cameras, visible_points
from text3d_fast.evaluation.observe import as_mesh, pictures, true_mesh
from text3d_fast.evaluation.suite import Make, Method
from text3d_fast.files import atomic_path
from text3d_fast.geometry import Mesh, write_mesh
from text3d_fast.guidance import DistillationLoss
from text3d_fast.pipelines.particles import ParticleStage
from text3d_fast.pipelines.playground import diversity, saturation
from text3d_fast.pipelines.prolificdreamer import Field, ProlificDreamer
from text3d_fast.pipelines.volume_stage import score_distillation
from text3d_fast.toybox.bank import one_thread
from text3d_fast.toybox.captions import parse
from text3d_fast.toybox.objects import CLASSES, COLORS
from text3d_fast.toybox.render import over
from text3d_fast.toybox.scenes import Description, Scene, build_scene, sample_parameters

WORLD = "the world"
STRONG = 99.0  # the guidance that SDS is used with elsewhere, 100 in their form
PROMPTS, PARTICLES, STEPS = ("a mug", "a blue chair"), 8, 300
QUICK_PROMPTS, QUICK_PARTICLES, QUICK_STEPS = ("a mug",), 2, 100


class SdsStage(ParticleStage):
    """Radiance fields as in `prolificdreamer.VsdStage`, moved by SDS: each as if it were alone."""

    name, particle = "vsd", Field

    def distillation(self) -> DistillationLoss:
        return score_distillation(self)


class SdsParticles(ProlificDreamer):
    """ProlificDreamer's first stage with SDS in the place of VSD."""

    stages = (SdsStage,)


def methods(model: str | None = None) -> list[Method]:
    """SDS and VSD with the same guidance, SDS with its usual strong one, and the world itself."""
    return [Method(name, model, True) for name in ("SDS", f"SDS, w = {STRONG:g}", "VSD", WORLD)]


def particles(count: int, device: str = "auto", settings: dict[str, Any] | None = None) -> Make:
    """Makes meshes for `suite.run`, where the seed of a run is the number of a particle, from 1."""
    kept: dict[Method, ProlificDreamer] = {}

    def make(method, prompt, seed, steps, folder, tick) -> tuple[Mesh, dict]:
        if method.name == WORLD:
            mesh, about = true_mesh(world_member(parse(prompt), seed)), {}
        else:
            whole = folder.with_name(f"{suite.slug(prompt)}-{count}-particles-{steps}")
            if not (whole / "result.json").is_file():
                if method not in kept:
                    kept[method] = _pipeline(method, count, device, {"vsd.steps": steps, **(settings or {})})
                resume = (whole / "checkpoint.safetensors").is_file()
                kept[method].run(prompt, None, 0, whole, lambda step, _: tick(step, steps), resume, stage="vsd")
            path = whole / ("mesh.glb" if seed == 1 else f"mesh-{seed}.glb")
            if not path.is_file():
                raise EmptyMesh(f"particle {seed} has no surface")
            mesh, about = as_mesh(path), json.loads((whole / "result.json").read_text(encoding="utf-8"))
            about["seconds"]["total"] /= count
        folder.mkdir(parents=True, exist_ok=True)
        write_mesh(folder / "mesh.glb", mesh)
        return mesh, about

    return make


def _pipeline(method: Method, count: int, device: str, settings: dict[str, Any]) -> ProlificDreamer:
    kind = ProlificDreamer if method.name == "VSD" else SdsParticles
    strong = {"vsd.guidance.weight": STRONG} if "w =" in method.name else {}
    return kind(method.model, device, settings={"particles": count, **settings, **strong})


def world_member(description: Description, number: int) -> Scene:
    """A draw from the known prior of a description's family, always the same for a number."""
    return build_scene(description, sample_parameters(description, torch.Generator().manual_seed(5000 + number)))


@dataclass(frozen=True)
class Distribution:
    """What n meshes of a prompt are like together.

    saturation   of their pictures, for each mesh; colours  shares of the visible surface nearest to each named colour
    diversity    root mean square difference of the pictures of two meshes, averaged over the pairs
    parameters   [n, P] the family's parameters of the best fitting member, 0..1 in their ranges
    """

    saturation: Tensor
    colors: dict[str, float]
    diversity: float
    parameters: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, meshes: Sequence[Mesh], members: Sequence[dict], kind: str) -> Distribution:
        cameras = held_out_cameras(8)
        images = torch.stack([over(pictures(mesh, cameras), torch.zeros(3)) for mesh in meshes])
        names = torch.cat([_nearest_colors(mesh) for mesh in meshes])
        shares = torch.bincount(names, minlength=len(COLORS)).double() / max(len(names), 1)
        return cls(torch.tensor([saturation(each) for each in images]), dict(zip(COLORS, shares.tolist(), strict=True)),
                   diversity(images), torch.stack([_placed(member["thing"], kind) for member in members]))


def _nearest_colors(mesh: Mesh) -> Tensor:
    """For each visible point, the row of the nearest named colour."""
    return torch.cdist(visible_points(mesh).albedo, torch.tensor(list(COLORS.values()))).argmin(1)


def _placed(parameters: dict[str, float], kind: str) -> Tensor:
    """Parameters of a class, 0..1 in their ranges."""
    return torch.tensor([(parameters[name] - low) / (high - low) for name, (low, high) in CLASSES[kind].ranges.items()])


def spread(parameters: Tensor) -> float:
    """Root mean square, over the parameters [n, P], of their standard deviations; NaN of a single mesh."""
    return float(parameters.var(0).mean().sqrt()) if len(parameters) > 1 else float("nan")


def spread_interval(count: int, errors: Tensor, trials: int = 2000) -> tuple[float, float]:
    """Between which bounds `spread` lies in 95 % of draws of `count` members from the prior, uniform in 0..1, whose
    parameters are measured with `errors` [P] (standard deviations).
    """
    if count < 2:
        return float("nan"), float("nan")
    generator, shape = torch.Generator().manual_seed(0), (trials, count, len(errors))
    draws = torch.rand(shape, generator=generator) + errors * torch.randn(shape, generator=generator)
    low, high = draws.var(1).mean(1).sqrt().quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high


def compare(found: dict[str, Distribution], description: Description, count: int) -> dict[str, dict]:
    """A row for each method, beside the world."""
    world = found[WORLD]
    kind = description.thing.kind
    true = torch.stack([_placed(world_member(description, number).parameters["thing"], kind)
                        for number in range(1, count + 1)])
    error = (world.parameters - true).square().mean(0).sqrt()
    rows = {}
    for name, one in found.items():
        present = len(one.parameters)
        off = {color: one.colors[color] - world.colors[color] for color in COLORS}
        rows[name] = {
            "meshes": present,
            "saturation": float(one.saturation.mean()),
            "saturation_error": float(one.saturation.std() / present**0.5) if present > 1 else float("nan"),
            "diversity": one.diversity,
            "colors": one.colors,
            "color_distance": 0.5 * sum(abs(value) for value in off.values()),
            "spread": spread(one.parameters),
            "spread_of_the_prior": spread_interval(present, error),
            "parameters": {
                parameter: {"mean": float(one.parameters[:, row].mean()), "fit_error": float(error[row]),
                            "spread": spread(one.parameters[:, row : row + 1])}
                for row, parameter in enumerate(CLASSES[kind].ranges)
            },
        }
    return rows


def run(
    out: str | Path, model: str | None = None, prompts: Sequence[str] = (), count: int | None = None,
    steps: int | None = None, quick: bool = False, device: str = "auto", settings: dict[str, Any] | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """`suite.run` with these methods, and "distribution": by prompt and method, the rows of `compare`."""
    prompts = list(prompts or (QUICK_PROMPTS if quick else PROMPTS))
    count = count or (QUICK_PARTICLES if quick else PARTICLES)
    steps = steps or (QUICK_STEPS if quick else STEPS)
    folder, tried = Path(out), methods(model)
    result = suite.run(folder, methods=tried, prompts=prompts, seeds=range(1, count + 1), steps=steps, device=device,
                       make=particles(count, device, settings), quiet=quiet)
    result["distribution"] = {}
    with one_thread():
        for prompt in prompts:
            description, found = parse(prompt), {}
            for method in tried:
                mine = [record for record in result["runs"]
                        if record["prompt"] == prompt and record["method"] == method.name]
                places = [suite.place(folder, method, prompt, record["seed"], steps) / "mesh.glb" for record in mine]
                there = [(path, record) for path, record in zip(places, mine, strict=True) if path.is_file()]
                if there:
                    found[method.name] = Distribution.of([as_mesh(path) for path, _ in there],
                                                         [record["member"] for _, record in there],
                                                         description.thing.kind)
            result["distribution"][prompt] = compare(found, description, count)
    suite.write_json(folder / "evaluation.json", result)
    _write_csv(folder / "distribution.csv", result["distribution"])
    _write_sheet(folder / "particles.png", folder, tried, prompts, count, steps)
    return result


def _write_csv(path: Path, distribution: dict[str, dict]) -> None:
    with atomic_path(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "method", "figure", "value", "error"])
        for prompt, rows in distribution.items():
            for name, row in rows.items():
                own = [("saturation", row["saturation"], row["saturation_error"]),
                       ("diversity", row["diversity"], ""), ("color distance", row["color_distance"], "")]
                own += [(f"share of {color}", share, "") for color, share in row["colors"].items()]
                own += [("spread", row["spread"], ""), ("spread of the prior, from", row["spread_of_the_prior"][0], ""),
                        ("spread of the prior, to", row["spread_of_the_prior"][1], "")]
                for parameter, facts in row["parameters"].items():
                    own += [(f"{parameter}, mean", facts["mean"], facts["fit_error"]),
                            (f"{parameter}, spread", facts["spread"], "")]
                writer.writerows([prompt, name, figure, *(value if value == "" else round(value, 4) for value in rest)]
                                 for figure, *rest in own)


@torch.no_grad()
def _write_sheet(
    path: Path, folder: Path, tried: Sequence[Method], prompts: Sequence[str], count: int, steps: int
) -> None:
    """All particles, a row for each method and prompt, half from the left."""
    from text3d_fast.images import write_views

    camera, ground = torch.tensor([[0.35, 0.5, 2.7]]), torch.tensor([0.93, 0.94, 0.96])
    cells, labels = [], []
    for prompt in prompts:
        for method in tried:
            for number in range(1, count + 1):
                mesh = suite.place(folder, method, prompt, number, steps) / "mesh.glb"
                empty = torch.zeros(1, 128, 128, 4)
                cells.append(over(pictures(as_mesh(mesh), camera, 128) if mesh.is_file() else empty, ground)[0])
                labels.append(f"{method.name}, {number}")
    write_views(path, torch.stack(cells), labels, columns=count)


def table(distribution: dict[str, dict]) -> Any:
    """The rows of `compare` as a rich table that fits 80 columns."""
    from rich import box
    from rich.table import Table

    result = Table(title="VSD against SDS: several results of one prompt", box=box.SIMPLE_HEAD, padding=0,
                   show_edge=False)
    for column in ("", "saturation", "differ", "colours", "spread", "of the prior", "parameters"):
        result.add_column(column, justify="left" if column in ("", "parameters") else "right")
    for prompt, rows in distribution.items():
        result.add_section()
        result.add_row(f"[bold]{prompt}")
        for name, row in rows.items():
            low, high = row["spread_of_the_prior"]
            means = ", ".join(f"{parameter} {facts['mean']:.2f}" for parameter, facts in row["parameters"].items())
            result.add_row(name, f"{row['saturation']:.3f}±{row['saturation_error']:.3f}", f"{row['diversity']:.3f}",
                           f"{row['color_distance']:.2f}", f"{row['spread']:.2f}", f"{low:.2f}-{high:.2f}", means)
        errors = ", ".join(f"±{facts['fit_error']:.2f}" for facts in rows[WORLD]["parameters"].values())
        result.add_row("[dim]error of a fit", *[""] * 5, f"[dim]{errors}")
    result.caption = (
        "Saturation: mean and standard error. Differ: of the pictures of two results. Colours: share of the surface "
        "in another colour than the world's. Parameters of the family, 0 to 1 in their ranges: means, their spread "
        "(standard deviation), and where it lies in 95 % of as many draws from the world's prior."
    )
    result.caption_justify = "left"
    return result
