"""The quality suite behind `text3d-fast evaluate`: generated meshes against the truth, over the built-in world.

For each method (a prior, with the camera given or in words only), prompt and seed: a run of a pipeline, its mesh
against the best fitting member of the class family, retrieval among all class x colour pairs, and the Janus measure.
Beside them the baselines, and as headline how much of the way from the best wrong class to the analytic prior is done:
(ours - wrong class) / (analytic - wrong class).

Folder: runs/METHOD/PROMPT-SEED-STEPS/ (what `generate` writes, and score.json), baselines/PROMPT.json,
evaluation.json, evaluation.csv (a row a run), sheet.png. What has a score is not run again; an interrupted run goes on
from its checkpoint.
"""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from text3d_fast.evaluation import metrics
from text3d_fast.evaluation.matching import Gallery, facing, wilson_interval
from text3d_fast.evaluation.observe import as_mesh, pictures
from text3d_fast.files import atomic_path, write_bytes
from text3d_fast.geometry import Mesh
from text3d_fast.lines import LOG, Lines
from text3d_fast.toybox.bank import one_thread
from text3d_fast.toybox.captions import parse
from text3d_fast.toybox.render import over
from text3d_fast.toybox.scenes import Description, build_scene, held_out

VERSION = 1
REFERENCE = "analytic, camera"
QUICK_PROMPTS = ("a red mug", "a blue chair", "a red car", "a white snowman")
QUICK_STEPS = 300
PROMPTS = (
    *("a red mug", "a blue chair", "a red car", "a white snowman", "a blue teapot", "a yellow house", "a red mushroom"),
    *("an orange cone", "a purple donut", "a green bowl", "a red table", "a green tree", "a red clock", "a blue cube"),
    *("a yellow ball", "a white cylinder", "a striped blue mug", "a checkered red cube", "a tall orange teapot"),
    *("a red ball on a blue cube", "a green mug on a red table"),
)
_UP = ("f5", "f2", "silhouette_iou", "volume_iou")
_DOWN = ("normal_error", "color_error")


@dataclass(frozen=True)
class Method:
    """One way to make meshes: a prior (None: the pipeline's own choice), whether it is given the camera, and the stage
    of a pipeline of several whose mesh it is.
    """

    name: str
    model: str | None
    camera: bool
    stage: str | None = None

    @property
    def slug(self) -> str:
        return slug(self.name)


def slug(text: str) -> str:
    return "-".join(re.findall(r"[a-z0-9]+", text.lower()))


def place(folder: Path, method: Method, prompt: str, seed: int, steps: int | None) -> Path:
    """The folder of a run within that of the evaluation."""
    return folder / "runs" / method.slug / f"{slug(prompt)}-{seed}-{steps or 'default'}"


def default_methods(model: str | None = None, quick: bool = False) -> list[Method]:
    """Both priors, with the camera and in words only; `model` takes the place of the learned Toybox prior."""
    analytic = [Method(REFERENCE, "analytic", True), Method("analytic, words", "analytic", False)]
    learned = model or "toybox"
    if learned == "analytic":
        return analytic
    name = Path(learned).name
    both = [Method(f"{name}, camera", learned, True), Method(f"{name}, words", learned, False)]
    return (analytic[:1] if quick else analytic) + both


def magic3d_methods(model: str | None = None) -> list[Method]:
    """The mesh of the coarse stage, and the one that the fine stage makes of the same volume."""
    return [Method(f"magic3d, {stage}", model, True, stage) for stage in ("coarse", "fine")]


Make = Callable[[Method, str, int, "int | None", Path, Callable[[int, int], Any]], tuple[Any, dict]]


def dreamfusion(device: str = "auto", model: str | None = None, settings: dict[str, Any] | None = None) -> Make:
    """Makes meshes with the DreamFusion pipeline; pipelines are kept for the next prompt.

    settings: of the methods whose prior is `model` (None: the learned Toybox one), not of those beside it
    """
    from text3d_fast.pipelines import DreamFusion

    kept: dict[Method, DreamFusion] = {}

    def make(method, prompt, seed, steps, folder, tick) -> tuple[Any, dict]:
        if method not in kept:
            own = (settings or {}) if method.model == (model or "toybox") else {}
            kept[method] = DreamFusion(method.model, device, settings={"guidance.camera": method.camera, **own})
        pipeline = kept[method]
        total = steps or pipeline.config.steps
        resume = (folder / "checkpoint.safetensors").is_file()
        if not resume and folder.exists():
            shutil.rmtree(folder)  # begun, but nothing in it to go on from
        result = pipeline.run(prompt, total, seed, folder, lambda step, _: tick(step, total), resume)
        return result.mesh, result.metrics

    return make


