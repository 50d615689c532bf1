"""Regularizers of samples along rays."""

from torch import Tensor

from text3d_fast.compat.nerfacc.pack import pack_info
from text3d_fast.compat.nerfacc.scan import exclusive_sum
from text3d_fast.compat.nerfacc.volrend import accumulate_along_rays


def distortion(weights: Tensor, t_starts: Tensor, t_ends: Tensor, ray_indices: Tensor, n_rays: int) -> Tensor:
    """How far apart along each ray its weights lie (mip-NeRF 360, Barron et al. 2022, eq. 15), [n_rays, 1].

    sum_i w_i^2 (t_end - t_start) / 3 + sum_ij w_i w_j |m_i - m_j| with m the middles; all inputs packed [samples].
    """
    shapes = [list(x.shape) for x in (weights, t_starts, t_ends, ray_indices)]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"weights, t_starts, t_ends, ray_indices: expected one shape, got {shapes}")
    middles = 0.5 * (t_starts + t_ends)
    own = (t_ends - t_starts) * weights.square() / 3
    packed_info = pack_info(ray_indices, n_rays)
    before, moment = exclusive_sum(weights, packed_info), exclusive_sum(weights * middles, packed_info)
    return accumulate_along_rays(own + 2 * weights * (middles * before - moment), None, ray_indices, n_rays)
