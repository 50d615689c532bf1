"""Volume rendering of samples along rays, batched [rays, samples] or packed [samples].

Packed samples come with `packed_info`, or with `ray_indices` and `n_rays`. float32 only where `ops.composite` serves;
everything else keeps the dtype it is given.
"""

from collections import UserDict
from collections.abc import Callable

import torch
from torch import Tensor

from text3d_fast import ops
from text3d_fast.compat.nerfacc.pack import pack_info
from text3d_fast.compat.nerfacc.scan import exclusive_prod, exclusive_sum


class _Extras(UserDict):
    """What `rendering` found besides; transmittances and opacities are computed when someone asks for them."""

    def __getitem__(self, key):
        value = self.data[key]
        if callable(value):
            self.data["trans"], self.data["alphas"] = value()
        return self.data[key]


def rendering(
    t_starts: Tensor,
    t_ends: Tensor,
    ray_indices: Tensor | None = None,
    n_rays: int | None = None,
    rgb_sigma_fn: Callable | None = None,
    rgb_alpha_fn: Callable | None = None,
    render_bkgd: Tensor | None = None,
    expected_depths: bool = True,
) -> tuple[Tensor, Tensor, Tensor, dict]:
    """-> colours [rays, 3], opacities [rays, 1], depths [rays, 1], extras: weights, trans, alphas, rgbs, (sigmas).

    t_starts, t_ends: [rays, samples], or packed [samples] with ray_indices and n_rays.
    rgb_sigma_fn, rgb_alpha_fn: (t_starts, t_ends, ray_indices) -> colours [..., 3] and densities or opacities [...];
        one of the two; also called when there are no samples. render_bkgd: added where the ray is not opaque.
    expected_depths: depths are divided by the opacity.
    """
    if ray_indices is not None and not t_starts.shape == t_ends.shape == ray_indices.shape:
        raise ValueError(f"t_starts, t_ends, ray_indices: expected one shape, got {list(t_starts.shape)}, "
                         f"{list(t_ends.shape)}, {list(ray_indices.shape)}")
    if rgb_sigma_fn is None and rgb_alpha_fn is None:
        raise ValueError("expected rgb_sigma_fn or rgb_alpha_fn, got neither")
    rgbs, density = (rgb_alpha_fn if rgb_sigma_fn is None else rgb_sigma_fn)(t_starts, t_ends, ray_indices)
    if rgbs.shape[-1] != 3:
        raise ValueError(f"rgbs: expected shape [..., 3], got {list(rgbs.shape)}")
    if density.shape != t_starts.shape:
        name = "alphas" if rgb_sigma_fn is None else "sigmas"
        raise ValueError(f"{name}: expected shape {list(t_starts.shape)}, got {list(density.shape)}")
    eps = torch.finfo(rgbs.dtype).eps
    packed = {"ray_indices": ray_indices, "n_rays": n_rays}
    if rgb_sigma_fn is not None and _can_composite(t_starts, t_ends, ray_indices, n_rays, rgbs, density):
        offsets = torch.searchsorted(ray_indices, torch.arange(n_rays + 1, device=ray_indices.device)).int()
        samples = ops.RaySamples(ray_indices.int(), t_starts, t_ends, offsets)
        out = ops.composite(density.float(), rgbs.float(), samples, early_stop=0.0)
        colors, opacities, weights = out.values, out.opacity[:, None], out.weights
        depths = out.depth[:, None] * opacities
        extras = {"weights": weights, "sigmas": density, "rgbs": rgbs}
        later = lambda: render_transmittance_from_density(t_starts, t_ends, density, **packed)
        if torch.compiler.is_compiling():
            extras["trans"], extras["alphas"] = later()
        else:
            extras = _Extras(extras | {"trans": later, "alphas": later})
    else:
        if rgb_sigma_fn is not None:
            weights, trans, alphas = render_weight_from_density(t_starts, t_ends, density, **packed)
            extras = {"weights": weights, "alphas": alphas, "trans": trans, "sigmas": density, "rgbs": rgbs}
        else:
            weights, trans = render_weight_from_alpha(density, **packed)
            extras = {"weights": weights, "trans": trans, "rgbs": rgbs, "alphas": density}
        colors = accumulate_along_rays(weights, rgbs, **packed)
        opacities = accumulate_along_rays(weights, None, **packed)
        depths = accumulate_along_rays(weights, 0.5 * (t_starts + t_ends)[..., None], **packed)
    if expected_depths:
        depths = depths / opacities.clamp_min(eps)
    if render_bkgd is not None:
        colors = colors + render_bkgd * (1.0 - opacities)
    return colors, opacities, depths, extras


def _can_composite(t_starts, t_ends, ray_indices, n_rays, rgbs, sigmas) -> bool:
    """ops.composite computes in float32, first-order gradients only."""
    small = (torch.float32, torch.float16, torch.bfloat16)
    return (ray_indices is not None and n_rays is not None and t_starts.dtype == t_ends.dtype == torch.float32
            and rgbs.dtype in small and sigmas.dtype in small)  # fmt: skip


def _as_packed(packed_info: Tensor | None, ray_indices: Tensor | None, n_rays: int | None) -> dict:
    """The arguments of a scan; with n_rays known, a GPU need not be waited for."""
    if packed_info is None and ray_indices is not None:
        packed_info = pack_info(ray_indices, n_rays)
    return {"packed_info": packed_info}


