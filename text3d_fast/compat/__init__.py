"""Drop-ins for other libraries' interfaces, on the ops and modules alone; docs/dropins.md says what differs.

    import text3d_fast.compat.nvdiffrast.torch as dr          # one import changed, or
    import text3d_fast.compat; text3d_fast.compat.install()   # unchanged imports find the drop-ins, or
    python -m text3d_fast.compat SCRIPT ARGS...               # an unchanged script does
"""

from text3d_fast.compat._install import PACKAGES, install

__all__ = ["PACKAGES", "install"]
