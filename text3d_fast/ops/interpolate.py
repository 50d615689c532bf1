"""Interpolation of vertex attributes over rasterized triangles."""

from collections.abc import Sequence

import torch

from text3d_fast.ops.checks import require_same_device, require_tensor
from text3d_fast.reference.interpolate import interpolate as reference_interpolate


def interpolate(
    attr: torch.Tensor,
    rast: torch.Tensor,
    tri: torch.Tensor,
    rast_db: torch.Tensor | None = None,
    diff_attrs: Sequence[int] | str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Interpolate vertex attributes at the pixels of `rasterize`.

    attr: float32 [B, V, A], [1, V, A] or [V, A], the last two for all images. rast [B, H, W, 4] and tri int32 [F, 3] as
    of rasterize. rast_db with diff_attrs: a list of attribute indices, or "all": also give their pixel derivatives.
    Returns values [B, H, W, A] = u a0 + v a1 + (1 - u - v) a2 and derivatives [B, H, W, 2 * len(diff_attrs)],
    (d/dX, d/dY) for each attribute in turn; 0 at the background. Without diff_attrs the latter has no channels.
    Gradients to attr, u and v of rast, and rast_db. Raises ValueError or TypeError for wrong arguments.
    """
    batched = isinstance(attr, torch.Tensor) and attr.dim() == 3
    require_tensor("attr", attr, ("batch", "vertices", "attributes") if batched else ("vertices", "attributes"))
    require_tensor("rast", rast, ("batch", "height", "width", 4))
    require_tensor("tri", tri, ("triangles", 3), torch.int32)
    if attr.dim() == 3 and attr.shape[0] not in (1, rast.shape[0]):
        raise ValueError(f"attr: expected a batch of 1 or {rast.shape[0]} like rast, got {attr.shape[0]}")
    chosen = _chosen(diff_attrs, attr.shape[-1])
    if chosen:
        if rast_db is None:
            raise ValueError("rast_db: expected a tensor, since diff_attrs asks for derivatives, got None")
        require_tensor("rast_db", rast_db, tuple(rast.shape))
    require_same_device(attr=attr, rast=rast, tri=tri, rast_db=rast_db)
    return reference_interpolate(attr, rast, tri, rast_db, chosen)


def _chosen(diff_attrs: Sequence[int] | str | None, attributes: int) -> list[int]:
    if diff_attrs is None:
        return []
    if isinstance(diff_attrs, str):
        if diff_attrs != "all":
            raise ValueError(f"diff_attrs: expected a list of indices, 'all' or None, got {diff_attrs!r}")
        return list(range(attributes))
    chosen = [int(i) for i in diff_attrs]
    if any(not 0 <= i < attributes for i in chosen):
        raise ValueError(f"diff_attrs: expected indices from 0 to {attributes - 1}, got {chosen}")
    return chosen
