"""python -m text3d_fast.compat [--device cpu] [--force] (SCRIPT | -m MODULE) ARGS...

Runs an unchanged script with the drop-ins in place of absent originals."""

import argparse
import contextlib
import os
import runpy
import sys

from text3d_fast.compat import PACKAGES, install


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m text3d_fast.compat",
        description=f"Run an unchanged script whose imports of {', '.join(PACKAGES)} find the drop-ins.",
    )
    parser.add_argument("--device", choices=("cpu",), help='run what the script puts on "cuda" on the CPU')
    parser.add_argument("--force", action="store_true", help="use the drop-ins even where an original is installed")
    parser.add_argument("-m", dest="module", action="store_true", help="SCRIPT is the name of a module")
    parser.add_argument("script")
    parser.add_argument("args", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    if not options.module and not os.path.isfile(options.script):
        parser.error(f"no such file: {options.script}")

    install(force=options.force)
    sys.argv = [options.script, *options.args]
    mapped = contextlib.nullcontext()
    if options.device == "cpu":
        from text3d_fast.compat._cpu import cuda_is_cpu

        print('text3d_fast.compat: --device cpu: whatever the script puts on "cuda" is on the CPU', file=sys.stderr)
        mapped = cuda_is_cpu()
    with mapped:
        if options.module:
            sys.path.insert(0, os.getcwd())
            runpy.run_module(options.script, run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, os.path.dirname(os.path.abspath(options.script)))
            runpy.run_path(options.script, run_name="__main__")


if __name__ == "__main__":
    main()
