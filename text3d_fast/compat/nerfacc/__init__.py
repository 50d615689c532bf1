"""nerfacc 0.5's interface, on CPU and CUDA tensors: `import text3d_fast.compat.nerfacc as nerfacc`.

Names, signatures and results are the original's (nerfstudio-project/nerfacc); docs/dropins.md lists what differs.
VDBEstimator and traverse_vdbs, which need fVDB, are not here.
"""

from text3d_fast.compat.nerfacc.data_specs import RayIntervals, RaySamples
from text3d_fast.compat.nerfacc.estimators.occ_grid import OccGridEstimator
from text3d_fast.compat.nerfacc.estimators.prop_net import PropNetEstimator
from text3d_fast.compat.nerfacc.grid import ray_aabb_intersect, traverse_grids
from text3d_fast.compat.nerfacc.losses import distortion
from text3d_fast.compat.nerfacc.pack import pack_info
from text3d_fast.compat.nerfacc.pdf import importance_sampling, searchsorted
from text3d_fast.compat.nerfacc.scan import exclusive_prod, exclusive_sum, inclusive_prod, inclusive_sum
from text3d_fast.compat.nerfacc.version import __version__
from text3d_fast.compat.nerfacc.volrend import (
    accumulate_along_rays,
    render_transmittance_from_alpha,
    render_transmittance_from_density,
    render_visibility_from_alpha,
    render_visibility_from_density,
    render_weight_from_alpha,
    render_weight_from_density,
    rendering,
)

__all__ = [
    "OccGridEstimator",
    "PropNetEstimator",
    "RayIntervals",
    "RaySamples",
    "__version__",
    "accumulate_along_rays",
    "distortion",
    "exclusive_prod",
    "exclusive_sum",
    "importance_sampling",
    "inclusive_prod",
    "inclusive_sum",
    "pack_info",
    "ray_aabb_intersect",
    "render_transmittance_from_alpha",
    "render_transmittance_from_density",
    "render_visibility_from_alpha",
    "render_visibility_from_density",
    "render_weight_from_alpha",
    "render_weight_from_density",
    "rendering",
    "searchsorted",
    "traverse_grids",
]
