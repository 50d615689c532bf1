"""OpenCV's lens models, and their inverse by Newton's method."""

import math

import torch
from torch import Tensor


@torch.no_grad()
def opencv_lens_undistortion(uv: Tensor, params: Tensor, eps: float = 1e-6, iters: int = 10) -> Tensor:
    """Undistorted normalized image points [..., 2].

    params: [..., n], the first n of k1, k2, p1, p2, k3, k4, k5, k6 with n one of 0, 1, 2, 4, 8; leading dimensions
    broadcast. A point whose Jacobian's determinant is below eps stays where it is then.
    """
    if uv.shape[-1] != 2 or params.shape[-1] not in (0, 1, 2, 4, 8):
        raise ValueError(f"uv, params: expected [..., 2] and [..., 0, 1, 2, 4 or 8], got {list(uv.shape)} and "
                         f"{list(params.shape)}")
    if params.shape[-1] == 0:
        return uv
    k1, k2, p1, p2, k3, k4, k5, k6 = torch.nn.functional.pad(params, (0, 8 - params.shape[-1])).unbind(-1)
    goal_x, goal_y = uv.unbind(-1)
    x, y = goal_x, goal_y
    for _ in range(iters):
        r = x * x + y * y
        above, below = 1 + r * (k1 + r * (k2 + r * k3)), 1 + r * (k4 + r * (k5 + r * k6))
        d = above / below
        slope = ((k1 + r * (2 * k2 + r * 3 * k3)) * below - above * (k4 + r * (2 * k5 + r * 3 * k6))) / (below * below)
        error_x = d * x + 2 * p1 * x * y + p2 * (r + 2 * x * x) - goal_x
        error_y = d * y + 2 * p2 * x * y + p1 * (r + 2 * y * y) - goal_y
        d_xx = d + 2 * x * x * slope + 2 * p1 * y + 6 * p2 * x
        d_yy = d + 2 * y * y * slope + 2 * p2 * x + 6 * p1 * y
        d_xy = 2 * x * y * slope + 2 * p1 * x + 2 * p2 * y
        determinant = d_xx * d_yy - d_xy * d_xy
        moves = determinant.abs() > eps
        x = x - torch.where(moves, (error_x * d_yy - error_y * d_xy) / determinant, 0.0)
        y = y - torch.where(moves, (error_y * d_xx - error_x * d_xy) / determinant, 0.0)
    return torch.stack([x, y], -1)


_opencv_lens_undistortion = opencv_lens_undistortion  # the original keeps a slower twin of that name


@torch.no_grad()
def opencv_lens_undistortion_fisheye(uv: Tensor, params: Tensor, eps: float = 1e-6, iters: int = 10) -> Tensor:
    """Undistorted normalized image points [..., 2] of the fisheye model; params: k1, k2, k3, k4 [..., 4].

    Where the search for the angle does not converge to within eps, or flips its sign, the point is 0.
    """
    if uv.shape[-1] != 2 or params.shape[-1] != 4:
        raise ValueError(f"uv, params: expected [..., 2] and [..., 4], got {list(uv.shape)} and {list(params.shape)}")
    k1, k2, k3, k4 = params.double().unbind(-1)
    seen = uv.norm(dim=-1).double().clamp(max=math.pi / 2)
    angle = seen
    step = torch.zeros_like(seen)
    for _ in range(iters):
        a = angle * angle
        value = angle * (1 + a * (k1 + a * (k2 + a * (k3 + a * k4)))) - seen
        step = value / (1 + a * (3 * k1 + a * (5 * k2 + a * (7 * k3 + a * 9 * k4))))
        angle = angle - step
    small = seen <= eps
    good = small | ((step.abs() < eps) & (angle > 0))
    scale = torch.where(small, 0.0, angle.tan() / torch.where(small, 1.0, seen))
    return torch.where(good, scale, 0.0)[..., None].to(uv.dtype) * uv


def _opencv_lens_distortion(uv: Tensor, params: Tensor) -> Tensor:
    """OpenCV's rational lens model; params: k1, k2, p1, p2, k3, k4, k5, k6 [..., 8]."""
    k1, k2, p1, p2, k3, k4, k5, k6 = params.unbind(-1)
    u, v = uv.unbind(-1)
    r = u * u + v * v
    radial = (1 + r * (k1 + r * (k2 + r * k3))) / (1 + r * (k4 + r * (k5 + r * k6)))
    return torch.stack([u * radial + 2 * p1 * u * v + p2 * (r + 2 * u * u),
                        v * radial + 2 * p2 * u * v + p1 * (r + 2 * v * v)], -1)  # fmt: skip


def _opencv_lens_distortion_fisheye(uv: Tensor, params: Tensor, eps: float = 1e-10) -> Tensor:
    """OpenCV's fisheye model; params: k1, k2, k3, k4 [..., 4]."""
    if params.shape[-1] != 4:
        raise ValueError(f"params: expected [..., 4], got {list(params.shape)}")
    k1, k2, k3, k4 = params.unbind(-1)
    r = uv.norm(dim=-1)
    angle = r.atan()
    a = angle * angle
    seen = angle * (1 + a * (k1 + a * (k2 + a * (k3 + a * k4))))
    return uv * (seen / r.clamp(min=eps))[..., None]
