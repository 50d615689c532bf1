"""`text3d-fast edit`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import OmitArgPrefixes, Positional, arg

from text3d_fast.app.commands.runs import Command, Job, RunOptions, default_folder, optimize


@dataclass
class Edit:
    """Change a finished result of magic3d with another prompt; what that does not change stays.

    Takes at most 30 % of the steps that the result took, with its priors and settings.

    Examples:
      text3d-fast edit runs/a-red-mug "a blue mug"
      text3d-fast edit runs/a-blue-mug "a striped blue mug"
    """

    folder: Positional[Annotated[Path, arg(metavar="RESULT_DIR")]]
    """What `generate --pipeline magic3d` wrote, or another edit."""
    prompt: Positional[Annotated[str, arg(metavar="PROMPT")]]
    """What to make of it."""
    run: Annotated[RunOptions, OmitArgPrefixes] = field(default_factory=RunOptions)

    def __call__(self) -> int:
        from text3d_fast.pipelines import magic3d

        options = self.run

        def make(settings: dict):
            return magic3d.Edit(self.folder, options.device, settings=settings)

        def run(pipeline, job, callback, report):
            return pipeline.run(job.prompt, options.steps, job.out, callback, job.resume, report)

        out = options.out or default_folder(self.prompt, options.resume)
        command = Command(make, run, ["edit", str(self.folder), self.prompt])
        return optimize(command, [Job(self.prompt, 0, out, options.resume)], options, out)