def magic3d(device: str = "auto", settings: dict[str, Any] | None = None) -> Make:
    """Makes meshes with either stage of Magic3D; the fine one begins with what the coarse one left beside it."""
    from text3d_fast.pipelines import Magic3D

    kept: dict[str | None, Magic3D] = {}

    def make(method, prompt, seed, steps, folder, tick) -> tuple[Any, dict]:
        if method.model not in kept:
            kept[method.model] = Magic3D(method.model, device, settings=settings)
        pipeline = kept[method.model]
        resume = (folder / "checkpoint.safetensors").is_file()
        if not resume and folder.exists():
            shutil.rmtree(folder)
        coarse = next(m for m in magic3d_methods(method.model) if m.stage == "coarse")
        start = None if method.stage == "coarse" else folder.parents[1] / coarse.slug / folder.name
        result = pipeline.run(prompt, steps, seed, folder, lambda step, state: tick(step, state.stage.config.steps),
                              resume, method.stage, start)
        return result.mesh, result.metrics

    return make


def run(
    out: str | Path = "runs/evaluation",
    model: str | None = None,
    methods: Sequence[Method] = (),
    prompts: Sequence[str] = (),
    seeds: Sequence[int] = (),
    steps: int | None = None,
    quick: bool = False,
    device: str = "auto",
    make: Make | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Evaluates and returns what evaluation.json holds: "summary" by method, "baselines", and every "run".

    Defaults: `default_methods(model)`, 21 prompts, seeds 0, 1, 2 and the model's steps; with `quick` four prompts, one
    seed, 300 steps.
    """
    folder = Path(out)
    methods = list(methods or default_methods(model, quick))
    prompts = list(prompts or (QUICK_PROMPTS if quick else PROMPTS))
    seeds = list(seeds or ((0,) if quick else (0, 1, 2)))
    steps = steps or (QUICK_STEPS if quick else None)
    make = make or dreamfusion(device)
    for prompt in prompts:
        parse(prompt)  # a mistake in the fifth prompt should not show after an hour
    folder.mkdir(parents=True, exist_ok=True)
    suite = _Suite(folder, make, steps)
    records = []
    jobs = [(method, prompt, seed) for prompt in prompts for method in methods for seed in seeds]
    with _progress(quiet) as bar:
        lines = Lines(bar.console, folder / LOG)
        overall = bar.add_task("evaluation", total=len(jobs))
        current = bar.add_task("", total=1)
        for method, prompt, seed in jobs:
            what = f"{prompt} | {method.name}"
            bar.reset(current, total=1, description=what)

            def tick(step: int, total: int, what: str = what) -> None:
                bar.update(current, completed=step, total=total)
                lines.say(f"{what}: step {step} of {total}; {len(records)} of {len(jobs)} runs done")

            records.append(suite.scored(method, prompt, seed, tick))
            bar.advance(overall)
        baselines = {prompt: suite.baselines(prompt) for prompt in prompts}
    result = {
        "version": VERSION,
        "methods": [asdict(method) for method in methods],
        "summary": summarize(records, baselines),
        "baselines": baselines,
        "runs": records,
    }
    write_json(folder / "evaluation.json", result)
    _write_csv(folder / "evaluation.csv", records)
    suite.write_sheet(folder / "sheet.png", methods, prompts, seeds[0])
    return result


class _Suite:
    def __init__(self, folder: Path, make: Make, steps: int | None) -> None:
        self.folder, self.make, self.steps = folder, make, steps
        self._gallery: Gallery | None = None

    @property
    def gallery(self) -> Gallery:
        if self._gallery is None:
            self._gallery = Gallery()
        return self._gallery

    def place(self, method: Method, prompt: str, seed: int) -> Path:
        return place(self.folder, method, prompt, seed, self.steps)

    def scored(self, method: Method, prompt: str, seed: int, tick: Callable[[int, int], Any]) -> dict:
        """The score of one run, made if it is not there."""
        place = self.place(method, prompt, seed)
        known = read_json(place / "score.json")
        if known is not None:
            return known
        started = time.perf_counter()
        mesh, about = self._made(method, prompt, seed, place, tick)
        made = time.perf_counter() - started
        with one_thread(), torch.no_grad():
            record = self._judged(parse(prompt), mesh)
        record |= {
            "version": VERSION, "prompt": prompt, "method": method.name, "seed": seed, "steps": self.steps,
            "held_out": any(held_out(thing.kind, thing.color) for thing in parse(prompt).things),
            "seconds": round(about.get("seconds", {}).get("total", made), 1),
            "warnings": about.get("warnings", []),
        }  # fmt: skip
        place.mkdir(parents=True, exist_ok=True)
        write_json(place / "score.json", record)
        return read_json(place / "score.json")

    def _made(self, method, prompt, seed, place, tick) -> tuple[Mesh, dict]:
        from text3d_fast.errors import EmptyMesh

        try:
            mesh, about = self.make(method, prompt, seed, self.steps, place, tick)
        except EmptyMesh as error:
            none = Mesh(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int32))
            return none, {"warnings": [str(error)]}
        return as_mesh(mesh), about

    def _judged(self, description: Description, mesh: Mesh) -> dict:
        member = metrics.fit_member(description, mesh)
        facts = facing(mesh, member)
        plain = description.base is None and description.thing.pattern is None
        return {
            "score": metrics.score(mesh, member).to_dict(),
            "retrieval_rank": self.gallery.retrieve(mesh).rank(description) if plain else None,
            "facing": asdict(facts),
            "member": member.parameters,
        }

    def baselines(self, prompt: str) -> dict[str, dict]:
        """Scores of the best ball, the best wrong class (the best of each figure) and the visual hull."""
        path = self.folder / "baselines" / f"{slug(prompt)}.json"
        known = read_json(path)
        if known is not None:
            return known["scores"]
        with one_thread(), torch.no_grad():
            description = parse(prompt)
            truth = metrics.Truth(build_scene(description))
            wrong = {kind: metrics.score(scene, truth) for kind, scene in metrics.wrong_classes(description).items()}
            best = {name: max(getattr(score, name) for score in wrong.values()) for name in _UP}
            best |= {name: _least([getattr(score, name) for score in wrong.values()]) for name in _DOWN}
            scores = {
                "best ball": metrics.score(metrics.best_ball(truth), truth).to_dict(),
                "best wrong class": best | {"kind": max(wrong, key=lambda kind: wrong[kind].f5)},
                "visual hull": metrics.score(metrics.visual_hull(truth), truth).to_dict(),
            }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"version": VERSION, "prompt": prompt, "scores": scores})
        return read_json(path)["scores"]

    def write_sheet(self, path: Path, methods: Sequence[Method], prompts: Sequence[str], seed: int) -> None:
        """One row a prompt: the truth, then each method, from four sides."""
        from PIL import Image

        cameras = torch.tensor([[0.35, angle, 2.7] for angle in (0.5, 2.07, 3.64, 5.21)])
        ground = torch.tensor([0.93, 0.94, 0.96])
        rows = []
        with one_thread(), torch.no_grad():
            for prompt in prompts:
                cells = [pictures(build_scene(parse(prompt)), cameras)]
                for method in methods:
                    mesh = self.place(method, prompt, seed) / "mesh.glb"
                    cells.append(pictures(as_mesh(mesh), cameras) if mesh.is_file() else torch.zeros_like(cells[0]))
                images = over(torch.cat(cells), ground)
                rows.append(torch.cat(list(images), 1))
        sheet = (torch.cat(rows).clamp(0, 1) * 255).round().to(torch.uint8)
        Image.fromarray(sheet.numpy()).save(path)


def _least(values: Sequence[float]) -> float | None:
    known = [value for value in values if not math.isnan(value)]
    return min(known) if known else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and not math.isnan(value)]
    return sum(known) / len(known) if known else None


def summarize(records: Sequence[dict], baselines: dict[str, dict]) -> dict[str, dict]:
    """Means by method and baseline, rates with 95 % intervals, and the headline of each method."""
    names = list(dict.fromkeys(record["method"] for record in records))
    summary = {}
    for name in names:
        mine = [record for record in records if record["method"] == name]
        row: dict[str, Any] = {key: _mean([r["score"][key] for r in mine]) for key in (*_UP, *_DOWN)}
        row["euler_right"] = _mean([float(r["score"]["euler"] == r["score"]["true_euler"]) for r in mine])
        ranks = [r["retrieval_rank"] for r in mine if r["retrieval_rank"] is not None]
        row["retrieval"] = _rate(sum(rank == 1 for rank in ranks), len(ranks))
        faced = [r["facing"] for r in mine if r["facing"]["directional"]]
        row["janus"] = _rate(sum(f["janus"] for f in faced), len(faced))
        row["views_agree"] = _mean([f["agreement"] for f in faced])
        row["seconds"] = _mean([r["seconds"] for r in mine])
        row["runs"] = len(mine)
        summary[name] = row
    for name in ("best ball", "best wrong class", "visual hull"):
        rows = [scores[name] for scores in baselines.values()]
        summary[name] = {key: _mean([row[key] for row in rows]) for key in (*_UP, *_DOWN)}
    wrong, reference = summary["best wrong class"], summary.get(REFERENCE)
    for name in names:
        if reference is not None and name != REFERENCE:
            summary[name]["headline"] = {
                key: _share(summary[name][key], wrong[key], reference[key]) for key in ("f5", "silhouette_iou")
            }
    return summary


def _share(ours: float, wrong: float, analytic: float) -> float | None:
    return (ours - wrong) / (analytic - wrong) if analytic - wrong > 1e-6 else None


def _rate(hits: int, total: int) -> dict | None:
    return {"rate": hits / total, "interval": wilson_interval(hits, total), "of": total} if total else None


def table(summary: dict[str, dict]) -> Any:
    """The summary as a rich table that fits 80 columns."""
    from rich import box
    from rich.table import Table

    columns = ["F 5%", "F 2%", "silh.", "vol.", "norm.", "col.", "Euler", "found", "Janus", "share"]
    result = Table("", title="Toybox: meshes against the truth", box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for column in columns:
        result.add_column(column, justify="right")

    def number(value: float | None, form: str = ".2f") -> str:
        return "-" if value is None else format(value, form)

    intervals = []
    for name, row in summary.items():
        headline = row.get("headline")
        rates = [row.get("retrieval"), row.get("janus")]
        result.add_row(
            name,
            *(number(row[key]) for key in _UP),
            number(row["normal_error"], ".0f") + "°",
            number(row["color_error"]),
            number(row.get("euler_right"), ".0%"),
            *(number(rate and rate["rate"], ".0%") for rate in rates),
            "-" if headline is None else f"{number(headline['f5'])} {number(headline['silhouette_iou'])}",
        )
        if any(rates):
            found, janus = ("{:.0%} to {:.0%}".format(*rate["interval"]) if rate else "-" for rate in rates)
            intervals.append(f"{name}: found {found}, Janus {janus}")
    legend = (
        "F-score, IoU of silhouette and volume: higher is better; error of normals and colours: lower. Euler: how many "
        "have the right characteristic. Found: retrieved first of all classes and colours. Share: how much of the way "
        "from the best wrong class to the analytic prior, in F 5% and silhouette. 95 % intervals:"
    )
    result.caption = "\n".join([legend, *intervals])
    result.caption_justify = "left"
    return result


def _progress(quiet: bool) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=Console(stderr=True, quiet=quiet), disable=quiet)


def read_json(path: Path) -> dict | None:
    """The content, None if there is none, it is cut short or of another version."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and content.get("version") == VERSION else None


def write_json(path: Path, content: dict) -> None:
    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    write_bytes(path, (json.dumps(plain(content), indent=1) + "\n").encode())


def _write_csv(path: Path, records: Sequence[dict]) -> None:
    scores = ("f5", "f2", "silhouette_iou", "volume_iou", "normal_error", "color_error", "euler", "true_euler")
    with atomic_path(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "prompt", "seed", "steps", *scores, "retrieval_rank", "janus", "seconds"])
        for record in records:
            values = [record["score"][name] for name in scores]
            values = [round(value, 4) if isinstance(value, float) else value for value in values]
            janus = record["facing"]["janus"] if record["facing"]["directional"] else None
            own = (record[name] for name in ("method", "prompt", "seed", "steps"))
            writer.writerow([*own, *values, record["retrieval_rank"], janus, record["seconds"]])


