"""What people use: the command line, its progress display, the doctor and the viewer."""

import os
import sys
from importlib.util import find_spec

# what `text3d-fast` itself and `generate` need, of the extra `generate`
_NEEDED = ("tyro", "rich", "yaml", "PIL", "trimesh", "xatlas", "safetensors", "transformers", "diffusers")


def main() -> int:
    """The command `text3d-fast`; says what to install where only the ops are."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        print(f"error: the command line needs {', '.join(missing)}: pip install 'text3d-fast[generate]' "
              f"(from a clone: pip install '.[generate]')", file=sys.stderr)
        return 2
    from text3d_fast.app import cli, memory, threads

    memory.keep_freed_memory()
    threads.spin_briefly()
    try:
        return cli.main()
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