def render_transmittance_from_alpha(
    alphas: Tensor,
    packed_info: Tensor | None = None,
    ray_indices: Tensor | None = None,
    n_rays: int | None = None,
    prefix_trans: Tensor | None = None,
) -> Tensor:
    """T_i = prod_{j<i} (1 - alpha_j), in the shape of alphas; prefix_trans, of the same shape, multiplies it."""
    trans = exclusive_prod(1 - alphas, **_as_packed(packed_info, ray_indices, n_rays))
    return trans if prefix_trans is None else trans * prefix_trans


def render_transmittance_from_density(
    t_starts: Tensor,
    t_ends: Tensor,
    sigmas: Tensor,
    packed_info: Tensor | None = None,
    ray_indices: Tensor | None = None,
    n_rays: int | None = None,
    prefix_trans: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """-> T_i = exp(-sum_{j<i} sigma_j delta_j) and alpha_i = 1 - exp(-sigma_i delta_i), in the shape of sigmas."""
    exponent = sigmas * (t_starts - t_ends)  # minus the optical depth: four negations less in all
    trans = torch.exp(exclusive_sum(exponent, **_as_packed(packed_info, ray_indices, n_rays)))
    return trans if prefix_trans is None else trans * prefix_trans, 1.0 - torch.exp(exponent)


def render_weight_from_alpha(
    alphas: Tensor,
    packed_info: Tensor | None = None,
    ray_indices: Tensor | None = None,
    n_rays: int | None = None,
    prefix_trans: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """-> w_i = T_i alpha_i, and T_i; see render_transmittance_from_alpha."""
    trans = render_transmittance_from_alpha(alphas, packed_info, ray_indices, n_rays, prefix_trans)
    return trans * alphas, trans


def render_weight_from_density(
    t_starts: Tensor,
    t_ends: Tensor,
    sigmas: Tensor,
    packed_info: Tensor | None = None,
    ray_indices: Tensor | None = None,
    n_rays: int | None = None,
    prefix_trans: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> w_i = T_i alpha_i, T_i, alpha_i; see render_transmittance_from_density."""
    trans, alphas = render_transmittance_from_density(
        t_starts, t_ends, sigmas, packed_info, ray_indices, n_rays, prefix_trans
    )
    return trans * alphas, trans, alphas


@torch.no_grad()
def render_visibility_from_alpha(
    alphas: Tensor,
    packed_info: Tensor | None = None,
    ray_indices: Tensor | None = None,
    n_rays: int | None = None,
    early_stop_eps: float = 1e-4,
    alpha_thre: float = 0.0,
    prefix_trans: Tensor | None = None,
) -> Tensor:
    """Whether light reaches a sample and it is not too thin: T >= early_stop_eps and alpha >= alpha_thre; bool."""
    trans = render_transmittance_from_alpha(alphas, packed_info, ray_indices, n_rays, prefix_trans)
    return _visible(trans, alphas, early_stop_eps, alpha_thre)


@torch.no_grad()
def render_visibility_from_density(
    t_starts: Tensor,
    t_ends: Tensor,
    sigmas: Tensor,
    packed_info: Tensor | None = None,
    ray_indices: Tensor | None = None,
    n_rays: int | None = None,
    early_stop_eps: float = 1e-4,
    alpha_thre: float = 0.0,
    prefix_trans: Tensor | None = None,
) -> Tensor:
    """Whether light reaches a sample and it is not too thin: T >= early_stop_eps and alpha >= alpha_thre; bool."""
    trans, alphas = render_transmittance_from_density(
        t_starts, t_ends, sigmas, packed_info, ray_indices, n_rays, prefix_trans
    )
    return _visible(trans, alphas, early_stop_eps, alpha_thre)


def _visible(trans: Tensor, alphas: Tensor, early_stop_eps: float, alpha_thre: float) -> Tensor:
    visible = trans >= early_stop_eps
    return visible & (alphas >= alpha_thre) if alpha_thre > 0 else visible


def _weighted(weights: Tensor, values: Tensor | None) -> Tensor:
    if values is None:
        return weights[..., None]
    if values.shape[:-1] != weights.shape:
        raise ValueError(f"values: expected shape {[*weights.shape, 'channels']}, got {list(values.shape)}")
    return weights[..., None] * values


def accumulate_along_rays(
    weights: Tensor, values: Tensor | None = None, ray_indices: Tensor | None = None, n_rays: int | None = None
) -> Tensor:
    """The sum of weights * values along each ray, [n_rays, channels]; without values of the weights, [n_rays, 1].

    weights: [..., samples], values: [..., samples, channels]; or packed [samples], [samples, channels] with ray_indices
    int64 [samples], in any order, and n_rays. Rays without samples are 0.
    """
    source = _weighted(weights, values)
    if ray_indices is None:
        return source.sum(-2)
    if n_rays is None:
        raise ValueError("n_rays: expected a number, as ray_indices are given; got None")
    if weights.dim() != 1:
        raise ValueError(f"weights: expected packed [samples], got {list(weights.shape)}")
    return source.new_zeros(n_rays, source.shape[-1]).index_add_(0, ray_indices, source)


def accumulate_along_rays_(
    weights: Tensor, values: Tensor | None = None, ray_indices: Tensor | None = None, outputs: Tensor | None = None
) -> None:
    """accumulate_along_rays, added to `outputs` [n_rays, channels] in place."""
    source = _weighted(weights, values)
    if ray_indices is None:
        outputs.add_(source.sum(-2))
        return
    if outputs.dim() != 2 or outputs.shape[1] != source.shape[1]:
        raise ValueError(f"outputs: expected shape [rays, {source.shape[1]}], got {list(outputs.shape)}")
    outputs.index_add_(0, ray_indices, source)
