"""What `playground` shows and writes."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from text3d_fast.app.commands.outcome import INTERRUPTED
from text3d_fast.app.messages import messages
from text3d_fast.errors import OutputError
from text3d_fast.files import write_text
from text3d_fast.images import write_views
from text3d_fast.lines import LOG, Lines, show
from text3d_fast.pipelines import playground

if TYPE_CHECKING:
    from text3d_fast.app.commands.playground import Playground


def compare(options: Playground, out: Path, settings: dict[str, Any]) -> int:
    """Make the pictures, with progress, and print the table; the files are written anew with every set of pictures that
    is done, so nothing is lost. Returns the exit status. Raises ValueError, ModelError, OutputError.

    settings: prior.*
    """
    from text3d_fast.guidance import load_prior
    from text3d_fast.pipelines.config import RunConfig
    from text3d_fast.pipelines.pipeline import choose_device

    console = Console(stderr=True, quiet=options.quiet)
    weights = () if options.no_grid else options.weights
    sets = len(playground.METHODS) + len(playground.GRID_METHODS) * len(weights)
    bar = Progress(
        TextColumn("[bold]{task.description:30}"), BarColumn(), MofNCompleteColumn(), TextColumn("sets of pictures"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console,
    )
    task = bar.add_task("loading", total=sets)
    done, rows, lines = 0, [], Lines(console, out / LOG)

    def report(what: str, step: int, steps: int) -> None:
        bar.update(task, description=what, completed=done + step / steps)
        lines.say(f"{what}: step {step} of {steps}; {done} of {sets} sets of pictures done")

    say = partial(show, console)
    with new_folder(out), bar, messages(say):
        prior = load_prior(options.model, choose_device(options.device), RunConfig().updated(settings).prior, True)
        make = playground.Playground(prior, options.prompt, options.count, options.steps, seed=options.seed,
                                     report=report)
        hours = (prior.seconds_a_picture() or 0.0) * options.count * options.steps * sets / 3600
        if hours > 1:
            say(f"warning: {prior.name} takes about {hours:.0f} hours for these on this CPU")
        enlarge = max(1, 128 // prior.image_size)
        figure, grid = Sheet("figure7", enlarge, 3), Sheet("grid", 1, max(len(weights), 1))
        try:
            for sheet, cells in ((figure, playground.figure(make)), (grid, playground.grid(make, weights))):
                for cell in cells:
                    rows.append({"picture": sheet.name, **cell.row})
                    sheet.add(cell, out)
                    write_rows(rows, out)
                    done += 1
        except KeyboardInterrupt:
            bar.stop()
            print(f"Stopped; {done} of {sets} sets of pictures are done" + (f", in {out}" if done else ""),
                  file=sys.stderr)
            return INTERRUPTED
    console.print(table(rows))
    if not options.quiet:
        print(out / "figure7.png")
    return 0


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[None]:
    """Made at the begin, so that what cannot be written to is said first, and taken back if nothing came of it."""
    fresh = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {out}: {error.strerror or error}") from error
    try:
        yield
    finally:
        if fresh:
            with contextlib.suppress(OSError):  # it holds something
                out.rmdir()


@dataclass
class Sheet:
    """A picture of cells that grows."""

    name: str
    enlarge: int
    columns: int
    cells: list[playground.Cell] = field(default_factory=list)

    def add(self, cell: playground.Cell, out: Path) -> None:
        self.cells.append(cell)
        pictures, labels = playground.sheet(self.cells, self.enlarge)
        try:
            write_views(out / f"{self.name}.png", pictures, labels, self.columns)
        except OSError as error:
            raise OutputError(f"cannot write into {out}: {error.strerror or error}") from error


def write_rows(rows: list[dict], out: Path) -> None:
    """table.csv and table.json."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(out / "table.csv", text.getvalue())
    write_text(out / "table.json", json.dumps(rows, indent=2) + "\n")


def table(rows: list[dict]) -> Table:
    shown = Table()
    for name in rows[0]:
        shown.add_column(name, justify="left" if name in ("picture", "method") else "right")
    for row in rows:
        shown.add_row(*(str(value) for value in row.values()))
    return shown