def main(options: Any, settings: dict[str, Any] | None = None) -> int:
    """The command: options are those of `app.commands.evaluate.Evaluate`, settings prior.*. Returns the exit status."""
    from rich.console import Console

    from text3d_fast.errors import OutputError

    if options.pipeline == "magic3d":
        methods, make = magic3d_methods(options.model), magic3d(options.device, settings)
    else:
        methods = default_methods(options.model, options.quick)
        make = dreamfusion(options.device, options.model, settings)
    if options.camera_only:
        methods = [method for method in methods if method.camera]
    try:
        if options.pipeline == "prolificdreamer":
            from text3d_fast.evaluation import variational

            result = variational.run(options.out, options.model, options.prompts, options.particles, options.steps,
                                     options.quick, options.device, settings)
        else:
            result = run(options.out, methods=methods, prompts=options.prompts, seeds=options.seeds,
                         steps=options.steps, quick=options.quick, device=options.device, make=make)
    except KeyboardInterrupt:
        print(f"Stopped; the same command goes on with what is in {options.out}.", file=sys.stderr)
        return 130
    except (OutputError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    Console().print(table(result["summary"]))
    if "distribution" in result:
        Console().print(variational.table(result["distribution"]))
    print(f"{options.out}/evaluation.json, {options.out}/evaluation.csv, {options.out}/sheet.png")
    return 0
