"""Drop-ins for other libraries' interfaces, on the ops alone."""

import sys
from types import ModuleType


def install(name: str) -> ModuleType:
    """Make `import <name>` find the drop-in from now on, for projects whose imports cannot be changed.

    name: "nvdiffrast". Returns the module. Raises ValueError for another name, RuntimeError if the original is
    already imported.
    """
    if name != "nvdiffrast":
        raise ValueError(f"name: expected 'nvdiffrast', got {name!r}")
    from text3d_fast.compat import nvdiffrast
    from text3d_fast.compat.nvdiffrast import torch as dr

    if sys.modules.get(name, nvdiffrast) is not nvdiffrast:
        raise RuntimeError(f"{name} is already imported; call install first")
    sys.modules[name] = nvdiffrast
    sys.modules[f"{name}.torch"] = dr
    return nvdiffrast
