"""Imports of the original names find the drop-ins."""

import importlib
import importlib.util
import pkgutil
import sys
from types import ModuleType

PACKAGES = (
    "nvdiffrast",
    "nerfacc",
    "tinycudann",
    "kaolin",
)
_HOME = __name__.rpartition(".")[0]


def install(*names: str, force: bool = False) -> dict[str, str]:
    """Make `import nerfacc` and the like find the drop-in where the original is absent.

    names: which packages, all of `PACKAGES` by default. force: also where the original is installed.
    Returns package -> what was done ("drop-in", or "original at PATH" where it was left alone), and says so on stderr.
    Raises ValueError for a name that has no drop-in; RuntimeError if an original that is to be replaced is already
    imported, as those who imported it would keep it.
    """
    for name in names:
        if name not in PACKAGES:
            raise ValueError(f"names: expected some of {', '.join(PACKAGES)}, got {name!r}")
    done = {name: _install(name, force) for name in names or PACKAGES}
    print("text3d_fast.compat: " + "; ".join(f"{name}: {what}" for name, what in done.items()), file=sys.stderr)
    return done


def _install(name: str, force: bool) -> str:
    imported = sys.modules.get(name)
    if imported is not None and imported.__name__ == f"{_HOME}.{name}":
        return "drop-in"
    original = imported.__spec__ if imported is not None else importlib.util.find_spec(name)
    if original is not None and not force:
        return f"original at {original.origin}"
    if imported is not None:
        raise RuntimeError(f"{name} is already imported; call install before")
    for module in _modules(f"{_HOME}.{name}"):
        sys.modules[module.__name__.removeprefix(f"{_HOME}.")] = module
    return "drop-in"


def _modules(name: str) -> list[ModuleType]:
    """The package and everything in it; all are put in place, so that no file is ever loaded under a second name."""
    package = importlib.import_module(name)
    inside = pkgutil.walk_packages(package.__path__, f"{name}.")
    return [package, *(importlib.import_module(module.name) for module in inside)]
