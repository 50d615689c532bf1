"""Several runs of one command: prompts from a file, several seeds; one folder each, an index and a contact sheet."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from text3d_fast.app.commands.runs import CHECKPOINT, Job, default_folder, slug

INDEX, SHEET = "index.json", "contact.png"
MOST_LETTERS = 42  # of a label: what fits under a picture


def read_prompts(path: Path) -> list[str]:
    """A line each; empty ones and those that begin with # do not count. ValueError if there are none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompts {path}: cannot read it ({getattr(error, 'strerror', None) or error})") from error
    prompts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not prompts:
        raise ValueError(f"--prompts {path}: expected a prompt on each line, got none")
    return prompts


class Batch:
    """Every prompt with every seed, below the folder `out`; `index.json` says what has become of each.

    What the index calls done is left alone when the batch is resumed, unless `again`; the rest goes on or begins.
    """

    def __init__(self, prompts: Sequence[str], seeds: Sequence[int], out: Path, resume: bool, again: bool = False):
        self.out = out
        there = self._before(resume)
        known = {(row["prompt"], row["seed"]): row for row in there}
        taken = {row["folder"] for row in there}
        asked = []
        for prompt in dict.fromkeys(prompts):
            for seed in dict.fromkeys(seeds):
                row = known.get((prompt, seed))
                if row is None:
                    name = self._name(prompt, seed if len(seeds) > 1 else None, taken)
                    row = {"prompt": prompt, "seed": seed, "folder": name, "status": "waiting"}
                    taken.add(name)
                asked.append(row)
        self.rows = asked + [row for row in there if row not in asked]
        self.jobs = [Job(row["prompt"], row["seed"], out / row["folder"], (out / row["folder"] / CHECKPOINT).is_file())
                     for row in asked if again or row["status"] == "waiting"]

    @staticmethod
    def _name(prompt: str, seed: int | None, taken: set[str]) -> str:
        stem = name = slug(prompt) + ("" if seed is None else f"-seed-{seed}")
        number = 1
        while name in taken:
            number += 1
            name = f"{stem}-{number}"
        return name

    def _before(self, resume: bool) -> list[dict[str, Any]]:
        """The rows of the index that is there. ValueError if the folder is not ours or not to be resumed."""
        try:
            if not self.out.exists() or not any(self.out.iterdir()):
                return []
        except OSError as error:
            raise ValueError(f"--out {self.out}: {error.strerror or error}") from error
        try:
            rows = json.loads((self.out / INDEX).read_text(encoding="utf-8"))
            for row in rows:
                if not {"prompt", "seed", "folder", "status"} <= set(row) or Path(row["folder"]).name != row["folder"]:
                    raise ValueError(f"not a row of an index: {row}")
        except (OSError, ValueError, TypeError):
            raise ValueError(f"{self.out} is not empty and holds no {INDEX} of several runs: choose another folder "
                             f"with --out") from None
        if not resume:
            raise ValueError(f"{self.out} already holds several runs: continue them with --resume, or choose another "
                             f"folder with --out")
        return rows

    def write(self) -> None:
        """The index and the contact sheet of now. OutputError if they cannot be written."""
        from text3d_fast.errors import OutputError
        from text3d_fast.files import write_text

        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot make the folder {self.out}: {error.strerror or error}") from error
        for left in self.out.glob(".*.*"):  # of a command that was killed while it wrote a file
            if re.fullmatch(r"\.(index|contact)\.\w{8}\.\w+", left.name):
                left.unlink(missing_ok=True)
        write_text(self.out / INDEX, json.dumps(self.rows, indent=2, ensure_ascii=False) + "\n")
        self._sheet()

    def finished(self, job: Job, outcome: Any) -> None:
        """Note a result, or the EmptyMesh that came instead."""
        row = next(row for row in self.rows if self.out / row["folder"] == job.out)
        if isinstance(outcome, Exception):
            row["status"] = "empty"
        else:
            metrics = outcome.metrics
            row |= {"status": "done", "faces": metrics["metrics"]["faces"], "seconds": metrics["seconds"]["total"],
                    "meshes": len(outcome.meshes)}
        self.write()

    def _sheet(self) -> None:
        """A picture of every mesh, with its prompt."""
        import torch

        from text3d_fast.geometry import read_mesh
        from text3d_fast.images import write_views
        from text3d_fast.pipelines.pictures import mesh_views
        from text3d_fast.scene.cameras import CameraDistribution

        pictures, labels = [], []
        seeds = {row["seed"] for row in self.rows}
        for row in self.rows:
            for number in range(1, row.get("meshes", 0) + 1):
                mesh = read_mesh(self.out / row["folder"] / f"mesh{'' if number == 1 else f'-{number}'}.glb")
                pictures.append(mesh_views(mesh, CameraDistribution(), [30.0], 20.0))
                end = f", seed {row['seed']}" if len(seeds) > 1 else ""
                end += f", {number}" if row["meshes"] > 1 else ""
                labels.append(_shortened(row["prompt"], MOST_LETTERS - len(end)) + end)
        if pictures:
            write_views(self.out / SHEET, torch.cat(pictures), labels)


def _shortened(text: str, letters: int) -> str:
    return text if len(text) <= letters else text[: letters - 1].rstrip() + "…"


def batch_folder(file: Path | None, prompt: str | None, resume: bool) -> Path:
    """runs/NAME_OF_FILE or runs/PROMPT-seeds."""
    return default_folder(file.stem if file is not None else f"{prompt} seeds", resume)
