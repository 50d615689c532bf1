"""What `playground` shows and writes."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from text3d_fast.errors import ModelError, OutputError
from text3d_fast.files import write_text
from text3d_fast.images import write_views
from text3d_fast.pipelines import playground

if TYPE_CHECKING:
    from text3d_fast.app.commands.playground import Playground


def compare(options: Playground, out: Path, settings: dict[str, Any]) -> list[playground.Cell]:
    """Make the pictures, with progress, write them and print the table. Raises ValueError, ModelError, OutputError.

    settings: prior.*
    """
    from text3d_fast.guidance import load_prior
    from text3d_fast.pipelines.config import RunConfig
    from text3d_fast.pipelines.pipeline import choose_device

    console = Console(stderr=True, quiet=options.quiet)
    prior = load_prior(options.model, choose_device(options.device), RunConfig().updated(settings).prior)
    if prior.kind == "latent":
        raise ModelError(f"--model {prior.name}: its pictures are behind a decoder, which is not loaded; use the "
                         f"built-in model or one that works on pixels")
    weights = () if options.no_grid else options.weights
    sets = len(playground.METHODS) + len(playground.GRID_METHODS) * len(weights)
    bar = Progress(
        TextColumn("[bold]{task.description:30}"), BarColumn(), MofNCompleteColumn(), TextColumn("sets of pictures"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console,
    )
    task = bar.add_task("preparing", total=sets)
    done = 0

    def report(what: str, step: int, steps: int) -> None:
        nonlocal done
        bar.update(task, description=what, completed=done + step / steps)
        done += step == steps

    make = playground.Playground(prior, options.prompt, options.count, options.steps, seed=options.seed, report=report)
    with bar:
        figure = playground.figure(make)
        grid = playground.grid(make, weights)
    rows = [{"picture": name, **cell.row} for name, cells in (("figure7", figure), ("grid", grid)) for cell in cells]
    write(out, rows, figure, grid, len(weights))
    console.print(table(rows))
    if not options.quiet:
        print(out / "figure7.png")
    return [*figure, *grid]


def write(
    out: Path, rows: list[dict], figure: list[playground.Cell], grid: list[playground.Cell], columns: int
) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_views(out / "figure7.png", *playground.sheet(figure, enlarge=2), columns=3)
        if grid:
            write_views(out / "grid.png", *playground.sheet(grid), columns=columns)
    except OSError as error:
        raise OutputError(f"cannot write into {out}: {error.strerror or error}") from error
    write_text(out / "table.csv", text.getvalue())
    write_text(out / "table.json", json.dumps(rows, indent=2) + "\n")


def table(rows: list[dict]) -> Table:
    shown = Table()
    for name in rows[0]:
        shown.add_column(name, justify="left" if name in ("picture", "method") else "right")
    for row in rows:
        shown.add_row(*(str(value) for value in row.values()))
    return shown
