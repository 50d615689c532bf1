"""The command line: text3d-fast generate | edit | playground | view | evaluate | bench | doctor."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Sequence
from dataclasses import is_dataclass
from functools import cache
from typing import Annotated, Union, get_args, get_type_hints

import docstring_parser  # tyro needs it too
import tyro
from tyro.conf import arg

from text3d_fast.app.commands.bench import Bench
from text3d_fast.app.commands.doctor import Doctor
from text3d_fast.app.commands.edit import Edit
from text3d_fast.app.commands.evaluate import Evaluate
from text3d_fast.app.commands.generate import Generate
from text3d_fast.app.commands.outcome import INTERRUPTED, fail
from text3d_fast.app.commands.playground import Playground
from text3d_fast.app.commands.view import View

COMMANDS = {"generate": Generate, "edit": Edit, "playground": Playground, "view": View, "evaluate": Evaluate,
            "bench": Bench, "doctor": Doctor}


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 done, 1 failed, 2 a mistake in the request, 3 empty mesh, 130 Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for option in ("--set", "--lora"):
        arguments = together(arguments, option)
    if arguments == ["--version"]:
        from text3d_fast import __version__

        print(f"text3d-fast {__version__}")
        return 0
    choices = []
    for name, kind in COMMANDS.items():  # tyro itself would leave out the docstring's examples
        describe_options(kind)
        about = inspect.getdoc(kind) if arguments[:1] == [name] else inspect.getdoc(kind).partition("\n\n")[0]
        choices.append(Annotated[kind, tyro.conf.subcommand(name, description=about, prefix_name=False)])
    command = tyro.cli(
        Union[tuple(choices)],  # noqa: UP007
        prog="text3d-fast", description="Text to 3D with 2D diffusion models, with and without a GPU.",
        args=arguments, config=(tyro.conf.FlagCreatePairsOff,),
    )
    try:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not isinstance(command, Generate | Edit):
            return fail("several processes (torchrun): only generate and edit are done by several; run it without")
        return command()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def together(arguments: Sequence[str], option: str) -> list[str]:
    """The arguments with the values of an option that is given several times after a single one: tyro would keep the
    last ones alone.
    """
    rest, values, ours = [], [], False
    for argument in arguments:
        if argument == option or argument.startswith(f"{option}="):
            ours = argument == option
            values += [] if ours else [argument.removeprefix(f"{option}=")]
        else:
            ours = ours and not argument.startswith("-")
            (values if ours else rest).append(argument)
    return [*rest, option, *values] if values else list(arguments)


@cache
def describe_options(kind: type) -> None:
    """Give each option its docstring in one line: tyro would keep the line breaks of the source, in --help and in what
    it writes for shells.
    """
    texts = {option.arg_name: option.description for option in docstring_parser.parse_from_object(kind).params}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        if "\n" in texts.get(name, ""):
            kind.__annotations__[name] = Annotated[hint, arg(help=" ".join(texts[name].split()))]
        if is_dataclass(next(iter(get_args(hint)), None)):
            describe_options(get_args(hint)[0])


if __name__ == "__main__":
    raise SystemExit(main())
