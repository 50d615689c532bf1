"""Datasets of Toybox renders on disk: bytes in npy shards, the truth about each image in jsonl beside them.

`shard-00000.npy` uint8 [n, size, size, 4]: premultiplied rgb and alpha, so that any background can be put behind.
`shard-00000.jsonl`, one line an image: description, parameters, elevation, azimuth, distance (radians, world units),
light, and `caption` with the true view word. Draw training captions anew with `captions.training_caption`.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from text3d_fast.files import atomic_path, write_bytes
from text3d_fast.toybox.captions import caption, view_word
from text3d_fast.toybox.objects import CLASSES
from text3d_fast.toybox.render import random_light, shade, trace
from text3d_fast.toybox.scenes import Description, build_scene, random_description, sample_parameters

FORMAT = 1
SHARD = 512
VIEWS_PER_SCENE = 16  # traced together, which takes a third of the time of 4 at a time


def sample_cameras(
    count: int,
    generator: torch.Generator | None = None,
    front: float = 0.7,
    overhead: float = 0.08,
    close: float = 0.12,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Elevation, azimuth (radians) and distance [count] each.

    A share `overhead` looks from 60 to 85 degrees up, a share `front` of all from within 45 degrees of the front, the
    rest evenly from the other sides, -10 to 60 degrees up; a share `close` stands at 1.6 to 2.5, the rest at 2.5 to 3.
    """
    if front + overhead > 1:
        raise ValueError(f"front + overhead: expected at most 1, got {front} + {overhead}")
    luck, spin, rise, near, depth = torch.rand(5, count, generator=generator)
    above = luck < overhead
    ahead = luck > 1 - front
    elevation = torch.where(above, 60 + 25 * rise, -10 + 70 * rise)
    azimuth = torch.where(above, 360 * spin, torch.where(ahead, -45 + 90 * spin, 45 + 270 * spin)) % 360
    distance = torch.where(near < close, 1.6 + 0.9 * depth, 2.5 + 0.5 * depth)
    return elevation.deg2rad(), azimuth.deg2rad(), distance


def _random_style(generator: torch.Generator, textureless: float, normal: float) -> str:
    luck = float(torch.rand((), generator=generator))
    return "textureless" if luck < textureless else "normal map" if luck < textureless + normal else "shaded"


def render_images(
    count: int,
    generator: torch.Generator,
    size: int = 64,
    front: float = 0.7,
    textureless: float = 0.08,
    normal: float = 0.08,
    two_objects: float = 0.15,
    kinds: Sequence[str] = tuple(CLASSES),
) -> tuple[np.ndarray, list[dict]]:
    """Draws `count` random training images of these classes: uint8 [count, size, size, 4] and their truths."""
    images, records = [], []
    while len(records) < count:
        description = random_description(generator, two_objects, kinds=kinds)
        parameters = sample_parameters(description, generator)
        views = min(VIEWS_PER_SCENE, count - len(records))
        elevation, azimuth, distance = sample_cameras(views, generator, front)
        surface = trace(build_scene(description, parameters), elevation, azimuth, distance, size)
        light = random_light(surface.eye, generator)
        styles = [_random_style(generator, textureless, normal) for _ in range(views)]
        by_style = {style: shade(surface, light, style) for style in set(styles)}
        for k, style in enumerate(styles):
            images.append((by_style[style][k] * 255).round().to(torch.uint8).numpy())
            word = view_word(float(elevation[k]), float(azimuth[k]))
            meaning = replace(description, style=style)
            records.append(
                {
                    "caption": caption(replace(meaning, view=word)),
                    "description": meaning.to_dict(),
                    "parameters": parameters,
                    "elevation": round(float(elevation[k]), 5),
                    "azimuth": round(float(azimuth[k]), 5),
                    "distance": round(float(distance[k]), 5),
                    "light": {
                        name: [round(v, 4) for v in getattr(light, name)[k].tolist()]
                        for name in ("position", "color", "ambient")
                    },
                }
            )
    return np.stack(images), records


@torch.no_grad()
def _render_shard(job: tuple[str, int, int, dict]) -> int:
    folder, shard, count, settings = job
    generator = torch.Generator().manual_seed(settings["seed"] * 1_000_003 + shard)
    options = {key: value for key, value in settings.items() if key not in ("format", "seed")}
    images, records = render_images(count, generator, **options)
    stem = Path(folder) / f"shard-{shard:05d}"
    lines = "".join(json.dumps(record) + "\n" for record in records)
    write_bytes(stem.with_suffix(".jsonl"), lines.encode())
    with atomic_path(stem.with_suffix(".npy")) as part:  # last: its presence means the shard is done
        np.save(part, images)
    return count


