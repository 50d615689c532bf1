"""What `import nvdiffrast.torch as dr` gives. The functions live in `.ops`, as in the original."""

from text3d_fast.compat.nvdiffrast.torch.ops import *  # noqa: F403
from text3d_fast.compat.nvdiffrast.torch.ops import __all__  # noqa: F401
