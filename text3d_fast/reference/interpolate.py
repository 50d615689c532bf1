"""Interpolation of vertex attributes over rasterized triangles in plain torch: the oracle for `ops.interpolate`."""

import torch

from text3d_fast.reference.rasterize import decode_triangle_ids


def interpolate(
    attr: torch.Tensor,
    rast: torch.Tensor,
    tri: torch.Tensor,
    rast_db: torch.Tensor | None,
    diff_attrs: list[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shapes and meaning as `ops.interpolate`; any floating dtype, differentiable any number of times."""
    batch, height, width, _ = rast.shape
    ids = decode_triangle_ids(rast[..., 3]).reshape(-1)
    pixel = ((ids >= 0) & (ids < tri.shape[0])).nonzero()[:, 0]
    vertices = tri[ids[pixel].long()].long()
    if attr.dim() == 2:
        corners = attr[vertices]
    else:
        image = pixel // (height * width) if attr.shape[0] > 1 else torch.zeros_like(pixel)
        corners = attr[image[:, None], vertices]
    u, v = rast.reshape(-1, 4)[pixel, :2].unbind(-1)
    weights = torch.stack([u, v, 1 - u - v], -1)
    values = (weights[..., None] * corners).sum(1)
    count = batch * height * width
    out = values.new_zeros(count, attr.shape[-1]).index_copy(0, pixel, values)
    out = out.view(batch, height, width, attr.shape[-1])
    if rast_db is None or not diff_attrs:
        return out, out.new_zeros(batch, height, width, 0)
    chosen = corners[..., diff_attrs]
    edges = torch.stack([chosen[:, 0] - chosen[:, 2], chosen[:, 1] - chosen[:, 2]], 1)  # [N, 2, D]
    db = rast_db.reshape(-1, 4)[pixel].view(-1, 2, 2)  # [N, (u, v), (X, Y)]
    derivatives = torch.einsum("nkd,nkx->ndx", edges, db).flatten(1)
    da = derivatives.new_zeros(count, 2 * len(diff_attrs)).index_copy(0, pixel, derivatives)
    return out, da.view(batch, height, width, 2 * len(diff_attrs))