def render_dataset(out: str | Path, count: int, workers: int = 1, **settings: object) -> None:
    """Renders a dataset of `count` images into the folder `out`, shard by shard; shards already there are kept.

    settings: seed, size, front (share of front views), textureless, normal (shares of those styles), two_objects,
    kinds (the classes to draw from).
    A folder made with other settings is refused; `count` may grow from one call to the next in whole shards.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    defaults = {"seed": 0, "size": 64, "front": 0.7, "textureless": 0.08, "normal": 0.08, "two_objects": 0.15}
    settings = json.loads(json.dumps({"format": FORMAT, **defaults, **settings}))  # as it will be read again
    manifest = folder / "dataset.json"
    if manifest.exists() and (found := json.loads(manifest.read_text())) != settings:
        raise ValueError(f"out: {folder} was rendered with {found}, not {settings}; choose another folder")
    write_bytes(manifest, json.dumps(settings).encode())
    jobs = []
    for shard in range(math.ceil(count / SHARD)):
        size = min(SHARD, count - shard * SHARD)
        path = folder / f"shard-{shard:05d}.npy"
        if not path.exists() or len(np.load(path, mmap_mode="r")) < size:
            jobs.append((str(folder), shard, size, settings))
    bar = Progress("rendering", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with bar:
        task = bar.add_task("", total=count, completed=count - sum(job[2] for job in jobs))
        if workers <= 1:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # the tensors are small: more threads only wait for each other
            try:
                for job in jobs:
                    bar.advance(task, _render_shard(job))
            finally:
                torch.set_num_threads(threads)
        else:
            with get_context("spawn").Pool(workers, torch.set_num_threads, (1,)) as pool:
                for done in pool.imap_unordered(_render_shard, jobs):
                    bar.advance(task, done)


class RenderedImages:
    """A rendered dataset: `images(rows)` uint8 [n, H, W, 4], `records[row]`, and the truths as arrays.

    Shards are memory-mapped; `camera` float32 [N, 3] holds elevation, azimuth, distance; `front`, `not_front`
    and `overhead` are the rows seen from the front, from elsewhere, and from above.
    """

    def __init__(self, folder: str | Path) -> None:
        stems = sorted(path.with_suffix("") for path in Path(folder).glob("shard-*.npy"))
        if not stems:
            raise ValueError(f"folder: {folder} holds no shard-*.npy; render one with examples.train_toybox.dataset")
        self._shards = [np.load(stem.with_suffix(".npy"), mmap_mode="r") for stem in stems]
        self._starts = np.cumsum([0, *(len(shard) for shard in self._shards)])
        self.records = [json.loads(line) for stem in stems for line in stem.with_suffix(".jsonl").open()]
        self.descriptions = [Description.from_dict(record["description"]) for record in self.records]
        keys = ("elevation", "azimuth", "distance")
        self.camera = np.array([[record[key] for key in keys] for record in self.records], dtype=np.float32)
        self._rows = np.arange(self._starts[-1])
        self._sort_by_view()

    def _sort_by_view(self) -> None:
        words = np.array([view_word(float(c[0]), float(c[1])) for c in self.camera])
        self.front, self.not_front = (words == "front").nonzero()[0], (words != "front").nonzero()[0]
        self.overhead = (words == "overhead").nonzero()[0]

    def __len__(self) -> int:
        return len(self._rows)

    def subset(self, rows: Sequence[int]) -> RenderedImages:
        """These rows alone, numbered anew."""
        part = copy(self)
        part._rows, part.camera = self._rows[rows], self.camera[rows]
        part.records, part.descriptions = [self.records[k] for k in rows], [self.descriptions[k] for k in rows]
        part._sort_by_view()
        return part

    def images(self, rows: np.ndarray) -> np.ndarray:
        """Images [len(rows), H, W, 4] uint8, premultiplied."""
        rows = self._rows[rows]
        shard = np.searchsorted(self._starts, rows, side="right") - 1
        return np.stack([self._shards[s][r - self._starts[s]] for s, r in zip(shard, rows, strict=True)])


def main() -> None:
    """The command line of `python -m examples.train_toybox.dataset`."""
    parser = argparse.ArgumentParser(description="Render a Toybox dataset (resumable).")
    parser.add_argument("--out", required=True, help="folder of the dataset")
    parser.add_argument("--count", type=int, default=20_000, help="images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--front", type=float, default=0.7, help="share of front views")
    parser.add_argument("--two-objects", type=float, default=0.15, help="share of two-object scenes")
    parser.add_argument("--kinds", nargs="+", choices=CLASSES, help="classes to draw from (default: all)")
    given = {key: value for key, value in vars(parser.parse_args()).items() if value is not None}
    render_dataset(given.pop("out"), given.pop("count"), given.pop("workers"), **given)


if __name__ == "__main__":
    main()
